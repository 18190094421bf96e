"""Rated pictures: one picture and one label a row, liked or not."""

from __future__ import annotations

from collections.abc import Sequence

from ..recipe import DataRecipe
from .filters import Filters, Names
from .images import ImageError
from .readers import SingleColumns
from .reading import Draft, Progress, Reading, coin, column_of, open_rows, prompt_of
from .rows import BadRow, RatedRow
from .scan import Look
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
    return open_rows(recipe, progress, RatedColumns(table))


class RatedColumns(SingleColumns[RatedRow]):
    """Columns of rated pictures."""

    kind, what = "rated", "rated picture"

    def __init__(self, table: Table) -> None:
        super().__init__(table, ("image", "file_name"))
        self.label = column_of(table, ("label", "split"))

    def fields(self) -> list[str]:
        return ["label"]

    def draft(self, i: int) -> Draft:
        table, liked = self.table, _label(self.table, i, self.label)
        prompt = prompt_of(table, i, self.prompt)
        return Draft(table.place(i), self.name(i), (prompt, None), (table.ref(i, self.image),), (), liked)

    def make(
        self, draft: Draft, looks: Sequence[Look], recipe: DataRecipe, filters: Filters, names: Names
    ) -> RatedRow | BadRow:
        name = self.named(draft, looks[0], filters, names)
        if isinstance(name, BadRow):
            return name
        turned = recipe.shuffle_labels and coin("shuffle_labels", name)
        sign = -draft.preference if turned else draft.preference
        return RatedRow(name, draft.prompts[0], looks[0].apply(draft.refs[0]), sign)


def _label(table: Table, i: int, column: str) -> float:
    """1.0 for liked, -1.0 for not. Raises ImageError for anything else."""
    value = table.value(i, column)
    word = "" if value is None else str(value).strip().lower()
    if word in LIKED:
        return 1.0
    if word in DISLIKED:
        return -1.0
    raise ImageError(f"'{column}' is {value!r}"[:80] + ", neither 1 nor 0", "bad label" if word else "no label")
