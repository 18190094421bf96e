"""Ranked lists: pictures of one prompt with scores or ranks, one list a row (as HPDv2 has them)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..keyed import generator
from ..recipe import DataRecipe
from .filters import Names
from .images import ImageError
from .readers import Progress, Reading, column_of, own_ids, settle, table_of
from .rows import BadRow, Cell, ImageRef, RankedRow, Report, digest_of, file_stamp
from .scan import KEEP_FROM, SAVE_EVERY, Look, Scanner
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

    A row with an unreadable picture, with fewer than two pictures or with another number of scores is left out.
    ``shuffle_labels`` deals a list's scores out anew, keyed by its id. ``rewards`` names further columns of scores.

    Raises:
        UserError: as ``read_pairs``.
    """
    table = table or table_of(recipe)
    names = column_of(table, PROMPTS), column_of(table, IMAGES), column_of(table, ORDERS)
    ids = own_ids(table)
    for name in recipe.rewards:
        column_of(table, (name,))
    report = Report(table.label, table.format, rows=len(table.bad), bad=list(table.bad))

    def rows() -> Iterator[RankedRow]:
        known, i = Names(), 0
        with Scanner(recipe, table.label, 2 * (table.total or KEEP_FROM)) as scanner:
            while table.exists(i):
                report.rows += 1
                try:
                    row = _row(table, i, names, recipe.rewards, scanner)
                    if recipe.duplicates == "skip" and row.id in known:
                        raise ImageError("", "duplicate")
                except ImageError as error:
                    report.bad.append(BadRow(table.place(i), error.reason, str(error)))
                else:
                    report.usable += 1
                    name = known.take(row.id)
                    row = replace(row, id=str(table.value(i, ids)) if ids else name)
                    yield _dealt(row) if recipe.shuffle_labels else row
                i += 1
                scanner.save(SAVE_EVERY)
                if progress is not None:
                    progress(i, table.total or 0)
                if report.usable == recipe.max_pairs:
                    break
        report.available = len(table.bad) + (table.total or i)
        settle(report, report.usable, recipe, "list")

    return Reading(table, report, rows())


def _row(table: Table, i: int, names: tuple[str, str, str], rewards: Sequence[str], scanner: Scanner) -> RankedRow:
    """The list of a row, best first, under a name made of its content. Raises ImageError."""
    _, images, order = names
    text, listed, marks = (table.value(i, name) for name in names)
    if not isinstance(text, str) or not text.strip():
        raise ImageError("", "no prompt")
    if not isinstance(listed, list) or len(listed) < 2:
        count = f"{len(listed)} in '{images}'" if isinstance(listed, list) else f"'{images}' is no list"
        raise ImageError(f"{count}: a list has two pictures or more", "malformed row")
    scores, *others = (_scores(m, n) for m, n in ((marks, order), *((table.value(i, n), n) for n in rewards)))
    for numbers, column in zip((scores, *others), (order, *rewards), strict=True):
        if len(numbers) != len(listed):
            raise ImageError(f"{len(listed)} pictures, {len(numbers)} {column}", "malformed row")
    lists = Lists(table)
    refs = [lists.ref(i, f"{images}[{k}]") for k in range(len(listed))]
    looks: list[Look] = scanner.look(refs)
    for look in looks:
        if look.error:
            raise ImageError(look.error, look.reason)
    best = sorted(range(len(refs)), key=lambda k: -scores[k])
    name = digest_of(text.encode(errors="replace"), *(look.digest.encode() for look in looks))[:20]
    pictures = tuple(looks[k].apply(refs[k]) for k in best)
    more = tuple((n, tuple(numbers[k] for k in best)) for n, numbers in zip(rewards, others, strict=True))
    return RankedRow(name, text, pictures, tuple(scores[k] for k in best), more)


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
