"""Offline PSO: pairs at exactly the times of a few-step sampler, to align a distilled student (arXiv 2410.03190)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from ...facts import SamplingRecord, student_record
from ..base import MethodConfig, Needs, Paper, Times
from ..pair import PairConfig, PairErrors, PairMethod

if TYPE_CHECKING:
    from ...context import Context
    from ...data.batch import Batch


def pso_loss(
    chosen: Tensor,
    rejected: Tensor,
    base_chosen: Tensor,
    base_rejected: Tensor,
    beta: float,
    negative: float = 1.0,
    prior: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Loss (B,) and logit u (B,) from per-sample mean squared errors (B,) of the student and of the base.

    u = beta [(R_w - k R_l) - (L_w - k L_l)] with k = ``negative``, and -log sigmoid(u) + ``prior`` L_l. With k = 1 and
    no prior this is Diffusion-DPO's at twice the beta, on other times."""
    logits = beta * ((base_chosen - negative * base_rejected) - (chosen - negative * rejected))
    return F.softplus(-logits) + prior * rejected, logits


def pso_hinge_loss(
    chosen: Tensor, rejected: Tensor, beta: float, negative: float, prior: float
) -> tuple[Tensor, Tensor]:
    """The release's form without a base: relu(1 - u) + ``prior`` L_l (B,) with u = -beta (L_w - k L_l) (B,)."""
    logits = -beta * (chosen - negative * rejected)
    return torch.relu(1 - logits) + prior * rejected, logits


class PSOTerms(MethodConfig):
    """The objective's terms."""

    beta: float = Field(5.0, gt=0, description="strength of the tie to the base")
    negative: float = Field(1.0, ge=0, description="factor on the terms of the rejected picture; 1 is the paper's")
    prior: float = Field(0.0, ge=0, description="weight of denoising the rejected picture, which keeps what it shows")
    loss: Literal["sigmoid", "hinge"] = Field(
        "sigmoid", description="the paper's form, or the release's without a base"
    )

    @model_validator(mode="after")
    def _rejected_counts(self) -> PSOTerms:
        if self.loss == "hinge" and self.beta * self.negative == self.prior:
            raise ValueError("with loss=hinge and prior = beta * negative rejected pictures cancel out; lower prior")
        return self


def pso_objective(terms: PSOTerms, errors: PairErrors) -> tuple[Tensor, Tensor]:
    """``pso_loss`` of the pair's four errors, or ``pso_hinge_loss`` of the student's two."""
    if terms.loss == "hinge":
        return pso_hinge_loss(errors.chosen, errors.rejected, terms.beta, terms.negative, terms.prior)
    assert errors.base_chosen is not None and errors.base_rejected is not None
    base = errors.base_chosen, errors.base_rejected
    return pso_loss(errors.chosen, errors.rejected, *base, terms.beta, terms.negative, terms.prior)


class PSOConfig(PSOTerms, PairConfig):
    """Settings of offline PSO."""

    timesteps: Times = Field(
        (999, 749, 499, 249), min_length=1, description="the student's times, falling, as its sampler takes them"
    )
    rollout: Literal["renoise", "ddim"] = Field("renoise", description="how that sampler goes on: new noise, or none")
    scale: float = Field(1.0, gt=0, description="what that sampler multiplies its first noise by")
    error_space: Literal["network", "epsilon"] = Field("epsilon", description="where errors are measured")


class PSO(PairMethod[PSOConfig]):
    """Diffusion-DPO where a few-step student lives: t is one of its sampler's own times, so that nothing else is moved.

    The student comes in by ``model.loras``, which fuses it into the base; what is trained is a further adapter. Chosen
    pictures are targets (data, a style, a concept, better samples), rejected ones the student's for the same prompt.
    """

    Config = PSOConfig
    paper = Paper(
        title="Tuning Timestep-Distilled Diffusion Model Using Pairwise Sample Optimization",
        arxiv="2410.03190",
        implements="the offline objective at the sampler's times; the release's factor on negatives, prior and hinge",
        differs="the released script takes times as positions in a falling list and so trains at 750, 500, 250 and 0; "
        "its defaults (5, 0.1, 0.5 with hinge) cancel the rejected pictures and are refused",
    )
    needs = Needs(batch="pair")

    def __init__(self, config: PSOConfig) -> None:
        super().__init__(config)
        self.needs = Needs(batch="pair", reference=config.loss == "sigmoid")

    def draw(self, ctx: Context, batch: Batch) -> tuple[Tensor, Tensor]:
        """One of the student's times, each alike, and noise; both shared by the pair."""
        times = self.config.timesteps
        drawn = [times[int(rng.integers(len(times)))] for rng in ctx.rng("time", batch)]
        return torch.tensor(drawn, device="cpu").to(ctx.device, non_blocking=True), ctx.draw(batch)[1]

    def objective(self, errors: PairErrors) -> tuple[Tensor, Tensor]:
        """``pso_objective`` of the pair's errors."""
        return pso_objective(self.config, errors)

    def sampling(self, scheduler: Mapping[str, Any]) -> SamplingRecord:
        """As the student was sampled before."""
        config = self.config
        return student_record(scheduler, config.timesteps, renoise=config.rollout == "renoise", scale=config.scale)
