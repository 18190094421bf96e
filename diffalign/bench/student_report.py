"""The table over steps of ``diffalign bench methods``: few-step students beside the teacher and plain DDIM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..eval.plots import INK, WARN, A, Figure
from ..eval.rows import read_rows
from .judge import PRIMARY
from .student_verdict import BARS, DIVERSITY, StepRow
from .verdict import shown

if TYPE_CHECKING:
    from rich.console import Console

TITLE = "Few-step students: single objects over steps"
HEADS = (
    "method",
    "steps",
    "at times",
    "verdict",
    "all right",
    "score share",
    "by seed",
    "over DDIM",
    "shapes",
    "diversity",
    "diversity share",
    "held-out",
    "train CPU s",
    "peak MB",
    "CPU ms a picture",
)
SAID = tuple(head for head in HEADS if head not in {"at times", "score share", "by seed", "shapes", "diversity share"})
RULE = "; ".join(
    [f"{bar:.0%} of the teacher's score at {k} step{'s' * (k > 1)}" for k, bar in BARS.items()]
    + [f"{DIVERSITY:.0%} of its diversity at each"]
)
EXPLAINED = (
    "all right: share of pictures of single objects that the oracle finds right, mean over seeds; shares are of the "
    "teacher's; held-out: all right of "
    "held-out prompts with two objects; over DDIM: against plain DDIM of the base at as many steps, times from the "
    "noise down, guided as the teacher; 95 % intervals by bootstrap over prompts; fewer steps than a student was made "
    "for take its times as sampling with fewer steps does; train CPU s and peak MB are of one training for all its "
    f"steps; CPU ms a picture: drawing, text to pixels. Learning: every seed reaches {RULE}; a row that aligns a "
    "student is judged by what it gains over that student."
)


@dataclass
class StepsReport:
    """``rows``: the teacher, DDIM, then students by name and steps. ``pictures``: by (name, steps) the folder of
    single-object pictures, of the first seed. ``troubles``: what of the references failed."""

    rows: list[StepRow] = field(default_factory=list)
    pictures: dict[tuple[str, int], Path] = field(default_factory=dict)
    troubles: list[str] = field(default_factory=list)

    def json(self) -> list[dict[str, Any]]:
        """Plain data."""
        return [asdict(row) for row in self.rows]

    @property
    def names(self) -> set[str]:
        """Of the rows."""
        return {row.name for row in self.rows}

    @property
    def notes(self) -> list[str]:
        """One a method: why it is judged so, and what its data cost."""
        said = {}
        for row in self.rows:
            if row.why or row.data:
                said[row.name] = f"{row.name}: {'; '.join(filter(None, (verdict_of(row), row.why, row.data)))}"
        return [*said.values(), *self.troubles]

    def render(self, console: Console) -> None:
        """For a person."""
        from rich.table import Table

        if self.rows:
            table = Table(title=TITLE)
            for head in SAID:
                table.add_column(head, justify="left" if head in ("method", "verdict") else "right")
            for row in self.rows:
                texts = dict(zip(HEADS, cells(row), strict=True))
                texts["all right"] += f" ({row.share:.0%})" * (row.share is not None)
                texts["diversity"] += f" ({row.diversity_share:.0%})" * (row.diversity_share is not None)
                table.add_row(*(texts[head] for head in SAID))
            console.print(table)
        for note in self.notes:
            console.print(note, highlight=False, markup=False)

    def markdown(self) -> str:
        """The whole table; empty without rows."""
        if not self.rows:
            return ""
        lines = ["", f"## {TITLE}", "", "| " + " | ".join(HEADS) + " |", "|" + "---|" * len(HEADS)]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in self.rows]
        lines += ["", EXPLAINED, "", *(f"* {note}" for note in self.notes)]
        return "\n".join(lines) + "\n"

    def page(self) -> dict[str, Any]:
        """For the page: table, plot and grid; empty without rows."""
        if not self.rows:
            return {}
        lines = [(row, cells(row)) for row in self.rows]
        told = {"title": TITLE, "heads": HEADS, "lines": lines, "explained": EXPLAINED, "notes": self.notes}
        return {**told, "plot": plot(self.rows), "grid": grid(self.pictures)}


def verdict_of(row: StepRow) -> str:
    """In a word or two."""
    return row.verdict or ("not judged" if row.kind == "student" else "reference")


def cells(row: StepRow) -> list[str]:
    """The row as texts, in the order of ``HEADS``."""
    return [
        row.name,
        str(row.steps),
        ", ".join(map(str, row.times or ())) if row.kind != "teacher" else "",
        verdict_of(row),
        f"{row.score:.3f}",
        "" if row.share is None else f"{row.share:.1%}",
        " ".join(f"{value:.3f}" for value in row.by_seed) if row.kind == "student" else "",
        row.over_ddim.text() if row.over_ddim else "",
        f"{row.shapes:.3f}",
        shown(row.diversity, ".3f"),
        "" if row.diversity_share is None else f"{row.diversity_share:.1%}",
        f"{row.held:.3f}",
        "" if row.cpu is None else f"{row.cpu:.0f}",
        "" if row.peak_mb is None else f"{row.peak_mb:.0f}",
        f"{row.ms:.1f}",
    ]


def plot(rows: Sequence[StepRow]) -> str:
    """Scores over steps: a line a method, DDIM's dashed, the teacher's level and the bars."""
    few = [row for row in rows if row.kind != "teacher"]
    teacher = next((row.score for row in rows if row.kind == "teacher"), None)
    values = [row.score for row in few] + ([] if teacher is None else [teacher])
    figure = Figure("Single objects all right, over steps", (0, max([row.steps for row in few] or [1]) + 1), (0, 1))
    if teacher is not None:
        figure.rule(INK, y=teacher, dash="2 3")
        figure.legend.append(("··· teacher", INK, False))
        for steps, bar in BARS.items():
            figure.line([steps - 0.12, steps + 0.12], [bar * teacher] * 2, f'stroke="{WARN}" stroke-width="2"')
        figure.legend.append(("bar", WARN, False))
    taken: list[tuple[float, float]] = []
    for name, group in groupby(few, key=lambda row: row.name):
        line = list(group)
        ink = {"learning": A, "not learning": WARN}.get(line[0].verdict, INK)
        dash = 'stroke-dasharray="4 3"' if line[0].kind == "ddim" else ""
        xs, ys = [float(row.steps) for row in line], [row.score for row in line]
        figure.line(xs, ys, f'stroke="{ink}" stroke-width="1.6" {dash}')
        figure.dots(xs, ys, ink)
        left, top = figure.to_x(xs[-1]) + 5, figure.to_y(ys[-1]) + 3.5
        while any(abs(top - other) < 10 and abs(left - beside) < 60 for beside, other in taken):
            top -= 10  # names do not lie on one another
        taken.append((left, top))
        figure.parts.append(f'<text x="{left:.1f}" y="{top:.1f}">{escape(name)}</text>')
    return figure.svg() if values else ""


def grid(pictures: Mapping[tuple[str, int], Path], shown: int = 8) -> dict[str, Any]:
    """The same prompts and noise by every model, a line each: prompts, and (name, [(picture, right)]).

    Empty where the pictures are gone."""
    from ..eval.page import evenly, picture_uri

    lines, prompts = [], []  # type: list[tuple[str, list[tuple[str | None, bool]]]], list[str]
    for (name, steps), folder in pictures.items():
        scores = folder / "scores.jsonl"
        if not scores.is_file():
            continue
        rows = {row.prompt: row for row in read_rows(scores) if row.scorer == PRIMARY and row.k == 0}
        prompts = prompts or [list(rows)[i] for i in evenly(list(rows), shown)]
        found = [rows.get(prompt) for prompt in prompts]
        tiles = [(picture_uri(folder / row.image), bool(row.value)) if row else (None, False) for row in found]
        lines.append((f"{name}, {steps} step{'s' * (steps > 1)}", tiles))
    return {"prompts": prompts, "lines": lines} if lines else {}
