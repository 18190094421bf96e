"""DMD: distribution matching with a regression on the teacher's own pictures of known noise."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ...data.teacher import teacher_noise
from ...errors import UserError
from ...perceptual import Lpips, load_lpips
from ..base import Loss, Paper, Times
from ..score_distill import DistillConfig, Sample, ScoreDistill

if TYPE_CHECKING:
    from ...context import Context
    from ...data.batch import Batch
    from ...denoiser import Denoiser
    from ...families.base import Model


class DMDConfig(DistillConfig):
    """One step, both phases in turn."""

    timesteps: Times = Field(
        (999,), min_length=1, max_length=1, description="the time that the student's one step is told"
    )
    critic_steps: int = Field(1, ge=1, description="updates of the fake score for one of the student")
    batches: Literal["fresh", "reuse"] = Field(
        "reuse", description="whether the second phase takes new rows or those of the first, with noise of its own"
    )
    regression_weight: float = Field(
        0.25, ge=0, description="weight of the regression on pictures of `diffalign pairs teacher`; 0: prompts alone"
    )
    regression: Literal["latent", "features", "lpips"] = Field(
        "latent",
        description="distance to the teacher's picture: squared, of latents, or of the base's middle block at them; or "
        "the paper's LPIPS of pictures, see `lpips`",
    )
    lpips: str = Field("", description="for regression=lpips: torchvision's VGG16, the file vgg16-397923af.pth")
    feature_time: int = Field(20, ge=0, description="the time at which the base looks for `features`")

    @model_validator(mode="after")
    def _weights_given(self) -> DMDConfig:
        if self.regression == "lpips" and not self.lpips:
            raise ValueError(
                "regression=lpips needs weights that are not shipped: set method.lpips=FILE to torchvision's "
                "vgg16-397923af.pth, and pip install lpips for its linear layers"
            )
        return self


class DMD(ScoreDistill[DMDConfig]):
    """Matching from noise of its own, and the distance between the student's and the teacher's answer to one noise."""

    Config = DMDConfig
    paper = Paper(
        title="One-step Diffusion with Distribution Matching Distillation",
        arxiv="2311.18828",
        implements="distribution matching in one step, with regression on cached pairs of noise and teacher's sample",
        differs="the regression's distance is of latents by default, which needs no other network; student and fake "
        "score are adapters on the teacher",
    )

    def __init__(self, config: DMDConfig) -> None:
        super().__init__(config)
        self.seen = bool(config.regression_weight) and config.regression == "lpips"
        if self.seen:
            self.needs = replace(self.needs, decode=True)

    @cached_property
    def perceptual(self) -> Lpips:
        """LPIPS, on the CPU until ``build``."""
        return load_lpips(self.config.lpips)

    def build(self, family: Model) -> dict[str, nn.Module]:
        if self.seen:
            self.perceptual.to(family.device)
        return super().build(family)

    def wants_pictures(self) -> bool:
        return self.config.regression_weight > 0 or super().wants_pictures()

    def reason(self) -> str:
        if self.config.regression_weight:
            return "the regression needs data of `diffalign pairs teacher`; method.regression_weight=0 prompts alone"
        return super().reason()

    def check(self, denoiser: Denoiser) -> None:
        """That the features' time lies in the schedule, and that LPIPS has its weights."""
        if self.seen:
            _ = self.perceptual
        if self.config.feature_time >= denoiser.num_timesteps:
            raise UserError(
                f"method.feature_time {self.config.feature_time} is beyond the schedule's last time "
                f"{denoiser.num_timesteps - 1}; lower it"
            )

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
        if self.config.regression == "lpips":
            with torch.no_grad():
                picture = ctx.decode(target)
            found: Tensor = self.perceptual(ctx.decode(x), picture)
            return found
        if self.config.regression == "latent":
            return (x - target).square().mean((1, 2, 3))
        t = torch.full((len(x),), self.config.feature_time, device=x.device)
        with torch.no_grad():
            wanted = ctx.features("base", target, t, sample.cond)
        return (ctx.features("base", x, t, sample.cond) - wanted).square().mean((1, 2, 3))
