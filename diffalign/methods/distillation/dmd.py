"""DMD: distribution matching with a regression on the teacher's own pictures of known noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...data.teacher import teacher_noise
from ..base import Loss, Paper
from ..score_distill import DistillConfig, Sample, ScoreDistill, Time

if TYPE_CHECKING:
    from ...context import Context
    from ...data.batch import Batch


class DMDConfig(DistillConfig):
    """One step, both phases in turn."""

    timesteps: tuple[Time, ...] = Field(
        (999,), min_length=1, max_length=1, description="the time that the student's one step is told"
    )
    critic_steps: int = Field(1, ge=1, description="updates of the fake score for one of the student")
    batches: Literal["fresh", "reuse"] = Field(
        "reuse", description="whether the second phase takes new rows or those of the first, with noise of its own"
    )
    regression_weight: float = Field(
        0.25, ge=0, description="weight of the regression on pictures of `diffalign pairs teacher`; 0: prompts alone"
    )
    regression: Literal["latent", "features"] = Field(
        "latent",
        description="distance to the teacher's picture: squared, of latents, or of the base's middle block at them",
    )
    feature_time: int = Field(20, ge=0, description="the time at which the base looks for `features`")


class DMD(ScoreDistill[DMDConfig]):
    """Matching from noise of its own, and the distance between the student's and the teacher's answer to one noise."""

    Config = DMDConfig
    paper = Paper(
        title="One-step Diffusion with Distribution Matching Distillation",
        arxiv="2311.18828",
        implements="distribution matching in one step, with regression on cached pairs of noise and teacher's sample",
        differs="the regression's distance is of latents, or of features of the base, and not LPIPS on pictures; "
        "student and fake score are adapters on the teacher",
    )

    def wants_pictures(self) -> bool:
        return self.config.regression_weight > 0 or super().wants_pictures()

    def reason(self) -> str:
        if self.config.regression_weight:
            return "the regression needs data of `diffalign pairs teacher`; method.regression_weight=0 prompts alone"
        return super().reason()

    def student_loss(self, ctx: Context, batch: Batch, sample: Sample) -> Loss:
        found = super().student_loss(ctx, batch, sample)
        if self.config.regression_weight:
            distance = self.distance(ctx, batch, sample)
            found.values = found.values + self.config.regression_weight * distance
            found.metrics["regression"] = distance
        return found

    def distance(self, ctx: Context, batch: Batch, sample: Sample) -> Tensor:
        """From the student's answer to the teacher's noise to the teacher's picture: (B,)."""
        target = batch.latents["image"]
        noise = teacher_noise(batch.ids, tuple(target.shape[1:])).to(target.device)
        if self.config.start == "sigma":
            noise = noise * ctx.denoiser.sigma(self.config.timesteps[0]).to(noise)
        x, _ = self.call_student(ctx, noise, sample.t, sample.cond)
        if self.config.regression == "latent":
            return (x - target).square().mean((1, 2, 3))
        t = torch.full((len(x),), self.config.feature_time, device=x.device)
        with torch.no_grad():
            wanted = ctx.features("base", target, t, sample.cond)
        return (ctx.features("base", x, t, sample.cond) - wanted).square().mean((1, 2, 3))
