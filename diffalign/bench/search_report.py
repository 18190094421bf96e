"""The table of ``diffalign bench search``: for a person, as Markdown, as JSON, and as a page with its curves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..eval.plots import INK, WARN, A, B, Figure
from ..eval.stats import bootstrap
from .verdict import Estimate, shown

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = 8  # prompts in the grid
LOOKS = ((A, ""), (A, 'stroke-dasharray="4 3"'), (WARN, ""), (B, ""), (INK, ""), (INK, 'stroke-dasharray="4 3"'))


@dataclass(frozen=True)
class Cell:
    """A search (as it was asked for, and as it ran) at a budget: one result a prompt, in their order."""

    text: str
    fitted: str
    budget: int
    rows: list[dict[str, Any]]

    def values(self, name: str) -> np.ndarray:
        """A number of each prompt, fp64 (P,)."""
        return np.array([row[name] for row in self.rows], np.float64)


@dataclass(frozen=True)
class Line:
    """One line of the table: means over prompts; gains over the first search at the same budget with 95 % intervals by
    bootstrap over prompts, None for that search itself. ``finished``: pictures that were finished, N of best-of-N;
    ``judge``: the score of the judge, for the oracle the share all right; ``seconds``: of the processor, a prompt."""

    search: str
    fitted: str
    budget: int
    finished: float
    calls: float
    reward: float
    gain: Estimate | None
    judge: float
    judge_gain: Estimate | None
    seconds: float
    decodes: float
    scores: float


@dataclass
class SearchReport:
    """What ``measure_search`` found. ``pictures``: by search, the folder at the last budget."""

    settings: dict[str, Any]
    reference: str
    cells: list[Cell]
    pictures: dict[str, Path] = field(default_factory=dict)

    @property
    def lines(self) -> list[Line]:
        """The table, budget by budget."""
        against = {cell.budget: cell for cell in self.cells if cell.text == self.reference}
        return [line_of(cell, against[cell.budget]) for cell in self.cells]

    def heads(self) -> list[str]:
        """Of the columns."""
        s = self.settings
        over = f"over {self.reference}"
        judge = "all right" if s["judge"] == "oracle" else s["judge"]
        return ["search", "budget", "N", "calls", s["reward"], over, judge, over, "CPU s", "decodes", "scorer calls"]

    def title(self) -> str:
        """In a line."""
        s = self.settings
        head = f"{s['count']} prompts of {s['prompts']}, {s['model']}, {s['steps']} steps, guidance {s['guidance']:g}"
        return f"{head}, reward {s['reward']}, judge {s['judge']}"

    @property
    def explained(self) -> str:
        """What the columns mean."""
        return (
            "Means over prompts, one picture each. A call is one picture through the U-Net, so that a guided step "
            "counts two; budgets are calls a prompt, and what a search could not use is not made up for. N: finished "
            "pictures. Gains are paired over prompts at equal budgets, with 95 % intervals by bootstrap. "
            f"{self.settings['reward']} is what was searched for; {self.settings['judge']} only judges. CPU s: "
            "processor seconds a prompt."
        )

    def json(self) -> dict[str, Any]:
        """Plain data, the results of each prompt among it."""
        cells = [asdict(cell) for cell in self.cells]
        return {"settings": self.settings, "lines": [asdict(line) for line in self.lines], "cells": cells}

    def render(self, console: Console) -> None:
        """For a person."""
        from rich.table import Table

        table = Table(title=self.title())
        for i, head in enumerate(self.heads()):
            table.add_column(head, justify="right" if i else "left")
        for line in self.lines:
            table.add_row(*cells(line))
        console.print(table)

    def markdown(self) -> str:
        """The whole table."""
        heads = self.heads()
        lines = [f"{self.title()}.", "", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        lines += ["| " + " | ".join(cells(line)) + " |" for line in self.lines]
        return "\n".join([*lines, "", self.explained]) + "\n"


def line_of(cell: Cell, against: Cell) -> Line:
    """A cell's means and its gains over another cell's."""

    def mean(name: str) -> float:
        return float(cell.values(name).mean())

    def gain(name: str) -> Estimate | None:
        if cell is against:
            return None
        gains = cell.values(name) - against.values(name)
        interval = bootstrap(gains)
        return Estimate(float(gains.mean()), interval.low, interval.high)

    return Line(
        cell.text,
        cell.fitted,
        cell.budget,
        mean("finished"),
        mean("calls"),
        mean("reward"),
        gain("reward"),
        mean("judge"),
        gain("judge"),
        mean("seconds"),
        mean("decodes"),
        mean("scores"),
    )


def cells(line: Line) -> list[str]:
    """As texts, in the order of the heads."""
    return [
        line.fitted,
        str(line.budget),
        f"{line.finished:.1f}",
        f"{line.calls:.1f}",
        shown(line.reward, ".3f"),
        line.gain.text() if line.gain else "",
        shown(line.judge, ".3f"),
        line.judge_gain.text() if line.judge_gain else "",
        f"{line.seconds:.2f}",
        f"{line.decodes:.1f}",
        f"{line.scores:.1f}",
    ]


def curve(title: str, lines: Sequence[Line], value: Callable[[Line], float]) -> str:
    """A line a search over the budgets."""
    budgets, values = [float(line.budget) for line in lines], [value(line) for line in lines]
    figure = Figure(title, (min(budgets), max(budgets)), (min(values), max(values)))
    for name, (colour, dash) in zip(dict.fromkeys(line.search for line in lines), LOOKS * len(lines), strict=False):
        own = [line for line in lines if line.search == name]
        x, y = [float(line.budget) for line in own], [value(line) for line in own]
        figure.line(x, y, f'stroke="{colour}" stroke-width="1.8" {dash}')
        figure.dots(x, y, colour)
        figure.legend.append((name, colour, bool(dash)))
    return figure.svg()


def page(report: SearchReport) -> str:
    """The page as text: no network, no scripts."""
    from ..eval.page import environment

    lines, s = report.lines, report.settings
    plots = [curve(f"{s['reward']}, searched for", lines, lambda line: line.reward)]
    plots.append(curve(f"{report.heads()[6]}, judged", lines, lambda line: line.judge))
    template = resources.files("diffalign.bench").joinpath("search.html.j2").read_text(encoding="utf-8")
    return (
        environment()
        .from_string(template)
        .render(
            data={"title": "Searches at equal U-Net calls", "subtitle": report.title()},
            heads=report.heads(),
            lines=[cells(line) for line in lines],
            explained=report.explained,
            plots=plots,
            grid=grid(report),
            budget=lines[-1].budget,
            settings=s,
            date=datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC"),
        )
    )


def picture_name(identity: str) -> str:
    """File of a prompt's picture; ids may hold anything."""
    return f"{hashlib.sha256(identity.encode()).hexdigest()[:12]}.png"


def grid(report: SearchReport) -> dict[str, Any]:
    """The same prompts by every search at the last budget: names, and for each prompt (text, [picture])."""
    from ..eval.page import evenly, picture_uri

    rows = report.cells[-1].rows
    picked = [rows[i] for i in evenly(rows, SHOWN)]
    names = list(report.pictures)
    lines = [
        (row["prompt"], [picture_uri(report.pictures[name] / picture_name(row["id"])) for name in names])
        for row in picked
    ]
    return {"names": names, "lines": lines}
