"""sCM: consistency in continuous time, by how the student changes along the teacher's trajectory.

Latents count as of unit deviation. Then a variance-preserving schedule is TrigFlow, alpha = cos(a) and sigma = sin(a)
of an angle a, and the velocity that a network of any prediction says is v = alpha noise - sigma x0, the trajectory's
own slope dx/da (arXiv 2410.11081, section 4). Networks are asked at times between those of the schedule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...data.batch import Cond
from ...denoiser import Denoiser, guide
from ...errors import UserError
from ...facts import SamplingRecord, student_record
from ..base import Loss, Method, MethodConfig, Needs, Paper, Phase, Stats, on_device
from ..score_distill import Time

if TYPE_CHECKING:
    from ...context import Context
    from ...data.batch import Batch
    from ...families.base import Model

WAVES = 16


class SCMConfig(MethodConfig):
    """SANA-Sprint's settings without its GAN."""

    timesteps: tuple[Time, ...] = Field(
        (999, 719), min_length=1, description="the times that the student is sampled at, falling"
    )
    guidance: tuple[float, float] = Field(
        (4.0, 5.0),
        description="the teacher's guidance u + w (c - u): each sample draws its own from this range; [1, 1]: "
        "conditional only",
    )
    time_mean: float = Field(0.893, description="mean of log(sigma / alpha) of the times")
    time_std: float = Field(1.6, gt=0, description="standard deviation of log(sigma / alpha) of the times")
    tangent: Literal["difference", "jvp"] = Field(
        "difference",
        description="the student's change along the trajectory: by two calls beside the point, or by forward-mode "
        "differentiation, without fused attention; differences are rounding where the U-Net's weights are of half "
        "precision",
    )
    step: float = Field(
        3e-4, gt=0, description="how far beside the point the calls are, in radians (tangent=difference)"
    )
    warmup: int = Field(4000, ge=0, description="updates over which the tangent's part of the loss grows to all of it")
    normalise: float = Field(0.1, gt=0, description="c of g / (|g| + c)")
    adaptive: bool = Field(True, description="divide the loss by a learned variance of its time")

    @field_validator("timesteps")
    @classmethod
    def _fall(cls, times: tuple[int, ...]) -> tuple[int, ...]:
        if any(a <= b for a, b in pairwise(times)):
            raise ValueError(f"the student's times must fall, such as [999, 719], not {list(times)}")
        return times


def to_velocity(output: Tensor, x: Tensor, angle: Tensor, prediction: str) -> Tensor:
    """v = alpha noise - sigma x0 (B, C, h, w) of a network's output at x and an angle (B,) between 0 and pi / 2."""
    cos, sin = (f(angle)[:, None, None, None] for f in (torch.cos, torch.sin))
    if prediction == "epsilon":
        return (output - sin * x) / cos
    return (cos * x - output) / sin if prediction == "sample" else output


def scm_direction(
    v: Tensor, slope: Tensor, tangent: Tensor, x: Tensor, angle: Tensor, share: Tensor | float, floor: float = 0.1
) -> tuple[Tensor, Tensor]:
    """(g / (|g| + floor), |g| (B,)), where g = -cos^2 (v - slope) - r (cos sin x + tangent), all (B, C, h, w).

    ``v``: the student's velocity at x; ``slope``: the teacher's; ``tangent``: the change of v along cos sin (slope, 1);
    ``share``: r. With r = 0 v is drawn to the teacher's; with r = 1 only a consistent v has g = 0."""
    cos, sin = (f(angle)[:, None, None, None] for f in (torch.cos, torch.sin))
    g = -(cos**2) * (v - slope) - share * (cos * sin * x + tangent)
    size = g.flatten(1).norm(dim=1)
    return g / (size + floor)[:, None, None, None], size


@dataclass
class Angles:
    """Angles of a schedule's times, rising."""

    table: np.ndarray

    @classmethod
    def of(cls, denoiser: Denoiser) -> Angles:
        """atan(sigma / alpha) of every time."""
        signal = denoiser.alphas_cumprod.numpy()
        return cls(np.arctan2(np.sqrt(1 - signal), np.sqrt(signal)))

    def time(self, angle: Tensor) -> tuple[Tensor, Tensor]:
        """The time (B,) at angles (B,) and how fast it grows with them, both between those of the table."""
        table = torch.from_numpy(self.table).to(angle)
        below = (torch.searchsorted(table, angle, right=True) - 1).clamp(0, len(table) - 2)
        rate = 1 / (table[below + 1] - table[below])
        return below + (angle - table[below]) * rate, rate


class LogVariance(nn.Module):
    """Of log(sigma / alpha) (B,): a number (B,), 0 at first."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(2 * WAVES, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, level: Tensor) -> Tensor:
        angles = level[:, None] * 2.0 ** torch.linspace(-3, 1, WAVES, device=level.device)
        found: Tensor = self.last(torch.cat([angles.sin(), angles.cos()], 1))
        return found[:, 0]


class SCM(Method[SCMConfig]):
    """The student's velocity is moved by the normalised g of `scm_direction`, weighed by alpha / sigma."""

    Config = SCMConfig
    paper = Paper(
        title="Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models",
        arxiv="2410.11081",
        implements="distillation on TrigFlow of eps and v models, tangent by differences or forward mode, warm-up, "
        "normalisation, learned variance; SANA-Sprint's times and guidance (2503.09641)",
        differs="latents count as of unit deviation; no GAN, guidance is not told; angles end at the schedule's own; "
        "the learned variance is a function of the time alone, by a linear layer on waves",
    )
    needs = Needs(batch="image")

    def __init__(self, config: SCMConfig) -> None:
        super().__init__(config)
        if config.adaptive:
            self.roles = ("student", "variance")
        self.phases = (Phase("student", self.roles),)

    def check(self, denoiser: Denoiser) -> None:
        if denoiser.prediction == "flow":
            raise UserError("method scm is for variance-preserving schedules, not for flow models")

    def build(self, family: Model) -> dict[str, nn.Module]:
        """The learned variance."""
        return {"variance": LogVariance()} if self.config.adaptive else {}

    def reason(self) -> str:
        return "the teacher's trajectories are met at real captioned pictures, noised"

    def sampling(self, scheduler: Mapping[str, Any]) -> SamplingRecord:
        """x0 and new noise, at the times of the settings."""
        return student_record(scheduler, self.config.timesteps)

    def statistics(self, ctx: Context, batch: Batch) -> Stats:
        return {"rows": torch.ones((), device=ctx.device)}

    def remember(self, before: Stats, now: Stats) -> Stats:
        """How many updates there were."""
        zero = torch.zeros_like(now["rows"])
        return {"updates": before.get("updates", zero - 1) + 1}

    def angle(self, ctx: Context, batch: Batch, angles: Angles) -> Tensor:
        """The angle of each sample (B,), within the schedule's."""
        config = self.config
        drawn = [math.atan(math.exp(rng.normal(config.time_mean, config.time_std))) for rng in ctx.rng("time", batch)]
        first, last = float(angles.table[0]), min(float(angles.table[-1]), math.pi / 2 - 1e-3)
        return on_device([min(max(a, first), last) for a in drawn], ctx.device).double()

    def velocity(self, ctx: Context, role: str, x: Tensor, angle: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """What a role says at x, an angle and its time: v (B, C, h, w)."""
        return to_velocity(ctx.model(role, x, t, cond), x, angle.float(), ctx.denoiser.prediction)

    def slope(self, ctx: Context, batch: Batch, x: Tensor, angle: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The guided teacher's velocity (B, C, h, w)."""
        low, high = self.config.guidance
        if low == high == 1:
            return self.velocity(ctx, "base", x, angle, t, cond)
        w = on_device([low + (high - low) * rng.random() for rng in ctx.rng("guidance", batch)], x.device).float()
        output = guide(*ctx.branches("base", x, t, cond), w[:, None, None, None])
        return to_velocity(output, x, angle.float(), ctx.denoiser.prediction)

    def tangent(self, ctx: Context, x: Tensor, angle: Tensor, angles: Angles, slope: Tensor, cond: Cond) -> Tensor:
        """cos sin (dv/dx slope + dv/da) (B, C, h, w): how the student's velocity changes along the trajectory.

        Without autocast: a difference needs all digits, and forward mode fails under it."""
        speed = angle.cos() * angle.sin()

        def said(x: Tensor, a: Tensor, t: Tensor, cond: Cond) -> Tensor:
            return to_velocity(ctx.roles("student", x, t, cond).float(), x, a, ctx.denoiser.prediction)

        if self.config.tangent == "jvp":
            t, rate = angles.time(angle)
            along = (speed.float()[:, None, None, None] * slope, speed.float(), (speed * rate).float())
            try:
                with sdpa_kernel(SDPBackend.MATH):
                    at = (x, angle.float(), t.float())
                    found: Tensor = torch.func.jvp(lambda x, a, t: said(x, a, t, cond), at, along)[1]
            except NotImplementedError as error:
                raise UserError(
                    "this attention has no forward-mode derivative; set method.tangent=difference, or model.attention "
                    "to torch's own"
                ) from error
            return found
        first, last = float(angles.table[0]), min(float(angles.table[-1]), math.pi / 2 - 1e-3)
        ends = [(angle + side * self.config.step).clamp(first, last) for side in (-1, 1)]
        # one call of both sides: what a batch is rounded by is the same in both
        both = torch.cat(ends)
        moved = torch.cat([x + (a - angle).float()[:, None, None, None] * slope for a in ends])
        below, above = said(moved, both.float(), angles.time(both)[0].float(), cond.repeat(2)).chunk(2)
        return (speed / (ends[1] - ends[0])).float()[:, None, None, None] * (above - below)

    def loss(self, ctx: Context, batch: Batch, phase: Phase) -> Loss:
        """Half-way between what v is and where g moves it: its gradient is that of g."""
        config, cond, real = self.config, batch.condition("image"), batch.latents["image"]
        angles = Angles.of(ctx.denoiser)
        angle = self.angle(ctx, batch, angles)
        t = angles.time(angle)[0].float()
        cos, sin = (f(angle).float()[:, None, None, None] for f in (torch.cos, torch.sin))
        x = cos * real + sin * ctx.draw(batch)[1]
        with torch.no_grad():
            slope = self.slope(ctx, batch, x, angle, t, cond)
            tangent = self.tangent(ctx, x, angle, angles, slope, cond)
        v = self.velocity(ctx, "student", x, angle, t, cond)
        with torch.no_grad():
            share: Tensor | float = 1.0
            if config.warmup and "updates" in ctx.stats:
                share = (ctx.stats["updates"] / config.warmup).clamp_max(1)
            g, size = scm_direction(v, slope, tangent, x, angle.float(), share, config.normalise)
            target = v + g
        weight = (1 / angle.tan()).float()
        values = weight * (v - target).square().mean((1, 2, 3))
        if config.adaptive:
            log = ctx.roles.modules["variance"](angle.tan().log().float())
            values = values * (-log).exp() + log
        gap = (v.detach() - slope).square().mean((1, 2, 3))
        return Loss(values, batch.weight, {"direction": size / math.sqrt(x[0].numel()), "gap": gap})
