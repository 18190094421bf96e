"""Latents and text embeddings, encoded once (DESIGN 5).

A cache is two stores side by side, pictures and prompts, each in a folder named after everything that made it (weights,
resolution, crop, number format, version of this code). Entries are keyed by the content of a picture or prompt: more
rows, another order or another data set only encode what is new.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..keyed import generator, normal
from ..recipe import DataRecipe
from .batch import Batch, Cond
from .buckets import buckets_of
from .encode import Job, encode_pictures, entry_cond, prompt_key, row_jobs
from .fill import (
    UNCOND,
    Counter,
    Progress,
    Ranks,
    ShardWriter,
    close_stores,
    fill,
    fill_stream,
    open_stores,
    plan_of,
    share,
)
from .keyindex import key_array
from .layout import CachePlan, is_flat, made_by_of, refuse_other, resolution_of, store_folder
from .rows import Row, digest_of
from .rowtable import Rows, Stream, packed
from .store import Store, fingerprint_of

if TYPE_CHECKING:
    from ..families import Model

Columns = Mapping[str, Tensor]


@dataclass(frozen=True)
class Item:
    """One row on the CPU: ``latents`` (C, h, w) and, when the posterior is sampled, their ``std``; ``cond`` of one
    sample; ``sizes`` (6,): height and width of the original, top and left of the crop, height and width of what was
    encoded; all by name. ``prompt``: the text itself."""

    id: str
    latents: dict[str, Tensor]
    cond: dict[str, Cond]
    columns: dict[str, float]
    std: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[str, Tensor] = field(default_factory=dict)
    prompt: str = ""


class LatentCache:
    """Rows with their latents and embeddings, by position. Entries are read from the disk as batches ask for them; what
    is held in memory is some dozens of bytes a row.

    Without stores (``data.cache=false``) the same calls encode each time. ``fingerprint`` is one hash of everything
    that makes the numbers; ``refused`` lists shards that were not whole and were made anew; ``encoded`` counts the
    entries that this process wrote.
    """

    def __init__(self, rows: Sequence[Row], model: Model, recipe: DataRecipe, ranks: Ranks, root: Path | None) -> None:
        self.rows: Rows = packed(rows)
        self.model, self.recipe, self.ranks, self.root = model, recipe, ranks, root
        self.resolution = resolution_of(model, recipe)
        self.buckets = buckets_of(model, recipe, self.resolution)
        self.extra: dict[str, np.ndarray] = {}
        made_by = made_by_of(model, recipe, self.resolution)
        shapes = {"buckets": json.dumps(self.buckets.sizes)} if recipe.buckets else {}
        self.fingerprint = fingerprint_of({kind: fingerprint_of(by) for kind, by in made_by.items()} | shapes)
        self.stores = (
            {} if root is None else {kind: Store(store_folder(root, kind, by), by) for kind, by in made_by.items()}
        )
        self.refused: list[str] = []
        self.encoded = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Item:
        return self.items([i])[0]

    @property
    def ids(self) -> Sequence[str]:
        """The rows' ids."""
        return self.rows.ids

    @cached_property
    def places(self) -> np.ndarray:
        """(n,) uint16: the number of each row's bucket. Rows of one batch must have the same."""
        if not self.rows.sides:
            return np.zeros(len(self.rows), np.uint16)
        return self.buckets.assign(self.rows.sizes(self.rows.sides[0]))

    def items(self, indices: Sequence[int], mirrored: Sequence[bool] | None = None) -> list[Item]:
        """Rows by position; where ``mirrored``, every picture of the row is (needs ``data.flip``)."""
        rows = [self.rows[i] for i in indices]
        flags = mirrored or [False] * len(rows)
        jobs = [row_jobs(row, self.recipe, self.buckets, flag) for row, flag in zip(rows, flags, strict=True)]
        texts = [self.texts(row) for row in rows]
        pictures = self._pictures([job for named in jobs for job in named.values()])
        conds = self._conds([text for named in texts for text in named.values()])
        return [
            Item(
                row.id,
                {k: pictures[job.key]["mean"] for k, job in named.items()},
                {k: conds[text] for k, text in words.items()},
                self._columns(i, row),
                {k: pictures[job.key]["std"] for k, job in named.items() if "std" in pictures[job.key]},
                {k: self._sizes(pictures[job.key]) for k, job in named.items()} or {"image": self._square()},
                row.prompt,
            )
            for i, row, named, words in zip(indices, rows, jobs, texts, strict=True)
        ]

    def batch(self, indices: Sequence[int], visits: Sequence[int], seed: int = 0) -> Batch:
        """Rows of one bucket by position as a batch on the CPU. With ``data.flip`` a coin keyed by (seed, visit, id)
        mirrors a row, both members of a pair together."""
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
            prompts=tuple(item.prompt for item in items),
        )

    @property
    def uncond(self) -> Cond:
        """The unconditional branch of one sample, on the CPU."""
        store = self.stores.get("prompts")
        found = store.find([UNCOND]) if store is not None else {}
        return entry_cond(found[UNCOND]) if found else self.model.uncond().to("cpu")

    def encode(self, prompts: Sequence[str]) -> Cond:
        """Conditioning of any prompts, on the CPU; the text encoder is asked only for those that are not stored."""
        conds = self._conds(prompts)
        return Cond.cat([conds[text] for text in prompts])

    def extend(
        self, made_by: Mapping[str, str], compute: Callable[[Batch], Columns], batch: int, seed: int = 0
    ) -> None:
        """Columns that a method computes once for each row: ``compute`` maps a batch (visit 0, not mirrored) to (B,)
        tensors. They are stored beside the cache under ``made_by``, which says what they depend on besides it."""

        def columns(rows: Sequence[int]) -> Columns:
            return compute(self.collate(self.items(rows), [0] * len(rows), seed))

        found = self.table({**made_by, "seed": str(seed)}, columns, batch)
        self.extra |= {name: values.numpy() for name, values in found.items()}

    def table(
        self,
        made_by: Mapping[str, str],
        compute: Callable[[Sequence[int]], Columns],
        batch: int,
        progress: Progress | None = None,
    ) -> dict[str, Tensor]:
        """Numbers of every row (n,), fp32: ``compute`` maps at most ``batch`` positions of one bucket to (B,) tensors.

        What is stored under ``made_by`` and this cache is not computed again; the processes share the rest."""
        by = {**made_by, "cache": self.fingerprint}
        keys = key_array(self._row_keys())
        made: dict[str, Tensor] = {}

        def take(rows: np.ndarray, values: Columns) -> None:
            for name, column in values.items():
                made.setdefault(name, torch.full((len(self),), math.nan))[torch.from_numpy(rows)] = column

        def columns(chosen: np.ndarray) -> Iterator[tuple[np.ndarray, Columns]]:
            tick = Counter(progress, len(chosen))
            for bucket in np.unique(self.places[chosen]):
                mine = chosen[self.places[chosen] == bucket]
                for start in range(0, len(mine), batch):
                    part = mine[start : start + batch]
                    tick(len(part))
                    yield part, {k: v.detach().float().cpu() for k, v in compute(part.tolist()).items()}

        if self.root is None:
            for part, values in columns(np.arange(len(self))):
                take(part, values)
            return made
        store = Store(store_folder(self.root, "columns", by), by)
        self.refused += open_stores([store], self.ranks)
        missing = store.missing(keys)
        self.ranks.barrier()
        writer = ShardWriter(store, 4096)
        for part, values in columns(share(missing, self.ranks)):
            writer.add([raw.tobytes().hex() for raw in keys[part]], values)
        self.encoded += writer.close()
        close_stores([(store, keys[missing])], self.ranks)
        for start in range(0, len(keys), 4096):
            part = np.arange(start, min(start + 4096, len(keys)))
            names = [raw.tobytes().hex() for raw in keys[part]]
            found = store.find(names)
            take(part, {k: torch.stack([found[n][k] for n in names]) for k in found[names[0]]})
        return made

    def values(self, name: str) -> np.ndarray:
        """(n,) fp: a column of all rows, the one that was computed before the data's own; NaN where there is none."""
        if name in self.extra:
            return self.extra[name]
        return self.rows.values(name) if name in self.rows.columns else np.full(len(self), math.nan)

    # -- inside -------------------------------------------------------------------------------------------------------

    def texts(self, row: Row) -> dict[str, str]:
        """The row's prompts by name; every row has the same names."""
        texts = dict(row.prompts)
        if self.rows.two_prompts:
            texts.setdefault("rejected_prompt", row.prompt)
        return texts

    def _sizes(self, entry: Mapping[str, Tensor]) -> Tensor:
        """(6,) as in `Item`; the last two follow from the latents."""
        return torch.cat([entry["size"], torch.tensor(entry["mean"].shape[-2:]) * self.model.factor])

    def _square(self) -> Tensor:
        """(6,) as in `Item` of a picture that a prompt's row will get: uncut, at the resolution."""
        side = float(self.resolution)
        return torch.tensor([side, side, 0.0, 0.0, side, side])

    def _columns(self, i: int, row: Row) -> dict[str, float]:
        values = dict(row.columns) | {k: self.rows.places_of(k).get(getattr(row, k)) for k in self.rows.labels}
        named = {k: math.nan if values[k] is None else float(values[k] or 0.0) for k in self.rows.columns}
        return named | {name: float(column[i]) for name, column in self.extra.items()}

    def _row_keys(self) -> Iterator[str]:
        for row in self.rows:
            parts = [job.key for job in row_jobs(row, self.recipe, self.buckets).values()]
            yield digest_of(row.id.encode(), *(part.encode() for part in (*parts, *self.texts(row).values())))

    def _pictures(self, jobs: Sequence[Job]) -> dict[str, dict[str, Tensor]]:
        if self.stores:
            return self.stores["pictures"].find(job.key for job in jobs)
        unique = {job.key: job for job in jobs}.values()
        return {
            key: {name: tensor[number] for name, tensor in entry.items()}
            for keys, entry in encode_pictures(unique, self.model, self.recipe)
            for number, key in enumerate(keys)
        }

    def _conds(self, texts: Sequence[str]) -> dict[str, Cond]:
        store = self.stores.get("prompts")
        keys = {text: prompt_key(text) for text in texts}
        stored = store.find(keys.values()) if store is not None else {}
        found = {text: entry_cond(stored[key]) for text, key in keys.items() if key in stored}
        rest = [text for text in keys if text not in found]
        if rest:
            cond = self.model.encode_prompts(rest).to("cpu")
            found |= {text: cond.take(slice(n, n + 1)) for n, text in enumerate(rest)}
        return found


def open_cache(
    rows: Sequence[Row] | Stream,
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
        rows: a sequence, or a stream, of which each row is encoded as it comes (needs ``data.cache``).
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
        if isinstance(rows, Stream):
            raise UserError("rows that are streamed need the cache; set data.cache=true")
        return LatentCache(rows, model, recipe, ranks, None)
    made_by = made_by_of(model, recipe, resolution_of(model, recipe))
    if flat and not is_flat(folder) and rank == 0:
        for kind, by in made_by.items():
            Store(folder / kind, by).repair()
    barrier()
    refuse_other(folder, made_by)
    if isinstance(rows, Stream):
        cache = LatentCache(rows.packed, model, recipe, ranks, folder)
        fill_stream(cache, rows.rows, progress)
        if rank == 0:
            rows.keep(cache.rows)
    else:
        cache = LatentCache(rows, model, recipe, ranks, folder)
        fill(cache, progress)
    return cache


def cache_plan(rows: Sequence[Row], model: Model, recipe: DataRecipe, folder: Path) -> CachePlan:
    """What the cache of these rows takes, and how much of it is not there yet. Writes nothing.

    Raises UserError as :func:`open_cache` does for a flat cache of other weights and a wrong resolution."""
    refuse_other(folder, made_by_of(model, recipe, resolution_of(model, recipe)))
    cache = LatentCache(rows, model, recipe, Ranks(), folder)
    for store in cache.stores.values():
        store.look()
    return plan_of(cache)
