"""Diffusion-ORPO, from diffusers' research project of that name (no paper on diffusion; ORPO is arXiv 2403.07691)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..base import Needs, Paper
from ..pair import PairConfig, PairErrors, PairMethod

Margin = Literal["error", "odds", "released"]


def log_odds(error: Tensor, scale: float = 1.0) -> Tensor:
    """log(p / (1 - p)) = -log(expm1(k m)) of p = exp(-k m), for errors m > 0 (B,). Falls with the error."""
    x = (scale * error).clamp_min(torch.finfo(error.dtype).tiny)
    # expm1 overflows where the log is x itself to rounding
    return torch.where(x > 30, -x, -torch.log(torch.expm1(x.clamp_max(30))))


def orpo_loss(
    chosen: Tensor, rejected: Tensor, beta: float = 0.1, margin: Margin = "error", scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Loss m_w + beta softplus(-z) (B,) and logit z (B,) from the policy's errors (B,).

    ``error``: z = m_l - m_w. ``odds``: z = the difference of the log odds of p = exp(-k m). ``released``: z = m_w -
    m_l, the sign as published, which lowers the loser's error too.
    """
    if margin == "odds":
        logits = log_odds(chosen, scale) - log_odds(rejected, scale)
    else:
        logits = rejected - chosen if margin == "error" else chosen - rejected
    return chosen + beta * F.softplus(-logits), logits


class ORPOConfig(PairConfig):
    """Settings of ORPO."""

    beta: float = Field(0.1, ge=0, description="weight of the preference term; 0 is fine-tuning on winners")
    margin: Margin = Field("error", description="error, odds, or released (its sign is inverted)")
    scale: float = Field(1.0, gt=0, description="k in p = exp(-k m), for margin=odds")


class ORPO(PairMethod[ORPOConfig]):
    """Fit the winner, with a preference term on the policy's own errors; no reference model.

    The published script treats the squared error as a log-likelihood, so that its preference term asks for a *smaller*
    error of the loser. The default has the sign mended (at equal errors the gradients are 1 + beta/2 on the winner's
    error and -beta/2 on the loser's).
    """

    Config = ORPOConfig
    paper = Paper(
        title="ORPO: Monolithic Preference Optimization without Reference Model",
        arxiv="2403.07691",
        implements="the form of diffusers' research script with its sign mended; log odds; the released sign by name",
        differs="the released sign is an option (margin=released), since it also fits the loser",
    )
    needs = Needs(batch="pair", reference=False)

    def objective(self, errors: PairErrors) -> tuple[Tensor, Tensor]:
        """``orpo_loss`` of the policy's two errors."""
        config = self.config
        return orpo_loss(errors.chosen, errors.rejected, config.beta, config.margin, config.scale)

    def notes(self) -> list[str]:
        """A warning for the released sign."""
        if self.config.margin != "released":
            return []
        return ["margin=released is the published sign: it lowers the loser's error as well as the winner's"]
