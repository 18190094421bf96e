"""Ranked lists: pictures of one prompt with scores or ranks, one list a row (as HPDv2 has them)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..recipe import DataRecipe
from .images import ImageError
from .rows import BadRow, Cell, ImageRef, Report, digest_of
from .scan import Look, Scanner
from .table import Table
from .tables import open_table

IMAGES = ("images", "image_path")
PROMPTS = ("prompt", "caption")


@dataclass(frozen=True)
class RankedRow:
    """``pictures`` of one prompt and their ``scores``, higher is better, best first."""

    id: str
    prompt: str
    pictures: tuple[ImageRef, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class _Element:
    """One picture of a list in a cell."""

    table: Table
    number: int

    def image(self, row: int, column: str) -> bytes | Path:
        return self.table.picture(self.table.value(row, column)[self.number], column)

    def stamp(self, row: int, column: str) -> str:
        signature = self.table.signature()
        return f"{signature}|{row}|{column}|{self.number}" if signature else ""


def read_ranked(recipe: DataRecipe) -> tuple[list[RankedRow], Report]:
    """Lists with the columns ``prompt``, ``images`` (or ``image_path``) and ``scores`` (higher is better) or ``rank``
    (1 or 0 is best).

    A row with an unreadable picture, with fewer than two pictures or with another number of scores is left out.

    Raises:
        UserError: as ``read_pairs``.
    """
    table = open_table(recipe.path, recipe.format, recipe.split, recipe.streaming)
    images, prompt = _first(table, IMAGES), _first(table, PROMPTS)
    order = _first(table, ("scores", "rank"))
    report = Report(table.label, table.format, rows=len(table.bad), bad=list(table.bad))
    rows: list[RankedRow] = []
    with Scanner(recipe, table.label, 0) as scanner:
        i = 0
        while table.exists(i) and len(rows) != recipe.max_pairs:
            report.rows += 1
            try:
                rows.append(_row(table, i, prompt, images, order, scanner))
            except ImageError as error:
                report.bad.append(BadRow(table.place(i), error.reason, str(error)))
            i += 1
    report.usable, report.available = len(rows), len(table.bad) + (table.total or i)
    if recipe.strict and report.flaws:
        raise UserError(
            f"data.strict: {len(report.flaws)} rows of '{table.label}' are flawed; first: {report.flaws[0]}"
        )
    if not rows:
        first = f"; first: {report.bad[0]}" if report.bad else ""
        raise UserError(f"no usable list in '{table.label}': {report.summary()}{first}")
    return rows, report


def _first(table: Table, names: Sequence[str]) -> str:
    for name in names:
        if name in table.columns:
            return name
    wanted = " or ".join(f"'{name}'" for name in names)
    raise UserError(f"'{table.label}' has no column {wanted}; it has {', '.join(table.columns)}")


def _row(table: Table, i: int, prompt: str, images: str, order: str, scanner: Scanner) -> RankedRow:
    text, listed, marks = table.value(i, prompt), table.value(i, images), table.value(i, order)
    if not isinstance(text, str) or not text.strip():
        raise ImageError("", "no prompt")
    if not isinstance(listed, list) or len(listed) < 2:
        raise ImageError(f"'{images}' is no list of two or more pictures", "malformed row")
    scores = _scores(marks, order)
    if len(scores) != len(listed):
        raise ImageError(f"{len(listed)} pictures, {len(scores)} {order}", "malformed row")
    place = table.place(i)
    refs = [ImageRef(Cell(_Element(table, k), i, images), f"{place} {images}[{k}]") for k in range(len(listed))]
    looks: list[Look] = scanner.look(refs)
    for look in looks:
        if look.error:
            raise ImageError(look.error, look.reason)
    best = sorted(range(len(refs)), key=lambda k: -scores[k])
    name = digest_of(text.encode(errors="replace"), *(look.digest.encode() for look in looks))[:20]
    return RankedRow(name, text, tuple(looks[k].apply(refs[k]) for k in best), tuple(scores[k] for k in best))


def _scores(marks: Any, order: str) -> list[float]:
    try:
        numbers = [float(mark) for mark in marks]
    except (TypeError, ValueError) as error:
        raise ImageError(f"'{order}' is no list of numbers", "bad label") from error
    if not all(map(math.isfinite, numbers)):
        raise ImageError(f"'{order}' holds a number that is not finite", "bad label")
    return [-number for number in numbers] if order == "rank" else numbers
