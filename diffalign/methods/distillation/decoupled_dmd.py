"""Decoupled DMD: the teacher's guidance and the matching of distributions, each at noise levels of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field
from torch import Tensor

from ..adversarial import Adversarial, GanConfig
from ..base import Paper, Times
from ..score_distill import Sample, Window, gap

if TYPE_CHECKING:
    from ...context import Context
    from ...data.batch import Batch


class DecoupledDMDConfig(GanConfig):
    """DMD2's settings and the schedule of either term."""

    timesteps: Times = Field((999, 749, 499, 249), min_length=1, description="the student's times, falling")
    guidance: float = Field(8.0, ge=0, description="guidance w of the teacher; its augmentation counts (w - 1) times")
    schedule: Literal["hybrid", "decoupled", "constrained", "coupled"] = Field(
        "hybrid",
        description="hybrid: guidance at levels cleaner than the student's step, matching at all; decoupled: both at "
        "all levels, drawn apart; constrained: both at one cleaner level; coupled: both at one level, which is DMD",
    )
    matching_weight: float = Field(1.0, ge=0, description="weight of the matching; 0: guidance alone, which diverges")
    divisor: Literal["separate", "shared"] = Field(
        "separate", description="each term's own mean |x - teacher's x0|, or one with the guided x0 for both, as in DMD"
    )
    relative_floor: float = Field(
        0.1, ge=0, description="least divisor as a share of mean |x|: at clean levels the divisors are tiny"
    )


class DecoupledDMD(Adversarial[DecoupledDMDConfig]):
    """g = (y_fake - y_cond) at t_DM - (w - 1) (y_cond - y_uncond) at t_CA, in x0-space."""

    Config = DecoupledDMDConfig
    paper = Paper(
        title="Decoupled DMD: CFG Augmentation as the Spear, Distribution Matching as the Shield",
        arxiv="2511.22677",
        implements="guidance augmentation and distribution matching with schedules, noise and divisors of their own",
        differs="no code of the authors is public; divisors and their floor are of this project; student and fake "
        "score are adapters on the teacher",
    )

    @property
    def tied(self) -> bool:
        """Whether both terms share time and noise."""
        return self.config.schedule in ("coupled", "constrained")

    def extra_draws(self) -> tuple[str, ...]:
        return super().extra_draws() if self.tied else (*super().extra_draws(), "augment")

    def cleaner(self, ctx: Context, sample: Sample) -> Window:
        """Levels from the range's first up to each sample's own step."""
        low, high = self.window(ctx, self.config.time_range, 1)[0]
        return [(low, min(high, max(low + 1, self.config.timesteps[k]))) for k in sample.steps]

    def time_window(self, ctx: Context, sample: Sample) -> Window:
        return self.cleaner(ctx, sample) if self.config.schedule == "constrained" else super().time_window(ctx, sample)

    def augment_window(self, ctx: Context, sample: Sample) -> Window:
        """Where the teacher's guidance is asked."""
        return self.cleaner(ctx, sample) if self.config.schedule == "hybrid" else super().time_window(ctx, sample)

    def direction(self, ctx: Context, batch: Batch, sample: Sample) -> tuple[Tensor, dict[str, Tensor]]:
        x, extra = sample.x, self.config.guidance - 1
        x_t, t = self.noised(ctx, batch, x, self.time_window(ctx, sample))
        y_fake = self.fake_x0(ctx, x_t, t, sample)
        if self.tied:
            y_cond, y_uncond = self.teacher(ctx, x_t, t, sample)
            y_near = y_cond
        else:
            y_cond = self.real_x0(ctx, x_t, t, sample)
            x_t, t = self.noised(ctx, batch, x, self.augment_window(ctx, sample), "augment")
            y_near, y_uncond = self.teacher(ctx, x_t, t, sample)
        matching, augmentation = self.config.matching_weight * (y_fake - y_cond), -extra * (y_near - y_uncond)
        metrics = {"gap": gap(x, y_fake, y_cond), "guidance": gap(x, y_uncond, y_near)}
        if self.config.normalise == "none":
            return matching + augmentation, metrics
        if self.config.divisor == "shared":
            return (matching + augmentation) / self.size(x, x - y_cond + augmentation), metrics
        return matching / self.size(x, x - y_cond) + augmentation / self.size(x, x - y_near), metrics

    def teacher(self, ctx: Context, x_t: Tensor, t: Tensor, sample: Sample) -> tuple[Tensor, Tensor]:
        """The teacher's x0 with and without the prompt."""
        cond, uncond = ctx.branches("base", x_t, t, sample.cond)
        return ctx.denoiser.to_x0(cond, x_t, t), ctx.denoiser.to_x0(uncond, x_t, t)

    def size(self, x: Tensor, distance: Tensor) -> Tensor:
        """Mean of |distance| of each sample, at least the floors: (B, 1, 1, 1)."""
        least = self.config.relative_floor * x.abs().mean((1, 2, 3), keepdim=True)
        return distance.abs().mean((1, 2, 3), keepdim=True).maximum(least).clamp_min(self.config.floor)
