"""Easy pairs first (Curriculum-DPO, arXiv 2405.13637): nested chunks of the pairs by their score gap."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UserError
from ..recipe import DataRecipe

if TYPE_CHECKING:
    from .cache import LatentCache
    from .rowtable import Rows


@dataclass(frozen=True)
class Curriculum:
    """``ranked``: rows of the cache, easy to hard. The first of ``chunks`` equal parts is drawn from for ``positions``
    rows of the endless order, then the first two, and so on; at last all rows, as without a curriculum."""

    ranked: np.ndarray
    chunks: int
    positions: int

    def size(self, stage: int) -> int:
        """How many rows a stage (from 0) draws from."""
        return -(-len(self.ranked) * (stage + 1) // self.chunks)

    def rows(self, stage: int) -> np.ndarray:
        """The rows of a stage, in the cache's order."""
        return np.sort(self.ranked[: self.size(stage)])

    def first_epoch(self, stage: int) -> int:
        """How many epochs were begun in the stages before: no visit of a row ever comes again."""
        return sum(-(-self.positions // self.size(s)) for s in range(stage))

    def stages(self, start: int, count: int) -> Iterator[tuple[int, np.ndarray]]:
        """(stage, positions in it) of the positions start .. start + count - 1."""
        end = start + count
        while start < end:
            stage = min(start // self.positions, self.chunks - 1)
            last = end if stage == self.chunks - 1 else min(end, (stage + 1) * self.positions)
            yield stage, np.arange(start, last) - stage * self.positions
            start = last


def check_curriculum(rows: Rows, recipe: DataRecipe) -> None:
    """Raises UserError for a ``data.curriculum`` over rows that are no pairs, or pairs without scores."""
    if recipe.curriculum is None:
        return
    if "chosen" not in rows.sides:
        raise UserError("data.curriculum orders pairs by score gap, and this method takes no pairs; set it to null")
    if recipe.scorer is not None:
        return
    absent = int(np.isnan(rows.values("chosen_score") - rows.values("rejected_score")).sum())
    if absent:
        raise UserError(
            f"data.curriculum orders pairs by their score gap, and {absent} of {len(rows)} have no scores: write them "
            "into the data with `diffalign pairs score`, or set data.scorer"
        )


def curriculum_of(cache: LatentCache, training: np.ndarray, recipe: DataRecipe, batch: int) -> Curriculum | None:
    """The curriculum that ``data.curriculum`` asks for, over the training rows; None where it asks for none.

    Args:
        batch: rows that a training step draws.

    Raises:
        UserError: as `check_curriculum`; more chunks than pairs.
    """
    check_curriculum(cache.rows, recipe)
    asked = recipe.curriculum
    if asked is None:
        return None
    gaps = (cache.values("chosen_score") - cache.values("rejected_score"))[training]
    ranked = training[np.argsort(-gaps, kind="stable")][: asked.top]
    if len(ranked) < asked.chunks:
        raise UserError(f"data.curriculum.chunks {asked.chunks} is more than the {len(ranked)} pairs; lower it")
    return Curriculum(ranked, asked.chunks, asked.steps * batch)
