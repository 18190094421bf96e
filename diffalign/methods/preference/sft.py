"""Supervised fine-tuning on the winners (or on any captioned images): the first control of every comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..base import Loss, Method, MethodConfig, Needs, Paper, Phase

if TYPE_CHECKING:
    from ...context import Context
    from ...data.batch import Batch


def sft_loss(error: Tensor) -> Tensor:
    """The denoising error itself (B,)."""
    return error


class SFTConfig(MethodConfig):
    """SFT has no settings of its own."""


class SFT(Method[SFTConfig]):
    """Denoising loss on one image a row; of pairs, the chosen image."""

    Config = SFTConfig
    paper = Paper(
        title="Denoising Diffusion Probabilistic Models",
        arxiv="2006.11239",
        implements="the simple loss on the chosen images, as the SFT baseline of Diffusion-DPO",
    )
    needs = Needs(batch="image", reference=False)

    def loss(self, ctx: Context, batch: Batch, phase: Phase) -> Loss:
        """Mean squared error of the network's own prediction target."""
        t, noise = ctx.draw(batch)
        x0 = batch.latents["image"]
        denoiser = ctx.denoiser
        error = ctx.error(
            "student", denoiser.add_noise(x0, noise, t), t, batch.condition("image"), denoiser.target(x0, noise, t)
        )
        return Loss(sft_loss(error), batch.weight, {"chosen_error": error})
