"""DDIM-InPO (Lu et al., CVPR 2025, arXiv 2503.18454)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from ..base import Needs, Paper
from ..inverted import InvertedConfig, InvertedPair
from ..pair import PairErrors
from .dpo import dpo_loss


class InPOConfig(InvertedConfig):
    """Settings of InPO. ``beta``: 2000 for SD1.5, 5000 for SDXL in the authors' launchers."""

    beta: float = Field(2000.0, gt=0, description="strength of the tie to the base, in Diffusion-DPO's convention")
    eta: float = Field(0.1, ge=0, le=1, description="share of the DDIM noise added after each inversion step")


class InPO(InvertedPair[InPOConfig]):
    """Diffusion-DPO's objective at latents that DDIM inversion of each picture reaches, with the noise that they imply.

    The released code stops each inversion at the next point of a 10-point grid, up to 99 steps from the t that networks
    and target are told, and feeds the network the level left (the first time is -99). Here the last step goes to t
    itself and the network is told the level entered; ``levels=authors`` is the released behaviour, at any batch size.
    """

    Config = InPOConfig
    paper = Paper(
        title="InPO: Inversion Preference Optimization with Reparametrized DDIM for Efficient Diffusion Model "
        "Alignment",
        arxiv="2503.18454",
        implements="the released objective; x_t at the level that the network is told, or the authors' grid",
        differs="t of each pair its own (authors: the first row's for all); alphas in fp32 (authors: fp16)",
    )
    needs = Needs(batch="pair", draws=())

    def objective(self, errors: PairErrors) -> tuple[Tensor, Tensor]:
        """``dpo_loss`` of the errors at the inverted latents."""
        assert errors.base_chosen is not None and errors.base_rejected is not None
        return dpo_loss(errors.chosen, errors.rejected, errors.base_chosen, errors.base_rejected, self.config.beta)
