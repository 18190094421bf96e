"""Sampling and judging: sample, score, eval, compare, report, sets, geneval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import (
    Allow,
    AsJson,
    BatchSize,
    Device,
    Dtype,
    InLoop,
    Quiet,
    app,
    is_main,
    names,
    out,
    print_rows,
    sampling_options,
)


@app.command()
@sampling_options
def sample(
    model: Annotated[str, typer.Argument(help="A diffusers folder, hub id, built-in name, or full run's folder.")],
    prompts: Annotated[str, typer.Option(help="A prompt file, built-in set, or the prompt itself.")],
    to: Annotated[Path, typer.Option("--out", help="Folder for images and manifest.jsonl.")],
    sampling: dict[str, Any],
    lora: Annotated[str | None, typer.Option(help="LoRA file, folder, or run's folder.")] = None,
    lora_scale: Annotated[float, typer.Option(help="Strength of the LoRA.")] = 1.0,
    students: Annotated[
        str | None, typer.Option(help="Folder of `pairs split` with a student for each part of the prompts.")
    ] = None,
    base_first: Annotated[
        int | None, typer.Option(help="So many of a few-step student's steps by its base, for its diversity.", min=1)
    ] = None,
    base_steps: Annotated[
        int | None, typer.Option(help="With --base-first: the base's steps over the whole schedule; 20.", min=1)
    ] = None,
    base_guidance: Annotated[float | None, typer.Option(help="With --base-first: the base's guidance; 7.")] = None,
    search: Annotated[
        str | None,
        typer.Option(help="Best picture by --reward: best-of-n, beam, greedy or tree; settings as beam:beams=4."),
    ] = None,
    reward: Annotated[str | None, typer.Option(help="With --search: a scorer, or name=PATH.")] = None,
    budget: Annotated[
        int | None, typer.Option(help="With --search: U-Net calls a picture; a guided step counts two.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Sample images for prompts: the same noise for every model; resumes image by image."""
    from ..eval.prompts import read_prompts, set_name
    from ..pipelines.sample import SampleSpec
    from ..pipelines.sample import sample as run_sample

    begun: dict[str, Any] = {"base_first": base_first, "base_steps": base_steps, "base_guidance": base_guidance}
    wanted: dict[str, Any] = {"search": search, "reward": reward, "budget": budget}
    spec = SampleSpec(model, lora, lora_scale, **begun, **wanted, **sampling)
    if students is not None:
        from ..pipelines.parts import sample_parts

        print(sample_parts(spec, students, read_prompts(prompts), to, not quiet, set_name(prompts)))
        return
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
    prompts: Annotated[list[str], typer.Option(help="A prompt file or built-in set; again for several.")],
    scorers: Annotated[str, typer.Option(help="Names, comma-separated; name=PATH for own weights.")],
    to: Annotated[Path, typer.Option("--out", help="Folder for images, scores and report.html.")],
    sampling: dict[str, Any],
    primary: Annotated[str | None, typer.Option(help="Scorer of the headline.")] = None,
    in_loop: InLoop = "",
    title: Annotated[str | None, typer.Option(help="Title of the report.")] = None,
    sets: Annotated[str, typer.Option(help="Set metrics too, comma-separated: diversity_clip, vendi, ...")] = "",
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
        title=title,
        sets=names(sets),
        progress=not quiet,
    ).render(out())


@app.command()
def compare(
    sources: Annotated[
        list[Path], typer.Argument(help="Score files or folders; two: A over B; more: the first is the base.")
    ],
    scorers: Annotated[str | None, typer.Option(help="Names, comma-separated; all that every file has.")] = None,
    in_loop: InLoop = "",
    labels: Annotated[str, typer.Option(help="Names of the models, comma-separated.")] = "",
    allow: Allow = "",
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
) -> None:
    """Paired win rates from score files: intervals over prompts, exact sign test with Holm's correction, ratings."""
    from ..eval.study import study

    if len(sources) == 2:  # A over B
        sources = sources[::-1]
    called = names(labels) or None
    if called is not None and len(sources) == 2:
        called = called[::-1]
    found = study(
        sources,
        scorers=names(scorers) if scorers else None,
        labels=called,
        in_loop=names(in_loop),
        allow=names(allow),
    )
    if as_json:
        print(found.json())
    elif markdown:
        print(found.markdown(), end="")
    else:
        found.render(out())


@app.command()
def report(
    sources: Annotated[
        list[Path], typer.Argument(help="An evaluation's or a run's folder, or score files, base first.")
    ],
    to: Annotated[Path | None, typer.Option("--out", help="report.html; beside the scores if not given.")] = None,
    primary: Annotated[str | None, typer.Option(help="Scorer of the headline.")] = None,
    in_loop: InLoop = "",
    labels: Annotated[str, typer.Option(help="Names of the models, comma-separated.")] = "",
    allow: Allow = "",
    title: Annotated[str | None, typer.Option(help="Title of the page.")] = None,
) -> None:
    """One self-contained page and a Markdown table of what was scored: win rates, distributions, pictures."""
    from ..eval.evaluate import write_report_of

    print(
        write_report_of(
            sources,
            to,
            primary=primary,
            in_loop=names(in_loop),
            labels=names(labels) or None,
            allow=names(allow),
            title=title,
        )
    )


@app.command(name="sets")
def set_metrics(
    images: Annotated[
        str | None, typer.Argument(help="Pictures as `score` takes them; none: list the metrics.")
    ] = None,
    metrics: Annotated[str, typer.Option(help="Names, comma-separated; name=PATH for own weights.")] = "",
    reference: Annotated[Path | None, typer.Option(help="Pictures to compare with (FID, KID, CMMD).")] = None,
    to: Annotated[Path | None, typer.Option("--out", help="sets.json; beside the pictures if not given.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Metrics of whole sets: FID, KID, CMMD, diversity, Vendi, LPIPS; those by prompt join the report."""
    from ..eval.sets import list_sets

    if images is None:
        rows = [{"name": s.name, "needs": s.needs, "about": s.about} for s in list_sets().values()]
        print_rows(rows, ["name", "needs", "about"], as_json)
        return
    from ..eval.setscore import measure_sets

    found = measure_sets(images, metrics, reference, to, device, dtype)
    print(found.out.read_text(), end="") if as_json else found.render(out())


@app.command()
def geneval(
    images: Annotated[str, typer.Argument(help="Pictures as `score` takes them.")],
    prompts: Annotated[str | None, typer.Option(help="A set with answers, such as everyday.")] = None,
    detections: Annotated[Path | None, typer.Option(help="What a detector found, JSON lines.")] = None,
    detector: Annotated[str | None, typer.Option(help="A detector that is installed, by name.")] = None,
    to: Annotated[Path | None, typer.Option("--out", help="Verdicts, a row a picture, as JSON lines.")] = None,
) -> None:
    """GenEval's judge on found objects: presence, counts, colours, positions."""
    import json
    from dataclasses import asdict

    from ..eval.detectors import load_detector
    from ..eval.geneval import judge_images

    found = judge_images(images, prompts, detections, load_detector(detector) if detector else None)
    if to is not None:
        to.write_text("".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in found.rows))
    found.render(out())
