"""LoRA-enhanced guidance distillation (Golnari 2023, arXiv 2312.06899): a LoRA that makes one forward a guided one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field, field_validator
from torch import nn

from ...facts import SamplingRecord, many_step_record
from ...families.guidance import require_embedding, tell
from ..base import Loss, Method, MethodConfig, Needs, Paper, Phase, on_device
from .agd import guidance_loss

if TYPE_CHECKING:
    from ...context import Context
    from ...data.batch import Batch
    from ...families import Model


class LoraGuidanceConfig(MethodConfig):
    """Settings of LoRA-enhanced guidance distillation."""

    guidance: float = Field(7.5, ge=0, description="of the teacher: u + w (c - u); what the student has built in")
    guidance_range: tuple[float, float] | None = Field(
        None, description="draw w from this range and tell it to a U-Net with a guidance embedding (time_cond_proj_dim)"
    )

    sampling_steps: int = Field(25, ge=1, description="steps that the student is recorded with; any number will do")

    @field_validator("guidance_range")
    @classmethod
    def _rise(cls, guidance: tuple[float, float] | None) -> tuple[float, float] | None:
        if guidance is not None and not 0 <= guidance[0] <= guidance[1]:
            raise ValueError(f"a range of guidance is two rising numbers from 0 on, not {list(guidance)}")
        return guidance


class LoraGuidance(Method[LoraGuidanceConfig]):
    """The student, a LoRA on the base, predicts on noised pictures what the guided base predicts there.

    Sampling then takes one forward a step and no unconditional branch. The paper is known here by its abstract.
    """

    Config = LoraGuidanceConfig
    paper = Paper(
        title="LoRA-Enhanced Distillation on Guided Diffusion Models",
        arxiv="2312.06899",
        implements="regression of the guided prediction on noised pictures, teacher and student one network",
        differs="known by its abstract; rank, rates and guidance are ours",
    )
    needs = Needs(batch="image")

    def build(self, family: Model) -> dict[str, nn.Module]:
        """Nothing. Raises UserError where a range of guidance meets a U-Net that takes no guidance embedding."""
        if self.config.guidance_range is not None:
            self._width = require_embedding(family.unet, f"method.guidance_range={list(self.config.guidance_range)}")
        return {}

    def sampling(self, scheduler: Mapping[str, Any]) -> SamplingRecord:
        """Like the base, and without its unconditional branch."""
        return many_step_record(scheduler, self.config.sampling_steps, self.config.guidance_range, self.config.guidance)

    def loss(self, ctx: Context, batch: Batch, phase: Phase) -> Loss:
        """``guidance_loss`` on noised pictures."""
        t, noise = ctx.draw(batch)
        x_t = ctx.denoiser.add_noise(batch.latents["image"], noise, t)
        cond = batch.condition("image")
        w = torch.full((len(batch),), self.config.guidance, device=x_t.device)
        told = cond
        if self.config.guidance_range is not None:
            low, high = self.config.guidance_range
            w = on_device([low + (high - low) * rng.random() for rng in ctx.rng("guidance", batch)], x_t.device).float()
            told = tell(cond, w, self._width)
        with torch.no_grad():
            branches = ctx.branches("base", x_t, t, cond)
        output = ctx.model("student", x_t, t, told)
        error, unguided = guidance_loss(output, *branches, w.view(-1, 1, 1, 1))
        return Loss(error, batch.weight, {"guided_error": error, "unguided_error": unguided})
