"""Sampling and judging: sample, score, eval, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import AsJson, BatchSize, Device, Dtype, InLoop, Quiet, app, is_main, names, out, sampling_options


@app.command()
@sampling_options
def sample(
    model: Annotated[str, typer.Argument(help="A diffusers folder, hub id, built-in name, or full run's folder.")],
    prompts: Annotated[str, typer.Option(help="A prompt file, built-in set, or the prompt itself.")],
    to: Annotated[Path, typer.Option("--out", help="Folder for images and manifest.jsonl.")],
    sampling: dict[str, Any],
    lora: Annotated[str | None, typer.Option(help="LoRA file, folder, or run's folder.")] = None,
    lora_scale: Annotated[float, typer.Option(help="Strength of the LoRA.")] = 1.0,
    quiet: Quiet = False,
) -> None:
    """Sample images for prompts: the same noise for every model; resumes image by image."""
    from ..eval.prompts import read_prompts, set_name
    from ..pipelines.sample import SampleSpec
    from ..pipelines.sample import sample as run_sample

    spec = SampleSpec(model, lora, lora_scale, **sampling)
    print(run_sample(spec, read_prompts(prompts), to, progress=not quiet, set_name=set_name(prompts)))


@app.command()
def score(
    images: Annotated[str, typer.Argument(help="Folder (manifest.jsonl or plain), .jsonl, .csv, .parquet or .tar.")],
    scorers: Annotated[str, typer.Option(help="Names, comma-separated; name=PATH for own weights.")],
    prompts: Annotated[str | None, typer.Option(help="Prompts, where the images bring none.")] = None,
    to: Annotated[Path | None, typer.Option("--out", help="scores.jsonl or .parquet.")] = None,
    batch: BatchSize = 32,
    device: Device = "auto",
    dtype: Dtype = "auto",
    reuse: Annotated[
        list[Path] | None, typer.Option(help="Further score files whose rows count where they hold.")
    ] = None,
    strict: Annotated[bool, typer.Option(help="Unreadable images are an error.")] = False,
    quiet: Quiet = False,
) -> None:
    """Score images by one or more scorers in one pass; resumes image by image; shares the work under a launcher."""
    from ..eval.score import score_images

    place = to or (Path(images) / "scores.jsonl" if Path(images).is_dir() else Path("scores.jsonl"))
    result = score_images(
        images,
        prompts,
        scorers,
        place,
        batch=batch,
        device=device,
        dtype=dtype,
        progress=not quiet,
        strict=strict,
        reuse=reuse or [],
    )
    if is_main():
        result.render(out())
        print(result.out)


@app.command(name="eval")
@sampling_options
def evaluate(
    models: Annotated[list[str], typer.Argument(help="[LABEL=]MODEL[+LORA[@SCALE]]; the first is the base.")],
    prompts: Annotated[str, typer.Option(help="A prompt file or built-in set.")],
    scorers: Annotated[str, typer.Option(help="Names, comma-separated; name=PATH for own weights.")],
    to: Annotated[Path, typer.Option("--out", help="Folder for images, scores and report.html.")],
    sampling: dict[str, Any],
    primary: Annotated[str | None, typer.Option(help="Scorer of the headline.")] = None,
    in_loop: InLoop = "",
    quiet: Quiet = False,
) -> None:
    """Sample, score and compare models on the same prompts and noise, with win rates and a report."""
    from ..eval.evaluate import Sampling
    from ..eval.evaluate import evaluate as run_eval

    run_eval(
        models,
        prompts,
        scorers,
        to,
        sampling=Sampling(**sampling),
        primary=primary,
        in_loop=names(in_loop),
        progress=not quiet,
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
    from ..eval.compare import compare as run_compare

    names = scorers.split(",") if scorers else None
    found = run_compare(a, b, scorers=names, in_loop=[n for n in in_loop.split(",") if n])
    print(found.json()) if as_json else found.render(out())
