"""Consistency: what the methods share that make every point of the teacher's trajectory say where it ends.

A real picture is noised to a time of the solver's grid. One DDIM step of the guided teacher leads to the time before
it, and from there the student, without gradient, says the end that it has to say from the first point too. Times are
indices of the schedule. Guidance is diffusers' u + w (c - u): 1 more than LCM and PCM count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from ..data.batch import Cond
from ..denoiser import guide
from ..errors import UserError
from .base import Loss, Method, MethodConfig, Needs, Phase, on_device

if TYPE_CHECKING:
    from ..context import Context
    from ..data.batch import Batch
    from ..denoiser import Denoiser

Form = Literal["huber", "vector", "mse"]
WIDTH = 1e-3  # LCM's, number by number
VECTOR_WIDTH = 0.00054  # improved consistency training's, times the root of how many numbers there are


class ConsistencyConfig(MethodConfig):
    """Settings that every consistency distillation has."""

    solver_steps: int = Field(
        50, ge=1, description="steps of the teacher's DDIM over the whole schedule, whose times they divide"
    )
    guidance: tuple[float, float] = Field(
        (4.0, 16.0),
        description="the teacher's guidance u + w (c - u): each sample draws its own from this range; [1, 1]: "
        "conditional only. LCM and PCM count w - 1",
    )
    loss: Form = Field(
        "huber",
        description="how far two ends are apart: pseudo-Huber of each number, pseudo-Huber of the whole vector "
        "(improved consistency training), or squared",
    )
    huber: float | None = Field(
        None, gt=0, description="width of pseudo-Huber; null: 1e-3, and 0.00054 sqrt(C h w) of the vector"
    )
    times: Literal["uniform", "lognormal"] = Field(
        "uniform", description="how times are drawn from the grid: evenly, or by log(sigma / alpha) as a normal"
    )
    time_mean: float = Field(-1.1, description="mean of log(sigma / alpha) (times=lognormal)")
    time_std: float = Field(2.0, gt=0, description="standard deviation of log(sigma / alpha) (times=lognormal)")
    target_ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of the average of the student that gives the targets; 0: the student itself",
    )

    @field_validator("guidance")
    @classmethod
    def _range(cls, guidance: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= guidance[0] <= guidance[1]:
            raise ValueError(f"a range of guidance is two rising numbers from 0 on, not {list(guidance)}")
        return guidance


K = TypeVar("K", bound=ConsistencyConfig)


@dataclass(frozen=True)
class Grid:
    """Times of the solver, rising, and for each the time that one step leads to, the time at which its trajectory ends
    and the time at which that began: all (N,)."""

    times: tuple[int, ...]
    before: tuple[int, ...]
    ends: tuple[int, ...]
    tops: tuple[int, ...]


@dataclass
class Point:
    """Where each sample stands: ``x_t`` (B, C, h, w) at ``t``, one step from ``before``, on a trajectory to ``end``,
    all (B,); ``spans`` are the last and first time of each trajectory, as numbers. ``w`` (B,) is the guidance of each;
    ``cond`` is what the teacher is told."""

    x_t: Tensor
    t: Tensor
    before: Tensor
    end: Tensor
    spans: tuple[tuple[int, int], ...]
    w: Tensor
    cond: Cond


def distance(difference: Tensor, form: Form = "huber", width: float | None = None) -> Tensor:
    """How far apart two ends are, from their difference (B, C, h, w): (B,).

    ``huber``: mean of sqrt(d^2 + c^2) - c (LCM); ``vector``: sqrt(|d|^2 + c^2) - c with c = 0.00054 sqrt(C h w)
    (arXiv 2310.14189, section 3.3); ``mse``: mean of d^2. ``width`` is c."""
    if form == "mse":
        return difference.square().mean((1, 2, 3))
    if form == "vector":
        c = VECTOR_WIDTH * math.sqrt(difference[0].numel()) if width is None else width
        return (difference.square().sum((1, 2, 3)) + c**2).sqrt() - c
    c = WIDTH if width is None else width
    return ((difference.square() + c**2).sqrt() - c).mean((1, 2, 3))


def make_grid(steps: int, solver_steps: int, segments: int = 1) -> Grid:
    """The grid over a schedule of ``steps`` times: the last of each of ``solver_steps`` equal parts (19, 39, ..., 999),
    and the last of each of ``segments`` equal parts, where trajectories begin; each ends at the last time of the
    segment below, the lowest at 0, the schedule's cleanest."""
    edges = [steps * (j + 1) // segments - 1 for j in range(segments)]
    times = sorted({*range(steps // solver_steps - 1, steps, steps // solver_steps), *edges})
    of = [-(-(t + 1) * segments // steps) - 1 for t in times]  # the segment of each
    ends = [edges[j - 1] if j else 0 for j in of]
    return Grid(tuple(times), (0, *times[:-1]), tuple(ends), tuple(edges[j] for j in of))


def lognormal_shares(above: Sequence[float], below: Sequence[float], mean: float, std: float) -> np.ndarray:
    """Probability (N,) of each of N steps from a noise level sigma / alpha ``above`` to the one ``below``: what a
    normal of the logarithm has between the two (arXiv 2310.14189, eq. 10)."""
    high, low = (
        np.array([math.erf((math.log(x) - mean) / (math.sqrt(2) * std)) for x in levels]) for levels in (above, below)
    )
    return np.asarray((high - low) / (high - low).sum())


class Consistency(Method[K], Generic[K]):
    """Hooks: ``grid`` (times, and where trajectories end), ``reach`` (how a network says the end) and ``told`` (what it
    knows besides). Every sample draws its own time, noise and guidance, so that a batch is a loop of singles."""

    needs = Needs(batch="image")
    roles: tuple[str, ...] = ("student",)
    phases: tuple[Phase, ...] = (Phase("student", ("student",)),)

    def __init__(self, config: K) -> None:
        super().__init__(config)
        self.teller = "student"
        pulls: tuple[tuple[str, str, float], ...] = ()
        if config.target_ema:
            self.teller = "target"
            self.roles = ("student", "target")
            pulls = (("target", "student", 1 - config.target_ema),)
        self.phases = (Phase("student", ("student",), pulls=pulls),)

    def reason(self) -> str:
        return "the teacher's steps begin at real captioned pictures, noised"

    def grid(self, steps: int) -> Grid:
        """Times of a schedule of ``steps``."""
        return make_grid(steps, self.config.solver_steps)

    def check(self, denoiser: Denoiser) -> None:
        """That the solver's steps divide the schedule."""
        check_divides("solver_steps", self.config.solver_steps, denoiser.num_timesteps)

    # ---- one loss ---------------------------------------------------------------------------------------------------

    def point(self, ctx: Context, batch: Batch) -> Point:
        """Where each sample is looked at."""
        config, real = self.config, batch.latents["image"]
        grid = self.grid(ctx.denoiser.num_timesteps)
        if config.times == "uniform":
            picked = [int(rng.integers(len(grid.times))) for rng in ctx.rng("time", batch)]
        else:
            above, below = ([float(ctx.denoiser.snr(t)) ** -0.5 for t in of] for of in (grid.times, grid.before))
            total = lognormal_shares(above, below, config.time_mean, config.time_std).cumsum()
            drawn = [rng.random() for rng in ctx.rng("time", batch)]
            picked = [min(int(np.searchsorted(total, u, side="right")), len(total) - 1) for u in drawn]
        low, high = config.guidance
        w = on_device([low + (high - low) * rng.random() for rng in ctx.rng("guidance", batch)], real.device)
        t, before, end = (
            on_device([of[i] for i in picked], real.device) for of in (grid.times, grid.before, grid.ends)
        )
        spans = tuple((grid.ends[i], grid.tops[i]) for i in picked)
        x_t = ctx.denoiser.add_noise(real, ctx.draw(batch)[1], t)
        return Point(x_t, t, before, end, spans, w, batch.condition("image"))

    def solve(self, ctx: Context, point: Point) -> Tensor:
        """The teacher's DDIM step from ``t`` to ``before``, guided: (B, C, h, w)."""
        x_t, t = point.x_t, point.t
        if self.config.guidance == (1.0, 1.0):
            output = ctx.model("base", x_t, t, point.cond)
        else:
            output = guide(*ctx.branches("base", x_t, t, point.cond), point.w[:, None, None, None])
        return ctx.denoiser.ddim_step(output, x_t, t, point.before).sample

    def told(self, ctx: Context, point: Point) -> Cond:
        """What the student is told."""
        return point.cond

    def reach(self, ctx: Context, output: Tensor, x: Tensor, t: Tensor, point: Point) -> Tensor:
        """The end (B, C, h, w) of the trajectory that a network says by its ``output`` at ``x`` and ``t`` (B,)."""
        raise TypeError(f"{type(self).__name__} does not say how an end is reached")

    @torch.no_grad()
    def target(self, ctx: Context, point: Point) -> Tensor:
        """The end (B, C, h, w) as it is said one step of the teacher further."""
        x, cond = self.solve(ctx, point), self.told(ctx, point)
        return self.reach(ctx, ctx.model(self.teller, x, point.before, cond), x, point.before, point)

    def predict(self, ctx: Context, point: Point) -> tuple[Tensor, Tensor]:
        """The end as the student says it, and its network's own output, both (B, C, h, w)."""
        output = ctx.model("student", point.x_t, point.t, self.told(ctx, point))
        return self.reach(ctx, output, point.x_t, point.t, point), output

    def consistency(self, ctx: Context, batch: Batch) -> tuple[Loss, Point, Tensor, Tensor]:
        """The loss, where it was taken, and what `predict` gives there."""
        point = self.point(ctx, batch)
        target = self.target(ctx, point)
        reached, output = self.predict(ctx, point)
        values = distance(reached - target, self.config.loss, self.config.huber)
        error = (reached.detach() - target).square().mean((1, 2, 3))
        return Loss(values, batch.weight, {"consistency_error": error}), point, reached, output

    def loss(self, ctx: Context, batch: Batch, phase: Phase) -> Loss:
        """The distance of what the student says from what is said one step further."""
        return self.consistency(ctx, batch)[0]


def check_divides(name: str, parts: int, steps: int) -> None:
    """Raises UserError where the setting ``name`` does not cut the schedule into equal ``parts``."""
    if steps % parts:
        near = sorted((d for d in range(1, steps + 1) if steps % d == 0), key=lambda d: abs(d - parts))[:4]
        raise UserError(
            f"method.{name} {parts} does not divide the schedule's {steps} times; set it to one that does, such as "
            f"{', '.join(map(str, sorted(near)))}"
        )
