"""The table of ``diffalign bench methods``: for a person, as Markdown, as JSON; the page is in :mod:`.methods_page`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .guided import GuidedReport
from .judge import HELD_OUT, IN_LOOP
from .student_jobs import GROUP
from .student_report import StepsReport
from .verdict import Row, shown

if TYPE_CHECKING:
    from rich.console import Console

HEADS = (
    "method",
    "verdict",
    "all right",
    "gain over base",
    "by seed",
    "over shuffled",
    f"wins, {IN_LOOP} (in-loop)",
    *(f"wins, {name}" for name in HELD_OUT),
    "shapes",
    "diversity",
    "steps",
    "pictures a step",
    "units",
    "train s",
    "train CPU s",
    "peak MB",
)
EXPLAINED = (
    "all right: share of held-out prompts whose layout, colours and shapes the oracle finds right, mean over seeds; "
    "intervals: 95 %, bootstrap over prompts; wins: against the base, ties one half; shapes, diversity: change of "
    "single objects (0.03 may be lost); pictures a step: through the U-Net, forward+backward by role; units: 1 forward "
    "+ 2 backward a picture; CPU: processor seconds, which other programs do not disturb; peak: resident memory beyond "
    "the libraries. †: this row's data were made with this judge's scores. Few-step "
    "students are drawn at their own steps here, and judged by the table over steps; what distils guidance learns "
    "where it matches the guided teacher at half the calls."
)


@dataclass
class MethodsReport:
    """What ``measure_methods`` found. ``pictures``: by row, the folder of its held-out pictures (first seed).
    ``over_steps``: of few-step students; ``guided``: of what distils guidance."""

    settings: dict[str, Any]
    rows: list[Row]
    pictures: dict[str, Path] = field(default_factory=dict)
    over_steps: StepsReport = field(default_factory=StepsReport)
    guided: GuidedReport = field(default_factory=GuidedReport)

    @property
    def failed(self) -> bool:
        """Whether any row failed."""
        return any(row.failed for row in self.rows) or bool(self.over_steps.troubles or self.guided.troubles)

    def json(self) -> dict[str, Any]:
        """Plain data."""
        further = {"over_steps": self.over_steps.json(), "guided": self.guided.json()}
        return {"settings": self.settings, "rows": [asdict(row) for row in self.rows], **further}

    def title(self) -> str:
        """In a line."""
        s = self.settings
        by_times: dict[int, list[str]] = {}
        for name, times in s["times"].items():
            by_times.setdefault(times, []).append(name)
        more = "".join(f"; {times} times that for {', '.join(names)}" for times, names in sorted(by_times.items()))
        return (
            f"{s['prompts']} held-out prompts, {len(s['seeds'])} seeds, {s['budget']:,} units of U-Net work each{more}"
        )

    @property
    def notes(self) -> list[str]:
        """Why rows are judged so; those of the other tables say it there."""
        told = self.over_steps.names | {line.name for line in self.guided.lines}
        return [f"{row.name}: {verdict_of(row)}: {row.why}" for row in self.rows if row.why and row.name not in told]

    def render(self, console: Console) -> None:
        """For a person: what matters most; the whole table is in the files."""
        from rich.table import Table

        shown = [HEADS.index(h) for h in HEADS if h not in {"pictures a step", "units", "by seed", "train s"}]
        table = Table(title=self.title())
        for i in shown:
            table.add_column(HEADS[i].replace("wins, tiny-", "wins "), justify="left" if i < 2 else "right")
        for row in self.rows:
            texts = cells(row)
            # only the gain keeps its interval here
            table.add_row(*(texts[i] if HEADS[i].startswith("gain") else texts[i].partition(" (")[0] for i in shown))
        console.print(table)
        for note in self.notes:
            console.print(note, highlight=False, markup=False)
        self.over_steps.render(console)
        self.guided.render(console)
        if self.settings["overrides"]:
            console.print(f"overrides: {' '.join(self.settings['overrides'])}", highlight=False, markup=False)

    def markdown(self) -> str:
        """The whole table."""
        lines = [f"{self.title()}.", "", "| " + " | ".join(HEADS) + " |", "|" + "---|" * len(HEADS)]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in self.rows]
        lines += ["", EXPLAINED, ""]
        lines += [f"* {note}" for note in self.notes]
        return "\n".join(lines) + "\n" + self.over_steps.markdown() + self.guided.markdown()


def cells(row: Row) -> list[str]:
    """The row as texts, in the order of ``HEADS``."""
    judges = (IN_LOOP, *HELD_OUT)
    change = "+.3f" if row.kind != "base" else ".3f"
    return [
        row.name,
        verdict_of(row),
        "" if row.right is None else f"{row.right:.3f}",
        row.gain.text() if row.gain else "",
        " ".join(shown(e.value, "+.3f") for e in row.by_seed),
        row.over_shuffled.text() if row.over_shuffled else "",
        *(wins(row, name) if name in row.wins else "" for name in judges),
        "" if row.shapes is None else shown(row.shapes, change),
        "" if row.diversity is None else shown(row.diversity, change),
        "" if row.steps is None else f"{row.steps} x {row.batch}",
        ", ".join(f"{role} {p['forward']:g}+{p['backward']:g}" for role, p in row.per_step.items()),
        "" if row.units is None else f"{row.units:,.0f}",
        "" if row.seconds is None else f"{row.seconds:.0f}",
        "" if row.cpu is None else f"{row.cpu:.0f}",
        "" if row.peak_mb is None else f"{row.peak_mb:.0f}",
    ]


def wins(row: Row, judge: str) -> str:
    """A win rate; marked where the judge is no outsider though its column says so."""
    estimate = row.wins[judge]
    own = judge in row.trained_on and judge in HELD_OUT
    return f"{shown(estimate.value, '.3f')}{'†' if own else ''} {estimate.span('.3f')}"


def verdict_of(row: Row) -> str:
    """In a word or two."""
    return row.verdict or "not judged"


def ranked(rows: Sequence[Row]) -> list[Row]:
    """Rows with a gain, best first; without few-step students, which are not meant to gain over their teacher."""
    compared = [row for row in rows if row.gain and row.group != GROUP]
    return sorted(compared, key=lambda row: -(row.gain.value if row.gain else 0.0))
