"""Rated pictures: one picture and one label a row, liked or not."""

from __future__ import annotations

from collections.abc import Iterator

from ..recipe import DataRecipe
from .filters import Filters, Names
from .images import ImageError
from .readers import Draft, Progress, Reading, coin, column_of, own_ids, prompt_column, prompt_of, settle, walk
from .rows import RatedRow, Report, digest_of
from .table import Table

# What a label may say; the words are those of the lists that Diffusion-KTO's code makes of Pick-a-Pic.
LIKED = {"1", "+1", "1.0", "true", "yes", "exclusive_win", "intersections"}
DISLIKED = {"0", "-1", "0.0", "-1.0", "false", "no", "exclusive_lose"}


def open_rated(recipe: DataRecipe, progress: Progress | None, table: Table) -> Reading[RatedRow]:
    """Pictures (``image`` or ``file_name``) with a prompt and a ``label`` (or ``split``): 1, true, +1 for liked, 0,
    false, -1 for not; one after another, and what is raised at the end comes after the last row.

    Formats, ids and rules for bad rows are those of ``read_pairs``. ``shuffle_labels`` turns a label by a coin keyed by
    the row's id.

    Raises:
        UserError: as ``read_pairs``.
    """
    prompt, image = prompt_column(table), column_of(table, ("image", "file_name"))
    label, ids = column_of(table, ("label", "split")), own_ids(table)
    report = Report(table.label, table.format)

    def draft(i: int) -> Draft:
        liked = _label(table, i, label)
        name = str(table.value(i, ids)) if ids else ""
        return Draft(table.place(i), name, (prompt_of(table, i, prompt), None), (table.ref(i, image),), (), liked)

    def rows() -> Iterator[RatedRow]:
        filters, names = Filters(recipe), Names()
        for found, (look,) in walk(table, (image,), draft, recipe, report, progress):
            content = digest_of(found.prompts[0].encode(), look.digest.encode())[:20]
            flaw = ("duplicate", "") if recipe.duplicates == "skip" and content in names else None
            flaw = flaw or filters.refuse_one(found.prompts[0], look)
            if flaw:
                report.bad.append(found.bad(*flaw))
                continue
            name = names.take(content)
            name = found.id or name
            report.usable += 1
            turned = recipe.shuffle_labels and coin("shuffle_labels", name)
            sign = -found.preference if turned else found.preference
            yield RatedRow(name, found.prompts[0], look.apply(found.refs[0]), sign)
            if report.usable == recipe.max_pairs:
                break
        settle(report, report.usable, recipe, "rated picture")

    return Reading(table, report, rows())


def _label(table: Table, i: int, column: str) -> float:
    """1.0 for liked, -1.0 for not. Raises ImageError for anything else."""
    value = table.value(i, column)
    word = "" if value is None else str(value).strip().lower()
    if word in LIKED:
        return 1.0
    if word in DISLIKED:
        return -1.0
    raise ImageError(f"'{column}' is {value!r}"[:80] + ", neither 1 nor 0", "bad label" if word else "no label")
