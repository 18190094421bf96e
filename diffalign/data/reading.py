"""What all readers of rows share: drafts, looks at their pictures, policies, the account of what was left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, TypeVar

import numpy as np

from ..errors import UserError, nearest
from ..keyed import generator
from ..recipe import DataRecipe
from .filters import Filters, Names, number_of
from .images import ImageError
from .rows import BadRow, ImageRef, Report
from .rowtable import R
from .scan import KEEP_FROM, SAVE_EVERY, Look, Scanner
from .table import Table

Progress = Callable[[int, int], None]
CHUNK = 256
D = TypeVar("D")
IDS = ("id", "ranking_id", "pair_id")


@dataclass(frozen=True)
class Draft:
    """A row before its pictures were looked at. ``preference`` is for the first picture: 1, 0, or 0.5 for a tie; of a
    rated picture its label. ``rewards``: further scores of a list's pictures."""

    place: str
    id: str
    prompts: tuple[str, str | None]
    refs: tuple[ImageRef, ...]
    scores: tuple[float | None, ...]
    preference: float = 1.0
    user: str | None = None
    rewards: tuple[tuple[str, tuple[float, ...]], ...] = ()

    def bad(self, reason: str, detail: str = "") -> BadRow:
        return BadRow(self.place, reason, detail, self.prompts[0], self.refs)


@dataclass(frozen=True)
class Reading(Generic[R]):
    """Rows as they are read. ``report`` is complete after the last one."""

    table: Table
    report: Report
    rows: Iterator[R]


class Columns(Generic[R]):
    """Which columns of a table hold what, and what rows become of them. ``pictures``: how many a row has, about."""

    kind: ClassVar[Literal["pair", "image", "rated", "ranked"]]
    what: ClassVar[str]
    pictures = 1

    def __init__(self, table: Table) -> None:
        self.table, self.ids = table, own_ids(table)

    def name(self, i: int) -> str:
        """The row's own id; "" where the rows have none."""
        return str(self.table.value(i, self.ids)) if self.ids else ""

    def fields(self) -> list[str]:
        """The plain columns besides id and prompt that rows of this table can have values in."""
        return []

    def draft(self, i: int) -> Draft:
        """Raises ImageError or BadValue for a row that cannot be read."""
        raise TypeError(f"{type(self).__name__} reads no rows")

    def make(
        self, draft: Draft, looks: Sequence[Look], recipe: DataRecipe, filters: Filters, names: Names
    ) -> R | BadRow:
        """The row after the policies; or why it is left out."""
        raise TypeError(f"{type(self).__name__} makes no rows")

    def ties(self, row: R) -> int:
        """Whether a row is a tie that was kept."""
        return 0


class BadValue(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def open_rows(recipe: DataRecipe, progress: Progress | None, columns: Columns[R]) -> Reading[R]:
    """The rows of a table, one after another; what is wrong with them as a whole is raised after the last one."""
    table = columns.table
    report = Report(table.label, table.format)

    def rows() -> Iterator[R]:
        filters, names = Filters(recipe), Names()
        for draft, looks in walk(table, columns.pictures, columns.draft, recipe, report, progress):
            row = columns.make(draft, looks, recipe, filters, names)
            if isinstance(row, BadRow):
                report.bad.append(row)
                continue
            report.usable += 1
            report.ties_kept += columns.ties(row)
            yield row
            if report.usable == recipe.max_pairs:
                break
        settle(report, report.usable, recipe, columns.what)

    return Reading(table, report, rows())


def walk(
    table: Table,
    pictures: int,
    draft: Callable[[int], Draft],
    recipe: DataRecipe,
    report: Report,
    progress: Progress | None,
) -> Iterator[tuple[Draft, list[Look]]]:
    """Drafts with looks at their pictures, of which a row has about ``pictures``; what cannot become one goes to the
    report."""
    report.rows = len(table.bad)
    report.bad += table.bad
    expected = min(table.total or KEEP_FROM, recipe.max_pairs or table.total or KEEP_FROM)
    with Scanner(recipe, table.label, pictures * expected) as scanner:
        start = 0
        while table.exists(start):
            drafts: list[Draft | BadRow] = []
            for i in range(start, start + min(CHUNK, table.together)):
                if not table.exists(i):
                    break
                drafts.append(draft_or_flaw(table, i, draft))
            looks = iter(scanner.look([ref for d in drafts if isinstance(d, Draft) for ref in d.refs]))
            for d in drafts:
                report.rows += 1
                if isinstance(d, BadRow):
                    report.bad.append(d)
                    continue
                mine = [next(looks) for _ in d.refs]
                wrong = next((look for look in mine if look.error), None)
                if wrong is not None:
                    report.bad.append(d.bad(wrong.reason, wrong.error))
                else:
                    report.available = len(table.bad) + (table.total or start + len(drafts))
                    yield d, mine
            scanner.save(SAVE_EVERY)
            start += len(drafts)
            if progress is not None:
                progress(start, table.total or 0)
    report.available = len(table.bad) + (table.total or start)


def draft_or_flaw(table: Table, i: int, draft: Callable[[int], D]) -> D | BadRow:
    """A row before its pictures were looked at (or what else ``draft`` makes of it), or why there is none."""
    try:
        return draft(i)
    except (ImageError, BadValue) as error:
        return BadRow(table.place(i), error.reason, str(error))


def coin(purpose: str, key: str) -> bool:
    """Heads or tails, by the key alone."""
    return bool(generator(purpose, key).random() < 0.5)


def settle(report: Report, usable: int, recipe: DataRecipe, what: str) -> None:
    """Close the account. Raises UserError for a flaw under ``strict`` and when nothing is left."""
    report.usable = usable
    flaws = report.flaws
    if recipe.strict and flaws:
        raise UserError(
            f"data.strict: {len(flaws)} of {report.rows} rows of '{report.source}' are flawed; the first is {flaws[0]}"
        )
    if not usable:
        first = f"; first: {report.bad[0]}" if report.bad else ""
        raise UserError(f"no usable {what} in '{report.source}': {report.summary()}{first}")


def column_of(table: Table, names: tuple[str, ...]) -> str:
    """The first of ``names`` that the table has. Raises UserError where there is none."""
    for name in names:
        if name in table.columns:
            return name
    if not table.columns:
        raise UserError(f"no row in '{table.label}'" + (f"; first: {table.bad[0]}" if table.bad else ""))
    hint = nearest(names[0], table.columns)
    hint = hint if hint.startswith("; did") else ""
    wanted = " or ".join(f"'{name}'" for name in names)
    raise UserError(f"'{table.label}' has no column {wanted}; it has {', '.join(table.columns)}{hint}")


def prompt_column(table: Table) -> str:
    """The column of the prompts of captioned pictures. Raises UserError where there is none."""
    return column_of(table, ("prompt", "caption", "text"))


def own_ids(table: Table) -> str | None:
    """The column of the rows' own ids, where every row has one and no two are equal. A stream cannot tell ahead."""
    for name in IDS if table.total else ():
        if name in table.columns and _all_differ(table, name):
            return name
    return None


def _all_differ(table: Table, column: str) -> bool:
    numbers = np.empty(table.total or 0, dtype=np.uint64)
    for i in range(len(numbers)):
        try:
            value = table.value(i, column)
        except ImageError:
            return False
        if value is None:
            return False
        numbers[i] = number_of(str(value))
    return len(np.unique(numbers)) == len(numbers)


def prompt_of(table: Table, i: int, column: str) -> str:
    """A row's prompt. Raises what `draft_or_flaw` knows."""
    value = table.value(i, column)
    if not isinstance(value, str) or not value.strip():
        raise BadValue("no prompt", "" if value is None or isinstance(value, str) else f"'{column}' is no text")
    return whole(value, column)


def whole(text: str, column: str) -> str:
    """The text, where it is Unicode (JSON can hold half a character)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadValue("malformed row", f"'{column}' holds half a character") from error
    return text


def number(table: Table, i: int, column: str, reason: str = "malformed row") -> float | None:
    """A finite number; None where there is none."""
    value = table.value(i, column)
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise BadValue(reason, f"'{column}' is no number: {value!r}"[:80]) from error
    return number if math.isfinite(number) else None
