"""Diff-Instruct, Diff-Instruct++ and Diff-Instruct*: integral divergences of scores, with a reward on the pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..base import Loss, Needs, Paper
from ..score_distill import DistillConfig, Sample, ScoreDistill, gap

if TYPE_CHECKING:
    from ...context import Context
    from ...data.batch import Batch


def implicit_matching(
    x: Tensor, y_fake: Tensor, y_real: Tensor, constant: float | None, weight: Tensor | float = 1.0
) -> Tensor:
    """Score-implicit matching in x0-space (B,): -mean(d'(y_fake - y_real) (y_fake - x)), gradients through everything.

    d' is that of the pseudo-Huber distance, d / sqrt(mean d^2 + constant^2) (both means over C, h, w), or with None of
    half the square, d itself; then it is SiD's loss at alpha = 1 without its divisor. ``weight`` (B, 1, 1, 1) turns
    differences of x0 into differences of scores (alpha / sigma^2)."""
    distance = weight * (y_fake - y_real)
    if constant is not None:
        distance = distance / (distance.square().mean((1, 2, 3), keepdim=True) + constant**2).sqrt()
    return -(distance * weight * (y_fake - x)).mean((1, 2, 3))


class DiffInstructConfig(DistillConfig):
    """One step by default; SDXL's is told time 399."""

    divergence: Literal["kl", "fisher", "huber"] = Field(
        "huber",
        description="kl: Diff-Instruct(++); huber: Diff-Instruct*, pseudo-Huber of scores; fisher: their square",
    )
    huber: float = Field(1e-3, gt=0, description="pseudo-Huber's constant, beside the root mean square of a difference")
    space: Literal["x0", "score"] = Field(
        "x0", description="where differences of divergences huber and fisher are measured, and so weighted over times"
    )
    normalise: Literal["sample", "none"] = Field("none", description="DMD's divisor of the direction, for kl")
    critic_steps: int = Field(1, ge=1, description="updates of the fake score for one of the student")
    reward: str = Field(
        "", description="scorers of the student's pictures, such as pickscore or hpsv21=FILE; empty: none"
    )
    reward_weight: float = Field(100.0, ge=0, description="weight of the reward")


class DiffInstruct(ScoreDistill[DiffInstructConfig]):
    """Divergence between student and guided teacher, minus a reward on what the student's pictures look like.

    In the divergences of scores gradients run through both score networks into x, as in SiD; their weights are still.
    """

    Config = DiffInstructConfig
    paper = Paper(
        title="Diff-Instruct*: Towards Human-Preferred One-step Text-to-image Generative Models",
        arxiv="2410.20898",
        implements="Diff-Instruct (KL, arXiv 2305.18455), Diff-Instruct++ (with reward, 2410.18881) and Diff-Instruct* "
        "(score-based divergence with reward), with any differentiable scorer",
        differs="from the papers alone; differences of scores are measured in x0-space by default and averaged, not "
        "summed; student and fake score start from the teacher; the papers' one-step model comes in by model.start",
    )

    def __init__(self, config: DiffInstructConfig) -> None:
        super().__init__(config)
        if config.reward:
            needs = self.needs
            self.needs = Needs(needs.batch, draws=needs.draws, reward=True, decode=True)

    def direction(self, ctx: Context, batch: Batch, sample: Sample) -> tuple[Tensor, dict[str, Tensor]]:
        """Of a divergence of scores: C h w times its gradient at x, taken at once; no graph outlives its role."""
        config = self.config
        if config.divergence == "kl":
            return super().direction(ctx, batch, sample)
        with torch.enable_grad():
            x = sample.x.detach().requires_grad_()
            x_t, t = self.noised(ctx, batch, x, self.time_window(ctx, sample))
            y_fake = self.fake_x0(ctx, x_t, t, sample)
            y_real = self.real_x0(ctx, x_t, t, sample, config.guidance)
            weight = 1.0 if config.space == "x0" else ctx.denoiser.alpha(t) / ctx.denoiser.sigma(t) ** 2
            constant = config.huber if config.divergence == "huber" else None
            values = implicit_matching(x, y_fake, y_real, constant, weight)
            (gradient,) = torch.autograd.grad(values.sum() * x[0].numel(), x)  # of sums: half precision holds it
        found = gap(x.detach(), y_fake.detach(), y_real.detach())
        return gradient, {"gap": found, "divergence": values.detach()}

    def student_loss(self, ctx: Context, batch: Batch, sample: Sample) -> Loss:
        found = super().student_loss(ctx, batch, sample)
        if self.config.reward:
            images = ctx.decode(sample.x)
            for name in ctx.rewards:
                score = ctx.reward(name, images, batch.prompts)
                found.values = found.values - self.config.reward_weight * score
                found.metrics[f"reward/{name}"] = score
        return found
