"""RankDPO (Karthik et al. 2024, arXiv 2410.18013): whole ranked lists, weighed by what a swap would cost their DCG."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...data.batch import Cond
from ...errors import UserError
from ..base import Loss, Method, MethodConfig, Needs, Paper, Phase

if TYPE_CHECKING:
    from ...context import Context
    from ...data.batch import Batch


def places(phi: Tensor) -> Tensor:
    """Rank of each picture in its list (B, K), 1 is best; equal ones share the mean of their ranks. ``phi`` (B, K) is
    NaN where a list has no more pictures, and so is the rank."""
    above = (phi[:, None] > phi[..., None]).sum(2)
    level = (phi[:, None] == phi[..., None]).sum(2)
    return torch.where(phi.isnan(), phi, 1 + above + (level - 1) / 2)


def pair_weights(phi: Tensor) -> Tensor:
    """W (B, K, K), 0 unless picture i was better than j: |2^phi_i - 2^phi_j| |1/log(1 + rank_i) - 1/log(1 + rank_j)|,
    the change of DCG (natural logarithm) if the two changed places."""
    gain, discount = torch.exp2(phi), torch.log1p(places(phi)).reciprocal()
    cost = (gain[..., None] - gain[:, None]).abs() * (discount[..., None] - discount[:, None]).abs()
    return torch.where(phi[..., None] > phi[:, None], cost, torch.zeros_like(cost))


def rankdpo_loss(
    errors: Tensor, base_errors: Tensor, phi: Tensor, beta: float, normalize: Literal["pairs", "weights"] = "pairs"
) -> tuple[Tensor, Tensor]:
    """Loss (B,) and logits u_ij (B, K, K) from per-picture mean squared errors (B, K) of the policy and the base.

    s = errors - base_errors; u_ij = -(beta/2) (s_i - s_j), in the convention of Diffusion-DPO's code; the loss is the
    sum of W_ij (-log sigmoid(u_ij)) over pairs whose first was better, divided by the pairs of the list, so that the
    step does not depend on its length, or by the sum of W (a list of two is then just Diffusion-DPO).
    """
    gain = base_errors - errors
    logits = (beta / 2) * (gain[..., None] - gain[:, None])
    weights = pair_weights(phi)
    # what a padded list has no scores for must not reach the gradient either
    losses = torch.where(weights > 0, weights * F.softplus(-logits), torch.zeros_like(logits)).sum((1, 2))
    if normalize == "weights":
        return losses / weights.sum((1, 2)).clamp_min(torch.finfo(losses.dtype).tiny), logits
    count = (~phi.isnan()).sum(1)
    return losses / (count * (count - 1) / 2).clamp_min(1), logits


def shares_of_wins(scores: Tensor) -> Tensor:
    """phi (B, K): the share of the other pictures of its list that each one beats, a tie counting one half."""
    beaten = (scores[..., None] > scores[:, None]).sum(2)
    level = (scores[..., None] == scores[:, None]).sum(2) - 1
    others = (~scores.isnan()).sum(1, keepdim=True) - 1
    return torch.where(scores.isnan(), scores, (beaten + 0.5 * level) / others.clamp_min(1))


class RankDPOConfig(MethodConfig):
    """Settings of RankDPO."""

    beta: float = Field(5000.0, gt=0, description="strength of the tie to the base (Diffusion-DPO's convention)")
    scores: Literal["given", "wins"] = Field(
        "given",
        description="phi: the data's scores, from 0 to 1, or the share of the list that a picture beats by them",
    )
    normalize: Literal["pairs", "weights"] = Field(
        "pairs", description="a list's loss is divided by its pairs, or by the sum of their weights"
    )
    shared_noise: bool = Field(
        False, description="one noise a list, as Diffusion-DPO has it, in place of one a picture"
    )
    error_space: Literal["network", "epsilon"] = Field(
        "network", description="where errors are measured: the network's own prediction, or rescaled to noise error"
    )


@dataclass
class ListErrors:
    """Errors of a batch of lists (B, K), in fp32, and the scores phi (B, K), NaN beyond a list's end."""

    student: Tensor
    base: Tensor
    phi: Tensor


class RankDPO(Method[RankDPOConfig]):
    """All pairs of a list of K pictures, from one student call and one base call of K B.

    The pictures of a list share t and have their own noise.
    """

    Config = RankDPOConfig
    paper = Paper(
        title="Scalable Ranked Preference Optimization for Text-to-Image Generation",
        arxiv="2410.18013",
        implements="eq. 5 to 7: DCG weights of every pair of a list, gains 2^phi - 1, own noise and shared t",
        differs="no code is public. Ours: means of squared errors with beta/2 (the paper: sums), division by the "
        "number of pairs, the mean rank for ties; lr and beta are not in the paper",
    )
    needs = Needs(batch="ranked")

    def fit(self, columns: Mapping[str, Tensor]) -> None:
        """Tells the loader how many noises a list takes. Raises UserError for scores that are not phi."""
        places = sorted(int(name.removeprefix("score_")) for name in columns if name.startswith("score_"))
        scores = torch.stack([columns[f"score_{place}"] for place in places], 1)
        low, high = scores.nan_to_num(torch.inf).min().item(), scores.nan_to_num(-torch.inf).max().item()
        if self.config.scores == "given" and not 0 <= low <= high <= 1:
            raise UserError(
                f"RankDPO takes scores from 0 to 1, and the data's lie between {low:.4g} and {high:.4g}; set "
                "method.scores=wins"
            )
        self.needs = replace(self.needs, draws=self.tags(scores.shape[1]))

    def tags(self, count: int) -> tuple[str, ...]:
        """Tags of the draws of a list of ``count`` pictures; t is the first one's."""
        return ("noise",) if self.config.shared_noise else ("noise", *(f"noise_{k}" for k in range(1, count)))

    def errors(self, ctx: Context, batch: Batch) -> ListErrors:
        """Student's (with gradient) and base's errors at one t a list."""
        names, denoiser = list(batch.latents), ctx.denoiser
        drawn = [ctx.draw(batch, tag) for tag in self.tags(len(names))]
        noise = torch.cat([noise for _, noise in drawn]).repeat(len(names) // len(drawn), 1, 1, 1)
        t, x0 = drawn[0][0].repeat(len(names)), torch.cat([batch.latents[name] for name in names])
        cond = Cond.cat([batch.condition(name) for name in names])
        x_t, target = denoiser.add_noise(x0, noise, t), denoiser.target(x0, noise, t)
        scale = denoiser.eps_error_scale(t) if self.config.error_space == "epsilon" else 1.0
        student = ctx.error("student", x_t, t, cond, target) * scale
        with torch.no_grad():
            base = ctx.error("base", x_t, t, cond, target) * scale
        scores = torch.stack([batch.columns[f"score_{k}"] for k in range(len(names))], 1)
        phi = shares_of_wins(scores) if self.config.scores == "wins" else scores
        return ListErrors(student.view(len(names), -1).T, base.view(len(names), -1).T, phi)

    def loss(self, ctx: Context, batch: Batch, phase: Phase) -> Loss:
        """Values and curves of one micro-batch; ``chosen`` is a list's best picture, ``rejected`` its worst."""
        found, config = self.errors(ctx, batch), self.config
        values, logits = rankdpo_loss(found.student, found.base, found.phi, config.beta, config.normalize)
        best, worst = found.phi.nan_to_num(-torch.inf).argmax(1, True), found.phi.nan_to_num(torch.inf).argmin(1, True)
        chosen, rejected = (found.student.gather(1, place)[:, 0] for place in (best, worst))
        base_chosen, base_rejected = (found.base.gather(1, place)[:, 0] for place in (best, worst))
        logits, ordered = logits.detach(), found.phi[..., None] > found.phi[:, None]
        right = ((logits > 0).float() + 0.5 * (logits == 0).float()) * ordered
        margin = (base_chosen - chosen) - (base_rejected - rejected)
        widest = (config.beta / 2) * margin.detach()
        metrics = {
            "chosen_error": chosen,
            "rejected_error": rejected,
            "chosen_gain": base_chosen - chosen,
            "rejected_gain": rejected - base_rejected,
            "margin": margin,
            "accuracy": right.sum((1, 2)) / ordered.sum((1, 2)).clamp_min(1),
            "logit": widest,
            "logit_abs": widest.abs(),
            "saturated": (widest.abs() > 5).float(),
        }
        return Loss(values, batch.weight, metrics)
