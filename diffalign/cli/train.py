"""Training and what belongs to it: train, cache."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from .common import AsJson, Overrides, Quiet, Recipe, app, is_main, out


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show what would happen; train nothing.")] = False,
    suggest_beta: Annotated[
        bool, typer.Option("--suggest-beta", help="Probe how large the logits get, name a beta; train nothing.")
    ] = False,
    preset: Annotated[
        str | None, typer.Option(help="Settings for a card of 8gb, 12gb, 16gb, 24gb, 48gb or 80gb; overrides win.")
    ] = None,
    processes: Annotated[int, typer.Option(help="With --plan: the number of processes to plan for.", min=1)] = 1,
    resume: Annotated[str, typer.Option(help="auto, never, or a checkpoint or run folder.")] = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a recipe; the run's folder holds checkpoints, samples, the model and report.html."""
    from ..recipe import load_recipe

    card = 0
    if preset is None:
        loaded = load_recipe(recipe, overrides or [])
    else:
        from ..presets import GIB, card_of, load_with_preset

        loaded, settings = load_with_preset(recipe, overrides or [], preset)
        card = card_of(preset) * GIB
        if is_main() and not quiet:
            print(f"preset {preset}: {' '.join(settings)}", file=sys.stderr)
    if plan:
        from ..plan import make_plan

        found = make_plan(loaded, processes, card)
        print(json.dumps(found.json(), indent=1)) if as_json else found.render(out())
        return
    if suggest_beta:
        from ..beta import suggest_beta as suggest
        from ..console import Console

        advice = suggest(loaded, Console(not quiet and is_main()).say)
        print(json.dumps(advice.json(), indent=1)) if as_json else advice.render(out())
        return
    from ..run import describe
    from ..run import train as run_recipe

    run = run_recipe(loaded, resume, progress=not quiet)
    if not is_main():
        return
    if as_json:
        print(json.dumps({"dir": str(run.dir), "step": run.step, "model": str(run.model), "report": str(run.report)}))
        return
    print(f"step {run.step}: {describe(run)}\nmodel: {run.model}\nreport: {run.report}")


@app.command()
def cache(
    recipe: Recipe,
    overrides: Overrides = None,
    to: Annotated[Path | None, typer.Option("--out", help="A folder of its own for this cache.")] = None,
    quiet: Quiet = False,
) -> None:
    """Encode a recipe's images and prompts ahead of time; resumes where it was stopped."""
    from ..recipe import load_recipe
    from ..setup import fill_cache

    found = fill_cache(load_recipe(recipe, overrides or []), to, progress=not quiet)
    if is_main():
        print(f"{len(found)} rows, {found.encoded} entries encoded, cache {found.fingerprint}")
