"""sCM: consistency in continuous time, by how the student changes along the teacher's trajectory.

Latents count as of unit deviation. Then a variance-preserving schedule is TrigFlow, alpha = cos(a) and sigma = sin(a)
of an angle a, and the velocity that a network of any prediction says is v = alpha noise - sigma x0, the trajectory's
own slope dx/da (arXiv 2410.11081, section 4). Networks are asked at times between those of the schedule.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from ...data.batch import Cond
from ...denoiser import Denoiser, guide
from ...errors import Note, UserError
from ...facts import SamplingRecord, student_record
from ...families.attention import math_attention
from ...families.guidance import require_embedding, tell
from ..base import Loss, Method, Needs, Paper, Phase, Stats, Times, on_device
from ..ladd import Heads, LaddConfig, blocks_of
from ..segmented import hinge_critic_loss

if TYPE_CHECKING:
    from ...context import Context
    from ...data.batch import Batch
    from ...families.base import Model

WAVES = 16


class SCMConfig(LaddConfig):
    """SANA-Sprint's settings; its GAN has weight 0.5."""

    timesteps: Times = Field((999, 719), min_length=1, description="the times that the student is sampled at, falling")
    guidance: tuple[float, float] = Field(
        (4.0, 5.0),
        description="the teacher's guidance u + w (c - u): each sample draws its own from this range; [1, 1]: "
        "conditional only",
    )
    tell_guidance: bool = Field(
        False,
        description="tell the student the guidance of each sample by its guidance embedding, which "
        "model.guidance_embedding adds, so that sampling chooses it; false: what all of them give is built in",
    )
    time_mean: float = Field(0.893, description="mean of log(sigma / alpha) of the times")
    time_std: float = Field(1.6, gt=0, description="standard deviation of log(sigma / alpha) of the times")
    tangent: Literal["difference", "jvp"] = Field(
        "difference",
        description="the student's change along the trajectory: by two calls beside the point, or by forward-mode "
        "differentiation, with torch's math attention; differences are rounding where the U-Net's weights are of half "
        "precision",
    )
    step: float = Field(
        3e-4, gt=0, description="how far beside the point the calls are, in radians (tangent=difference)"
    )
    warmup: int = Field(4000, ge=0, description="updates over which the tangent's part of the loss grows to all of it")
    normalise: float = Field(0.1, gt=0, description="c of g / (|g| + c)")
    adaptive: bool = Field(True, description="divide the loss by a learned variance of its time")


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

    @property
    def ends(self) -> tuple[float, float]:
        """The first and the last that networks are asked at; just below pi / 2, where there is no signal."""
        return float(self.table[0]), min(float(self.table[-1]), math.pi / 2 - 1e-3)

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
        "normalisation, learned variance; SANA-Sprint's (2503.09641) times, guidance embedding and LADD's heads by "
        "option",
        differs="latents count as of unit deviation; angles end at the schedule's own; the learned variance is a "
        "function of the time alone, by a linear layer on waves; heads on the U-Net's down and middle blocks, which "
        "start at zero, trained in every step on rows of their own",
    )
    needs = Needs(batch="image")

    def __init__(self, config: SCMConfig) -> None:
        super().__init__(config)
        self.said = False
        trained = ("student", "variance") if config.adaptive else ("student",)
        self.roles, self.phases = trained, (Phase("student", trained),)
        if config.gan_weight:
            self.roles = (*trained, "heads")
            self.phases = (*self.phases, Phase("critic", ("heads",)))
            self.needs = Needs(batch="image", draws=("noise", "gan"))

    def check(self, denoiser: Denoiser) -> None:
        if denoiser.prediction == "flow":
            raise UserError("method scm is for variance-preserving schedules, not for flow models")

    def build(self, family: Model) -> dict[str, nn.Module]:
        """The learned variance, and the GAN's heads. Raises UserError where guidance is to be told to a U-Net that has
        no embedding for it, and for blocks that it has not."""
        config, found = self.config, dict[str, nn.Module]()
        if config.tell_guidance:
            self._width = require_embedding(family.unet, "method.tell_guidance=true")
        if config.adaptive:
            found["variance"] = LogVariance()
        if config.gan_weight:
            self._blocks = blocks_of(family.unet, config.gan_blocks)
            found["heads"] = Heads(self._blocks.values(), config.gan_width)
        return found

    def reason(self) -> str:
        return "the teacher's trajectories are met at real captioned pictures, noised"

    def sampling(self, scheduler: Mapping[str, Any]) -> SamplingRecord:
        """x0 and new noise, at the times of the settings."""
        told = self.config.guidance if self.config.tell_guidance else None
        return student_record(scheduler, self.config.timesteps, told=told)

    def statistics(self, ctx: Context, batch: Batch) -> Stats:
        return {"rows": torch.ones((), device=ctx.device)}

    def remember(self, before: Stats, now: Stats) -> Stats:
        """How many updates there were."""
        zero = torch.zeros_like(now["rows"])
        return {"updates": before.get("updates", zero - 1) + 1}

    def angle(
        self, ctx: Context, batch: Batch, angles: Angles, tag: str = "time", law: tuple[float, float] | None = None
    ) -> Tensor:
        """An angle of each sample (B,) within the schedule's, by mean and deviation of log(sigma / alpha)."""
        mean, std = law or (self.config.time_mean, self.config.time_std)
        drawn = [math.atan(math.exp(rng.normal(mean, std))) for rng in ctx.rng(tag, batch)]
        first, last = angles.ends
        return on_device([min(max(a, first), last) for a in drawn], ctx.device).double()

    def guidance(self, ctx: Context, batch: Batch) -> Tensor:
        """The guidance of each sample (B,), by its own draw."""
        low, high = self.config.guidance
        return on_device([low + (high - low) * rng.random() for rng in ctx.rng("guidance", batch)], ctx.device).float()

    def told(self, ctx: Context, batch: Batch) -> Cond:
        """What the student is told."""
        cond = batch.condition("image")
        return tell(cond, self.guidance(ctx, batch), self._width) if self.config.tell_guidance else cond

    def velocity(self, ctx: Context, role: str, x: Tensor, angle: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """What a role says at x, an angle and its time: v (B, C, h, w)."""
        return to_velocity(ctx.model(role, x, t, cond), x, angle.float(), ctx.denoiser.prediction)

    def slope(self, ctx: Context, batch: Batch, x: Tensor, angle: Tensor, t: Tensor) -> Tensor:
        """The guided teacher's velocity (B, C, h, w)."""
        cond = batch.condition("image")
        if self.config.guidance == (1.0, 1.0):
            return self.velocity(ctx, "base", x, angle, t, cond)
        output = guide(*ctx.branches("base", x, t, cond), self.guidance(ctx, batch)[:, None, None, None])
        return to_velocity(output, x, angle.float(), ctx.denoiser.prediction)

    def tangent(self, ctx: Context, x: Tensor, angle: Tensor, angles: Angles, slope: Tensor, cond: Cond) -> Tensor:
        """cos sin (dv/dx slope + dv/da) (B, C, h, w): how the student's velocity changes along the trajectory.

        Without autocast and by torch's math attention: a difference needs all digits, and forward mode fails under the
        one and lacks a formula for other kernels. Warns of a kernel that makes way."""
        with math_attention(ctx.roles.networks["student"]) as other:
            if other and not self.said:
                self.said = True
                warnings.warn(
                    f"the tangent's calls take torch's math attention in the place of {' and '.join(other)}, which "
                    "lacks a forward-mode derivative or full precision",
                    Note,
                    stacklevel=2,
                )
            return self._tangent(ctx, x, angle, angles, slope, cond)

    def _tangent(self, ctx: Context, x: Tensor, angle: Tensor, angles: Angles, slope: Tensor, cond: Cond) -> Tensor:
        speed = angle.cos() * angle.sin()

        def said(x: Tensor, a: Tensor, t: Tensor, cond: Cond) -> Tensor:
            return to_velocity(ctx.roles("student", x, t, cond).float(), x, a, ctx.denoiser.prediction)

        if self.config.tangent == "jvp":
            t, rate = angles.time(angle)
            along = (speed.float()[:, None, None, None] * slope, speed.float(), (speed * rate).float())
            at = (x, angle.float(), t.float())
            try:
                found: Tensor = torch.func.jvp(lambda x, a, t: said(x, a, t, cond), at, along)[1]
            except NotImplementedError as error:
                raise UserError(
                    "a layer of this U-Net has no forward-mode derivative; set method.tangent=difference"
                ) from error
            return found
        ends = [(angle + side * self.config.step).clamp(*angles.ends) for side in (-1, 1)]
        # one call of both sides: what a batch is rounded by is the same in both
        both = torch.cat(ends)
        moved = torch.cat([x + (a - angle).float()[:, None, None, None] * slope for a in ends])
        below, above = said(moved, both.float(), angles.time(both)[0].float(), cond.repeat(2)).chunk(2)
        return (speed / (ends[1] - ends[0])).float()[:, None, None, None] * (above - below)

    # ---- losses -----------------------------------------------------------------------------------------------------

    def loss(self, ctx: Context, batch: Batch, phase: Phase) -> Loss:
        """The student's, or that of the heads."""
        return self.critic_loss(ctx, batch) if phase.name == "critic" else self.student_loss(ctx, batch)

    def point(self, ctx: Context, batch: Batch, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """Where the student is asked: x (B, C, h, w), its angle and its time (B,)."""
        angle = self.angle(ctx, batch, angles)
        cos, sin = (f(angle).float()[:, None, None, None] for f in (torch.cos, torch.sin))
        x = cos * batch.latents["image"] + sin * ctx.draw(batch)[1]
        return x, angle, angles.time(angle)[0].float()

    def student_loss(self, ctx: Context, batch: Batch) -> Loss:
        """Half-way between what v is and where g moves it, so that its gradient is that of g; and what the heads say
        of the student's x0."""
        config, told = self.config, self.told(ctx, batch)
        angles = Angles.of(ctx.denoiser)
        x, angle, t = self.point(ctx, batch, angles)
        with torch.no_grad():
            slope = self.slope(ctx, batch, x, angle, t)
            tangent = self.tangent(ctx, x, angle, angles, slope, told)
        v = self.velocity(ctx, "student", x, angle, t, told)
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
        metrics = {"direction": size / math.sqrt(x[0].numel()), "gap": gap}
        if config.gan_weight:
            made = self.made(ctx, batch, angles, told, x, angle, v)
            metrics["gan"] = -config.gan_weight * self.judge(ctx, batch, angles, made).mean(1)
            values = values + metrics["gan"]
        return Loss(values, batch.weight, metrics)

    # ---- the GAN ----------------------------------------------------------------------------------------------------

    def made(
        self, ctx: Context, batch: Batch, angles: Angles, told: Cond, x: Tensor, angle: Tensor, v: Tensor
    ) -> Tensor:
        """The student's x0 (B, C, h, w) as the heads see it: from where it was asked, or, of a share of the samples,
        from the schedule's last time."""
        cos, sin = (f(angle).float()[:, None, None, None] for f in (torch.cos, torch.sin))
        x0 = cos * x - sin * v
        drawn = [rng.random() < self.config.gan_last for rng in ctx.rng("gan-last", batch)]
        if not any(drawn):
            return x0
        rows = on_device([row for row, picked in enumerate(drawn) if picked], x.device)
        last = angle.new_full((len(rows),), angles.ends[1])
        a, b = math.cos(angles.ends[1]), math.sin(angles.ends[1])
        begun = a * batch.latents["image"][rows] + b * ctx.draw(batch)[1][rows]
        said = self.velocity(ctx, "student", begun, last, angles.time(last)[0].float(), told.take(rows))
        return x0.index_copy(0, rows, a * begun - b * said)

    def judge(self, ctx: Context, batch: Batch, angles: Angles, x: Tensor) -> Tensor:
        """What the heads (N) say of latents x, noised to a time of the sample's own: (B, N), positive for real ones."""
        angle = self.angle(ctx, batch, angles, "gan-time", (self.config.gan_time_mean, self.config.gan_time_std))
        cos, sin = (f(angle).float()[:, None, None, None] for f in (torch.cos, torch.sin))
        x_t = cos * x + sin * ctx.draw(batch, "gan")[1]
        seen = ctx.features_of(
            "base", x_t, angles.time(angle)[0].float(), batch.condition("image"), tuple(self._blocks)
        )
        found: Tensor = ctx.roles.modules["heads"](seen)
        return found

    def critic_loss(self, ctx: Context, batch: Batch) -> Loss:
        """The heads learn to tell the student's x0 from the pictures themselves, at one time and noise: the hinge."""
        angles, told = Angles.of(ctx.denoiser), self.told(ctx, batch)
        with torch.no_grad():
            x, angle, t = self.point(ctx, batch, angles)
            made = self.made(ctx, batch, angles, told, x, angle, self.velocity(ctx, "student", x, angle, t, told))
        real, fake = (self.judge(ctx, batch, angles, shown) for shown in (batch.latents["image"], made))
        metrics = {"gan_real": real.mean(1), "gan_fake": fake.mean(1)}
        return Loss(hinge_critic_loss(real, fake).mean(1), batch.weight, metrics)
