"""The project's own measurements."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from .common import AsJson, BatchSize, Device, Dtype, Overrides, app, out

bench = typer.Typer(help="The project's own measurements, as a table and JSON.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.command("step")
def bench_step(
    recipe: Annotated[str, typer.Argument(help="Recipe to measure.")] = "tiny/dpo",
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="Measured steps.", min=2)] = 20,
    unet: Annotated[str, typer.Option(help="recipe; or random weights: random-50m, sd15-random.")] = "recipe",
    as_json: AsJson = False,
) -> None:
    """One training step: U-Net calls, seconds and memory by part, beside the same step done naively."""
    from ..bench import measure_step
    from ..recipe import load_recipe

    found = measure_step(load_recipe(recipe, overrides or []), steps, unet)
    print(json.dumps(found.json(), indent=1)) if as_json else found.render(out())


@bench.command("data")
def bench_data(
    recipe: Annotated[str, typer.Argument(help="Recipe whose model and data settings are used.")] = "tiny/dpo",
    overrides: Overrides = None,
    pairs: Annotated[int, typer.Option(help="Pairs that are made, cached and read.")] = 10_000,
    form: Annotated[Literal["parquet", "folder"], typer.Option(help="How the pairs lie on the disk.")] = "parquet",
    index: Annotated[int, typer.Option(help="Also the memory of this many rows without pictures.", min=0)] = 0,
    folder: Annotated[Path | None, typer.Option(help="Keep data and cache here, and use them again.")] = None,
    as_json: AsJson = False,
) -> None:
    """The data path at size: rate and memory of reading, caching and one epoch of small made-up pairs."""
    from ..bench.data import measure_data
    from ..recipe import load_recipe

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    found = measure_data(load_recipe(recipe, overrides or []), pairs, form, folder, index, say)
    print(json.dumps(found.json(), indent=1)) if as_json else found.render(out())


@bench.command("score")
def bench_score(
    scorers: Annotated[str, typer.Option(help="Names, comma-separated; the first is also measured alone.")] = (
        "tiny-clip,tiny-pickscore,tiny-hps"
    ),
    images: Annotated[int, typer.Option(help="Pictures.", min=2)] = 32,
    size: Annotated[int, typer.Option(help="Pixels a side.", min=64)] = 1024,
    rounds: Annotated[int, typer.Option(help="Times each way, in turns.", min=2)] = 5,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch: BatchSize = 32,
    as_json: AsJson = False,
) -> None:
    """Scoring: images/s of one pass, beside one image at a time, a decode a scorer, and weights read for each call."""
    from ..bench.score import measure_score

    found = measure_score(scorers, images, size, rounds, device, dtype, batch)
    print(json.dumps(found.json(), indent=1)) if as_json else found.render(out())
