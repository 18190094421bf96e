"""Filling a cache: what is missing is encoded, shared among processes, and written shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import RunError
from .encode import (
    PROMPT_BATCH,
    Job,
    Piece,
    cond_entry,
    encode_pictures,
    encode_prompts,
    orientations,
    picture_keys,
    prompt_key,
    prompt_keys,
    row_jobs,
)
from .keyindex import KeyIndex, first_places, key_array
from .layout import CachePlan, entry_bytes
from .store import Store, free_bytes, rows_per_shard

if TYPE_CHECKING:
    from .cache import LatentCache
    from .rows import Row

UNCOND = "unconditional"
SPECIAL = ("", UNCOND)  # the empty prompt and the unconditional branch are in every cache
TURN = 64  # rows of a stream that one process encodes before the next one's turn
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Ranks:
    """This process among those that fill a cache together."""

    rank: int = 0
    world: int = 1
    barrier: Callable[[], None] = lambda: None


def share(positions: np.ndarray, ranks: Ranks) -> np.ndarray:
    """This process's contiguous part, so that each reads its own files."""
    return positions[ranks.rank * len(positions) // ranks.world : (ranks.rank + 1) * len(positions) // ranks.world]


class ShardWriter:
    """Gathers pieces into shards of about ``per_shard`` entries of one shape."""

    def __init__(self, store: Store, per_shard: int, tick: Callable[[int], None] = lambda n: None) -> None:
        self.store, self.per_shard, self.tick = store, per_shard, tick
        self.waiting: dict[tuple[tuple[int, ...], ...], tuple[list[str], list[Mapping[str, Tensor]]]] = {}
        self.written = 0

    def add(self, keys: Sequence[str], entry: Mapping[str, Tensor]) -> None:
        """One piece; a shard is written when enough of its shape are there."""
        shape = tuple(tuple(tensor.shape[1:]) for tensor in entry.values())
        names, parts = self.waiting.setdefault(shape, ([], []))
        names += keys
        parts.append(entry)
        self.tick(len(keys))
        if len(names) >= self.per_shard:
            self._write(shape)
        elif sum(len(n) for n, _ in self.waiting.values()) >= 2 * self.per_shard:  # many shapes, each a few
            self._write(max(self.waiting, key=lambda s: len(self.waiting[s][0])))

    def _write(self, shape: tuple[tuple[int, ...], ...]) -> None:
        names, parts = self.waiting.pop(shape)
        self.store.write(names, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        self.written += len(names)

    def drain(self, pieces: Iterator[Piece]) -> None:
        """All pieces, and what is left at their end."""
        for keys, entry in pieces:
            self.add(keys, entry)
        self.close()

    def close(self) -> int:
        """Write what waits; the number of entries written in all."""
        for shape in list(self.waiting):
            self._write(shape)
        return self.written


def open_stores(stores: Sequence[Store], ranks: Ranks) -> list[str]:
    """One process checks what is on the disk, then all read the headers. Returns the shards that were refused."""
    refused: list[str] = []
    if ranks.rank == 0:
        for store in stores:
            store.repair()
            refused += store.refused
    ranks.barrier()
    for store in stores:
        store.refresh()
    return refused


def close_stores(written: Sequence[tuple[Store, np.ndarray]], ranks: Ranks) -> None:
    """All processes take up what the others wrote. Raises RunError when some of the keys (n, 2) are not there."""
    ranks.barrier()
    for store, keys in written:
        store.refresh()
        absent = store.missing(keys)
        if len(absent):
            raise RunError(
                f"{len(absent)} entries that other processes wrote are not in '{store.folder}'; "
                "data.cache_dir must be a folder that all machines share"
            )


class Counter:
    """Entries done, told to whoever shows them; ``total`` 0 is not known."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, n: int) -> None:
        self.done += n
        if self.progress is not None:
            self.progress(self.done, self.total)


@dataclass(frozen=True)
class Lack:
    """Keys of all pictures and prompts of the rows (in row order), and where in them something new is missing."""

    pictures: np.ndarray
    prompts: np.ndarray
    no_pictures: np.ndarray
    no_prompts: np.ndarray


def find_lack(cache: LatentCache) -> Lack:
    """What the stores, as far as they were read, do not have. The special prompts stand first."""
    pictures = picture_keys(cache.rows, cache.recipe, cache.buckets)
    special = key_array([prompt_key(""), UNCOND])
    prompts = np.concatenate([special, prompt_keys(cache.rows)])
    return Lack(pictures, prompts, cache.stores["pictures"].missing(pictures), cache.stores["prompts"].missing(prompts))


def picture_jobs(cache: LatentCache, positions: np.ndarray) -> Iterator[Job]:
    """Jobs by their position in ``picture_keys``."""
    turns = orientations(cache.recipe)
    sides = cache.rows.sides
    for position in positions.tolist():
        row, rest = divmod(position, len(sides) * len(turns))
        side, turn = divmod(rest, len(turns))
        yield row_jobs(cache.rows[row], cache.recipe, cache.buckets, turns[turn])[sides[side]]


def prompt_texts(cache: LatentCache, positions: np.ndarray) -> Iterator[str]:
    """Prompts by their position in ``find_lack``'s keys, without the unconditional branch."""
    names = ("prompt", "rejected_prompt")[: 1 + cache.rows.two_prompts]
    for position in positions.tolist():
        if position == 0:
            yield ""
        elif position >= len(SPECIAL):
            row, name = divmod(position - len(SPECIAL), len(names))
            yield cache.texts(cache.rows[row])[names[name]]


def writers(cache: LatentCache, tick: Callable[[int], None]) -> tuple[ShardWriter, ShardWriter]:
    """For pictures and prompts."""
    picture, prompt = (rows_per_shard(n) for n in entry_bytes(cache.model, cache.recipe))
    return ShardWriter(cache.stores["pictures"], picture, tick), ShardWriter(cache.stores["prompts"], prompt, tick)


def fill(cache: LatentCache, progress: Progress | None = None) -> None:
    """Encode and write what is missing, shared among the processes.

    Raises:
        UserError: the disk is too small. RunError: it became full, or a picture changed meanwhile.
    """
    cache.refused += open_stores(list(cache.stores.values()), cache.ranks)
    lack = find_lack(cache)
    cache.ranks.barrier()
    if not len(lack.no_pictures) and not len(lack.no_prompts):
        return
    plan_of(cache, lack).check()
    pictures, prompts = share(lack.no_pictures, cache.ranks), share(lack.no_prompts, cache.ranks)
    to_pictures, to_prompts = writers(cache, Counter(progress, len(pictures) + len(prompts)))
    cache.model.ensure_encoders()
    alone = [([UNCOND], cond_entry(cache.model.uncond()))] if 1 in prompts else []
    to_prompts.drain(chain(alone, encode_prompts(prompt_texts(cache, prompts), cache.model)))
    to_pictures.drain(encode_pictures(picture_jobs(cache, pictures), cache.model, cache.recipe))
    cache.encoded += to_prompts.written + to_pictures.written
    close_stores(
        [
            (cache.stores["pictures"], lack.pictures[lack.no_pictures]),
            (cache.stores["prompts"], lack.prompts[lack.no_prompts]),
        ],
        cache.ranks,
    )


def fill_stream(cache: LatentCache, rows: Iterator[Row], progress: Progress | None = None) -> None:
    """Rows that come one after another: each is encoded as it comes, unless it is there already, and packed.

    Every process reads the whole stream and encodes its turns of 64 rows. What is written stays when the work stops.

    Raises:
        RunError: the disk became full.
    """
    ranks, recipe = cache.ranks, cache.recipe
    cache.refused += open_stores(list(cache.stores.values()), ranks)
    ranks.barrier()
    cache.model.ensure_encoders()
    to_pictures, to_prompts = writers(cache, Counter(progress, 0))
    asked = KeyIndex()
    texts: list[str] = []

    def new(store: Store, key: str) -> bool:
        keys = key_array([key])
        if asked.find(keys)[0] >= 0:
            return False
        asked.add(keys, np.zeros(1, np.int64))
        return bool(store.index.find(keys)[0] < 0)

    def flush() -> None:
        for keys, entry in encode_prompts(texts, cache.model):
            to_prompts.add(keys, entry)
        texts.clear()

    def jobs() -> Iterator[Job]:
        for number, row in enumerate(rows):
            cache.rows.append(row)
            mine = number // TURN % ranks.world == ranks.rank
            fresh = [text for text in row.prompts.values() if new(cache.stores["prompts"], prompt_key(text))]
            texts.extend(fresh if mine else ())
            if len(texts) >= PROMPT_BATCH:
                flush()
            for mirrored in orientations(recipe):
                for job in row_jobs(row, recipe, cache.buckets, mirrored).values():
                    if new(cache.stores["pictures"], job.key) and mine:
                        yield job

    if ranks.rank == 0:
        if new(cache.stores["prompts"], UNCOND):
            to_prompts.add([UNCOND], cond_entry(cache.model.uncond()))
        texts += [""] if new(cache.stores["prompts"], prompt_key("")) else []
    for keys, entry in encode_pictures(jobs(), cache.model, recipe):
        to_pictures.add(keys, entry)
    flush()
    cache.encoded += to_prompts.close() + to_pictures.close()
    lack = find_lack(cache)
    close_stores([(cache.stores["pictures"], lack.pictures), (cache.stores["prompts"], lack.prompts)], ranks)


def plan_of(cache: LatentCache, lack: Lack | None = None) -> CachePlan:
    """What the cache takes."""
    assert cache.root is not None
    lack = lack or find_lack(cache)
    picture, prompt = entry_bytes(cache.model, cache.recipe)
    pictures, prompts = len(first_places(lack.pictures)), len(first_places(lack.prompts))
    return CachePlan(
        cache.root,
        pictures,
        prompts,
        pictures * picture + prompts * prompt,
        len(lack.no_pictures) * picture + len(lack.no_prompts) * prompt,
        free_bytes(cache.root),
    )
