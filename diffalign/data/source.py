"""What a batch is: an endless, keyed order over cached rows, cut into steps, ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from .. import keyed
from .batch import Batch, Cond

if TYPE_CHECKING:
    from .cache import LatentCache


class Source:
    """Rows of a cache in an order that is a function of (seed, epoch) alone.

    Args:
        cache: the encoded rows.
        indices: which rows of it (training or held-out).
        seed: keys order, caption dropout and flips.
        caption_dropout: share of samples whose prompt is replaced by the unconditional one.
        period: visits are counted modulo this, so that a row's draws come back (``data.reference_errors``).

    ``reference`` (rows of the cache, V, 2): the base's errors at the first V visits, which ``load`` puts into the
    columns ``base_chosen`` and ``base_rejected``.
    """

    def __init__(
        self,
        cache: LatentCache,
        indices: Sequence[int],
        seed: int,
        uncond: Cond,
        caption_dropout: float = 0.0,
        period: int | None = None,
    ) -> None:
        self.cache = cache
        self.indices = np.asarray(indices, dtype=np.int64)
        self.seed = seed
        self.uncond = uncond.to("cpu")
        self.caption_dropout = caption_dropout
        self.period = period
        self.reference: torch.Tensor | None = None
        self._order = lru_cache(maxsize=2)(self._permutation)

    def __len__(self) -> int:
        return len(self.indices)

    def _permutation(self, epoch: int) -> np.ndarray:
        return self.indices[keyed.permutation(len(self.indices), self.seed, "order", epoch)]

    def rows(self, start: int, count: int) -> tuple[list[int], list[int]]:
        """(cache indices, visits) of the endless order's positions start .. start + count - 1."""
        epochs, places = np.divmod(np.arange(start, start + count), len(self.indices))
        visits = epochs % self.period if self.period else epochs
        return [int(self._order(int(e))[p]) for e, p in zip(epochs, places, strict=True)], visits.tolist()

    def load(self, indices: Sequence[int], visits: Sequence[int]) -> Batch:
        """A batch on the CPU."""
        batch = self.cache.batch(indices, visits, self.seed)
        if self.caption_dropout:
            self._drop_captions(batch)
        if self.reference is not None:
            found = self.reference[list(indices), list(visits)]
            batch.columns |= {"base_chosen": found[:, 0], "base_rejected": found[:, 1]}
        return batch

    def _drop_captions(self, batch: Batch) -> None:
        coins = [
            keyed.generator(self.seed, "caption", visit, name).random() < self.caption_dropout
            for name, visit in zip(batch.ids, batch.visits, strict=True)
        ]
        mask = torch.tensor(coins)
        if not mask.any():
            return
        for name, cond in batch.cond.items():
            empty = self.uncond.expand(len(mask))
            batch.cond[name] = Cond(
                torch.where(mask[:, None, None], empty.embeds.to(cond.embeds.dtype), cond.embeds),
                {k: torch.where(mask[:, None], empty.added[k].to(v.dtype), v) for k, v in cond.added.items()},
            )

    def share(self, draw: int, batch: int, rank: int, world: int) -> tuple[list[int], list[int]]:
        """Rows of one rank for the ``draw``-th batch: contiguous slices that differ by at most one row."""
        cuts = [round(batch * r / world) for r in range(world + 1)]
        return self.rows(draw * batch + cuts[rank], cuts[rank + 1] - cuts[rank])


def split_heldout(ids: Sequence[str], count: int, seed: int) -> tuple[list[int], list[int]]:
    """(training, held-out) positions: the ``count`` ids with the smallest keyed number are held out.

    At most a quarter of the rows is taken, so that tiny data still trains."""
    count = min(count, len(ids) // 4)
    numbers = [keyed.generator(seed, "heldout", name).random() for name in ids]
    held = set(np.argsort(numbers, kind="stable")[:count].tolist())
    return [i for i in range(len(ids)) if i not in held], sorted(held)
