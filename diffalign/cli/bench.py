"""The project's own measurements."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .common import AsJson, Overrides, app, out

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
