"""The command line. Commands import what they need when they run; nothing heavy is imported for help and listings."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from . import __version__
from .errors import RunError, UserError

app = typer.Typer(
    name="diffalign",
    help="Align and distil text-to-image diffusion models, and judge the result.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
pairs = typer.Typer(help="Preference pairs: check.", no_args_is_help=True)
bench = typer.Typer(help="The project's own measurements, as a table and JSON.", no_args_is_help=True)
app.add_typer(pairs, name="pairs")
app.add_typer(bench, name="bench")

Recipe = Annotated[str, typer.Argument(help="A recipe file, or a built-in name such as sd15/dpo.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides: key.sub=value ...", metavar="[KEY=VALUE]...")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
Device = Annotated[Literal["auto", "cuda", "mps", "cpu"], typer.Option(help="Where to compute.")]
Dtype = Annotated[Literal["auto", "fp32", "bf16", "fp16"], typer.Option(help="Number format of the networks.")]
Steps = Annotated[int, typer.Option(help="Sampling steps.", min=1)]
Guidance = Annotated[float, typer.Option(help="Classifier-free guidance; 1 or less means none.")]
Negative = Annotated[str | None, typer.Option(help="Negative prompt.")]
Scheduler = Annotated[str, typer.Option(help="Sampler: ddim, euler, dpm++, unipc, lcm, default, ...")]
Height = Annotated[int | None, typer.Option(help="Pixels; the model's own if not given.")]
Width = Annotated[int | None, typer.Option(help="Pixels; the model's own if not given.")]
Seed = Annotated[int, typer.Option(help="Keys the noise of every image.", min=0)]
PerPrompt = Annotated[int, typer.Option(help="Images for each prompt.", min=1)]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Variant = Annotated[str | None, typer.Option(help="Weight files to take, such as fp16.")]
BatchSize = Annotated[int, typer.Option("--batch", help="Images a forward.", min=1)]


def out() -> Any:
    """A console on stdout that does not colour or wrap what a pipe reads."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 140  # a table in a file is not cut to an imagined screen
    return console


def print_rows(rows: list[dict[str, Any]], columns: list[str], as_json: bool) -> None:
    """A listing: aligned columns for people, JSON for programs."""
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    widths = [max(len(str(row.get(c, ""))) for row in rows) if rows else 0 for c in columns[:-1]]
    for row in rows:
        cells = [str(row.get(c, "")).ljust(w) for c, w in zip(columns, widths, strict=False)]
        print("  ".join([*cells, str(row.get(columns[-1], ""))]).rstrip())


# ---- train --------------------------------------------------------------------------------------------------------


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show what would happen; train nothing.")] = False,
    resume: Annotated[str, typer.Option(help="auto, never, or a checkpoint or run folder.")] = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a recipe; the run's folder holds checkpoints, samples, the model and report.html."""
    from .recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if plan:
        from .plan import make_plan

        found = make_plan(loaded)
        print(json.dumps(found.json(), indent=1)) if as_json else found.render(out())
        return
    from .run import describe
    from .run import train as run_recipe

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
    from .recipe import load_recipe
    from .setup import fill_cache

    found = fill_cache(load_recipe(recipe, overrides or []), to, progress=not quiet)
    if is_main():
        print(f"{len(found)} rows, {found.encoded} entries encoded, cache {found.fingerprint}")


# ---- sample, score, eval, compare ---------------------------------------------------------------------------------


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="A diffusers folder, hub id, built-in name, or full run's folder.")],
    prompts: Annotated[str, typer.Option(help="A prompt file, built-in set, or the prompt itself.")],
    to: Annotated[Path, typer.Option("--out", help="Folder for images and manifest.jsonl.")],
    lora: Annotated[str | None, typer.Option(help="LoRA file, folder, or run's folder.")] = None,
    lora_scale: Annotated[float, typer.Option(help="Strength of the LoRA.")] = 1.0,
    steps: Steps = 25,
    guidance: Guidance = 7.5,
    negative_prompt: Negative = None,
    scheduler: Scheduler = "ddim",
    height: Height = None,
    width: Width = None,
    seed: Seed = 0,
    per_prompt: PerPrompt = 1,
    batch: BatchSize = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    variant: Variant = None,
    quiet: Quiet = False,
) -> None:
    """Sample images for prompts: the same noise for every model; resumes image by image."""
    from .eval.prompts import read_prompts
    from .pipelines.sample import SampleSpec
    from .pipelines.sample import sample as run_sample

    spec = SampleSpec(
        model=model,
        lora=lora,
        lora_scale=lora_scale,
        steps=steps,
        guidance=guidance,
        negative_prompt=negative_prompt,
        scheduler=scheduler,
        height=height,
        width=width,
        seed=seed,
        per_prompt=per_prompt,
        batch=batch,
        device=device,
        dtype=dtype,
        revision=revision,
        variant=variant,
    )
    print(run_sample(spec, read_prompts(prompts), to, progress=not quiet))


@app.command()
def score(
    images: Annotated[str, typer.Argument(help="Folder with manifest.jsonl, or a plain folder of images.")],
    scorers: Annotated[str, typer.Option(help="Names, comma-separated; name=PATH for own weights.")],
    prompts: Annotated[str | None, typer.Option(help="Prompts, where there is no manifest.")] = None,
    to: Annotated[Path | None, typer.Option("--out", help="scores.jsonl or .parquet.")] = None,
    batch: BatchSize = 32,
    device: Device = "auto",
    dtype: Dtype = "auto",
    strict: Annotated[bool, typer.Option(help="Unreadable images are an error.")] = False,
    quiet: Quiet = False,
) -> None:
    """Score images by one or more scorers; resumes image by image."""
    from .eval.score import score_images

    place = to or (Path(images) / "scores.jsonl" if Path(images).is_dir() else Path("scores.jsonl"))
    result = score_images(
        images, prompts, scorers, place, batch=batch, device=device, dtype=dtype, progress=not quiet, strict=strict
    )
    result.render(out())
    print(result.out)


@app.command(name="eval")
def evaluate(
    models: Annotated[list[str], typer.Argument(help="[LABEL=]MODEL[+LORA[@SCALE]]; the first is the base.")],
    prompts: Annotated[str, typer.Option(help="A prompt file or built-in set.")],
    scorers: Annotated[str, typer.Option(help="Names, comma-separated; name=PATH for own weights.")],
    to: Annotated[Path, typer.Option("--out", help="Folder for images, scores and report.html.")],
    steps: Steps = 25,
    guidance: Guidance = 7.5,
    negative_prompt: Negative = None,
    scheduler: Scheduler = "ddim",
    height: Height = None,
    width: Width = None,
    seed: Seed = 0,
    per_prompt: PerPrompt = 1,
    batch: BatchSize = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    variant: Variant = None,
    primary: Annotated[str | None, typer.Option(help="Scorer of the headline.")] = None,
    in_loop: Annotated[str, typer.Option(help="Scorers that training used, comma-separated; they are marked.")] = "",
    quiet: Quiet = False,
) -> None:
    """Sample, score and compare models on the same prompts and noise, with win rates and a report."""
    from .eval.evaluate import Sampling
    from .eval.evaluate import evaluate as run_eval

    sampling = Sampling(
        steps=steps,
        guidance=guidance,
        negative_prompt=negative_prompt,
        scheduler=scheduler,
        height=height,
        width=width,
        seed=seed,
        per_prompt=per_prompt,
        batch=batch,
        device=device,
        dtype=dtype,
        revision=revision,
        variant=variant,
    )
    looped = [name for name in in_loop.split(",") if name]
    run_eval(
        models, prompts, scorers, to, sampling=sampling, primary=primary, in_loop=looped, progress=not quiet
    ).render(out())


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Score file or folder of the first model.")],
    b: Annotated[Path, typer.Argument(help="Score file or folder of the second.")],
    scorers: Annotated[str | None, typer.Option(help="Names, comma-separated; all that both have.")] = None,
    in_loop: Annotated[str, typer.Option(help="Scorers that training used, comma-separated.")] = "",
    as_json: AsJson = False,
) -> None:
    """Paired win rate of A over B from score files, with bootstrap interval and exact sign test."""
    from .eval.compare import compare as run_compare

    names = scorers.split(",") if scorers else None
    found = run_compare(a, b, scorers=names, in_loop=[n for n in in_loop.split(",") if n])
    print(found.json()) if as_json else found.render(out())


# ---- data ---------------------------------------------------------------------------------------------------------


@pairs.command("check")
def pairs_check(
    path: Annotated[str, typer.Argument(help="Folder, .jsonl, .csv, Parquet, datasets folder or hub id.")],
    overrides: Overrides = None,
    to: Annotated[Path | None, typer.Option("--out", help="Folder for report.json and sheet.png.")] = None,
    model: Annotated[str | None, typer.Option(help="Model whose tokenizer counts over-long prompts.")] = None,
    strict: Annotated[bool, typer.Option(help="A flawed row is an error.")] = False,
    as_json: AsJson = False,
) -> None:
    """Count what a set of pairs holds: usable pairs, ties, duplicates, unreadable images; with a picture sheet."""
    from .data.check import check_pairs
    from .recipe import data_recipe

    changes = [text.removeprefix("data.") for text in overrides or []]
    recipe = data_recipe(path, [*changes, "strict=true"] if strict else changes)
    found = check_pairs(recipe, to, model)
    print(json.dumps(found.json(), indent=1)) if as_json else found.render(out())


# ---- lists --------------------------------------------------------------------------------------------------------


@app.command()
def methods(as_json: AsJson = False) -> None:
    """The methods that can be trained."""
    from .methods import list_methods

    print_rows(list_methods(), ["name", "group", "needs", "arxiv", "title"], as_json)


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """The built-in recipes."""
    from .recipe import builtin_recipes, describe_recipe

    print_rows([{"name": n, "about": describe_recipe(n)} for n in builtin_recipes()], ["name", "about"], as_json)


@app.command()
def scorers(as_json: AsJson = False) -> None:
    """The scorers of the eval suite."""
    from .eval.scorers import list_scorers

    print_rows([{"name": s.name, "about": s.about} for s in list_scorers().values()], ["name", "about"], as_json)


@app.command()
def prompts(as_json: AsJson = False) -> None:
    """The built-in prompt sets."""
    from .eval.prompts import builtin_sets, read_prompts

    rows = [{"name": name, "prompts": len(read_prompts(name))} for name in sorted(builtin_sets())]
    print_rows(rows, ["name", "prompts"], as_json)


# ---- demo and bench -------------------------------------------------------------------------------------------------


@app.command()
def demo(
    to: Annotated[Path, typer.Option("--out", help="Folder for everything the demo makes.")] = Path("demo"),
    steps: Annotated[int | None, typer.Option(help="Training steps; the recipe's if not given.", min=1)] = None,
    prompts_: Annotated[int, typer.Option("--prompts", help="Held-out prompts to judge on.", min=8)] = 200,
    quiet: Quiet = False,
) -> None:
    """The whole story on the tiny models: sample, score pairs, train a LoRA by Diffusion-DPO, compare, report."""
    from .demo import run_demo

    run_demo(to, steps, prompts_, progress=not quiet).render(out())


@bench.command("step")
def bench_step(
    recipe: Annotated[str, typer.Argument(help="Recipe to measure.")] = "tiny/dpo",
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="Measured steps.", min=2)] = 20,
    unet: Annotated[str, typer.Option(help="recipe; or random weights: random-50m, sd15-random.")] = "recipe",
    as_json: AsJson = False,
) -> None:
    """One training step: U-Net calls, seconds and memory by part, beside the same step done naively."""
    from .bench import measure_step
    from .recipe import load_recipe

    found = measure_step(load_recipe(recipe, overrides or []), steps, unet)
    print(json.dumps(found.json(), indent=1)) if as_json else found.render(out())


# ---- entry ----------------------------------------------------------------------------------------------------------


def show_version(wanted: bool) -> None:
    """``--version``."""
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Align and distil text-to-image diffusion models, and judge the result."""


def is_main() -> bool:
    """Whether this process prints; under a launcher rank 0 alone does."""
    return os.environ.get("RANK", "0") == "0"


def stop(message: str, status: int) -> NoReturn:
    """One line on stderr and the exit status."""
    if is_main():
        print(f"diffalign: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def main() -> None:
    """Entry point: 0 done, 2 wrong input, 1 failure while running, 130 interrupted."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    usage = typer.BadParameter.__bases__[0]  # click's UsageError, wherever this typer keeps it
    try:
        status = app(standalone_mode=False)
    except UserError as error:
        stop(str(error), 2)
    except RunError as error:
        stop(str(error), error.exit_status)
    except usage as error:  # type: ignore[misc]
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.ctx.get_help())
            sys.exit(0)
        where = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        stop(error.format_message() + where, 2)
    except (KeyboardInterrupt, typer.Abort):
        stop("interrupted", 130)
    sys.exit(status if isinstance(status, int) else 0)
