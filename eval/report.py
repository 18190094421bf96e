"""One self-contained HTML page: verdict, tables, pictures side by side, curves, and every convention behind them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from ..errors import UserError
from .page import Sheet, environment, is_small, picture_uri
from .sections import Section, StudyView, headline, study_view
from .stats import Mean
from .study import Study
from .training_report import Training, read_training, training_view

__all__ = ["ReportData", "headline", "render_report", "write_report", "write_run_report"]


@dataclass
class ReportData:
    """What a page shows; empty parts are left out.

    ``studies``: one a prompt set; the first comparison of the first is the headline, by ``primary`` (a scorer; None:
    the first one that no training looked at). ``training``: a run's curves and samples. ``facts``: further conventions
    in words. ``means``: by model and scorer, and ``gallery``: pictures with captions, for a model that stands alone."""

    title: str
    subtitle: str = ""
    studies: Sequence[Study] = ()
    means: dict[str, dict[str, Mean]] = field(default_factory=dict)
    gallery: Sequence[Sheet] = ()
    primary: str | None = None
    training: Training | None = None
    facts: dict[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()


def render_report(data: ReportData) -> str:
    """The page as text: no network, no scripts, all pictures inside. Raises UserError when there is nothing to show."""
    training = data.training
    if not (data.studies or data.means or (training and (training.log or training.sheets))):
        raise UserError("there is nothing to report: no comparison, no training log, no samples")
    studies = [study_view(study, data.primary, number) for number, study in enumerate(data.studies, 1)]
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            data=data,
            studies=studies,
            summary=_summary(studies) if len(studies) > 1 else [],
            training=training_view(training) if training else None,
            means=[(label, [found.get(name) for name in _columns(data.means)]) for label, found in data.means.items()],
            mean_names=_columns(data.means),
            pixelated=bool(data.gallery) and is_small(data.gallery[0].path),
            gallery=[(sheet.caption, picture_uri(sheet.path)) for sheet in data.gallery],
            facts=_facts(data),
            fingerprints=_fingerprints(data.studies),
            date=datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC"),
        )
    )


def write_report(data: ReportData, path: str | Path) -> Path:
    """Render into a file. Raises UserError when it cannot be written."""
    target = Path(path)
    text = render_report(data)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"report '{path}' cannot be written ({error.strerror}); choose another place") from error
    return target


def write_run_report(run_dir: str | Path, studies: Sequence[Study] = ()) -> Path:
    """``report.html`` of a training run's folder, from ``log.jsonl``, ``samples/*.png`` and ``recipe.yaml``.

    Raises UserError when the folder holds neither a log nor samples."""
    training = read_training(run_dir)
    data = ReportData(
        title=Path(run_dir).resolve().name,
        subtitle=f"training run, {training.steps} steps" if training.steps is not None else "training run",
        studies=studies,
        training=training,
    )
    return write_report(data, Path(run_dir) / "report.html")


def _summary(studies: Sequence[StudyView]) -> list[tuple[str, list[Section | None]]]:
    """Over several prompt sets: each model against the first, by the headline's scorer."""
    names = list(dict.fromkeys(s.a for view in studies for s in view.sections))
    return [(name, [next((s for s in v.sections if s.a == name), None) for v in studies]) for name in names]


def _columns(means: dict[str, dict[str, Mean]]) -> list[str]:
    return list(dict.fromkeys(name for found in means.values() for name in found))


def _facts(data: ReportData) -> dict[str, str]:
    """The conventions in words: what was sampled how, and how the numbers were made."""
    facts: dict[str, str] = {}
    if data.studies:
        for study in data.studies:
            name = f"prompts of {study.prompt_set}" if study.prompt_set else "prompts"
            facts[name] = f"{study.prompts} prompts, list sha256 {study.prompts_sha256[:16]}…"
        first = data.studies[0]
        for side in first.sides:
            settings = side.sampling.get("settings")
            if isinstance(settings, dict):
                shown = {k: v for k, v in settings.items() if v is not None and k != "hashes"}
                hashes = settings.get("hashes")
                if isinstance(hashes, dict):
                    shown["weights"] = " ".join(f"{part}:{str(value)[:10]}" for part, value in hashes.items())
                source = " + ".join(str(side.sampling[k]) for k in ("model", "lora") if side.sampling.get(k))
                facts[f"sampling of {side.label}"] = f"{source}: {_words(shown)}"
        c = first.comparisons[0]
        facts["win rate"] = (
            "share of prompts where the image scores higher for the same prompt and noise; seeds are averaged within a "
            "prompt, ties count one half"
        )
        facts["intervals"] = (
            f"{c.level:.0%}; bootstrap over prompts (BCa, {c.draws} draws, seed {c.seed}, within categories); Wilson's "
            "where every prompt is a plain win or loss"
        )
        facts["tests"] = (
            "exact two-sided sign test over prompts without ties; Holm's correction over all scorers and pairs of a "
            "prompt set"
        )
        if len(first.sides) > 2:
            facts["ratings"] = (
                "Bradley-Terry from the win rates of all pairs, 400 log10 as in chess, mean 0; half a win each way is "
                "added to every pair; percentile intervals by resampling prompts"
            )
        facts["pictures"] = (
            "grids are taken evenly through the prompt list, not chosen; extremes are by the headline's scorer"
        )
    return facts | data.facts


def _words(values: dict[str, object]) -> str:
    return ", ".join(
        f"{k} {json.dumps(v) if isinstance(v, dict | list) else v}" for k, v in values.items() if v is not None
    )


def _fingerprints(studies: Sequence[Study]) -> list[tuple[str, dict[str, str]]]:
    found: dict[str, dict[str, str]] = {}
    for study in studies:
        for file in study.files:
            for s in study.comparisons[0].scorers:
                stated = file.meta.conventions.get(s.scorer)
                found.setdefault(s.scorer, {**s.fingerprint, **({"note": stated} if stated else {})})
    return [(name, {k: v[:16] + "…" if k == "weights" else v for k, v in f.items()}) for name, f in found.items()]
