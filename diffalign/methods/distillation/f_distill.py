"""f-distill: score differences weighted by the density ratio, for any f-divergence."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor

from ..adversarial import Adversarial, GanConfig
from ..base import Loss, Paper, Stats, Times
from ..score_distill import Sample, ScoreDistill, Share, dm_direction, gap

if TYPE_CHECKING:
    from ...context import Context
    from ...data.batch import Batch

Divergence = Literal["rkl", "kl", "js", "softened_rkl", "neyman", "hellinger", "jeffreys"]
# h(rho) = rho^2 f''(rho) up to a constant factor
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rkl": torch.ones_like,
    "kl": lambda rho: rho,
    "js": lambda rho: rho / (1 + rho),
    "softened_rkl": lambda rho: 1 / (1 + rho),
    "neyman": lambda rho: 1 / rho,
    "hellinger": torch.sqrt,
    "jeffreys": lambda rho: 1 + rho,
}
assert set(WEIGHTS) == set(get_args(Divergence))
RATIO = (0.1, 20.0)  # what a ratio is cut to
LOGIT = 10.0


def ratio_of(logits: Tensor) -> Tensor:
    """The density ratio p_real / p_fake that a discriminator's logits (B,) say, cut to 0.1 .. 20."""
    return logits.clamp(-LOGIT, LOGIT).exp().clamp(*RATIO)


def f_weight(divergence: str, rho: Tensor) -> Tensor:
    """h(rho) (B,): 1 everywhere for the reverse KL, which is DMD; at rho = 1 it is 1, 1, 1/2, 1/2, 1, 1, 2 for rkl, kl,
    js, softened_rkl, neyman, hellinger, jeffreys."""
    return WEIGHTS[divergence](rho)


class FDistillConfig(GanConfig):
    """DMD2's settings with the GAN, which is a part of this method, and the divergence."""

    timesteps: Times = Field((999, 749, 499, 249), min_length=1, description="the student's times, falling")
    guidance: float = Field(8.0, ge=0, description="the teacher's guidance: u + w (c - u); 1 is conditional only")
    divergence: Divergence = Field("js", description="f; rkl is DMD2")
    gan_weight: float = Field(5e-3, ge=0, description="weight of the student's GAN loss; the head learns even at 0")
    gan_features: Literal["fake", "base"] = Field("base", description="whose middle block the head looks at")
    mean: Literal["step", "none"] = Field(
        "step", description="divide the weights by their mean over the whole step, or leave them as they are"
    )
    ratio_bins: int = Field(
        0,
        ge=0,
        description="divide ratios by their mean over the step in so many bins of time (authors: 10); 0: do not",
    )
    ratio_memory: Share = Field(
        0.0, description="share of a bin's mean that is kept from step to step (authors: 0, on ImageNet 0.5)"
    )


class FDistill(Adversarial[FDistillConfig]):
    """g = h(rho) (y_fake - y_real) / mean |x - y_real|, with rho from the GAN's head at the same noisy point.

    The mean of h over all samples of a step, micro-batches and processes is divided out by the weights of the loss."""

    Config = FDistillConfig
    paper = Paper(
        title="One-step Diffusion Models with f-Divergence Distribution Matching",
        arxiv="2502.15681",
        implements="weights of seven f-divergences from the discriminator's ratio, divided by their mean over the step",
        differs="ratios are divided by their mean in bins of time only on request; the GAN's term is drawn apart from "
        "the ratio, and weighs as at a mean ratio of 1; student and fake score are adapters on the teacher",
    )

    def __init__(self, config: FDistillConfig) -> None:
        super().__init__(config)
        self.couples = "batch" if config.ratio_bins else "none"

    @property
    def adversarial(self) -> bool:
        return True

    def reason(self) -> str:
        return "the head that tells the ratio of densities learns from real captioned pictures"

    def notes(self) -> list[str]:
        config = self.config
        if not config.ratio_bins:
            return super().notes()
        thin = "" if config.ratio_memory else ": with few samples in a bin every ratio is 1 and this is DMD2 (see "
        thin += "" if config.ratio_memory else "method.ratio_memory)"
        return [
            *super().notes(),
            f"ratios are divided by their mean in {config.ratio_bins} bins of time over the step{thin}; it costs "
            "another pass of the student",
        ]

    def ratio(self, ctx: Context, batch: Batch, sample: Sample) -> tuple[Tensor, Tensor, Tensor]:
        """(rho (B,), x_t, t): the head's ratio at the noisy point of the scores."""
        x_t, t = self.noised(ctx, batch, sample.x, self.time_window(ctx, sample))
        return ratio_of(self.logits(ctx, x_t, t, sample.cond)), x_t, t

    def bins(self, ctx: Context, t: Tensor) -> Tensor:
        """The bin of each time (B,)."""
        return t * self.config.ratio_bins // ctx.denoiser.num_timesteps

    def statistics(self, ctx: Context, batch: Batch) -> Stats:
        """Sum and count of the ratios in each bin."""
        if not self.config.ratio_bins or ctx.phase != "student":
            return {}
        rho, _, t = self.ratio(ctx, batch, self.generate(ctx, batch))
        table = torch.zeros(2, self.config.ratio_bins, device=rho.device)
        table.index_add_(1, self.bins(ctx, t), torch.stack([rho, torch.ones_like(rho)]) * batch.weight)
        return {"ratio": table}

    def remember(self, before: Stats, now: Stats) -> Stats:
        """The mean ratio of each bin, 1 at first; bins without a sample keep theirs."""
        if "ratio" not in now:
            return {}
        total, count = now["ratio"]
        kept, rate = before.get("bins", torch.ones_like(total)), self.config.ratio_memory
        return {"bins": torch.where(count > 0, rate * kept + (1 - rate) * total / count.clamp_min(1e-12), kept)}

    def direction(self, ctx: Context, batch: Batch, sample: Sample) -> tuple[Tensor, dict[str, Tensor]]:
        rho, x_t, t = self.ratio(ctx, batch, sample)
        if "bins" in ctx.stats:
            rho = rho / (ctx.stats["bins"][self.bins(ctx, t)] + 1e-6)
        y_fake = self.fake_x0(ctx, x_t, t, sample)
        y_real = self.real_x0(ctx, x_t, t, sample, self.config.guidance)
        return dm_direction(sample.x, y_fake, y_real, self.divisor), {
            "gap": gap(sample.x, y_fake, y_real),
            "ratio": rho,
        }

    def student_loss(self, ctx: Context, batch: Batch, sample: Sample) -> Loss:
        found = ScoreDistill.student_loss(self, ctx, batch, sample)
        weight = f_weight(self.config.divergence, found.metrics["ratio"])
        found.metrics["f_weight"] = weight
        # in a mean of the step the trainer divides by the sum of the weights; the GAN's term weighs as at a ratio of 1
        one = f_weight(self.config.divergence, torch.ones_like(weight))
        share = torch.ones_like(weight) if self.config.mean == "none" else one / weight
        if self.config.mean == "none":
            found.values = weight * found.values
        if self.config.gan_weight:
            found.values = found.values + share * self.student_term(ctx, batch, sample)
        if self.config.mean == "step":
            found.weights = found.weights * weight
        return found
