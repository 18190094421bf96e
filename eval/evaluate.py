"""Evaluate models: sample the same prompts from the same noise, score, compare each with the first, write a report."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UserError
from ..pipelines.spec import SampleSpec, Sampling
from .compare import Comparison, compare
from .curves import read_log
from .prompts import Prompt, prompts_sha256, read_prompts
from .report import Mean, ReportData, Sheet, headline, write_report
from .rows import ScoreFile, read_score_file
from .score import ScoreResult, score_images
from .scorers import load_scorers, parse_scorers
from .stats import bootstrap
from .training_report import Training

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class ModelSpec:
    """``[label=]model[+lora[@scale]]``. Both may be a run's folder; ``lora`` a file too."""

    label: str
    model: str
    lora: str | None = None
    lora_scale: float = 1.0


@dataclass
class Evaluation:
    """What an evaluation left: ``comparisons`` of each further model with the first; ``report`` the HTML page."""

    out: Path
    models: list[ModelSpec]
    scores: dict[str, ScoreResult]
    comparisons: list[Comparison]
    report: Path

    def render(self, console: Console) -> None:
        """Tables and verdicts for a person."""
        if not self.comparisons:
            for label, result in self.scores.items():
                console.print(label, highlight=False, markup=False)
                result.render(console)
        for comparison in self.comparisons:
            comparison.render(console)
        console.print(f"report: {self.report}", highlight=False, markup=False)


def parse_model(text: str) -> ModelSpec:
    """``base=assets/tiny-sd+runs/dpo@0.8`` -> ModelSpec; a path that exists is taken as it is, plus signs and all.

    Raises UserError for an empty part or a scale that is no number."""
    label, rest = "", text
    match = re.match(r"([\w.\- ]+)=(.+)", text)
    if match and not Path(text).exists():
        label, rest = match[1], match[2]
    model, plus, lora = (
        (rest, "", "") if Path(rest).exists() else rest.rpartition("+") if "+" in rest else (rest, "", "")
    )
    if not model or (plus and not lora):
        raise UserError(f"model '{text}' is incomplete; write MODEL, MODEL+LORA, MODEL+LORA@SCALE or LABEL=MODEL")
    scale = 1.0
    if "@" in lora and not Path(lora).exists():
        lora, _, number = lora.rpartition("@")
        try:
            scale = float(number)
        except ValueError as error:
            raise UserError(f"LoRA scale '{number}' in '{text}' is not a number; write MODEL+LORA@0.8") from error
    name = label or Path(lora or model).expanduser().name or model
    return ModelSpec(name, model, lora or None, scale)


def parse_models(texts: Sequence[str]) -> list[ModelSpec]:
    """Specs with labels that differ and can be folder names. Raises UserError when there is no model."""
    if not texts:
        raise UserError("no model given; name one or more: MODEL, MODEL+LORA or LABEL=MODEL")
    specs: list[ModelSpec] = []
    taken: set[str] = set()
    for spec in map(parse_model, texts):
        base = re.sub(r"[^\w.\- ]+", "-", spec.label).strip("-. ") or "model"
        label, number = base, 1
        while label in taken:
            number += 1
            label = f"{base}-{number}"
        taken.add(label)
        specs.append(ModelSpec(label, spec.model, spec.lora, spec.lora_scale))
    return specs


def evaluate(
    models: Sequence[str],
    prompts: str | Path | Sequence[Prompt],
    scorers: str | Sequence[str],
    out: str | Path,
    *,
    sampling: Sampling | None = None,
    score_batch: int = 32,
    primary: str | None = None,
    in_loop: Iterable[str] = (),
    run: str | Path | None = None,
    title: str | None = None,
    progress: bool = True,
) -> Evaluation:
    """Sample, score and compare. Everything is kept under ``out`` and resumes image by image.

    ``out/<label>/`` holds ``images/``, ``manifest.jsonl`` and ``scores.jsonl`` of each model;
    ``out/<label>-vs-<first>.json`` each comparison; ``out/report.html`` the report.

    Args:
        models: ``[label=]model[+lora[@scale]]``; the first is what the others are compared with.
        prompts: a set, file or text, or prompts.
        scorers: such as ``"oracle,pickscore=FOLDER"``; all see the same decoded images.
        primary: the scorer of the headline; default: the first that is not in ``in_loop``.
        in_loop: scorers that training used; they are marked.
        run: a training run's folder whose curves join the report; default: a model or LoRA that is one.

    Raises:
        UserError: bad models, prompts, scorers or settings.
    """
    from ..pipelines.sample import sample

    specs = parse_models(models)
    names = parse_scorers(scorers)
    looped = list(in_loop)
    if primary is not None and primary not in names:
        raise UserError(f"the primary scorer '{primary}' is not among {', '.join(names)}")
    wanted = read_prompts(prompts) if isinstance(prompts, str | Path) else list(prompts)
    settings = sampling or Sampling()
    folder = Path(out)
    loaded = load_scorers(scorers, settings.device)
    for scorer in loaded:
        scorer.check_prompts([p.prompt for p in wanted])
    scores: dict[str, ScoreResult] = {}
    for spec in specs:
        place = folder / spec.label
        if progress:
            _say(f"{spec.label}: {len(wanted) * settings.per_prompt} images")
        sample(
            SampleSpec(spec.model, spec.lora, spec.lora_scale, **vars(settings)),
            wanted,
            place,
            progress=progress,
        )
        scores[spec.label] = score_images(
            place, None, loaded, place / "scores.jsonl", batch=score_batch, progress=progress
        )
    first = specs[0]
    comparisons = []
    for spec in specs[1:]:
        found = compare(folder / spec.label, folder / first.label, labels=(spec.label, first.label), in_loop=looped)
        (folder / f"{spec.label}-vs-{first.label}.json").write_text(found.json() + "\n", encoding="utf-8")
        headline(found, primary)
        comparisons.append(found)
    _write_summary(folder, specs, wanted, scores, settings)
    source = _run_folder(run, specs)
    files = {spec.label: read_score_file(folder / spec.label) for spec in specs}
    data = ReportData(
        title=title or " and ".join(spec.label for spec in specs),
        subtitle=f"{len(wanted)} prompts, {settings.per_prompt} image{'s' * (settings.per_prompt > 1)} each",
        comparisons=comparisons,
        means={label: {name: _mean(file, name) for name in names} for label, file in files.items()},
        gallery=[] if comparisons else _gallery(files[first.label]),
        primary=primary,
        training=Training(log=read_log(source)) if source else None,
        notes=[f"{label}: {note}" for label, result in scores.items() for note in result.notes],
    )
    return Evaluation(folder, specs, scores, comparisons, write_report(data, folder / "report.html"))


def _mean(file: ScoreFile, scorer: str) -> Mean:
    """Mean over prompts of the mean over seeds."""
    by_prompt: dict[str, list[float]] = {}
    for row in file.rows:
        if row.scorer == scorer and row.value is not None:
            by_prompt.setdefault(row.id, []).append(row.value)
    values = np.array([np.mean(found) for found in by_prompt.values()])
    return Mean(float(values.mean()), bootstrap(values), len(values))


def _gallery(file: ScoreFile) -> list[Sheet]:
    images = list({row.image: row for row in file.rows}.values())
    places = np.linspace(0, len(images) - 1, min(24, len(images))).round()
    folder = file.path.parent / (file.meta.folder or ".")
    return [Sheet(images[int(i)].prompt, folder / images[int(i)].image) for i in places]


def _run_folder(run: str | Path | None, specs: Sequence[ModelSpec]) -> Path | None:
    """The run whose curves are shown: the one asked for (which must have a log), else the last model that is a run."""
    if run is not None:
        read_log(run)
        return Path(run)
    places = [Path(p) for s in reversed(specs) for p in (s.lora, s.model) if p]
    return next((p for p in places if (p / "log.jsonl").is_file()), None)


def _write_summary(
    folder: Path,
    specs: Sequence[ModelSpec],
    prompts: Sequence[Prompt],
    scores: Mapping[str, ScoreResult],
    settings: Sampling,
) -> None:
    summary = {
        "prompts": len(prompts),
        "prompts_sha256": prompts_sha256(prompts),
        "sampling": vars(settings),
        "models": {
            s.label: {"model": s.model, "lora": s.lora, "lora_scale": s.lora_scale, "means": scores[s.label].means}
            for s in specs
        },
    }
    (folder / "eval.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _say(text: str) -> None:
    from rich.console import Console

    Console(stderr=True).print(text, highlight=False, markup=False)
