"""Phased DMD: the schedule in phases; what a phase makes is matched at the noise level where it ends, not as x0."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...errors import UserError
from ..base import Loss, Paper, Times, on_device
from ..score_distill import (
    DistillConfig,
    Sample,
    ScoreDistill,
    Window,
    dm_direction,
    gap,
    surrogate,
    times_of,
)

if TYPE_CHECKING:
    from ...context import Context
    from ...data.batch import Batch
    from ...denoiser import Denoiser


class PhasedDMDConfig(DistillConfig):
    """Four steps in two phases, five updates of the fake score for one of the student."""

    timesteps: Times = Field((999, 749, 499, 249), min_length=1, description="the student's times, falling")
    phases: tuple[int, ...] | None = Field(
        None, min_length=1, description="how many of the student's steps each phase has; null: two halves, or one phase"
    )
    rollout: Literal["renoise", "ddim"] = Field(
        "renoise", description="how a later step and the end of a phase are reached: x0 and new noise, or DDIM"
    )
    guidance: float = Field(4.0, ge=0, description="the teacher's guidance: u + w (c - u); 1 is conditional only")
    margin: int = Field(
        20, ge=1, description="scores are asked so many times above the end of a phase, where the new noise is little"
    )
    step_fake: bool = Field(
        True,
        description="tell the fake score which phase made a sample, by a learned vector added to its text; theirs has "
        "a fake score for each",
    )

    @model_validator(mode="after")
    def _whole(self) -> PhasedDMDConfig:
        steps = len(self.timesteps)
        if self.phases is not None and (min(self.phases) < 1 or sum(self.phases) != steps):
            raise ValueError(
                f"phases {list(self.phases)} must be numbers of steps, each at least 1, that add up to the student's "
                f"{steps}, such as {list(halves(steps))}"
            )
        return self


def halves(steps: int) -> tuple[int, ...]:
    """Two phases of about as many steps each; one of a single step."""
    return (steps,) if steps == 1 else (steps - steps // 2, steps // 2)


def further_noise(denoiser: Denoiser, t: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """A and beta (B, 1, 1, 1) of x_t = A x_end + beta noise, from the level ``end`` (B,) to the noisier ``t`` (B,);
    a negative end is x0 itself.

    A = alpha_t / alpha_end and beta^2 = sigma_t^2 - A^2 sigma_end^2: x_t has the schedule's own noise."""
    alpha, sigma = ending(denoiser, end)
    ratio = denoiser.alpha(t) / alpha
    return ratio, (denoiser.sigma(t) ** 2 - (ratio * sigma) ** 2).clamp_min(0).sqrt()


def ending(denoiser: Denoiser, end: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma (B, 1, 1, 1) where a phase ends: 1 and 0 of x0 itself, whatever the schedule's final level is."""
    clean = (end < 0)[:, None, None, None]
    at = end.clamp_min(0)
    return denoiser.alpha(at).masked_fill(clean, 1.0), denoiser.sigma(at).masked_fill(clean, 0.0)


def fake_target(denoiser: Denoiser, x_s: Tensor, noise: Tensor, t: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """What the fake score learns at x_t = A x_s + beta noise, in the network's own prediction (B, C, h, w), and its
    scale sigma_t / beta (B, 1, 1, 1).

    As eps it is (sigma_t / beta) noise; the x0 beside it is x_s / alpha_s - alpha_t sigma_s^2 / (alpha_s^2 beta) noise.
    Of flow models it is -x_s / (1 - s) + (t + (1 - t) s^2 / (1 - s)^2) / beta noise (arXiv 2510.27684)."""
    alpha, sigma = ending(denoiser, end)
    _, beta = further_noise(denoiser, t, end)
    share = denoiser.sigma(t) / beta
    x0 = x_s / alpha - denoiser.alpha(t) * sigma**2 / (alpha**2 * beta) * noise
    return denoiser.target(x0, share * noise, t), share


class PhasedDMD(ScoreDistill[PhasedDMDConfig]):
    """Matching within intervals of the noise level, from the end of each phase up.

    A sample stops at a step of its own and is brought from there to the time s where its phase ends; the last phase
    ends at x0. Both scores are asked at times t above s, of x_t = A x_s + beta noise. What the student would say of x0
    is not known to the fake score: it learns (sigma_t / beta) noise, whose mean given x_t is the score's own
    (arXiv 2510.27684, section 3). With one phase all this is DMD2 without its GAN.
    """

    Config = PhasedDMDConfig
    paper = Paper(
        title="Phased DMD: Few-step Distribution Matching Distillation via Score Matching within Subintervals",
        arxiv="2510.27684",
        implements="matching at the end of each phase, scores from there up to the noise, the fake score's target "
        "within a phase; eps, v and flow models",
        differs="one student and one fake score serve all phases, and the fake score is told the phase, where theirs "
        "are experts trained one after another; the fake score's loss is weighed by (beta / sigma)^2, 1 where a phase "
        "ends at x0",
    )

    @property
    def phase_steps(self) -> tuple[int, ...]:
        """How many steps each phase has."""
        return self.config.phases or halves(len(self.config.timesteps))

    def marks(self) -> tuple[int, ...]:
        """The phase of each step."""
        return tuple(phase for phase, steps in enumerate(self.phase_steps) for _ in range(steps))

    def ends(self) -> tuple[int, ...]:
        """The time at which each step's phase ends: the first of the next phase, -1 (x0) of the last."""
        times = (*self.config.timesteps, -1)
        after = tuple(accumulate(self.phase_steps))
        return tuple(times[after[phase]] for phase in self.marks())

    def extra_draws(self) -> tuple[str, ...]:
        return (*super().extra_draws(), "land") if self.config.rollout == "renoise" else super().extra_draws()

    def time_window(self, ctx: Context, sample: Sample) -> Window:
        """Above the end of each sample's phase, up to the end of the range."""
        return self._above(super().time_window(ctx, sample), sample)

    def critic_window(self, ctx: Context, sample: Sample) -> Window:
        return self._above(super().critic_window(ctx, sample), sample)

    def _above(self, window: Window, sample: Sample) -> Window:
        return [(self._first(k, low), high) for k, (low, high) in zip(sample.steps, window, strict=True)]

    def _first(self, step: int, low: int) -> int:
        end = self.ends()[step]
        return low if end < 0 else max(low, end + self.config.margin)

    def check(self, denoiser: Denoiser) -> None:
        """That every phase has times at which the scores are asked."""
        for name in ("time_range", "critic_range"):
            low, high = times_of(getattr(self.config, name), denoiser.num_timesteps)
            for step, end in enumerate(self.ends()):
                if self._first(step, low) > high:
                    raise UserError(
                        f"method.{name} ends at {high}, which leaves no time above {end}, where the phase of the "
                        f"student's time {self.config.timesteps[step]} ends; widen it, lower method.margin or choose "
                        "other phases"
                    )

    def land(self, ctx: Context, batch: Batch, sample: Sample) -> tuple[Tensor, Tensor]:
        """What each sample's phase ends at (B, C, h, w), with the student's gradient, and its time (B,)."""
        ends = self.ends()
        end = on_device([ends[k] for k in sample.steps], sample.x.device)
        alpha, sigma = ending(ctx.denoiser, end)
        if self.config.rollout == "ddim":
            noise = ctx.denoiser.to_eps(sample.output, sample.x_in, sample.t)
        else:
            noise = ctx.draw(batch, "land")[1]
        return alpha * sample.x + sigma * noise, end

    def diffused(self, ctx: Context, batch: Batch, x_s: Tensor, end: Tensor, window: Window) -> tuple[Tensor, ...]:
        """(x_t, t, noise): the end of a phase under new noise, at a time of its window."""
        t, noise = self.times(ctx, batch, "score-time", window), ctx.draw(batch, "score")[1]
        ratio, beta = further_noise(ctx.denoiser, t, end)
        return ratio * x_s + beta * noise, t, noise

    def student_loss(self, ctx: Context, batch: Batch, sample: Sample) -> Loss:
        """The surrogate of DMD's direction at the end of the phase."""
        x_s, end = self.land(ctx, batch, sample)
        with torch.no_grad():
            x_t, t, _ = self.diffused(ctx, batch, x_s, end, self.time_window(ctx, sample))
            y_fake = self.fake_x0(ctx, x_t, t, sample)
            y_real = self.real_x0(ctx, x_t, t, sample, self.config.guidance)
            x = sample.x.detach()
            direction = dm_direction(x, y_fake, y_real, self.divisor)
        return Loss(surrogate(x_s, direction), batch.weight, {"gap": gap(x, y_fake, y_real)})

    def critic_loss(self, ctx: Context, batch: Batch, sample: Sample) -> Loss:
        """The squared error of `fake_target`, in units where the new noise has variance 1."""
        x_s, end = self.land(ctx, batch, sample)
        x_t, t, noise = self.diffused(ctx, batch, x_s, end, self.critic_window(ctx, sample))
        target, share = fake_target(ctx.denoiser, x_s, noise, t, end)
        error = ((self.fake(ctx, x_t, t, sample) - target) / share).square().mean((1, 2, 3))
        return Loss(error, batch.weight, {"fake_error": error})
