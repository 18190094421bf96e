"""Latents and text embeddings, encoded once (DESIGN 5).

A cache is two stores side by side, pictures and prompts, each in a folder named after everything that made it (weights,
resolution, crop, number format, version of this code). Entries are keyed by the content of a picture or prompt: more
rows, another order or another data set only encode what is new.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import RunError
from ..keyed import generator, normal
from ..recipe import DataRecipe
from .batch import Batch, Cond
from .encode import Job, Piece, cond_entry, encode_pictures, encode_prompts, entry_cond, picture_job, prompt_key
from .layout import CachePlan, entry_bytes, is_flat, made_by_of, refuse_other, resolution_of, store_folder
from .rows import ImageRow, PairRow, digest_of
from .store import Store, fingerprint_of, free_bytes, rows_per_shard

if TYPE_CHECKING:
    from ..families import Model

UNCOND = "unconditional"
Row = PairRow | ImageRow
Progress = Callable[[int, int], None]
Columns = Mapping[str, Tensor]


@dataclass(frozen=True)
class Item:
    """One row on the CPU: ``latents`` (C, h, w) and, when the posterior is sampled, their ``std``; ``cond`` of one
    sample; ``sizes`` (6,): height and width of the original, top and left of the crop, height and width of what was
    encoded; all by name."""

    id: str
    latents: dict[str, Tensor]
    cond: dict[str, Cond]
    columns: dict[str, float]
    std: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Ranks:
    """This process among those that fill a cache together."""

    rank: int = 0
    world: int = 1
    barrier: Callable[[], None] = lambda: None


class LatentCache:
    """Rows with their latents and embeddings, by position. Reading maps the shards; nothing is copied before a batch.

    Without stores (``data.cache=false``) the same calls encode each time. ``fingerprint`` is one hash of everything
    that makes the numbers; ``refused`` lists shards that were not whole and were made anew; ``encoded`` counts the
    entries that this process wrote.
    """

    def __init__(self, rows: Sequence[Row], model: Model, recipe: DataRecipe, ranks: Ranks, root: Path | None) -> None:
        self.rows, self.model, self.recipe, self.ranks, self.root = rows, model, recipe, ranks, root
        self.resolution = resolution_of(model, recipe)
        self.ids = [row.id for row in rows]
        self.column_names = _column_names(rows)
        self.two_prompts = any("rejected_prompt" in row.prompts for row in rows)
        self.extra: list[dict[str, float]] = [{} for _ in rows]
        made_by = made_by_of(model, recipe, self.resolution)
        self.fingerprint = fingerprint_of({kind: fingerprint_of(by) for kind, by in made_by.items()})
        self.stores = (
            {} if root is None else {kind: Store(store_folder(root, kind, by), by) for kind, by in made_by.items()}
        )
        self.refused: list[str] = []
        self.encoded = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Item:
        return self.items([i])[0]

    def items(self, indices: Sequence[int], mirrored: Sequence[bool] | None = None) -> list[Item]:
        """Rows by position; where ``mirrored``, every picture of the row is (needs ``data.flip``)."""
        flags = mirrored or [False] * len(indices)
        jobs = [
            {k: picture_job(ref, self.ids[i], self.recipe, flag) for k, ref in self.rows[i].images.items()}
            for i, flag in zip(indices, flags, strict=True)
        ]
        texts = [self._texts(self.rows[i]) for i in indices]
        pictures = self._pictures([job for named in jobs for job in named.values()])
        conds = self._conds([text for named in texts for text in named.values()])
        return [
            Item(
                self.ids[i],
                {k: pictures[job.key]["mean"] for k, job in named.items()},
                {k: conds[text] for k, text in words.items()},
                self._columns(i),
                {k: pictures[job.key]["std"] for k, job in named.items() if "std" in pictures[job.key]},
                {k: self._sizes(pictures[job.key]) for k, job in named.items()},
            )
            for i, named, words in zip(indices, jobs, texts, strict=True)
        ]

    def batch(self, indices: Sequence[int], visits: Sequence[int], seed: int = 0) -> Batch:
        """Rows by position as a batch on the CPU. With ``data.flip`` a coin keyed by (seed, visit, id) mirrors a row,
        both members of a pair together."""
        flags = [self.flipped(i, visit, seed) for i, visit in zip(indices, visits, strict=True)]
        return self.collate(self.items(indices, flags), visits, seed)

    def flipped(self, i: int, visit: int, seed: int) -> bool:
        """Whether row ``i`` is mirrored at this visit."""
        return self.recipe.flip and bool(generator(seed, "flip", visit, self.ids[i]).random() < 0.5)

    @staticmethod
    def collate(items: Sequence[Item], visits: Sequence[int], seed: int = 0) -> Batch:
        """Items stacked, latents in fp32. Where a std is stored the latents are drawn from the posterior with noise
        keyed by (seed, visit, id, name)."""
        latents: dict[str, Tensor] = {}
        for name in items[0].latents:
            stacked = torch.stack([item.latents[name] for item in items]).float()
            if name in items[0].std:
                shape = stacked.shape[1:]
                noise = [normal(shape, seed, "posterior", v, i.id, name) for i, v in zip(items, visits, strict=True)]
                stacked += torch.stack([item.std[name] for item in items]).float() * torch.stack(noise)
            latents[name] = stacked
        return Batch(
            tuple(item.id for item in items),
            tuple(visits),
            latents,
            {name: Cond.cat([item.cond[name] for item in items]) for name in items[0].cond},
            {k: torch.tensor([item.columns[k] for item in items], dtype=torch.float32) for k in items[0].columns},
            torch.ones(len(items)),
            sizes={name: torch.stack([item.sizes[name] for item in items]).float() for name in items[0].sizes},
        )

    @property
    def uncond(self) -> Cond:
        """The unconditional branch of one sample, on the CPU."""
        store = self.stores.get("prompts")
        return entry_cond(store.get(UNCOND)) if store and UNCOND in store else self.model.uncond().to("cpu")

    def encode(self, prompts: Sequence[str]) -> Cond:
        """Conditioning of any prompts, on the CPU; the text encoder is asked only for those that are not stored."""
        conds = self._conds(prompts)
        return Cond.cat([conds[text] for text in prompts])

    def extend(
        self, made_by: Mapping[str, str], compute: Callable[[Batch], Columns], batch: int, seed: int = 0
    ) -> None:
        """Columns that a method computes once for each row: ``compute`` maps a batch (visit 0, not mirrored) to (B,)
        tensors. They are stored beside the cache under ``made_by``, which says what they depend on besides it."""

        def columns(part: Sequence[int]) -> Columns:
            return compute(self.collate(self.items(part), [0] * len(part), seed))

        table = self.table({**made_by, "seed": str(seed)}, columns, batch)
        for i in range(len(self)):
            self.extra[i] = {name: float(values[i]) for name, values in table.items()}

    def table(
        self, made_by: Mapping[str, str], compute: Callable[[Sequence[int]], Columns], batch: int
    ) -> dict[str, Tensor]:
        """Numbers (rows, ...) in fp32 that are computed once for each row: ``compute`` maps positions to (n, ...)
        tensors. They are stored beside the cache under ``made_by``; the work is shared among the processes, and what
        is there is not computed again."""
        by = {**made_by, "cache": self.fingerprint}
        keys = [self._row_key(row) for row in self.rows]
        place = dict(zip(keys, range(len(keys)), strict=True))

        def pieces(chosen: Sequence[str]) -> Iterable[Piece]:
            for start in range(0, len(chosen), batch):
                part = list(chosen[start : start + batch])
                found = compute([place[key] for key in part])
                yield part, {name: values.detach().float().cpu() for name, values in found.items()}

        if self.root is None:
            parts = [entry for _, entry in pieces(keys)]
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        store = Store(store_folder(self.root, "columns", by), by)
        self._open([store])
        missing = store.missing(keys)
        self.ranks.barrier()
        self._write(store, pieces(_share(missing, self.ranks)), 4096, lambda n: None)
        self._close([(store, missing)])
        entries = [store.get(key) for key in keys]
        return {name: torch.stack([entry[name] for entry in entries]) for name in entries[0]}

    # -- inside -------------------------------------------------------------------------------------------------------

    def _sizes(self, entry: Mapping[str, Tensor]) -> Tensor:
        """(6,) as in `Item`; the last two follow from the latents."""
        return torch.cat([entry["size"], torch.tensor(entry["mean"].shape[-2:]) * self.model.factor])

    def _texts(self, row: Row) -> dict[str, str]:
        texts = dict(row.prompts)
        if self.two_prompts:
            texts.setdefault("rejected_prompt", row.prompt)
        return texts

    def _columns(self, i: int) -> dict[str, float]:
        values = self.rows[i].columns
        named = {k: math.nan if values[k] is None else float(values[k] or 0.0) for k in self.column_names}
        return named | self.extra[i]

    def _row_key(self, row: Row) -> str:
        pictures = [picture_job(ref, row.id, self.recipe).key for ref in row.images.values()]
        return digest_of(row.id.encode(), *(part.encode() for part in (*pictures, *self._texts(row).values())))

    def _pictures(self, jobs: Sequence[Job]) -> dict[str, dict[str, Tensor]]:
        if self.stores:
            return {job.key: self.stores["pictures"].get(job.key) for job in jobs}
        unique = list({job.key: job for job in jobs}.values())
        return {
            key: {name: tensor[number] for name, tensor in entry.items()}
            for keys, entry in encode_pictures(unique, self.model, self.recipe, self.resolution)
            for number, key in enumerate(keys)
        }

    def _conds(self, texts: Sequence[str]) -> dict[str, Cond]:
        store = self.stores.get("prompts")
        keys = {text: prompt_key(text) for text in texts}
        found = {text: entry_cond(store.get(key)) for text, key in keys.items() if store and key in store}
        rest = [text for text in keys if text not in found]
        if rest:
            cond = self.model.encode_prompts(rest).to("cpu")
            found |= {text: cond.take(slice(n, n + 1)) for n, text in enumerate(rest)}
        return found

    def _open(self, stores: Sequence[Store]) -> None:
        """One process checks what is on the disk, then all read the headers."""
        if self.ranks.rank == 0:
            for store in stores:
                store.repair()
                self.refused += store.refused
        self.ranks.barrier()
        for store in stores:
            store.refresh()

    def _close(self, written: Sequence[tuple[Store, Sequence[str]]]) -> None:
        """All processes take up what the others wrote."""
        self.ranks.barrier()
        for store, keys in written:
            store.refresh()
            absent = store.missing(keys)
            if absent:
                raise RunError(
                    f"{len(absent)} entries that other processes wrote are not in '{store.folder}'; "
                    "data.cache_dir must be a folder that all machines share"
                )

    def _write(self, store: Store, pieces: Iterable[Piece], per_shard: int, tick: Callable[[int], None]) -> None:
        """Gather pieces into shards of about ``per_shard`` entries."""
        keys: list[str] = []
        parts: list[dict[str, Tensor]] = []

        def flush() -> None:
            if keys:
                store.write(keys, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
                self.encoded += len(keys)
                keys.clear()
                parts.clear()

        for names, entry in pieces:
            keys += names
            parts.append(entry)
            tick(len(names))
            if len(keys) >= per_shard:
                flush()
        flush()

    def fill(self, progress: Progress | None = None) -> None:
        """Encode and write what is missing, shared among the processes.

        Raises:
            UserError: the disk is too small. RunError: it became full, or a picture changed meanwhile.
        """
        pictures, prompts = self.stores["pictures"], self.stores["prompts"]
        self._open([pictures, prompts])
        jobs = _jobs(self.rows, self.recipe)
        texts = {prompt_key(text): text for row in self.rows for text in self._texts(row).values()}
        lack = pictures.missing(jobs), prompts.missing([prompt_key(""), UNCOND, *texts])
        texts[prompt_key("")] = ""
        self.ranks.barrier()
        if not lack[0] and not lack[1]:
            return
        plan = _plan(self, len(jobs), len(texts) + 1, len(lack[0]), len(lack[1]))
        plan.check()
        mine = [_share(keys, self.ranks) for keys in lack]
        done, total = 0, sum(len(keys) for keys in mine)

        def tick(n: int) -> None:
            nonlocal done
            done += n
            if progress is not None:
                progress(done, total)

        self.model.ensure_encoders()
        picture_bytes, prompt_bytes = entry_bytes(self.model, self.recipe)
        alone = [([UNCOND], cond_entry(self.model.uncond()))] if UNCOND in mine[1] else []
        plain = [texts[key] for key in mine[1] if key != UNCOND]
        self._write(prompts, chain(alone, encode_prompts(plain, self.model)), rows_per_shard(prompt_bytes), tick)
        pieces = encode_pictures([jobs[key] for key in mine[0]], self.model, self.recipe, self.resolution)
        self._write(pictures, pieces, rows_per_shard(picture_bytes), tick)
        self._close([(pictures, lack[0]), (prompts, lack[1])])


def open_cache(
    rows: Sequence[Row],
    model: Model,
    recipe: DataRecipe,
    folder: Path,
    *,
    rank: int = 0,
    world: int = 1,
    barrier: Callable[[], None] = lambda: None,
    progress: Progress | None = None,
    flat: bool = False,
) -> LatentCache:
    """The cache of these rows, complete: what is missing is encoded and written first.

    Args:
        folder: caches of other weights and settings lie side by side in it, each in folders of its own.
        rank, world, barrier: this process among those that share the work.
        progress: called with (done, total) entries of this process.
        flat: write straight into ``folder`` (``diffalign cache --out``). A folder that was written so serves only the
            weights and settings it was made with.

    The model's encoders are needed only when something is missing; the caller releases them.

    Raises:
        UserError: a flat cache of other weights or settings, a wrong resolution, disk too small, folder not writable,
            latents that are not finite. RunError: disk full meanwhile, a picture changed meanwhile.
    """
    ranks = Ranks(rank, world, barrier)
    if not recipe.cache:
        return LatentCache(rows, model, recipe, ranks, None)
    made_by = made_by_of(model, recipe, resolution_of(model, recipe))
    if flat and not is_flat(folder) and rank == 0:
        for kind, by in made_by.items():
            Store(folder / kind, by).repair()
    barrier()
    refuse_other(folder, made_by)
    cache = LatentCache(rows, model, recipe, ranks, folder)
    cache.fill(progress)
    return cache


def cache_plan(rows: Sequence[Row], model: Model, recipe: DataRecipe, folder: Path) -> CachePlan:
    """What the cache of these rows takes, and how much of it is not there yet. Writes nothing.

    Raises UserError as :func:`open_cache` does for a flat cache of other weights and a wrong resolution."""
    refuse_other(folder, made_by_of(model, recipe, resolution_of(model, recipe)))
    cache = LatentCache(rows, model, recipe, Ranks(), folder)
    jobs = _jobs(rows, recipe)
    texts = {"", *(text for row in rows for text in cache._texts(row).values())}
    for store in cache.stores.values():
        store.look()
    lack = cache.stores["prompts"].missing([UNCOND, *(prompt_key(text) for text in texts)])
    return _plan(cache, len(jobs), len(texts) + 1, len(cache.stores["pictures"].missing(jobs)), len(lack))


def _share(keys: Sequence[str], ranks: Ranks) -> Sequence[str]:
    """This process's contiguous part, so that each reads its own files."""
    return keys[ranks.rank * len(keys) // ranks.world : (ranks.rank + 1) * len(keys) // ranks.world]


def _jobs(rows: Sequence[Row], recipe: DataRecipe) -> dict[str, Job]:
    """Every picture to encode, once."""
    jobs: dict[str, Job] = {}
    for row in rows:
        for ref in row.images.values():
            for mirrored in (False, True) if recipe.flip else (False,):
                job = picture_job(ref, row.id, recipe, mirrored)
                jobs.setdefault(job.key, job)
    return jobs


def _column_names(rows: Sequence[Row]) -> list[str]:
    """Columns in which some row has a value; ``tie`` only where ties were kept."""
    names: dict[str, None] = {}
    for row in rows:
        for name, value in row.columns.items():
            if value is not None and (name != "tie" or value):
                names[name] = None
    return list(names)


def _plan(cache: LatentCache, pictures: int, prompts: int, lack_pictures: int, lack_prompts: int) -> CachePlan:
    assert cache.root is not None
    picture, prompt = entry_bytes(cache.model, cache.recipe)
    return CachePlan(
        cache.root,
        pictures,
        prompts,
        pictures * picture + prompts * prompt,
        lack_pictures * picture + lack_prompts * prompt,
        free_bytes(cache.root),
    )
