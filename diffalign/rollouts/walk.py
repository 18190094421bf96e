"""Samples under way: many at once, each step recorded, forked where a method wants a group, a pool or a tree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.batch import Cond
from ..denoiser import log_prob
from .policy import Policy

if TYPE_CHECKING:
    from ..context import Context
    from ..data.batch import Batch


@dataclass(frozen=True)
class Taken:
    """A step that N samples took: the ``k``-th, from ``x_t`` at ``t`` to ``x_s`` at ``s`` (negative: x0), under a
    Gaussian of ``mean`` (N, C, h, w) and ``std`` (N, 1, 1, 1). ``log_prob`` (N,) is the density of x_s averaged over
    its numbers; None for a step without noise, which has none."""

    k: int
    t: Tensor
    s: Tensor
    x_t: Tensor
    x_s: Tensor
    mean: Tensor
    std: Tensor
    log_prob: Tensor | None

    def take(self, index: Sequence[int]) -> Taken:
        """Those of some samples."""
        if list(index) == list(range(len(self.t))):
            return self
        rows = torch.tensor(list(index), device="cpu").to(self.t.device, non_blocking=True)
        density = None if self.log_prob is None else self.log_prob[rows]
        parts = (self.t[rows], self.s[rows], self.x_t[rows], self.x_s[rows], self.mean[rows], self.std[rows])
        return Taken(self.k, *parts, density)


def whole_picture(batch: Batch) -> Cond:
    """The prompt; networks that take sizes are told those of a whole picture of this size, as at sampling."""
    cond = batch.cond["prompt"]
    if not cond.added:
        return cond
    side = batch.sizes["image"][:, 4:]
    return cond.sized(torch.cat([side, torch.zeros_like(side), side], 1))


class Walk:
    """``members`` samples of each prompt on their way from noise to x0, without gradients.

    ``x`` (N, C, h, w) is where they are, ``k`` the step that comes next, ``row`` (N,) the prompt of each sample, and
    ``ids`` (N,) its path: the prompt's id, its number among the members, and one more number for each fork. Samples of
    one prompt stand beside one another. The noise of a step is keyed by the path so far, so that two samples share
    everything up to the fork that parts them, bit for bit, and a walk that is walked again is the same.

    Args:
        ctx, prompts: the tools, and P prompts.
        policy: how the student samples.
        role: who samples.
        members: samples a prompt.
        shared_noise: whether a prompt's members start from one noise.
        shifts: added to the times of each prompt's samples (P,), for times off the grid.
    """

    def __init__(
        self,
        ctx: Context,
        prompts: Batch,
        policy: Policy,
        role: str = "student",
        members: int = 1,
        shared_noise: bool = False,
        shifts: Sequence[int] | None = None,
    ) -> None:
        self.ctx, self.prompts, self.policy, self.role = ctx, prompts, policy, role
        self.shape = ctx.shape_of(prompts)
        self.cond = whole_picture(prompts)
        self.shifts = list(shifts) if shifts is not None else [0] * len(prompts)
        self.row = [row for row in range(len(prompts)) for _ in range(members)]
        self.ids = [f"{name}.{member}" for name in prompts.ids for member in range(members)]
        self.k = 0
        self._output: Tensor | None = None
        self._seen: tuple[list[int], Cond] | None = None
        start = [prompts.ids[row] for row in self.row] if shared_noise else self.ids
        self.x = policy.scale * self._noise("start", start)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        return self.k == len(self.policy)

    @property
    def texts(self) -> list[str]:
        """The prompt of each sample, as scorers read it."""
        return [self.prompts.prompts[row] for row in self.row]

    @property
    def t(self) -> Tensor:
        """The time of each sample's next step (N,), int64."""
        return self._times(self.policy.times[self.k])

    def _times(self, time: int) -> Tensor:
        times = [time + self.shifts[row] if time >= 0 else time for row in self.row]
        return torch.tensor(times, device="cpu").to(self.ctx.device, non_blocking=True)

    def _noise(self, tag: str, names: Sequence[str]) -> Tensor:
        return self.ctx.noise(tag, names, [self.prompts.visits[row] for row in self.row], self.shape)

    def told(self) -> Cond:
        """What the network is told of each sample."""
        if self._seen is None or self._seen[0] != self.row:
            index = torch.tensor(self.row, device="cpu").to(self.ctx.device, non_blocking=True)
            self._seen = list(self.row), self.cond.take(index)
        return self._seen[1]

    @torch.no_grad()
    def output(self) -> Tensor:
        """The network's output (N, C, h, w) where the samples are, guided as the policy says; one call, kept."""
        if self._output is None:
            self._output = self.ctx.model(self.role, self.x, self.t, self.told(), self.policy.guidance)
        return self._output

    @torch.no_grad()
    def x0(self) -> Tensor:
        """What the network takes the clean latents for (N, C, h, w)."""
        return self.ctx.denoiser.to_x0(self.output(), self.x, self.t)

    def take(self, index: Sequence[int]) -> None:
        """Go on with these samples alone, in this order."""
        kept = list(index)
        rows = torch.tensor(kept, device="cpu").to(self.ctx.device, non_blocking=True)
        self.row, self.ids = [self.row[i] for i in kept], [self.ids[i] for i in kept]
        self.x = self.x[rows]
        self._output = None if self._output is None else self._output[rows]

    def fork(self, count: int | Sequence[int]) -> list[int]:
        """Each sample becomes ``count`` beside one another (a number, or one each), with the same latents and the same
        output; what comes is their own. One child is no fork: the path stays. Returns each child's parent."""
        counts = [count] * len(self) if isinstance(count, int) else list(count)
        parents = [i for i, children in enumerate(counts) for _ in range(children)]
        if len(parents) > len(self):
            self.take(parents)
            places = [place for children in counts for place in range(children)]
            self.ids = [
                f"{name}.{place}" if counts[parent] > 1 else name
                for name, place, parent in zip(self.ids, places, parents, strict=True)
            ]
        return parents

    @torch.no_grad()
    def step(self, eta: float | Tensor | None = None) -> Taken:
        """Take the next step; ``eta``, a number or one each (N,), in the place of the policy's. Where it is one each,
        the density of a sample without noise is nan."""
        k, t, s, x = self.k, self.t, self._times(self.policy.ends[self.k]), self.x
        noise = None if self.still(eta) else self._noise(f"step-{k}", self.ids)
        found = self.policy.step(self.ctx.denoiser, self.output(), x, t, s, noise, eta)
        density = None
        if noise is not None:
            noisy = found.std > 0 if isinstance(eta, Tensor) else torch.ones_like(found.std, dtype=torch.bool)
            density = log_prob(found.sample, found.mean, torch.where(noisy, found.std, 1))
            density = torch.where(noisy.flatten(), density, math.nan)
        self.x, self.k, self._output = found.sample, k + 1, None
        return Taken(k, t, s, x, found.sample, found.mean, found.std, density)

    def still(self, eta: float | Tensor | None = None) -> bool:
        """Whether the next step adds no noise and so has no likelihood."""
        eta = self.policy.eta if eta is None else eta
        none = not isinstance(eta, Tensor) and eta == 0
        return self.policy.ends[self.k] < 0 or (self.policy.kernel != "renoise" and none)
