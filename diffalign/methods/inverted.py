"""Pair methods whose noisy latents come from DDIM inversion of each picture (offline sheet 0.3, 0.4, 5, 6)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from ..denoiser import Denoiser, stop_exactly
from ..errors import UserError
from .base import Needs
from .pair import Noised, PairConfig, PairMethod

if TYPE_CHECKING:
    from ..context import Context
    from ..data.batch import Batch


class InvertedConfig(PairConfig):
    """Settings of the inversion."""

    inversion_steps: int = Field(
        10, ge=1, le=1000, description="points of the inversion's grid over the whole schedule"
    )
    levels: Literal["exact", "authors"] = Field(
        "exact",
        description="exact: each pair is inverted to its own t; authors: to the next point of the grid, while the "
        "networks and the target are told t",
    )
    inverter: Literal["policy", "base"] = Field("policy", description="which network inverts, without gradient")
    guidance: float = Field(1.0, ge=0, description="classifier-free guidance of the inversion; 1 is conditional only")
    eta: float = Field(0.0, ge=0, le=1, description="share of the DDIM noise added after each inversion step")


I = TypeVar("I", bound=InvertedConfig)  # noqa: E741 - beside P and C


def check_inversion(denoiser: Denoiser, steps: int) -> None:
    """Raises UserError when the grid of ``steps`` points, whose stride is a whole number, leaves out more than a tenth
    of the schedule."""
    times = denoiser.num_timesteps
    covered = times // steps * steps
    if covered < 0.9 * times:
        raise UserError(
            f"method.inversion_steps={steps} does not fit the model's schedule of {times} times, of which it covers "
            f"{covered}; take {times // max(1, times // min(steps, times))}"
        )


class InvertedPair(PairMethod[I], Generic[I]):
    """A pair shares t; winner and loser are inverted to it, each along its own path, in one batched pass of 2B.

    Samples of a batch stop at levels of their own. The regression target is what says x0 at the x_t that was reached:
    for an eps network (x_t - alpha_t x0) / sigma_t. ``renoise`` and ``average`` are ReNoise's, see
    ``Denoiser.invert``.
    """

    needs = Needs(batch="pair", draws=())
    renoise = 0
    average: tuple[int, ...] = ()

    def check(self, denoiser: Denoiser) -> None:
        """That the grid covers the schedule."""
        check_inversion(denoiser, self.config.inversion_steps)

    def grid(self, ctx: Context, t: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Levels (K,) or (n, K), which steps each of the times t (n,) takes (n, K), and the times told to the network
        (None: the levels entered). All on the CPU."""
        if self.config.levels == "exact":
            levels, mask = stop_exactly(ctx.denoiser.inversion_grid(self.config.inversion_steps)[0], t)
            return levels, mask, None
        levels, told = ctx.denoiser.inversion_grid(self.config.inversion_steps, "source")
        return levels, told < t[:, None], told

    def noise(self, ctx: Context, batch: Batch) -> Noised:
        """Both members inverted to the pair's t, which is drawn evenly over the schedule."""
        config, denoiser = self.config, ctx.denoiser
        rngs = ctx.rng("inversion", batch)
        # drawn here and not by the loader: the grid is worked out on the CPU, and nothing waits for the device
        t = torch.tensor([int(rng.integers(denoiser.num_timesteps)) for rng in rngs], device="cpu").repeat(2)
        x0 = torch.cat([batch.latents["chosen"], batch.latents["rejected"]])
        cond = self.pair_cond(batch)
        levels, mask, told = self.grid(ctx, t)
        noises = None
        if config.eta:
            shape = (2, mask.shape[1], *x0.shape[1:])  # winner's and loser's are independent
            drawn = torch.stack([torch.from_numpy(rng.standard_normal(shape, dtype="float32")) for rng in rngs], 1)
            noises = list(drawn.flatten(0, 1).to(x0.device, non_blocking=True).unbind(1))
        role = "student" if config.inverter == "policy" else "base"
        x_t = denoiser.invert(
            lambda x, s: ctx.model(role, x, s, cond, config.guidance),
            x0,
            levels,
            # a constant predictor then gives exactly the forward noising of x0 with it
            initial_alpha=1.0 if config.levels == "exact" else None,
            times=told,
            mask=mask,
            renoise=self.renoise,
            average=self.average,
            eta=config.eta,
            noises=noises,
        )
        t = t.to(x0.device, non_blocking=True)
        return Noised(x_t, t, denoiser.target_from_xt(x0, x_t, t), cond)
