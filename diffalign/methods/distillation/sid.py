"""SiD: score identity distillation with guided scores, in one step (SiD-LSG) or several, with a GAN by option."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ...data.batch import Cond
from ..adversarial import Adversarial, GanConfig
from ..base import Loss, Paper, Times
from ..score_distill import Sample, ScoreDistill, Share, gap

if TYPE_CHECKING:
    from ...context import Context
    from ...data.batch import Batch
    from ...families.base import Model


def sid_loss(
    x: Tensor, y_fake: Tensor, y_real: Tensor, alpha: float = 1.0, floor: float | None = 1e-5
) -> tuple[Tensor, Tensor]:
    """(loss (B,), divisor (B,)) of samples x and of both scores' x0 at one noisy x, all (B, C, h, w).

    mean[(y_real - y_fake) ((y_real - x) - alpha (y_real - y_fake))] / w with w = mean |x - y_real| of the sample, at
    least ``floor`` and without gradient; None divides by nothing. Gradients flow through x and through both scores.
    Where the fake score is exact its mean is (1 - alpha) E|y_real - y_fake|^2 / w: no measure of progress."""
    difference = y_real - y_fake
    divisor = torch.ones_like(x[:, 0, 0, 0])
    if floor is not None:
        divisor = (x - y_real).detach().abs().mean((1, 2, 3)).clamp_min(floor)
    return (difference * ((y_real - x) - alpha * difference)).mean((1, 2, 3)) / divisor, divisor


class SiDConfig(GanConfig):
    """SiD-LSG's one step. In several: times [999, 749, 499, 249] with start=unit; each sample stops at one of them."""

    timesteps: Times = Field((625,), min_length=1, description="the student's times, falling")
    start: Literal["unit", "sigma"] = Field(
        "sigma", description="the first input: unit noise, or noise times sigma of the first time"
    )
    alpha: float = Field(1.0, ge=0, description="weight of the squared score difference that is taken off")
    guidance: float = Field(4.5, ge=0, description="kappa: guidance of the scores, as `strategy` places it")
    strategy: Literal["lsg", "long", "zero", "anti"] = Field(
        "lsg",
        description="guided are both scores, fake one in training too (lsg); the teacher alone (long); or the teacher "
        "is not, and the fake score sees no text (zero) or is guided away from it (anti)",
    )
    fake_guidance: float | None = Field(None, description="the fake score's in the student's loss; null: by strategy")
    critic_guidance: float | None = Field(None, description="the fake score's in its own loss; null: by strategy")
    text_dropout: Share = Field(
        0.1, description="share of empty prompts where the fake score learns, if it is guided there or for the student"
    )
    order: Literal["student", "critic"] = Field("critic", description="which phase comes first in a step")
    critic_steps: int = Field(1, ge=1, description="updates of the fake score for one of the student")
    time_range: tuple[Share, Share] = Field((0.02, 0.979), description="times of the scores, as shares of the schedule")
    critic_range: tuple[Share, Share] = Field((0.02, 0.979), description="times at which the fake score learns")
    floor: float = Field(1e-5, ge=0, description="least divisor")
    gan_draws: Literal["own", "shared"] = Field("shared", description="time and noise of real and made pictures")


class SiD(Adversarial[SiDConfig]):
    """The student follows the gradient through both scores: their Jacobians are what makes it SiD and not DMD.

    That gradient is taken at x at once and handed to the student, so that no graph of a score outlives its role. The
    fake score is fitted through its own guidance ("long-short"): its guided output is the student's true score, the
    target stays the guided teacher, and the first gradient is 0. The GAN, where on, has no head: its logit is the mean
    of the fake score's middle features.
    """

    Config = SiDConfig
    paper = Paper(
        title="Guided Score identity Distillation for Data-Free One-Step Text-to-Image Generation",
        arxiv="2406.01561",
        implements="SiD's loss with alpha, long and short guidance, Zero-CFG and Anti-CFG; few steps as a uniform "
        "mixture (2505.12674), Diffusion-GAN without a head",
        differs="means for sums; each sample stops at a step of its own and only its last call has a gradient (the "
        "one-step authors' several steps differentiate all); v models are fitted on their own error; the GAN's "
        "schedule (first without it) is two runs; anti-guidance -1 is from memory",
    )

    @property
    def scales(self) -> tuple[float, float, float]:
        """Guidance of the fake score in its own loss and in the student's, and of the teacher."""
        config, kappa = self.config, self.config.guidance
        by_strategy = {
            "lsg": (kappa, kappa, kappa),
            "long": (1.0, 1.0, kappa),
            "zero": (0.0, 0.0, 1.0),
            "anti": (-1.0, -1.0, 1.0),
        }
        critic, fake, real = by_strategy[config.strategy]
        critic = critic if config.critic_guidance is None else config.critic_guidance
        return critic, fake if config.fake_guidance is None else config.fake_guidance, real

    def fake(self, ctx: Context, x_t: Tensor, t: Tensor, sample: Sample, guidance: float | None = None) -> Tensor:
        """The fake score's output (B, C, h, w), guided as where it learns if not told; one call at 0 and 1."""
        scale = self.scales[0] if guidance is None else guidance
        if scale == 0:
            return super().fake(ctx, x_t, t, replace(sample, cond=_without(ctx, sample.cond)))
        return super().fake(ctx, x_t, t, sample, scale)

    def direction(self, ctx: Context, batch: Batch, sample: Sample) -> tuple[Tensor, dict[str, Tensor]]:
        """C h w times the gradient of ``sid_loss`` at x, through x_t and both scores."""
        _, kappa_fake, kappa_real = self.scales
        with torch.enable_grad():
            x = sample.x.detach().requires_grad_()
            x_t, t = self.noised(ctx, batch, x, self.time_window(ctx, sample))
            y_fake = self.fake_x0(ctx, x_t, t, sample, kappa_fake)
            y_real = self.real_x0(ctx, x_t, t, sample, kappa_real)
            loss, _ = sid_loss(x, y_fake, y_real, self.config.alpha, self.divisor)
            (gradient,) = torch.autograd.grad(loss.sum() * x[0].numel(), x)  # of sums: half precision holds it
        return gradient, {"sid": loss.detach(), "gap": gap(x.detach(), y_fake.detach(), y_real.detach())}

    def critic_loss(self, ctx: Context, batch: Batch, sample: Sample) -> Loss:
        """As always, with the fake score guided, and some prompts empty where its guess without one is ever asked."""
        if self.scales[:2] != (1, 1) and self.config.text_dropout:
            drawn = [float(rng.random()) < self.config.text_dropout for rng in ctx.rng("text", batch)]
            empty = torch.tensor(drawn, device="cpu").to(sample.x.device, non_blocking=True)
            sample = replace(sample, cond=_where(empty, _without(ctx, sample.cond), sample.cond))
        return super().critic_loss(ctx, batch, sample)

    # ---- the GAN without a head -------------------------------------------------------------------------------------

    def extra_roles(self) -> tuple[str, ...]:
        return ScoreDistill.extra_roles(self)

    def build(self, family: Model) -> dict[str, nn.Module]:
        return ScoreDistill.build(self, family)

    def logits(self, ctx: Context, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The mean of the middle features, within 10 of 0 (B,)."""
        return ctx.features(self.config.gan_features, x_t, t, cond).mean((1, 2, 3)).clamp(-10, 10)


def _without(ctx: Context, cond: Cond) -> Cond:
    """The empty prompt beside the sizes of these samples."""
    return ctx.uncond.expand(len(cond)).beside(cond)


def _where(chosen: Tensor, a: Cond, b: Cond) -> Cond:
    """Row by row from ``a`` where ``chosen`` (B,), else from ``b``."""

    def pick(one: Tensor, other: Tensor) -> Tensor:
        return torch.where(chosen.reshape(-1, *[1] * (one.ndim - 1)), one, other)

    return Cond(pick(a.embeds, b.embeds), {name: pick(a.added[name], b.added[name]) for name in b.added})
