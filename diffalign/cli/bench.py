"""The project's own measurements."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from .common import AsJson, BatchSize, Device, Dtype, Overrides, app, names, out

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


@bench.command("methods")
def bench_methods(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides for the methods of --only.", metavar="[KEY=VALUE]...")
    ] = None,
    only: Annotated[str, typer.Option(help="Run these rows or groups alone, as dpo,preference.")] = "",
    seeds: Annotated[str, typer.Option(help="Training seeds, as 0,1,2.")] = "0,1,2",
    budget: Annotated[
        int | None, typer.Option(help="Units of U-Net work for each training; default: tiny/dpo's own.")
    ] = None,
    prompts: Annotated[int | None, typer.Option(help="Judge by the first so many held-out prompts.")] = None,
    folder: Annotated[Path, typer.Option("--out", help="Results; what is there is not run again.")] = Path(
        "runs/bench-methods"
    ),
    jobs: Annotated[int | None, typer.Option(help="Trainings at a time, a thread each; default: one a core.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Run nothing; the table of what is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train every method from one tiny base at one budget, beside controls; who is seen to learn, and at what cost."""
    from ..bench.methods import BUDGET, Plan, measure_methods
    from ..pipelines.spec import parse_seeds

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    found = parse_seeds(seeds)
    plan = Plan(
        out=folder,
        seeds=(found,) if isinstance(found, int) else found,
        budget=BUDGET if budget is None else budget,
        prompts=prompts,
        jobs=jobs,
        only=tuple(names(only)),
        overrides=tuple(overrides or ()),
        shown=show,
        say=say,
    )
    report = measure_methods(plan)
    print(json.dumps(report.json(), indent=1)) if as_json else report.render(out())
    if not as_json:
        print(f"report: {folder / 'report.html'}")
    if report.failed:
        raise typer.Exit(1)


@bench.command("search")
def bench_search(
    model: Annotated[str, typer.Option(help="A diffusers folder, hub id or built-in name.")] = "tiny-sd",
    reward: Annotated[str, typer.Option(help="The scorer that is searched for.")] = "tiny-pickscore",
    judge: Annotated[str, typer.Option(help="The scorer that only judges.")] = "oracle",
    prompts: Annotated[str, typer.Option(help="A prompt file or built-in set.")] = "tiny-heldout",
    limit: Annotated[int | None, typer.Option(help="The first so many prompts.", min=1)] = None,
    budget: Annotated[str, typer.Option(help="U-Net calls a prompt, as 80,160; a guided step counts two.")] = (
        "80,160,320"
    ),
    search: Annotated[
        list[str] | None,
        typer.Option(help="Again for several, as beam:beams=4; the others are compared with the first. Default: all."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Sampling steps.", min=2)] = 10,
    guidance: Annotated[float, typer.Option(help="Guidance; 1 or less: none.")] = 3.0,
    seed: Annotated[int, typer.Option(help="Keys every draw.", min=0)] = 0,
    folder: Annotated[Path, typer.Option("--out", help="Results; what is there is not run again.")] = Path(
        "runs/bench-search"
    ),
    batch: BatchSize = 32,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Best-of-N, greedy, beam and tree search at equal U-Net calls on the same prompts: reward, judge and cost."""
    from ..bench.search import SEARCHES, Plan, measure_search
    from ..errors import UserError

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if not all(part.isdigit() for part in names(budget)):
        raise UserError(f"--budget {budget}: give whole numbers, as 80,160,320")
    plan = Plan(
        out=folder,
        model=model,
        reward=reward,
        judge=judge,
        prompts=prompts,
        limit=limit,
        budgets=tuple(int(part) for part in names(budget)),
        searches=tuple(search or SEARCHES),
        steps=steps,
        guidance=guidance,
        seed=seed,
        batch=batch,
        device=device,
        dtype=dtype,
        say=say,
    )
    report = measure_search(plan)
    print(json.dumps(report.json(), indent=1)) if as_json else report.render(out())
    if not as_json:
        print(f"report: {folder / 'report.html'}")
