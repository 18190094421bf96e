"""TDM: the student's deterministic trajectory meets the teacher's, segment by segment, as distributions."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...errors import UserError
from ..base import Loss, Paper, Times, on_device
from ..score_distill import DistillConfig, Sample, ScoreDistill, Share, Window, gap, times_of

if TYPE_CHECKING:
    from ...context import Context
    from ...data.batch import Batch
    from ...denoiser import Denoiser

LATEST = 10  # a segment's noisy end is left out by so many times
CLEAR = 20  # and its clean end by so many where the target divides by beta


def segment_noise(denoiser: Denoiser, t: Tensor, mid: Tensor) -> tuple[Tensor, Tensor]:
    """A and beta (B, 1, 1, 1) of x_t = A x_mid + beta noise, from the level ``mid`` (B,) to the noisier ``t`` (B,).

    A = alpha_t / alpha_mid and beta^2 = sigma_t^2 - A^2 sigma_mid^2, so that x_t has the schedule's own noise."""
    ratio = denoiser.alpha(t) / denoiser.alpha(mid)
    return ratio, (denoiser.sigma(t) ** 2 - (ratio * denoiser.sigma(mid)) ** 2).clamp_min(0).sqrt()


def importance(mixed: Tensor, noise: Tensor) -> Tensor:
    """exp(-mean(mixed^2) / 2) / exp(-mean(noise^2) / 2) (B,): how likely the noise that is in x_t is as a normal draw,
    tempered by the mean over C, h, w."""
    return torch.exp((noise.square().mean((1, 2, 3)) - mixed.square().mean((1, 2, 3))) / 2)


def match(distance: Tensor, divisor: Tensor, form: Literal["huber", "mse"], width: float = 1e-3) -> Tensor:
    """mean of sqrt(d^2 + c^2) - c, or of d^2, over ``divisor`` (B,): (B,). With distances far above c the first gives
    every number the same pull."""
    if form == "mse":
        return distance.square().mean((1, 2, 3)) / divisor
    return ((distance.square() + width**2).sqrt() - width).mean((1, 2, 3)) / divisor


class TDMConfig(DistillConfig):
    """The authors' demo: four steps of a horizon of 900."""

    timesteps: Times = Field((899, 674, 449, 224), min_length=1, description="the student's times, falling")
    rollout: Literal["ddim"] = Field("ddim", description="how a later step gets its input: deterministic DDIM")
    guidance: float = Field(4.5, ge=0, description="the teacher's guidance: u + w (c - u); 1 is conditional only")
    order: Literal["student", "critic"] = Field("critic", description="which phase comes first in a step")
    critic_steps: int = Field(1, ge=1, description="updates of the fake score for one of the student")
    critic_range: tuple[Share, Share] = Field((0.02, 0.98), description="times at which the fake score learns, at most")
    segments: Literal["separate", "full"] = Field(
        "separate",
        description="scores are asked within the step's own segment, or from its clean end up to the first time (then "
        "step_fake tells the fake score which step it is)",
    )
    target: Literal["x0", "score"] = Field(
        "x0", description="what the fake score learns: the student's x0 (theirs, biased), or the score without bias"
    )
    importance: bool = Field(True, description="weigh the fake score's loss by how likely its noise is (target x0)")
    snr_max: float = Field(
        5.0, gt=0, description="the fake score's loss in x0 is weighed by min(SNR, this) (target x0)"
    )
    loss: Literal["huber", "mse"] = Field(
        "huber", description="how far x0 is from its target: pseudo-Huber, or squared"
    )
    huber: float = Field(1e-3, gt=0, description="width of the pseudo-Huber loss")

    @model_validator(mode="after")
    def _wide(self) -> TDMConfig:
        for high, low in pairwise((*self.timesteps, -1)):
            if high - low < 2 * (LATEST + CLEAR):
                raise ValueError(
                    f"the segment of time {high} ends at {low + 1}: TDM's times must be {2 * (LATEST + CLEAR)} apart "
                    "at least"
                )
        return self


@dataclass
class Diffused:
    """The end of a sample's segment, noised again: ``x_t`` (B, C, h, w) at ``t`` (B,), with the new ``noise``;
    ``share`` is sigma_t / beta, and ``mixed`` the noise beside x0 that x_t holds in all."""

    x_t: Tensor
    t: Tensor
    noise: Tensor
    share: Tensor
    mixed: Tensor


class TDM(ScoreDistill[TDMConfig]):
    """A few-step student whose every state is drawn towards the teacher's marginal at its time.

    Each sample stops at a step of its own; from there one DDIM jump leads to the end of the step's segment, and from
    that point, not from x0, noise is added to where the scores are asked. The fake score as the authors train it
    regresses x0, which is not independent of that point: exact scores then leave the states in between off the
    teacher's marginals. ``target=score`` has it learn (sigma_t / beta) times the new noise, whose mean is the score.
    """

    Config = TDMConfig
    paper = Paper(
        title="Learning Few-Step Diffusion Models by Trajectory Distribution Matching",
        arxiv="2503.06674",
        implements="the demo's losses: disjoint or full segments, importance weight, min-SNR, pseudo-Huber; a fake "
        "score that is told the step, and an unbiased target for it, by option",
        differs="student and fake score roll the trajectory out on their own draws; adapters on the teacher; the "
        "target `score` is this project's, weighed by (beta / sigma)^2; no random segment ends",
    )

    def notes(self) -> list[str]:
        """Within their own segments the time tells the fake score which step it is."""
        return [] if self.config.segments == "separate" else super().notes()

    def ends(self, sample: Sample) -> Tensor:
        """The time (B,) where each sample's segment ends: one above the student's next time, 0 for the last."""
        times = (*self.config.timesteps, -1)
        return on_device([times[k + 1] + 1 for k in sample.steps], sample.x.device)

    def time_window(self, ctx: Context, sample: Sample) -> Window:
        """From the segment's end to shortly before its start, or before the first time."""
        return self._within(super().time_window(ctx, sample), sample)

    def critic_window(self, ctx: Context, sample: Sample) -> Window:
        return self._within(super().critic_window(ctx, sample), sample)

    def _within(self, bounds: Window, sample: Sample) -> Window:
        return [self._segment(k, *bound) for k, bound in zip(sample.steps, bounds, strict=True)]

    def _segment(self, k: int, low: int, high: int) -> tuple[int, int]:
        """What of the times from ``low`` to ``high`` belongs to the ``k``-th step."""
        times = (*self.config.timesteps, -1)
        clear = CLEAR if self.config.target == "score" else 0
        top = times[k] if self.config.segments == "separate" else times[0] + 1
        return max(low, times[k + 1] + 1 + clear), min(high, top - LATEST - 1)

    def check(self, denoiser: Denoiser) -> None:
        """That every step has times at which the scores are asked."""
        for name in ("time_range", "critic_range"):
            low, high = times_of(getattr(self.config, name), denoiser.num_timesteps)
            for k, time in enumerate(self.config.timesteps):
                first, last = self._segment(k, low, high)
                if first > last:
                    raise UserError(
                        f"method.{name} ({low} to {high}) leaves no time of the segment of the student's time {time}; "
                        "widen it"
                    )

    @torch.no_grad()
    def diffused(self, ctx: Context, batch: Batch, sample: Sample, window: Window) -> Diffused:
        """The end of each segment, reached by the student's own jump, at a time of its window."""
        denoiser, mid = ctx.denoiser, self.ends(sample)
        t, noise = self.times(ctx, batch, "score-time", window), ctx.draw(batch, "score")[1]
        eps = denoiser.to_eps(sample.output, sample.x_in, sample.t)
        ratio, beta = segment_noise(denoiser, t, mid)
        x_t = ratio * denoiser.add_noise(sample.x, eps, mid) + beta * noise
        mixed = (ratio * denoiser.sigma(mid) * eps + beta * noise) / denoiser.sigma(t)
        return Diffused(x_t, t, noise, denoiser.sigma(t) / beta, mixed)

    def student_loss(self, ctx: Context, batch: Batch, sample: Sample) -> Loss:
        """How far x0 is from where the scores' difference would move it; only the last call has a gradient."""
        with torch.no_grad():
            found = self.diffused(ctx, batch, sample, self.time_window(ctx, sample))
            y_fake = self.fake_x0(ctx, found.x_t, found.t, sample)
            y_real = self.real_x0(ctx, found.x_t, found.t, sample, self.config.guidance)
            x = sample.x.detach()
            divisor = torch.ones_like(x[:, 0, 0, 0])
            if self.divisor is not None:
                divisor = (x - y_real).abs().mean((1, 2, 3)).clamp_min(self.divisor)
            target = x + y_real - y_fake
        values = match(sample.x - target, divisor, self.config.loss, self.config.huber)
        return Loss(values, batch.weight, {"gap": gap(x, y_fake, y_real)})

    def critic_loss(self, ctx: Context, batch: Batch, sample: Sample) -> Loss:
        """x0's error by min(SNR, 5) and the importance weight; or the score's, in units of the new noise."""
        found = self.diffused(ctx, batch, sample, self.critic_window(ctx, sample))
        output = self.fake(ctx, found.x_t, found.t, sample)
        if self.config.target == "score":
            eps = ctx.denoiser.to_eps(output, found.x_t, found.t)
            error = (eps / found.share - found.noise).square().mean((1, 2, 3))
            return Loss(error, batch.weight, {"fake_error": error})
        error = (ctx.denoiser.to_x0(output, found.x_t, found.t) - sample.x).square().mean((1, 2, 3))
        error = error * ctx.denoiser.snr(found.t).clamp_max(self.config.snr_max)
        weight = importance(found.mixed, found.noise) if self.config.importance else torch.ones_like(error)
        return Loss(weight * error, batch.weight, {"fake_error": error, "importance": weight})
