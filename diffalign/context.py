"""The pure tools a method is given (DESIGN 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from . import keyed
from .data.batch import Batch, Cond
from .denoiser import Denoiser, guide
from .roles import Roles

Reward = Callable[..., Tensor]  # (images, prompts, times or None): see `Context.reward`


def draw_noise(
    seed: int, tag: str, phase: str, repeat: int, batch: Batch, shape: Sequence[int], steps: int
) -> tuple[Tensor, Tensor]:
    """(t (B,) int64 uniform on 0..steps-1, noise (B, *shape) fp32), a function of the samples' ids and visits alone."""
    times, noises = [], []
    for name, visit in zip(batch.ids, batch.visits, strict=True):
        rng = keyed.generator(seed, tag, visit, phase, repeat, name)
        times.append(int(rng.integers(steps)))
        noises.append(rng.standard_normal(tuple(shape), dtype=np.float32))
    return torch.tensor(times), torch.from_numpy(np.stack(noises))


@dataclass
class Context:
    """What a method may use. ``phase`` and ``repeat`` are set by the trainer and key the draws; ``step`` is how many
    steps are done; ``stats`` holds the reduced result of ``Method.statistics``. ``latent_shape`` (C, h, w) is that of a
    picture at the run's resolution: what is drawn for batches that bring no latents."""

    roles: Roles
    denoiser: Denoiser
    seed: int
    device: torch.device
    uncond: Cond
    autocast: torch.dtype | None = None
    rewards: dict[str, Reward] = field(default_factory=dict)
    decoder: Callable[[Tensor], Tensor] | None = None
    phase: str = "main"
    repeat: int = 0
    step: int = 0
    stats: dict[str, Tensor] = field(default_factory=dict)
    latent_shape: tuple[int, int, int] = (4, 64, 64)

    def casting(self) -> AbstractContextManager[object]:
        """Autocast as the run's precision asks.

        Casts are not kept for the length of a call: no weight is used twice in one, and kept they would be a second
        network in half precision beside checkpointed blocks."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast, cache_enabled=False)

    def model(
        self, role: str, x_t: Tensor, t: Tensor, cond: Cond, guidance: float = 1.0, uncond: Cond | None = None
    ) -> Tensor:
        """The network's own prediction (B, C, h, w) in fp32.

        ``guidance`` follows diffusers: uncond + w (cond - uncond); 1 is conditional only, in one call of B, otherwise
        one call of 2B. ``uncond`` (B rows): see ``branches``."""
        if guidance != 1.0:
            return guide(*self.branches(role, x_t, t, cond, uncond), guidance)
        with self.casting():
            return self.roles(role, x_t, t, cond).float()

    def branches(
        self, role: str, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond | None = None
    ) -> tuple[Tensor, Tensor]:
        """Conditional and unconditional prediction, each (B, C, h, w) in fp32, from one call of 2B.

        ``uncond`` (B rows) defaults to the run's own. The unconditional branch keeps the sizes of the pictures, as
        diffusers' SDXL pipeline does."""
        without = self.uncond.expand(len(x_t)) if uncond is None else uncond
        with self.casting():
            both = Cond.cat([without.beside(cond), cond])
            found, conditional = self.roles(role, x_t.repeat(2, 1, 1, 1), t.repeat(2), both).float().chunk(2)
        return conditional, found

    def error(self, role: str, x_t: Tensor, t: Tensor, cond: Cond, target: Tensor, guidance: float = 1.0) -> Tensor:
        """Mean over C, h, w of the squared error of a role's prediction, one number a sample (B,), in fp32."""
        return (self.model(role, x_t, t, cond, guidance) - target.float()).square().mean((1, 2, 3))

    def draw(self, batch: Batch, tag: str = "noise") -> tuple[Tensor, Tensor]:
        """(t, noise) of each sample: t (B,) uniform over the schedule, noise (B, C, h, w) of the latents' shape, or of
        ``latent_shape`` where the batch has prompts alone."""
        key = draw_key(tag, self.phase, self.repeat)
        if key in batch.drawn:
            return batch.drawn[key]
        shape, steps = self.shape_of(batch), self.denoiser.num_timesteps
        t, noise = draw_noise(self.seed, tag, self.phase, self.repeat, batch, shape, steps)
        return t.to(self.device, non_blocking=True), noise.to(self.device, non_blocking=True)

    def noise(self, tag: str, names: Sequence[str], visits: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Standard normals (N, *shape) in fp32, keyed as ``draw``'s by the names and visits of N samples that are no
        rows of a batch, such as those that are sampled for one."""
        drawn = [
            keyed.normal(shape, self.seed, tag, visit, self.phase, self.repeat, name)
            for name, visit in zip(names, visits, strict=True)
        ]
        return torch.stack(drawn).to(self.device, non_blocking=True)

    def shape_of(self, batch: Batch) -> tuple[int, ...]:
        """(C, h, w) of the batch's latents; ``latent_shape`` where it has none."""
        return next((tuple(latents.shape[1:]) for latents in batch.latents.values()), self.latent_shape)

    def rng(self, tag: str, batch: Batch) -> list[np.random.Generator]:
        """One generator a sample for any other draw, keyed as ``draw``'s."""
        return [
            keyed.generator(self.seed, tag, visit, self.phase, self.repeat, name)
            for name, visit in zip(batch.ids, batch.visits, strict=True)
        ]

    def features(self, role: str, x_t: Tensor, t: Tensor, cond: Cond, layer: str = "mid_block") -> Tensor:
        """Output of a sub-module of the U-Net (by its dotted name) during a role's forward, in fp32."""
        with self.casting():
            return self.roles.features(role, x_t, t, cond, layer).float()

    def features_of(self, role: str, x_t: Tensor, t: Tensor, cond: Cond, layers: Sequence[str]) -> list[Tensor]:
        """The same of several sub-modules, by one forward."""
        with self.casting():
            return [found.float() for found in self.roles.features_of(role, x_t, t, cond, layers)]

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], fp32, of scaled latents (B, C, h, w); differentiable; for ``needs.decode``."""
        if self.decoder is None:
            raise TypeError("ctx.decode is for methods whose needs say decode=True")
        return self.decoder(latents)

    def reward(self, name: str, images: Tensor, prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Scores (B,) in fp32 of images (B, 3, H, W) in [0, 1] for prompts (B) (``batch.prompts``) by a scorer of the
        eval suite; differentiable. Needs ``needs.reward``; ``name`` is one of ``Method.rewards``, without its path.

        ``t`` (B,): times at which the images are what the denoiser believes; step-aware scorers alone look at it."""
        return self.rewards[name](images, prompts) if t is None else self.rewards[name](images, prompts, t)


def draw_key(tag: str, phase: str, repeat: int) -> str:
    """Where a loader leaves a (t, noise) pair drawn ahead of time."""
    return f"{tag}/{phase}/{repeat}"
