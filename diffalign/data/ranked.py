"""Ranked lists: pictures of one prompt with scores or ranks, one list a row (as HPDv2 has them)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..keyed import generator
from ..recipe import DataRecipe
from .filters import Filters, Names
from .images import ImageError
from .readers import table_of
from .reading import Columns, Draft, Progress, Reading, column_of, open_rows, prompt_of
from .rows import BadRow, Cell, ImageRef, RankedRow, Report, digest_of, file_stamp
from .scan import Look
from .table import Table

IMAGES = ("images", "image_path")
PROMPTS = ("prompt", "caption")
ORDERS = ("scores", "rank")


class Lists:
    """A table whose cells hold lists of pictures; a column's name says which element: ``images[2]``."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def image(self, row: int, column: str) -> bytes | Path:
        name, place = _element(column)
        return self.table.picture(self.table.value(row, name)[place], name)

    def stamp(self, row: int, column: str) -> str:
        found = self.image(row, column)
        if isinstance(found, Path):
            return file_stamp(found)
        signature = self.table.signature()
        return f"{signature}|{row}|{column}" if signature else ""

    def ref(self, row: int, column: str) -> ImageRef:
        """The picture of an element, unread."""
        return ImageRef(Cell(self, row, column), f"{self.table.place(row)} {column}")

    def holds_bytes(self, column: str) -> bool:
        """Whether the pictures themselves are in the table."""
        return self.table.holds_bytes(_element(column)[0])

    def signature(self) -> str:
        """A name for this very state of the table; "" when there is none."""
        return self.table.signature()


def _element(column: str) -> tuple[str, int]:
    name, _, place = column.rstrip("]").rpartition("[")
    return name, int(place)


def is_ranked(table: Table) -> bool:
    """Whether a table has lists of pictures."""
    return any(name in table.columns for name in IMAGES)


def read_ranked(recipe: DataRecipe) -> tuple[list[RankedRow], Report]:
    """All lists of `open_ranked`, in memory."""
    reading = open_ranked(recipe)
    return list(reading.rows), reading.report


def open_ranked(recipe: DataRecipe, progress: Progress | None = None, table: Table | None = None) -> Reading[RankedRow]:
    """Lists with the columns ``prompt``, ``images`` (or ``image_path``) and ``scores`` (higher is better) or ``rank``
    (1 or 0 is best), one after another; what is raised at the end comes after the last row.

    A row with an unreadable picture, with fewer than two pictures or with another number of scores is left out, and so
    is a tie, unless ``ties`` is keep: a list whose scores, and rewards if there are any, are all equal, which teaches
    nothing. ``shuffle_labels`` deals a list's scores out anew, keyed by its id. ``rewards`` names further columns of
    scores.

    Raises:
        UserError: as ``read_pairs``.
    """
    return open_rows(recipe, progress, ListColumns(table or table_of(recipe), recipe.rewards))


class ListColumns(Columns[RankedRow]):
    """Columns of ranked lists; ``rewards``: names of those with further scores."""

    kind, what, pictures = "ranked", "list", 2

    def __init__(self, table: Table, rewards: Sequence[str] = ()) -> None:
        self.prompt, self.images = column_of(table, PROMPTS), column_of(table, IMAGES)
        self.order, self.rewards = column_of(table, ORDERS), [column_of(table, (name,)) for name in rewards]
        self.lists = Lists(table)
        super().__init__(table)

    def fields(self) -> list[str]:
        return ["scores", *self.rewards]

    def draft(self, i: int) -> Draft:
        table, images, prompt = self.table, self.images, prompt_of(self.table, i, self.prompt)
        listed = table.value(i, images)
        if not isinstance(listed, list) or len(listed) < 2:
            count = f"{len(listed)} in '{images}'" if isinstance(listed, list) else f"'{images}' is no list"
            raise ImageError(f"{count}: a list has two pictures or more", "malformed row")
        scores, *others = (_scores(table.value(i, name), name) for name in (self.order, *self.rewards))
        for numbers, column in zip((scores, *others), (self.order, *self.rewards), strict=True):
            if len(numbers) != len(listed):
                raise ImageError(f"{len(listed)} pictures, {len(numbers)} {column}", "malformed row")
        refs = tuple(self.lists.ref(i, f"{images}[{k}]") for k in range(len(listed)))
        rewards = tuple(zip(self.rewards, map(tuple, others), strict=True))
        return Draft(table.place(i), self.name(i), (prompt, None), refs, tuple(scores), rewards=rewards)

    def make(
        self, draft: Draft, looks: Sequence[Look], recipe: DataRecipe, filters: Filters, names: Names
    ) -> RankedRow | BadRow:
        """Best first."""
        prompt, scores = draft.prompts[0], [score or 0.0 for score in draft.scores]
        if recipe.ties != "keep" and all(len(set(n)) == 1 for n in (scores, *(r for _, r in draft.rewards))):
            return draft.bad("tie", "all scores are equal")
        flaw = filters.refuse_list(prompt, looks)
        if flaw:
            return draft.bad(*flaw)
        name = names.take(digest_of(prompt.encode(), *(look.digest.encode() for look in looks))[:20])
        best = sorted(range(len(looks)), key=lambda k: -scores[k])
        pictures = tuple(looks[k].apply(draft.refs[k]) for k in best)
        more = tuple((reward, tuple(values[k] for k in best)) for reward, values in draft.rewards)
        row = RankedRow(draft.id or name, prompt, pictures, tuple(scores[k] for k in best), more)
        return _dealt(row) if recipe.shuffle_labels else row

    def ties(self, row: RankedRow) -> int:
        return int(len(set(row.scores)) == 1)


def _dealt(row: RankedRow) -> RankedRow:
    """The pictures in an order keyed by the id, under the same falling scores."""
    order = generator("shuffle_labels", row.id).permutation(len(row.pictures))
    return replace(row, pictures=tuple(row.pictures[k] for k in order))


def _scores(marks: Any, order: str) -> list[float]:
    try:
        numbers = [float(mark) for mark in marks]
    except (TypeError, ValueError) as error:
        raise ImageError(f"'{order}' is no list of numbers", "bad label") from error
    if not all(map(math.isfinite, numbers)):
        raise ImageError(f"'{order}' holds a number that is not finite", "bad label")
    return [-number for number in numbers] if order == "rank" else numbers
