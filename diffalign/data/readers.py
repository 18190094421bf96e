"""Preference pairs and captioned pictures from whatever format they come in.

Pairs: columns ``prompt`` (or ``caption``), ``chosen``, ``rejected`` (or ``chosen_file_name``,
``rejected_file_name``), optional ``rejected_prompt``, ``chosen_score``, ``rejected_score``, ``tie``, ``user`` (or
``user_id``) and ``label`` (1: as written, 0.5: tie, 0: the other way round); or Pick-a-Pic's ``caption``, ``jpg_0``,
``jpg_1``, ``label_0``, ``label_1``, ``has_label``, with ``caption_0``, ``caption_1`` where each picture has a caption
(Pick-Double Caption).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..recipe import DataRecipe
from .files import cache_root
from .filters import Filters, Names
from .perturb import LEVELS, perturb
from .reading import (
    BadValue,
    Columns,
    Draft,
    Progress,
    Reading,
    coin,
    column_of,
    number,
    open_rows,
    prompt_column,
    prompt_of,
    whole,
)
from .rows import BadRow, ImageRow, ImageSet, PairRow, PairSet, digest_of
from .rowtable import ImageRows, PairRows, R
from .scan import Look
from .table import Table
from .tables import open_table

USERS = ("user", "user_id")
PAIR_COLUMNS = {"chosen", "jpg_0", "chosen_file_name"}  # one of them makes a table one of pairs


def read_pairs(recipe: DataRecipe, progress: Progress | None = None) -> PairSet:
    """Every usable pair of ``recipe.path``, winner first, and the account of the others.

    Rows keep references, not pictures; each picture was decoded once and is known to be whole. Ids are the rows' own
    (``id``, ``ranking_id``, ``pair_id``) where all are there and differ, else a hash of prompt and pictures.

    Policies: ``ties`` skip; random (a coin keyed by the id); keep (as written, marked ``tie=True``). ``duplicates``
    skip leaves out pairs of two equal pictures (bytes or pixels) and pairs that were there before (same prompt and
    pictures, whichever was preferred). ``shuffle_labels`` swaps winner and loser by a coin keyed by the id, and the
    scores stay where they were: nothing tells the two apart in this control run. ``perturb`` gives losers without a
    caption of their own the prompt, made worse by fixed rules (`data.perturb`).
    ``max_pairs`` stops after that many usable rows. Rows whose data are flawed are left out, or, with ``strict``,
    refused.

    Raises:
        UserError: no such data, a column is missing, nothing usable, or a flaw under ``strict``.
    """
    reading = open_pairs(recipe, progress)
    rows = PairRows(reading.table, row_folder(recipe))
    rows.extend(reading.rows)
    return PairSet(rows, reading.report)


def open_pairs(recipe: DataRecipe, progress: Progress | None = None, table: Table | None = None) -> Reading[PairRow]:
    """The same, one after another; what :func:`read_pairs` raises at its end comes after the last row."""
    return open_rows(recipe, progress, PairColumns.of(table or table_of(recipe)))


def read_images(recipe: DataRecipe, progress: Progress | None = None) -> ImageSet:
    """Captioned pictures: ``file_name`` (or ``image``), ``prompt`` (or ``caption``, ``text``), optional ``score``.

    The formats, ids and rules for bad rows are those of :func:`read_pairs`; ``max_pairs`` counts pictures.

    Raises:
        UserError: as :func:`read_pairs`.
    """
    reading = open_images(recipe, progress)
    rows = ImageRows(reading.table, row_folder(recipe))
    rows.extend(reading.rows)
    return ImageSet(rows, reading.report)


def open_images(recipe: DataRecipe, progress: Progress | None = None, table: Table | None = None) -> Reading[ImageRow]:
    """The same, one after another; what :func:`read_images` raises at its end comes after the last row."""
    return open_rows(recipe, progress, ImageColumns(table or table_of(recipe)))


def row_folder(recipe: DataRecipe) -> Path | None:
    """Where rows go that memory should not hold: beside the cache; None is the system's temporary folder."""
    return cache_root(recipe) / "rows" if recipe.cache else None


def table_of(recipe: DataRecipe) -> Table:
    """The table of ``recipe.path``. Raises UserError."""
    if recipe.streaming and not recipe.cache:
        raise UserError("data.streaming needs data.cache=true: without a cache every step would read the stream anew")
    return open_table(recipe.path, recipe.format, recipe.split, recipe.streaming)


def _swapped(row: PairRow) -> PairRow:
    """Winner and loser exchanged; each picture keeps its score and its own prompt."""
    prompt, other = (row.prompt, None) if row.rejected_prompt is None else (row.rejected_prompt, row.prompt)
    return replace(
        row,
        prompt=prompt,
        rejected_prompt=other,
        chosen=row.rejected,
        rejected=row.chosen,
        chosen_score=row.rejected_score,
        rejected_score=row.chosen_score,
    )


class PairColumns(Columns[PairRow]):
    """Columns of pairs."""

    kind, what, pictures = "pair", "pair", 2

    def __init__(self, table: Table, prompt: str, images: tuple[str, str], scores: tuple[str, str], pick: bool) -> None:
        super().__init__(table)
        self.prompt, self.images, self.scores, self.pick = prompt, images, scores, pick
        self.other = "caption_1" if prompt == "caption_0" else "rejected_prompt"  # the second picture's own prompt

    @staticmethod
    def of(table: Table) -> PairColumns:
        """Raises UserError that names the missing column."""
        pick = "jpg_0" in table.columns or "jpg_1" in table.columns
        double = pick and {"caption_0", "caption_1"} <= set(table.columns)
        prompt = "caption_0" if double else column_of(table, ("prompt", "caption"))
        if pick:
            images = column_of(table, ("jpg_0",)), column_of(table, ("jpg_1",))
            column_of(table, ("label_0",))
            scores = ("score_0", "score_1") if "score_0" in table.columns else ("ps_score_0", "ps_score_1")
        else:
            images = (
                column_of(table, ("chosen", "chosen_file_name")),
                column_of(table, ("rejected", "rejected_file_name")),
            )
            scores = ("chosen_score", "rejected_score")
        return PairColumns(table, prompt, images, scores, pick)

    def fields(self) -> list[str]:
        """Under the names of a pair."""
        has = set(self.table.columns)
        found = ["rejected_prompt"] if self.other in has else []
        if self.scores[0] in has and self.scores[1] in has:
            found += ["chosen_score", "rejected_score"]
        if has & set(USERS):
            found.append("user")
        return found + (["tie"] if self.pick or has & {"tie", "label"} else [])

    def draft(self, i: int) -> Draft:
        table = self.table
        other = table.value(i, self.other)
        if other is not None and not isinstance(other, str):
            raise BadValue("malformed row", f"'{self.other}' is no text")
        return Draft(
            table.place(i),
            self.name(i),
            (prompt_of(table, i, self.prompt), other and whole(other, self.other)),
            tuple(table.ref(i, column) for column in self.images),
            tuple(number(table, i, column) for column in self.scores),
            self._picked(i) if self.pick else self._written(i),
            _user(table, i),
        )

    def make(
        self, draft: Draft, looks: Sequence[Look], recipe: DataRecipe, filters: Filters, names: Names
    ) -> PairRow | BadRow:
        """Winner first."""
        tie = draft.preference == 0.5
        if tie and recipe.ties == "skip":
            return draft.bad("tie")
        a, b = draft.scores
        gap = None if a is None or b is None else (b - a if draft.preference == 0 else a - b)
        flaw = filters.refuse(draft.prompts, looks, gap)
        if flaw:
            return draft.bad(*flaw)
        first, second = (look.apply(ref) for look, ref in zip(looks, draft.refs, strict=True))
        row = PairRow("", draft.prompts[0], first, second, draft.prompts[1], a, b, tie, draft.user)
        if draft.preference == 0:
            row = _swapped(row)
        content = digest_of(row.prompt.encode(), row.chosen.digest.encode(), row.rejected.digest.encode())[:20]
        row = replace(row, id=draft.id or names.take(content))
        if tie and recipe.ties == "random":
            row = replace(_swapped(row) if coin("tie", row.id) else row, tie=False)
        if recipe.shuffle_labels and coin("shuffle_labels", row.id):
            row = replace(_swapped(row), chosen_score=row.chosen_score, rejected_score=row.rejected_score)
        if recipe.perturb and row.rejected_prompt is None:
            row = replace(row, rejected_prompt=perturb(row.prompt, LEVELS[recipe.perturb]))
        return row

    def ties(self, row: PairRow) -> int:
        return int(row.tie)

    def _picked(self, i: int) -> float:
        """Pick-a-Pic: label_0 is 1 when jpg_0 was preferred, 0.5 for a tie; label_1 = 1 - label_0."""
        label = number(self.table, i, "label_0", "bad label")
        if label is None or not _flag(self.table, i, "has_label", True):
            raise BadValue("no label", "")
        other = number(self.table, i, "label_1", "bad label")
        if label not in (0.0, 0.5, 1.0) or (other is not None and label + other != 1):
            raise BadValue("bad label", f"label_0 {label:g}" + (f", label_1 {other:g}" if other is not None else ""))
        return label

    def _written(self, i: int) -> float:
        if _flag(self.table, i, "tie", False):
            return 0.5
        label = number(self.table, i, "label", "bad label")
        if label not in (None, 0.0, 0.5, 1.0):
            raise BadValue("bad label", f"label {label:g} is none of 1, 0.5, 0")
        return 1.0 if label is None else label


class SingleColumns(Columns[R]):
    """Columns of single pictures with a prompt."""

    def __init__(self, table: Table, image: tuple[str, ...]) -> None:
        self.prompt, self.image = prompt_column(table), column_of(table, image)
        super().__init__(table)

    def named(self, draft: Draft, look: Look, filters: Filters, names: Names) -> str | BadRow:
        """The picture's id; or why it is left out."""
        flaw = filters.refuse_one(draft.prompts[0], look)
        if flaw:
            return draft.bad(*flaw)
        name = names.take(digest_of(draft.prompts[0].encode(), look.digest.encode())[:20])
        return draft.id or name


class ImageColumns(SingleColumns[ImageRow]):
    """Columns of captioned pictures."""

    kind, what = "image", "picture"

    def __init__(self, table: Table) -> None:
        super().__init__(table, ("file_name", "image"))

    def draft(self, i: int) -> Draft:
        table, prompt = self.table, prompt_of(self.table, i, self.prompt)
        score = number(table, i, "score")
        return Draft(table.place(i), self.name(i), (prompt, None), (table.ref(i, self.image),), (score,))

    def make(
        self, draft: Draft, looks: Sequence[Look], recipe: DataRecipe, filters: Filters, names: Names
    ) -> ImageRow | BadRow:
        name = self.named(draft, looks[0], filters, names)
        if isinstance(name, BadRow):
            return name
        return ImageRow(name, draft.prompts[0], looks[0].apply(draft.refs[0]), draft.scores[0])


def _user(table: Table, i: int) -> str | None:
    """Who preferred, as text; None where nobody is named."""
    for column in USERS:
        value = table.value(i, column)
        if value is not None and str(value).strip():
            return whole(str(value), column)
    return None


def _flag(table: Table, i: int, column: str, missing: bool) -> bool:
    value: Any = table.value(i, column)
    if value is None:
        return missing
    return value.strip().lower() in ("1", "true", "yes") if isinstance(value, str) else bool(value)
