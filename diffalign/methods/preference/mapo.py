"""MaPO, margin-aware preference optimisation without a reference (Hong et al. 2024, arXiv 2406.06424)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..base import Needs, Paper
from ..pair import PairConfig, PairErrors, PairMethod


def likelihood_score(error: Tensor, scale: float = 0.5) -> Tensor:
    """s(m) = c m / expm1(c m) of per-sample errors m >= 0: strictly falling, s(0) = 1, s'(0) = -c/2.

    Written with exp(-c m), so that a large error gives 0 and no NaN gradient."""
    x = scale * error
    small = x < 1e-4
    safe = torch.where(small, torch.ones_like(x), x)
    return torch.where(small, 1 - x / 2 + x * x / 12, -safe * torch.exp(-safe) / torch.expm1(-safe))


def mapo_loss(
    chosen: Tensor, rejected: Tensor, beta: float = 0.1, scale: float = 0.5, steps: float = 1000.0
) -> tuple[Tensor, Tensor]:
    """Loss m_w + beta softplus(-T (s(m_w) - s(m_l))) (B,) and logit T (s(m_w) - s(m_l)) (B,) from errors (B,)."""
    logits = steps * (likelihood_score(chosen, scale) - likelihood_score(rejected, scale))
    return chosen + beta * F.softplus(-logits), logits


class MaPOConfig(PairConfig):
    """Settings of MaPO."""

    beta: float = Field(0.1, ge=0, description="weight of the margin term; 0 is fine-tuning on winners")
    scale: float = Field(0.5, gt=0, description="c, the authors' snr_value")
    steps: float = Field(1000.0, gt=0, description="T, the multiplier of the score difference")


class MaPO(PairMethod[MaPOConfig]):
    """Fit the winner and widen the margin to the loser; no reference model.

    With p = exp(-c m) the score is (-log p) p / (1 - p), as in the authors' code, not the log-odds that its variable
    name suggests. expm1 and the series at 0 keep digits that exp(x) - 1 loses.
    """

    Config = MaPOConfig
    paper = Paper(
        title="Margin-aware Preference Optimization for Aligning Diffusion Models without Reference",
        arxiv="2406.06424",
        implements="the authors' released objective; the printed formula was not at hand to compare",
        differs="expm1 in place of exp(x) - 1, with the limit at 0",
    )
    needs = Needs(batch="pair", reference=False)

    def objective(self, errors: PairErrors) -> tuple[Tensor, Tensor]:
        """``mapo_loss`` of the policy's two errors."""
        return mapo_loss(errors.chosen, errors.rejected, self.config.beta, self.config.scale, self.config.steps)
