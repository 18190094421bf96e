"""``diffalign pairs score``: score columns for pairs of any format, and new labels from them.

Every picture is scored for its row's prompt by `diffalign score`'s own machinery: decoded once for all scorers, each
prompt encoded once, picture by picture resumable, shared among processes. The pairs are then written as `pairs convert`
writes them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError
from ..recipe import DataRecipe
from .convert import Converted, ConvertOptions, convert_pairs
from .mix import mix_scores
from .readers import PairColumns, table_of
from .reading import Draft, Progress, draft_or_flaw
from .rows import ImageRef, PairRow, digest_of
from .table import Table

if TYPE_CHECKING:
    from ..eval.scorers import Scorer

SCORES = "scores.jsonl"


@dataclass(frozen=True)
class Rescoring:
    """``weights`` by scorer. ``relabel``: the picture with the higher score is the chosen one, and scores that differ
    by at most ``tie_gap`` are a tie."""

    weights: Mapping[str, float]
    relabel: bool = False
    tie_gap: float = 0.0

    def __post_init__(self) -> None:
        if self.tie_gap < 0:
            raise UserError(f"--tie-gap {self.tie_gap:g} is below 0; give the largest gap that counts as a tie")


class ScoredTable(Table):
    """A table of pairs with scores: ``own`` (n, 2) by scorer, and their mix, in the order in which the table names the
    two pictures; with ``relabel`` its labels follow the mix."""

    def __init__(self, table: Table, own: Mapping[str, np.ndarray], how: Rescoring, made_by: str) -> None:
        self.table, self.own, self.how, self.made_by = table, own, how, made_by
        self.mixed = mix_scores(own, how.weights)
        self.pick = PairColumns.of(table).pick
        names = ("score_0", "score_1") if self.pick else ("chosen_score", "rejected_score")
        self.given = {name: (self.mixed, side) for side, name in enumerate(names)}
        self.given |= {f"{name}_{side}": (values, side) for name, values in own.items() for side in (0, 1)}
        self.labels = ("label_0", "label_1", "has_label") if self.pick else ("label", "tie")
        columns = [*table.columns, *self.given, *(self.labels if how.relabel else ())]
        super().__init__(table.format, table.label, table.base, list(dict.fromkeys(columns)), table.total)
        self.bad, self.together = table.bad, table.together

    def signature(self) -> str:
        mine = self.table.signature()
        return mine and digest_of(mine.encode(), self.made_by.encode())

    def value(self, row: int, column: str) -> Any:
        if column in self.given:
            values, side = self.given[column]
            return None if np.isnan(values[row, side]) else float(values[row, side])
        if self.how.relabel and column in self.labels:
            return self._label(row, column)
        return self.table.value(row, column)

    def _label(self, row: int, column: str) -> float | bool | None:
        first, second = self.mixed[row]
        if column == "tie":
            return False
        if np.isnan(first - second):  # a picture that could not be scored: the row will be left out
            return False if column == "has_label" else None
        if column == "has_label":
            return True
        label = 0.5 if abs(first - second) <= self.how.tie_gap else float(first > second)
        return 1 - label if column == "label_1" else label

    def exists(self, row: int) -> bool:
        return self.table.exists(row)

    def place(self, row: int) -> str:
        return self.table.place(row)

    def holds_bytes(self, column: str) -> bool:
        return column not in self.given and self.table.holds_bytes(column)

    def ref(self, row: int, column: str) -> ImageRef:
        return self.table.ref(row, column)

    def image(self, row: int, column: str) -> bytes | Path:
        return self.table.image(row, column)

    def stamp(self, row: int, column: str) -> str:
        return self.table.stamp(row, column)


class Beside:
    """Each scorer's own numbers, written as ``chosen_NAME`` and ``rejected_NAME`` beside the mix."""

    def __init__(self, names: list[str], settings: Mapping[str, Any]) -> None:
        self.names, self.settings = names, settings
        self.fields = tuple(f"{side}_{name}" for name in names for side in ("chosen", "rejected"))
        self.keeps = tuple(f"{name}_{side}" for name in names for side in (0, 1))

    def apply(self, row: PairRow, source: Mapping[str, Any]) -> tuple[PairRow, dict[str, Any]]:
        """See `Change`."""
        sides = ("rejected", "chosen") if source["turned"] else ("chosen", "rejected")
        return row, {f"{side}_{name}": source[f"{name}_{i}"] for name in self.names for i, side in enumerate(sides)}

    def counts(self) -> dict[str, int]:
        """See `Change`."""
        return {}


@dataclass
class Rescored:
    """The conversion, and the mean of each scorer over all pictures; ``relabelled``: pairs whose preference changed."""

    converted: Converted
    means: dict[str, float]
    relabelled: int | None = None
    ties: int = 0
    notes: list[str] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        """Plain data."""
        facts = {k: v for k, v in asdict(self).items() if k != "converted"}
        return {**self.converted.json(), **facts}

    def render(self, console: Any) -> None:
        """The account for a terminal."""
        self.converted.render(console)
        for name, mean in self.means.items():
            console.print(f"mean of {name}: {mean:.4f}", markup=False)
        if self.relabelled is not None:
            console.print(
                f"of the scored rows {self.relabelled:,} changed their preference, {self.ties:,} are ties", markup=False
            )
        for note in self.notes:
            console.print(f"note: {note}", markup=False, soft_wrap=True)


def score_pairs(
    recipe: DataRecipe,
    target: Path,
    scorers: str,
    how: Rescoring,
    options: ConvertOptions,
    *,
    batch: int = 32,
    device: str = "auto",
    dtype: str = "auto",
    bar: bool = True,
    progress: Progress | None = None,
) -> Rescored | None:
    """Write the pairs of ``recipe.path`` to ``target`` with score columns; None for all processes but the first.

    What is scored is kept in ``.NAME.scores`` beside the target, from where the same command goes on, and in the end as
    ``scores.jsonl`` in the target: what every number was made with.

    Raises:
        UserError: as `convert_pairs` and `score_images`; a stream, or a scorer that cannot judge the prompts.
    """
    from ..eval.ranks import join_ranks
    from ..eval.rows import meta_path, read_rows
    from ..eval.score import score_items
    from ..eval.scorers import load_scorers

    options.check()
    table = table_of(recipe)
    if recipe.streaming or table.total is None:
        raise UserError("`pairs score` reads the pairs twice and data.streaming reads them once; leave streaming out")
    if recipe.max_pairs is not None:
        raise UserError("`pairs score` writes every pair; take some of them first with `diffalign pairs convert --max`")
    ranks = join_ranks(device)
    loaded = load_scorers(scorers, device, dtype)
    work = target.absolute().parent / f".{target.name}.scores"
    place = target / SCORES if (target / SCORES).is_file() else work / SCORES
    blank = {s.name: np.zeros((table.total, 2)) for s in loaded}
    source = items_of(ScoredTable(table, blank, how, ""))  # new labels need no old ones
    result = score_items(source, Path(table.label), loaded, place, batch=batch, device=device, progress=bar)
    if not ranks.main:
        return None
    own = {s.name: np.full((table.total, 2), np.nan) for s in loaded}
    for row in read_rows(place):
        if row.scorer in own and row.value is not None:
            own[row.scorer][int(row.id), row.k] = row.value
    scored = ScoredTable(table, own, how, made_by(loaded, how))
    beside = Beside([s.name for s in loaded], {"scores": scored.made_by})
    # Pick-a-Pic's columns have no place for further ones
    change = None if options.format == "pickapic" else beside
    converted = convert_pairs(recipe, target, options, progress, change, scored)
    if place.parent == work:
        for path in (place, meta_path(place)):
            os.replace(path, target / path.name)
    shutil.rmtree(work, ignore_errors=True)
    relabelled, ties = changed(table, scored) if how.relabel else (None, 0)
    return Rescored(converted, result.means, relabelled, ties, result.notes)


def made_by(scorers: list[Scorer], how: Rescoring) -> str:
    """What the score columns depend on besides the pictures, in one hash."""
    facts = [*(f"{s.name} {s.fingerprint_id} {how.weights[s.name]:g}" for s in scorers)]
    return digest_of(*(fact.encode() for fact in [*facts, f"{how.relabel} {how.tie_gap:g}"]))


def items_of(table: Table) -> Any:
    """Every row that can be read as two items: the row's number, k 0 and 1 in the order in which the row names them."""
    from ..eval.items import Item, ItemSet
    from ..eval.prompts import Prompt

    items, prompts = [], []
    for i, draft in drafts(table):
        text = draft.prompts[0]
        prompts.append(Prompt(str(i), text))
        items += [Item(str(i), text, None, k, None, f"{draft.place} {k}", ref) for k, ref in enumerate(draft.refs)]
    if not items:
        first = f"; first: {table.bad[0]}" if table.bad else ""
        raise UserError(f"no usable pair in '{table.label}'{first}")
    return ItemSet(items, prompts, [])


def drafts(table: Table) -> Iterator[tuple[int, Draft]]:
    """The rows that can be read, by number."""
    columns = PairColumns.of(table)
    for i in range(table.total or 0):
        found = draft_or_flaw(table, i, columns.draft)
        if isinstance(found, Draft):
            yield i, found


def changed(table: Table, scored: ScoredTable) -> tuple[int, int]:
    """(rows whose preference is another than it was, rows that are ties now) of those with both scores."""
    before = dict(drafts(table))
    now = {i: draft.preference for i, draft in drafts(scored) if None not in draft.scores}
    return (
        sum(value != before[i].preference for i, value in now.items() if i in before),
        sum(value == 0.5 for value in now.values()),
    )
