"""Several models on the same prompts: every pair compared, a win matrix and a rating for each scorer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UserError
from .compare import Comparison, Side, compare_files, sides_of, span, with_holm
from .rows import ScoreFile, read_score_file
from .stats import DRAWS, LEVEL, SEED, Interval, Mean, Paired, ratings

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Cell:
    """A model against another by one scorer: what was seen, and the sign test's p by Holm over the whole study."""

    paired: Paired
    holm_p: float


@dataclass(frozen=True)
class Board:
    """One scorer over all models, which are told by their place in the study.

    ``cells[i, j]``: i against j. ``ratings``: Bradley-Terry, on the scale of chess ratings, mean 0."""

    scorer: str
    in_loop: bool
    means: list[Mean]
    cells: dict[tuple[int, int], Cell]
    ratings: list[tuple[float, Interval]]


@dataclass(frozen=True)
class Study:
    """What a set of prompts says about models. ``comparisons``: each further model (A) with the first (B), in detail;
    p values of boards and comparisons are corrected as one family: all scorers and all pairs of this study."""

    sides: list[Side]
    files: list[ScoreFile]
    boards: list[Board]
    comparisons: list[Comparison]
    prompt_set: str | None
    prompts: int
    prompts_sha256: str
    level: float
    notes: list[str]

    def json(self) -> str:
        """All numbers, without the single images."""
        boards = [
            {
                "scorer": b.scorer,
                "in_loop": b.in_loop,
                "means": [asdict(m) for m in b.means],
                "ratings": [{"rating": value, **asdict(interval)} for value, interval in b.ratings],
                "pairs": [
                    {"a": self.sides[i].label, "b": self.sides[j].label, "holm_p": c.holm_p, **asdict(c.paired)}
                    for (i, j), c in b.cells.items()
                    if i > j
                ],
            }
            for b in self.boards
        ]
        data = {
            "models": [side.label for side in self.sides],
            "prompt_set": self.prompt_set,
            "prompts": self.prompts,
            "prompts_sha256": self.prompts_sha256,
            "level": self.level,
            "boards": boards,
            "comparisons": [json.loads(c.json()) for c in self.comparisons],
            "notes": self.notes,
        }
        return json.dumps(data, indent=2, ensure_ascii=False)

    def markdown(self) -> str:
        """Tables for a README or a pull request."""
        name = f"{self.prompt_set}: " if self.prompt_set else ""
        base = self.sides[0].label
        parts = [f"{name}{self.prompts} prompts (sha256 `{self.prompts_sha256[:16]}`), {self.level:.0%} intervals.\n"]
        for board in self.boards:
            head = [
                board.scorer + (" (in-loop)" if board.in_loop else ""),
                "mean",
                f"win rate against {base}",
                "Holm p",
            ]
            head += ["rating"] if board.ratings else []
            parts += ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
            for i, side in enumerate(self.sides):
                row = [side.label, f"{board.means[i].value:.4g} {span(board.means[i].interval, '.4g')}"]
                cell = board.cells.get((i, 0))
                rate = f"{cell.paired.win_rate:.1%} {span(cell.paired.win_interval, '.1%')}" if cell else ""
                row += [rate, f"{cell.holm_p:.2g}" if cell else ""]
                if board.ratings:
                    value, interval = board.ratings[i]
                    row.append(f"{value:+.0f} {span(interval, '+.0f')}")
                parts.append("| " + " | ".join(row) + " |")
            parts.append("")
            if len(self.sides) > 2:
                parts += [
                    f"Win rates by {board.scorer}, row against column:\n",
                    "| | " + " | ".join(side.label for side in self.sides) + " |",
                    "|---|" + "---:|" * len(self.sides),
                ]
                for i, side in enumerate(self.sides):
                    cells = [board.cells.get((i, j)) for j in range(len(self.sides))]
                    parts.append(
                        f"| {side.label} | " + " | ".join(f"{c.paired.win_rate:.1%}" if c else "" for c in cells) + " |"
                    )
                parts.append("")
        parts += [f"Note: {note}." for note in self.notes]
        return "\n".join(parts).rstrip() + "\n"

    def render(self, console: Console) -> None:
        """Two models: their comparison. More: a table of each scorer, then each model against the first."""
        from rich.table import Table

        if len(self.sides) > 2:
            for board in self.boards:
                title = f"{board.scorer}{' (in-loop)' if board.in_loop else ''}: win rate, row against column"
                table = Table(title=title)
                for name in ("model", "mean", "rating", *(side.label for side in self.sides)):
                    table.add_column(name, justify="left" if name == "model" else "right")
                for i, side in enumerate(self.sides):
                    value, interval = board.ratings[i]
                    cells = [board.cells.get((i, j)) for j in range(len(self.sides))]
                    rates = [f"{c.paired.win_rate:.1%}{'*' * (c.holm_p < 0.05)}" if c else "" for c in cells]
                    rating = f"{value:+.0f} {span(interval, '+.0f')}"
                    table.add_row(side.label, f"{board.means[i].value:.4g}", rating, *rates)
                console.print(table, markup=False)
            console.print("* p < 0.05 by the exact sign test, Holm's correction over all scorers and pairs")
        for comparison in self.comparisons:
            comparison.render(console)
        for note in self.notes:
            if not any(note in c.notes for c in self.comparisons):
                console.print(f"note: {note}", highlight=False, markup=False)


def study(
    sources: Sequence[str | Path],
    *,
    scorers: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    in_loop: Iterable[str] = (),
    level: float = LEVEL,
    draws: int = DRAWS,
    seed: int = SEED,
    allow: Iterable[str] = (),
) -> Study:
    """Compare every pair of two or more score files (or folders that hold one each); the first is the base.

    Raises:
        UserError: as `compare`, for any pair.
    """
    return study_files(
        [read_score_file(source) for source in sources], scorers, labels, in_loop, level, draws, seed, allow
    )


def study_files(
    files: Sequence[ScoreFile],
    scorers: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    in_loop: Iterable[str] = (),
    level: float = LEVEL,
    draws: int = DRAWS,
    seed: int = SEED,
    allow: Iterable[str] = (),
) -> Study:
    """:func:`study` of files that were read."""
    if len(files) < 2:
        raise UserError("a comparison needs two or more score files; name the base first")
    sides, looped, allowed = sides_of(files, labels), set(in_loop), list(allow)
    common = [name for name in files[0].meta.scorers if all(name in f.meta.scorers for f in files)]
    if scorers is None and not common and len(files) > 2:
        raise UserError("no scorer is common to all score files; score them alike")
    wanted = scorers if scorers is not None or len(files) == 2 else common
    pairs = [(i, j) for i in range(len(files)) for j in range(i)]
    found = [
        compare_files(
            files[i], files[j], (sides[i], sides[j]), wanted, looped, level, draws, seed, allowed, details=j == 0
        )
        for i, j in pairs
    ]
    found = with_holm(found)
    names = [s.scorer for s in found[0].scorers]
    boards = []
    for place, name in enumerate(names):
        cells: dict[tuple[int, int], Cell] = {}
        for (i, j), comparison in zip(pairs, found, strict=True):
            s = comparison.scorers[place]
            cells[i, j] = Cell(s.overall, s.holm_p)
            cells[j, i] = Cell(s.overall.mirrored(), s.holm_p)
        values = [prompt_values(file, name) for file in files]
        means = [
            Mean.of(np.array([np.mean(list(v.values())) for v in side.values()]), level, draws, seed) for side in values
        ]
        boards.append(Board(name, name in looped, means, cells, _ratings(values, level, seed)))
    return Study(
        sides=sides,
        files=list(files),
        boards=boards,
        comparisons=[c for (_, j), c in zip(pairs, found, strict=True) if j == 0],
        prompt_set=files[0].meta.prompt_set,
        prompts=max(c.prompts for c in found),
        prompts_sha256=files[0].meta.prompts_sha256,
        level=level,
        notes=list(dict.fromkeys(note for c in found for note in c.notes)),
    )


def prompt_values(file: ScoreFile, scorer: str) -> dict[str, dict[int, float]]:
    """Scores by prompt id and k; prompts without any are left out."""
    found: dict[str, dict[int, float]] = {}
    for row in file.rows:
        if row.scorer == scorer and row.value is not None:
            found.setdefault(row.id, {})[row.k] = row.value
    return found


def _ratings(values: Sequence[dict[str, dict[int, float]]], level: float, seed: int) -> list[tuple[float, Interval]]:
    """Over prompts and seeds that every model has; empty where there is none."""
    wins = []
    for identity in values[0]:
        if not all(identity in side for side in values):
            continue
        ks = sorted(set.intersection(*(set(side[identity]) for side in values)))
        if ks:
            scores = np.array([[side[identity][k] for k in ks] for side in values])  # (models, seeds)
            gaps = scores[:, None] - scores[None]
            wins.append(((gaps > 0) + 0.5 * (gaps == 0)).mean(-1))
    return ratings(np.array(wins), level, seed=seed) if wins else []
