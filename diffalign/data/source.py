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
    from .curriculum import Curriculum

RUN = 8  # rows of one bucket that stand together in the order


class Source:
    """Rows of a cache in an order that is a function of (seed, epoch) alone.

    With aspect buckets an epoch's order is the same permutation, in which the rows of each bucket are brought together
    in runs of 8, at the place of the run's first row; the incomplete runs stand at the end of the epoch. A step takes
    the next rows of the order, whatever their buckets, and groups them by bucket into micro-batches: which rows make a
    step depends on neither micro-batch nor processes, no row is repeated or left out, and nothing is padded.

    Args:
        cache: the encoded rows.
        indices: which rows of it (training or held-out).
        seed: keys order, caption dropout and flips.
        caption_dropout: share of samples whose prompt is replaced by the unconditional one.
        period: visits are counted modulo this, so that a row's draws come back (``data.reference_errors``).
        group: rows that a method compares with one another. The rows of a step are cut into groups of this size, bucket
            by bucket in their order; ranks and micro-batches hold whole groups of consecutive rows. The last one of a
            bucket may be smaller.
        curriculum: which rows the order draws from, and until when; with one a visit is an epoch's number.

    ``reference`` (rows of the cache, V, 2): the base's errors at the first V visits, which ``load`` puts into the
    columns ``base_chosen`` and ``base_rejected``.
    """

    def __init__(
        self,
        cache: LatentCache,
        indices: Sequence[int] | np.ndarray,
        seed: int,
        uncond: Cond,
        caption_dropout: float = 0.0,
        period: int | None = None,
        group: int = 1,
        curriculum: Curriculum | None = None,
    ) -> None:
        self.cache = cache
        self.indices = np.asarray(indices, dtype=np.int64)
        self.seed = seed
        self.uncond = uncond.to("cpu")
        self.caption_dropout = caption_dropout
        self.period = period
        self.group = group
        self.curriculum = curriculum
        self.reference: torch.Tensor | None = None
        self._order = lru_cache(maxsize=2)(self._permutation)

    def __len__(self) -> int:
        return len(self.indices)

    def _permutation(self, stage: int, epoch: int) -> np.ndarray:
        rows = self.indices if self.curriculum is None else self.curriculum.rows(stage)
        order = keyed.permutation(len(rows), self.seed, "order", epoch)
        return rows[in_runs(order, self.cache.places[rows][order])]

    def rows(self, start: int, count: int) -> tuple[list[int], list[int]]:
        """(cache indices, visits) of the endless order's positions start .. start + count - 1."""
        plain = [(0, np.arange(start, start + count))]
        indices: list[int] = []
        visits: list[int] = []
        for stage, positions in plain if self.curriculum is None else self.curriculum.stages(start, count):
            size, first = len(self.indices), 0
            if self.curriculum is not None:
                size, first = self.curriculum.size(stage), self.curriculum.first_epoch(stage)
            epochs, places = np.divmod(positions, size)
            epochs += first
            indices += [int(self._order(stage, int(e))[p]) for e, p in zip(epochs, places, strict=True)]
            visits += (epochs % self.period if self.period else epochs).tolist()
        return indices, visits

    def cut(self, indices: Sequence[int], visits: Sequence[int], micro: int) -> list[tuple[list[int], list[int]]]:
        """Rows in lists of at most ``micro`` (a multiple of ``group``) of one bucket each, in order of the buckets'
        first rows."""
        groups: dict[int, tuple[list[int], list[int]]] = {}
        for index, visit in zip(indices, visits, strict=True):
            rows, times = groups.setdefault(int(self.cache.places[index]), ([], []))
            rows.append(index)
            times.append(visit)
        return [
            (rows[start : start + micro], times[start : start + micro])
            for rows, times in groups.values()
            for start in range(0, len(rows), micro)
        ]

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
        """Rows of one rank for the ``draw``-th batch: contiguous slices that differ by a row (or group) at most."""
        if self.group > 1:
            groups = self.cut(*self.rows(draw * batch, batch), self.group)
            return joined(groups[slice(*(round(len(groups) * r / world) for r in (rank, rank + 1)))])
        cuts = [round(batch * r / world) for r in range(world + 1)]
        return self.rows(draw * batch + cuts[rank], cuts[rank + 1] - cuts[rank])

    def portion(self, rank: int, world: int) -> list[int]:
        """One rank's part of all rows, group by group."""
        rows = self.indices.tolist()
        return (
            joined(self.cut(rows, [0] * len(rows), self.group)[rank::world])[0] if self.group > 1 else rows[rank::world]
        )


def joined(parts: Sequence[tuple[list[int], list[int]]]) -> tuple[list[int], list[int]]:
    """Rows and visits of several lists as one."""
    return [row for rows, _ in parts for row in rows], [visit for _, visits in parts for visit in visits]


def in_runs(order: np.ndarray, places: np.ndarray) -> np.ndarray:
    """``order`` (n,) with the rows of each bucket (``places`` (n,), by position in the order) in runs of 8."""
    if not len(places) or (places == places[0]).all():
        return order
    together = np.argsort(places, kind="stable")  # positions, bucket by bucket, each in the order's own sequence
    sizes = np.unique(places, return_counts=True)[1]
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    nth = np.arange(len(order)) - starts
    short = nth // RUN == np.repeat(sizes // RUN, sizes)  # the run that the bucket's rows do not fill
    leader = together[starts + nth // RUN * RUN]
    return order[together[np.lexsort((nth, leader, short))]]


def split_heldout(ids: Sequence[str], count: int, seed: int) -> tuple[np.ndarray, list[int]]:
    """(training, held-out) positions: the ``count`` ids with the smallest keyed number are held out, and the other rows
    of the last one's id with it.

    At most a quarter of the rows is asked for, so that tiny data still trains."""
    count = min(count, len(ids) // 4)
    if not count:
        return np.arange(len(ids)), []
    numbers = keyed.uniforms(ids, seed, "heldout")
    held = numbers <= np.partition(numbers, count - 1)[count - 1]
    return np.flatnonzero(~held), np.flatnonzero(held).tolist()
