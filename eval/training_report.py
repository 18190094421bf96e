"""The training part of a report: curves, which known picture a run resembles, samples on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .curves import LogRow, panels, read_log
from .health import health
from .page import SHEET, Sheet, evenly, picture_uri

SHEETS = 4  # first, last, and evenly between: what changed shows best in few


@dataclass(frozen=True)
class Training:
    """A run as the report shows it. ``log``: rows of its log.jsonl; ``recipe``: YAML text."""

    log: Sequence[LogRow] = ()
    sheets: Sequence[Sheet] = ()
    recipe: str | None = None

    @property
    def steps(self) -> int | None:
        """The last step of the log."""
        return max((row["step"] for row in self.log if isinstance(row["step"], int)), default=None)


def read_training(run_dir: str | Path) -> Training:
    """``log.jsonl``, ``samples/*.png`` and ``recipe.yaml`` of a run's folder; what is not there stays empty."""
    folder = Path(run_dir)
    recipe = folder / "recipe.yaml"
    pictures = sorted((folder / "samples").glob("*.png"))
    return Training(
        log=read_log(folder) if (folder / "log.jsonl").is_file() else [],
        sheets=[Sheet(_sheet_name(pictures[i]), pictures[i]) for i in dict.fromkeys(evenly(pictures, SHEETS))],
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
    )


def training_view(training: Training) -> dict[str, object]:
    """What ``training.html.j2`` shows."""
    verdict = health(training.log) if training.log else None
    return {
        "health": verdict if verdict and verdict.verdict != "unclear" else None,
        "curves": panels(training.log),
        "sheets": [(sheet.caption, picture_uri(sheet.path, SHEET)) for sheet in training.sheets],
        "recipe": training.recipe,
    }


def _sheet_name(path: Path) -> str:
    step = path.stem.rpartition("-")[2]
    return f"step {int(step)}" if step.isdigit() else path.stem
