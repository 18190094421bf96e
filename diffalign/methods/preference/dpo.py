"""Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from ..base import Needs, Paper
from ..pair import PairConfig, PairErrors, PairMethod


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    base_chosen: Tensor,
    base_rejected: Tensor,
    beta: float | Tensor,
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Loss (B,) and logit u (B,) from per-sample mean squared errors (B,) of the policy and the base.

    u = -(beta/2) [(m_w - m_l) - (r_w - r_l)], with ``beta`` as in the authors' code and diffusers' SDXL script; the
    diffusers SD script's beta is half of it. ``sigmoid``: -log sigmoid(u), with ``label_smoothing`` the conservative
    form. ``hinge``: max(0, 1 - u). ``ipo``: (u/beta - 1/(2 beta))^2, whose minimum lies at u = 1/2 (a quarter of the
    form that the diffusers script intends, at its beta' = beta/2).
    """
    logits = -(beta / 2) * ((chosen - rejected) - (base_chosen - base_rejected))
    if loss == "sigmoid":
        values = (1 - label_smoothing) * F.softplus(-logits) + label_smoothing * F.softplus(logits)
    elif loss == "hinge":
        values = torch.relu(1 - logits)
    else:
        values = (logits / beta - 1 / (2 * beta)).square()
    return values, logits


class DPOConfig(PairConfig):
    """Settings of Diffusion-DPO."""

    beta: float = Field(5000.0, gt=0, description="strength of the tie to the base (authors' convention)")
    loss: Literal["sigmoid", "ipo", "hinge"] = Field("sigmoid", description="form of the pair loss")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of labels believed wrong (sigmoid only)")

    @model_validator(mode="after")
    def _smoothing_needs_sigmoid(self) -> DPOConfig:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing goes with loss=sigmoid, not {self.loss}; set label_smoothing=0")
        return self


class DPO(PairMethod[DPOConfig]):
    """-log sigmoid of the difference of the implicit rewards of a pair, measured by denoising errors.

    Both members share t and noise, and errors are means over C, h, w in fp32 (the released code keeps the reference's
    in fp16, which puts +-1 on the logit at beta 5000). The paper writes beta T omega(lambda) times squared norms; the
    authors' code, followed here, takes T omega as constant and means in place of sums.
    """

    Config = DPOConfig
    paper = Paper(
        title="Diffusion Model Alignment Using Direct Preference Optimization",
        arxiv="2311.12908",
        implements="eq. 14 in the authors' scaling; sigmoid, IPO, hinge, label smoothing, the SDPO safeguard",
        differs="errors in fp32 (authors: reference in fp16); ties count one half in accuracy; crops and flips are "
        "shared by what the cache stores",
    )
    needs = Needs(batch="pair")

    def objective(self, errors: PairErrors) -> tuple[Tensor, Tensor]:
        """``dpo_loss`` of the pair's four errors."""
        assert errors.base_chosen is not None and errors.base_rejected is not None
        config = self.config
        return dpo_loss(
            errors.chosen,
            errors.rejected,
            errors.base_chosen,
            errors.base_rejected,
            config.beta,
            config.loss,
            config.label_smoothing,
        )
