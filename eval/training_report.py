"""The training part of a report: verdict, guards, curves, and the same samples at several steps side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from PIL import Image

from .curves import LogRow, alarms, panels, read_log, series
from .health import Finding, health
from .page import SHEET, Sheet, evenly, image_uri, picture_uri

SHEETS = 4  # first, last, and evenly between: what changed shows best in few
PROMPTS = 8  # rows of samples


@dataclass(frozen=True)
class Training:
    """A run as the report shows it. ``log``: rows of its log.jsonl; ``recipe``: YAML text."""

    log: Sequence[LogRow] = ()
    sheets: Sequence[Sheet] = ()
    recipe: str | None = None

    @property
    def method(self) -> dict[str, object]:
        """The recipe's method: its name and settings; empty where they are not known, as in a damaged file."""
        try:
            recipe = yaml.safe_load(self.recipe or "")
        except yaml.YAMLError:
            return {}
        found = recipe.get("method") if isinstance(recipe, dict) else None
        return found if isinstance(found, dict) else {}

    @property
    def steps(self) -> int | None:
        """The last step of the log."""
        return max((row["step"] for row in self.log if isinstance(row["step"], int)), default=None)


@dataclass(frozen=True)
class Samples:
    """One prompt's samples at several steps: ``columns`` names the steps, ``cells`` holds pictures as data URIs."""

    prompt: str
    cells: list[list[str]]


def read_training(run_dir: str | Path) -> Training:
    """``log.jsonl``, ``samples/*.png`` and ``recipe.yaml`` of a run's folder; what is not there stays empty."""
    folder = Path(run_dir)
    recipe = folder / "recipe.yaml"
    log = read_log(folder) if (folder / "log.jsonl").is_file() else []
    pictures = sorted((folder / "samples").glob("*.png"))
    return Training(
        log=log,
        sheets=[Sheet(_sheet_name(path, best_step(log)), path) for path in _chosen(pictures, best_step(log))],
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
    )


def training_view(training: Training) -> dict[str, object]:
    """What ``training.html.j2`` shows."""
    verdict = health(training.log, training.method) if training.log else None
    rows = sample_rows(training.sheets)
    return {
        "health": verdict,
        "findings": [(f, *_shown(f)) for f in verdict.findings] if verdict else [],
        "alarms": alarms(training.log),
        "skipped": _skipped(training.log),
        "curves": panels(training.log),
        "columns": [sheet.caption for sheet in training.sheets] if rows else [],
        "rows": rows,
        "sheets": [] if rows else [(sheet.caption, picture_uri(sheet.path, SHEET)) for sheet in training.sheets],
        "recipe": training.recipe,
    }


def best_step(log: Sequence[LogRow]) -> int | None:
    """The step with the lowest held-out loss, step 0 aside."""
    looks = [(loss, step) for step, loss in zip(*series(log, "loss", "validate"), strict=True) if step]
    return int(min(looks)[1]) if looks else None


def sample_rows(sheets: Sequence[Sheet]) -> list[Samples]:
    """Samples by prompt, a cell a sheet; empty where a sheet does not say where its pictures are, or they differ."""
    places = [_tiles(sheet.path) for sheet in sheets]
    if not places or not all(places) or len({tuple(t[4] for t in tiles) for tiles in places}) > 1:
        return []
    prompts = list(dict.fromkeys(str(tile[4]) for tile in places[0]))
    cells: dict[str, list[list[str]]] = {prompt: [] for prompt in prompts[:PROMPTS]}
    for sheet, tiles in zip(sheets, places, strict=True):
        with Image.open(sheet.path) as opened:
            picture = opened.convert("RGB")
        for prompt, row in cells.items():
            row.append([image_uri(picture.crop((x, y, x + w, y + h))) for x, y, w, h, name in tiles if name == prompt])
    return [Samples(prompt, row) for prompt, row in cells.items()]


def _tiles(path: Path) -> list[tuple[int, int, int, int, str]]:
    """(left, top, width, height, prompt) of each picture of a sheet, from the PNG's text chunk."""
    try:
        with Image.open(path) as image:
            return [tuple(tile) for tile in json.loads(image.info.get("tiles", "[]"))]
    except (OSError, ValueError):
        return []


def _chosen(pictures: Sequence[Path], best: int | None) -> list[Path]:
    """First, last, the best by held-out loss, and evenly between."""
    chosen = {pictures[i] for i in evenly(pictures, SHEETS)}
    chosen |= {path for path in pictures if best is not None and _step(path) == best}
    if len(chosen) > SHEETS:  # the best one takes the place of its neighbour
        between = [path for path in sorted(chosen)[1:-1] if _step(path) != best]
        chosen.remove(min(between, key=lambda path: abs((_step(path) or 0) - (best or 0))))
    return sorted(chosen)


def _step(path: Path) -> int | None:
    step = path.stem.rpartition("-")[2]
    return int(step) if step.isdigit() else None


def _sheet_name(path: Path, best: int | None) -> str:
    step = _step(path)
    if step is None:
        return path.stem
    return f"step {step}" + (", base" if step == 0 else ", lowest held-out loss since" if step == best else "")


def _skipped(log: Sequence[LogRow]) -> int:
    """Updates that were skipped for non-finite gradients."""
    counts = series(log, "skipped")[1]
    return int(counts[-1]) if counts else 0


def _shown(finding: Finding) -> tuple[str, str]:
    """Start and end of a finding as text."""
    if "change" in finding.name:
        return "", f"{finding.end:+.1%}".replace("-", "−")
    if finding.name == "saturated logits":
        return f"{finding.start or 0:.0%}", f"{finding.end:.0%}"
    return "" if finding.start is None else f"{finding.start:.3g}", f"{finding.end:.3g}"
