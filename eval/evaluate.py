"""Evaluate models: sample the same prompts from the same noise, score, compare each with the first, write a report."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UserError
from ..pipelines.spec import SampleSpec, Sampling
from .compare import Comparison, sides_of
from .curves import read_log
from .page import Sheet, evenly
from .prompts import Prompt, prompts_sha256, read_prompts, set_name
from .report import ReportData, write_report, write_run_report
from .rows import ScoreFile, read_score_file
from .score import ScoreResult, score_images
from .scorers import load_scorers, parse_scorers
from .stats import Mean
from .study import Study, prompt_values, study_files
from .training_report import Training

if TYPE_CHECKING:
    from rich.console import Console

SUMMARY, REPORT, TABLE, NUMBERS = "eval.json", "report.html", "report.md", "comparison.json"
GALLERY = 24


@dataclass(frozen=True)
class ModelSpec:
    """``[label=]model[+lora[@scale]]``. Both may be a run's folder; ``lora`` a file too."""

    label: str
    model: str
    lora: str | None = None
    lora_scale: float = 1.0


@dataclass(frozen=True)
class PromptSet:
    """A list of prompts under the name that results carry."""

    name: str
    prompts: list[Prompt]


@dataclass
class Evaluation:
    """What an evaluation left: ``scores`` by set and label, ``studies`` of each set (none for one model), ``report``
    the HTML page, beside it ``report.md``."""

    out: Path
    models: list[ModelSpec]
    scores: dict[str, dict[str, ScoreResult]]
    studies: list[Study]
    report: Path

    @property
    def comparisons(self) -> list[Comparison]:
        """Each further model with the first, set by set."""
        return [c for study in self.studies for c in study.comparisons]

    def render(self, console: Console) -> None:
        """Tables and verdicts for a person."""
        if not self.studies:
            for by_label in self.scores.values():
                for label, result in by_label.items():
                    console.print(label, highlight=False, markup=False)
                    result.render(console)
        for study in self.studies:
            if len(self.studies) > 1:
                console.rule(study.prompt_set or "")
            study.render(console)
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


def prompt_sets(prompts: str | Path | Sequence[Prompt] | Sequence[str | Path]) -> list[PromptSet]:
    """One set, or several sources as sets with names that differ. Raises UserError as `read_prompts`."""
    if isinstance(prompts, str | Path):
        prompts = [prompts]
    listed = [p for p in prompts if isinstance(p, Prompt)]
    if listed:
        return [PromptSet("prompts", listed)]
    sets: list[PromptSet] = []
    for source in prompts:
        assert not isinstance(source, Prompt)
        base = re.sub(r"[^\w.\-]+", "-", set_name(source))
        taken = {s.name for s in sets}
        name = next(n for i in range(1, len(taken) + 2) if (n := base if i == 1 else f"{base}-{i}") not in taken)
        sets.append(PromptSet(name, read_prompts(source)))
    if not sets:
        raise UserError("no prompts given; name a prompt file or a set")
    return sets


def evaluate(
    models: Sequence[str],
    prompts: str | Path | Sequence[Prompt] | Sequence[str | Path],
    scorers: str | Sequence[str],
    out: str | Path,
    *,
    sampling: Sampling | None = None,
    score_batch: int = 32,
    primary: str | None = None,
    in_loop: Iterable[str] = (),
    run: str | Path | None = None,
    title: str | None = None,
    sets: str | Sequence[str] = (),
    progress: bool = True,
) -> Evaluation:
    """Sample, score and compare. Everything is kept under ``out`` and resumes image by image.

    ``out/<label>/`` (``out/<set>/<label>/`` for several sets) holds ``images/``, ``manifest.jsonl`` and
    ``scores.jsonl`` of each model; ``comparison.json`` beside them the numbers of the set; ``out/report.html`` the
    report, ``out/report.md`` its tables, ``out/eval.json`` what was asked for.

    Args:
        models: ``[label=]model[+lora[@scale]]``; the first is what the others are compared with. A model that records
            how it is to be sampled (few-step students) is sampled so where ``sampling`` says nothing else.
        prompts: a set, file or text, prompts, or several sets or files.
        scorers: such as ``"oracle,pickscore=FOLDER"``; all see the same decoded images.
        primary: the scorer of the headline; default: the first that is not in ``in_loop``.
        in_loop: scorers that training used; they are marked.
        run: a training run's folder whose curves join the report; default: a model or LoRA that is one.
        sets: set metrics of the pictures, such as ``"diversity_clip"``; those by prompt join the report.

    Raises:
        UserError: bad models, prompts, scorers or settings.
    """
    from ..pipelines.sample import sample
    from .setscore import load_sets, measure

    specs = parse_models(models)
    names = list(parse_scorers(scorers))
    if primary is not None and primary not in names:
        raise UserError(f"the primary scorer '{primary}' is not among {', '.join(names)}")
    lists = prompt_sets(prompts)
    settings = sampling or Sampling()
    settings.check()
    folder = Path(out)
    places = {s.name: folder / s.name if len(lists) > 1 else folder for s in lists}
    loaded = load_scorers(scorers, settings.device)
    for scorer in loaded:
        for wanted in lists:
            scorer.check_prompts([p.prompt for p in wanted.prompts])
    metrics = load_sets(sets, device=settings.device) if sets else []
    scores: dict[str, dict[str, ScoreResult]] = {s.name: {} for s in lists}
    each = settings.per_prompt * len(settings.seeds)
    for spec in specs:
        for wanted in lists:
            place = places[wanted.name] / spec.label
            if progress:
                _say(f"{spec.label}, {wanted.name}: {len(wanted.prompts) * each} images")
            asked = SampleSpec(spec.model, spec.lora, spec.lora_scale, **vars(settings))
            sample(asked, wanted.prompts, place, progress=progress, set_name=wanted.name)
            scores[wanted.name][spec.label] = score_images(
                place, None, loaded, place / "scores.jsonl", batch=score_batch, progress=progress
            )
            if metrics:
                measure(place, metrics)
    summary = {
        "title": title or listed([spec.label for spec in specs]),
        "primary": primary,
        "in_loop": list(in_loop),
        "run": None if run is None else str(run),
        "scorers": names,
        "sampling": vars(settings),
        "sets": [
            {
                "name": s.name,
                "folder": places[s.name].relative_to(folder).as_posix(),
                "prompts": len(s.prompts),
                "sha256": prompts_sha256(s.prompts),
            }
            for s in lists
        ],
        "models": {
            s.label: {
                "model": s.model,
                "lora": s.lora,
                "lora_scale": s.lora_scale,
                "means": {name: by_label[s.label].means for name, by_label in scores.items()},
            }
            for s in specs
        },
        "notes": [f"{label}: {n}" for found in scores.values() for label, r in found.items() for n in r.notes],
    }
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    studies = report_evaluation(folder)
    return Evaluation(folder, specs, scores, studies, folder / REPORT)


def report_evaluation(folder: Path, target: Path | None = None) -> list[Study]:
    """Compare what an evaluation left and write its report anew.

    Raises UserError for a folder that holds no evaluation, or one that is unfinished."""
    file = folder / SUMMARY
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        labels = list(facts["models"])
        groups = [(folder / s["folder"], s["name"]) for s in facts["sets"]]
        primary, in_loop, scorers, title = (facts[k] for k in ("primary", "in_loop", "scorers", "title"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{file}' is no record of an evaluation ({error!r}); run `diffalign eval` again") from error
    files = [[read_score_file(place / label) for label in labels] for place, _ in groups]
    studies = []
    if len(labels) > 1:
        for found, (place, _) in zip(files, groups, strict=True):
            # Few-step students are sampled as they record it, beside a base that takes its many steps.
            study = study_files(found, scorers, labels, in_loop, allow=["sampling"])
            (place / NUMBERS).write_text(study.json() + "\n", encoding="utf-8")
            studies.append(study)
    sources = [p for m in reversed(list(facts["models"].values())) for p in (m["lora"], m["model"]) if p]
    source = _run_folder(facts.get("run"), sources)
    first = files[0][0]
    images = len({(r.id, r.k) for r in first.rows}) / max(1, len({r.id for r in first.rows}))
    data = ReportData(
        title=title,
        subtitle=f"{sum(s['prompts'] for s in facts['sets'])} prompts, {images:.3g} image{'s' * (images > 1)} each",
        studies=studies,
        means=means_of(files, labels, [name for _, name in groups], scorers),
        gallery=[] if studies else gallery_of(first),
        primary=primary,
        training=Training(log=read_log(source)) if source else None,
        notes=facts.get("notes", []),
    )
    _write(data, target or folder / REPORT)
    return studies


def write_report_of(
    sources: Sequence[Path],
    target: Path | None = None,
    *,
    primary: str | None = None,
    in_loop: Sequence[str] = (),
    labels: Sequence[str] | None = None,
    allow: Sequence[str] = (),
    title: str | None = None,
) -> Path:
    """The report of an evaluation's folder, of a training run's, or of score files of one or more prompt sets (told
    apart by the hash of their prompts; each set has the same models in the same order, the base first).

    Raises:
        UserError: nothing to show, sets with other numbers of models, or what `study` refuses.
    """
    if len(sources) == 1 and (sources[0] / SUMMARY).is_file():
        report_evaluation(sources[0], target)
        return target or sources[0] / REPORT
    if len(sources) == 1 and (sources[0] / "log.jsonl").is_file():
        return write_run_report(sources[0])
    files = [read_score_file(source) for source in sources]
    groups: dict[str, list[ScoreFile]] = {}
    for file in files:
        groups.setdefault(file.meta.prompts_sha256, []).append(file)
    sets = list(groups.values())
    if len({len(group) for group in sets}) > 1 or (len(sets) > 1 and len(sets[0]) == 1):
        sets = [files]  # not a table of models by sets: let the comparison say what differs
    studies = [study_files(group, None, labels, in_loop, allow=allow) for group in sets if len(group) > 1]
    names = list(dict.fromkeys(name for file in files for name in file.meta.scorers))
    called = [s.label for s in studies[0].sides] if studies else list(labels or [sides_of(files, None)[0].label])
    data = ReportData(
        title=title or listed(called),
        subtitle=f"{sum(s.prompts for s in studies) or files[0].meta.prompts} prompts",
        studies=studies,
        means={} if studies else means_of([files], called, [""], names),
        gallery=[] if studies else gallery_of(files[0]),
        primary=primary,
    )
    place = target or (sources[0] if sources[0].is_dir() else sources[0].parent) / REPORT
    return _write(data, place)


def _write(data: ReportData, target: Path) -> Path:
    """The page, and beside it its tables as Markdown."""
    page = write_report(data, target)
    if data.studies:
        text = "\n".join(study.markdown() for study in data.studies)
        page.with_suffix(".md").write_text(f"# {data.title}\n\n{text}", encoding="utf-8")
    return page


def listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def means_of(
    files: Sequence[Sequence[ScoreFile]], labels: Sequence[str], names: Sequence[str], scorers: Sequence[str]
) -> dict[str, dict[str, Mean]]:
    """Mean over prompts of the mean over seeds, by model (and set, where there are several) and scorer."""
    found: dict[str, dict[str, Mean]] = {}
    for by_set, name in zip(files, names, strict=True):
        for file, label in zip(by_set, labels, strict=True):
            row = found.setdefault(f"{label}, {name}" if len(names) > 1 else label, {})
            for scorer in scorers:
                values = [float(np.mean(list(v.values()))) for v in prompt_values(file, scorer).values()]
                if values:
                    row[scorer] = Mean.of(np.array(values))
    return found


def gallery_of(file: ScoreFile) -> list[Sheet]:
    """Pictures of a model that stands alone, evenly through its prompts."""
    images = list({row.image: row for row in file.rows}.values())
    folder = file.path.parent / (file.meta.folder or ".")
    return [Sheet(images[i].prompt, folder / images[i].image) for i in evenly(images, GALLERY)]


def _run_folder(run: str | None, sources: Sequence[str]) -> Path | None:
    """The run whose curves are shown: the one asked for (which must have a log), else the last model that is a run."""
    if run is not None:
        read_log(run)
        return Path(run)
    return next((Path(p) for p in sources if (Path(p) / "log.jsonl").is_file()), None)


def _say(text: str) -> None:
    from rich.console import Console

    Console(stderr=True).print(text, highlight=False, markup=False)
