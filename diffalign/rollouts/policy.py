"""A sampler as a policy: at each step a Gaussian over the next latents, whose mean the network gives.

Kernels: ``ddim`` with a share eta of new noise (arXiv 2010.02502; eta = 1 is the DDPM posterior and, in this scaling of
the latents, Euler-ancestral), ``renoise`` (LCM's and DMD2's: x0 and all new noise), and of flow models, with eta as
their noise level, ``flow`` (Flow-GRPO's SDE, arXiv 2505.05470), ``dance`` (DanceGRPO's, 2505.07818, of constant rate)
and ``cps`` (a fixed share of what noise is left, which keeps each level but contracts with every step).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ..denoiser import Denoiser, Step, flow_sde_step

Kernel = Literal["ddim", "renoise", "flow", "dance", "cps"]
FLOWS = ("flow", "dance", "cps")
CLEAN = -1  # where a last step goes that ends on x0 itself


@dataclass(frozen=True)
class Policy:
    """How a student samples.

    Args:
        times: of the steps, falling indices of the schedule (K,).
        ends: where each step goes (K,); negative is x0 itself, without noise, whatever the kernel.
        kernel: see the module.
        eta: share of new noise of ``ddim``, noise level of flow models' kernels.
        guidance: of the student; 1 is none.
        scale: what the unit noise of the start is multiplied by.
    """

    times: tuple[int, ...]
    ends: tuple[int, ...]
    kernel: Kernel = "ddim"
    eta: float = 1.0
    guidance: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        falling = all(a > b for a, b in pairwise(self.times))
        if not self.times or len(self.times) != len(self.ends) or not falling:
            raise ValueError(f"a policy needs falling times and an end for each, not {self.times} and {self.ends}")
        if any(s >= t for t, s in zip(self.times, self.ends, strict=True)):
            raise ValueError(f"every step must end below its time: {self.times} and {self.ends}")

    def __len__(self) -> int:
        return len(self.times)

    def step(
        self,
        denoiser: Denoiser,
        output: Tensor,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        noise: Tensor | None = None,
        eta: float | Tensor | None = None,
    ) -> Step:
        """The step from ``t`` to ``s`` (B,), of which each sample has its own, by the network's ``output`` at ``x``.

        Without ``noise`` the sample is the mean. ``eta``, a number or (B,), in the place of the policy's.
        Differentiable in ``output``."""
        eta = self.eta if eta is None else eta
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x0 = denoiser.to_x0(output, x, t)
        level = s.clamp(min=0)
        if self.kernel == "renoise":
            mean, std = denoiser.alpha(level).to(x) * x0, denoiser.sigma(level).to(x)
        elif self.kernel != "ddim":
            mean, std = self._flow(denoiser, output, x, t, level, eta)
        elif isinstance(eta, Tensor):
            std = eta.to(x).view(-1, 1, 1, 1) * denoiser.transition(output, x, t, level, 1.0)[1]
            towards = (denoiser.sigma(level).to(x).square() - std.square()).clamp(min=0).sqrt()
            mean = denoiser.alpha(level).to(x) * x0 + towards * denoiser.to_eps(output, x, t)
        else:
            mean, std = denoiser.transition(output, x, t, level, eta)
        clean = (s < 0).reshape(-1, 1, 1, 1)
        mean, std = torch.where(clean, x0, mean), torch.where(clean, torch.zeros_like(std), std)
        return Step(mean if noise is None else mean + std * noise.to(mean.dtype), mean, std)

    def _flow(
        self, denoiser: Denoiser, output: Tensor, x: Tensor, t: Tensor, level: Tensor, eta: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean and std of a step of a flow model, whose sigma is its time."""
        v, s, end = denoiser.to_v(output, x, t), denoiser.sigma(t).to(x), denoiser.sigma(level).to(x)
        share = eta.to(x).view(-1, 1, 1, 1) if isinstance(eta, Tensor) else torch.full_like(s, eta)
        if self.kernel == "cps":
            std = end * torch.sin(share * (math.pi / 2))
            return (1 - end) * (x - s * v) + (end.square() - std.square()).sqrt() * (x + (1 - s) * v), std
        # the drift is linear in the squared rate; Dance's is constant, where Flow-GRPO's is s / (1 - s)
        found = flow_sde_step(v, x, s.flatten(), end.flatten(), 1.0, torch.zeros_like(x))
        rate = share.square() * ((1 - torch.where(s >= 1, end, s)) / s if self.kernel == "dance" else 1)
        euler = x + v * (end - s)
        return euler + rate * (found.mean - euler), rate.sqrt() * found.std

    def stds(self, denoiser: Denoiser) -> Tensor:
        """Standard deviation of each step, fp32 (K,) on the CPU."""
        zeros = torch.zeros(len(self), 1, 1, 1, device="cpu")
        t, s = torch.tensor(self.times, device="cpu"), torch.tensor(self.ends, device="cpu")
        return self.step(denoiser, zeros, zeros, t, s).std.flatten()

    def weights(self, denoiser: Denoiser) -> Tensor:
        """|a| / std of each step, fp32 (K,) on the CPU, with a the slope of the step's mean in eps; 0 without noise,
        and from a level without signal, where eps is the sample itself whatever the network says.

        What a change of eps weighs in the step's density: half its square in the KL, and itself in the difference of
        two densities from one state, (a / std) mean[(eps - eps_base) (z_w - z_l)] with z the steps' noises."""
        t, s = torch.tensor(self.times, device="cpu"), torch.tensor(self.ends, device="cpu")
        zeros = torch.zeros(len(self), 1, 1, 1, device="cpu")
        low, high = (
            self.step(denoiser, denoiser.from_eps(eps, zeros, t), zeros, t, s).mean for eps in (zeros, zeros + 1)
        )
        std, slope = self.stds(denoiser), (high - low).flatten().abs()
        return torch.where((std > 0) & slope.isfinite(), slope / std, torch.zeros_like(std))

    def trainable(self, denoiser: Denoiser) -> list[int]:
        """The steps that have a likelihood: those whose std is not 0."""
        return [k for k, std in enumerate(self.stds(denoiser).tolist()) if std > 0]


def many_steps(denoiser: Denoiser, steps: int, spacing: str = "leading", offset: int = 1) -> tuple[Sequence[int], ...]:
    """(times, ends) of a many-step sampler. The last step ends at level 0, whose noise is not quite nothing, so that it
    has a likelihood, as SPO's and DDPO's have it."""
    times = denoiser.timesteps(steps, spacing, offset).tolist()
    last = max(times[-1] - denoiser.num_timesteps // steps, 0)
    return tuple(times), (*times[1:], last if last < times[-1] else CLEAN)


def few_steps(times: Sequence[int]) -> tuple[Sequence[int], ...]:
    """(times, ends) of a few-step student at exactly ``times``; the last step ends on x0."""
    return tuple(times), (*times[1:], CLEAN)
