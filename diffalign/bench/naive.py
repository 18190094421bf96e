"""The step as training scripts do it: VAE and text encoder in the loop, a call each for winners and losers, a second
network as the reference. The mathematics, rows and draws are those of the run it is made from.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..data.batch import Batch, Cond
from ..data.cache import LatentCache
from ..data.encode import Job, ready, row_jobs
from ..data.source import Source
from ..families import compile_unet
from ..roles import BASE, Roles
from ..setup import Parts
from ..trainer import Trainer


class EncodingCache(LatentCache):
    """Rows that are encoded each time they are asked for. Only the pictures are decoded beforehand (``decode``), as a
    loader's workers would do it."""

    def __init__(self, cache: LatentCache) -> None:
        super().__init__(cache.rows, cache.model, cache.recipe, cache.ranks, None)
        self.extra = cache.extra
        self.decoded: dict[str, tuple[Tensor, Tensor]] = {}

    def decode(self, indices: Sequence[int], visits: Sequence[int], seed: int) -> None:
        """Pixels of these rows into memory, in place of those before."""
        self.decoded.clear()
        for i, visit in zip(indices, visits, strict=True):
            flipped = self.flipped(i, visit, seed)
            for job in row_jobs(self.rows[i], self.recipe, self.buckets, flipped).values():
                found = ready(job, self.recipe)
                self.decoded[job.key] = found.pixels, torch.tensor([*found.original, *found.corner], dtype=torch.int32)

    def _pictures(self, jobs: Sequence[Job]) -> dict[str, dict[str, Tensor]]:
        keys = list(dict.fromkeys(job.key for job in jobs))
        mean, std = self.model.encode_images(torch.stack([self.decoded[key][0] for key in keys]))
        parts = {"mean": mean.float().cpu()} | ({"std": std.half().cpu()} if self.recipe.posterior == "sample" else {})
        return {
            key: {name: tensor[n] for name, tensor in parts.items()} | {"size": self.decoded[key][1]}
            for n, key in enumerate(keys)
        }


class NaiveRoles(Roles):
    """The same trained networks, a reference that is a network of its own, and winners and losers in separate calls."""

    def __init__(self, ours: Roles, base: nn.Module | None, pairs: bool) -> None:
        self.__dict__.update(ours.__dict__)
        self.ours = ours
        if base is not None:
            self.networks = {**ours.networks, BASE: base}
        if pairs:
            self.forward = self._halves

    def activate(self, role: str) -> None:
        """The adapters are shared with the roles they were made by, which keep account of who is active."""
        if role != BASE:
            self.ours.activate(role)

    def _halves(self, unet: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        half = len(x_t) // 2
        parts = (slice(0, half), slice(half, None))
        return torch.cat([self.ours.forward(unet, x_t[part], t[part], cond.take(part)) for part in parts])


class NaiveTrainer(Trainer):
    """The same loop with VAE and text encoder in it: nothing is cached, nothing prepared while a step runs."""

    def decode(self) -> None:
        """The next step's pictures into memory; not part of the step."""
        assert isinstance(self.source.cache, EncodingCache)
        draws = [self.source.share(self.step * self.fresh + n, self.recipe.batch, 0, 1) for n in range(self.fresh)]
        indices, visits = ([value for draw in draws for value in draw[k]] for k in (0, 1))
        self.source.cache.decode(indices, visits, self.source.seed)

    def batches(self, draw: int) -> list[Batch]:
        """A fresh batch, encoded now, in the run's precision."""
        with self.ctx.casting():
            return [batch.to(self.ctx.device) for batch in self._load(draw)]


def make_naive(parts: Parts) -> NaiveTrainer:
    """The naive twin of a run's trainer: same weights, same optimisers, same rows and draws."""
    ours, roles = parts.trainer, parts.trainer.roles
    base = roles.networks.get(BASE) if parts.method.needs.reference else None
    if base is not None and roles.lora is not None:
        base = deepcopy(base)
        base.unload_lora()  # type: ignore[operator]
        if parts.recipe.model.compile:
            compile_unet(base)
    source = ours.source
    encoding = Source(
        EncodingCache(source.cache),
        source.indices.tolist(),
        source.seed,
        source.uncond,
        source.caption_dropout,
    )
    ctx = replace(ours.ctx, roles=NaiveRoles(roles, base, parts.method.needs.batch == "pair"))
    naive = NaiveTrainer(parts.method, ctx, encoding, ours.recipe, ours.accelerator)
    naive.optimizers, naive.ema = ours.optimizers, ours.ema
    return naive
