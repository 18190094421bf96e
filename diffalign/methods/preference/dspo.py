"""DSPO, direct score preference optimisation (Zhu et al., ICLR 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..base import Needs, Paper
from ..pair import Noised, PairConfig, PairErrors, PairMethod
from .dpo import dpo_loss

if TYPE_CHECKING:
    from ...context import Context


@dataclass
class DSPOErrors(PairErrors):
    """Besides the errors, of the winner's residual r_w and drift d_w (student minus base): mean r_w d_w (B,) and
    mean d_w^2 (B,)."""

    cross: Tensor | None = None
    drift: Tensor | None = None


def dspo_loss(errors: DSPOErrors, beta: float, form: Literal["score", "sdxl"] = "score") -> tuple[Tensor, Tensor]:
    """Loss (B,) and Diffusion-DPO's logit u (B,).

    ``score`` (the authors' SD1.5 code): mean ||r_w - beta (1 - sigmoid(u)) d_w||^2, written out in its three means.
    ``sdxl`` (their SDXL code, another loss): (1 - sigmoid(u))^2, times mean d_w^2 where that is at least 0.1. The
    gradient flows through sigmoid(u) in both.
    """
    assert errors.base_chosen is not None and errors.base_rejected is not None
    assert errors.cross is not None and errors.drift is not None
    _, logits = dpo_loss(errors.chosen, errors.rejected, errors.base_chosen, errors.base_rejected, beta)
    doubt = torch.sigmoid(-logits)
    if form == "score":
        pull = beta * doubt
        return errors.chosen - 2 * pull * errors.cross + pull.square() * errors.drift, logits
    far = errors.drift.detach() >= 0.1
    return doubt.square() * torch.where(far, errors.drift, torch.ones_like(errors.drift)), logits


class DSPOConfig(PairConfig):
    """Settings of DSPO. ``beta``: 0.001 for ``score`` (grid .001, .01, .05), 5000 for ``sdxl`` (1000 to 5000)."""

    beta: float = Field(0.001, ge=0, description="inside the logit (halved) and, for form=score, before the pull")
    form: Literal["score", "sdxl"] = Field("score", description="the authors' SD1.5 loss, or their SDXL loss")


class DSPO(PairMethod[DSPOConfig]):
    """Score matching on the winner, bent by the preference.

    With the authors' beta of 0.001 the pull is 5e-4 of the residual: their SD1.5 form is fine-tuning on winners to
    that order. Their SDXL branch has no data term.
    """

    Config = DSPOConfig
    paper = Paper(
        title="DSPO: Direct Score Preference Optimization for Diffusion Model Alignment",
        arxiv="",
        implements="both released losses, per sample",
        differs="the SDXL branch is chosen for each pair (authors: by the batch mean); the paper has one lambda, the "
        "code uses beta in two places",
    )
    needs = Needs(batch="pair")

    def errors(self, ctx: Context, noised: Noised) -> DSPOErrors:
        """The four errors, and what the winner's residual and drift have in common."""
        student = self.residual(ctx, "student", noised)
        with torch.no_grad():
            base = self.residual(ctx, "base", noised)
        four = self.compare(ctx, noised.t, student, base.square().mean((1, 2, 3)))
        pairs = len(student) // 2
        winner, drift = student[:pairs], (student - base)[:pairs]
        scale = self.scale(ctx, noised.t[:pairs])
        return DSPOErrors(
            four.chosen,
            four.rejected,
            four.base_chosen,
            four.base_rejected,
            cross=(winner * drift).mean((1, 2, 3)) * scale,
            drift=drift.square().mean((1, 2, 3)) * scale,
        )

    def objective(self, errors: PairErrors) -> tuple[Tensor, Tensor]:
        """``dspo_loss``."""
        assert isinstance(errors, DSPOErrors)
        return dspo_loss(errors, self.config.beta, self.config.form)
