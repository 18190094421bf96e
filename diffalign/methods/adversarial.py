"""A GAN on the features of a score network, beside score distillation (DMD2, arXiv 2405.14867, section 4.3)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.batch import Cond
from .base import Loss
from .score_distill import DistillConfig, Sample, ScoreDistill

if TYPE_CHECKING:
    from ..context import Context
    from ..data.batch import Batch
    from ..families.base import Model


class GanConfig(DistillConfig):
    """Settings of the GAN."""

    gan_weight: float = Field(0.0, ge=0, description="weight of the student's GAN loss; 0: no GAN, prompts alone")
    gan_critic_weight: float = Field(1e-2, gt=0, description="weight of the GAN's loss beside the fake score's")
    gan_times: int = Field(1000, ge=1, description="the GAN sees pictures at times below this; 1: clean ones")
    gan_features: Literal["fake", "base"] = Field("fake", description="whose middle block the head looks at")
    gan_draws: Literal["own", "shared"] = Field("own", description="time and noise of real and made pictures")
    gan_r1: float = Field(
        0.0, ge=0, description="weight of the head's R1 penalty beside its loss (FastGen: 100 to 1000); 0: none"
    )
    gan_r1_noise: float = Field(0.1, gt=0, description="strength of the noise that R1 is estimated by")
    gan_width: int | None = Field(None, gt=0, description="channels of the head; null: as many as the features")


A = TypeVar("A", bound=GanConfig)


def gan_critic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """softplus(fake) + softplus(-real) of logits (B,): 2 ln 2 where the head knows nothing."""
    return F.softplus(fake) + F.softplus(-real)


def gan_student_loss(fake: Tensor) -> Tensor:
    """softplus(-fake) of logits (B,), the loss that does not saturate."""
    return F.softplus(-fake)


def r1_penalty(logits: Tensor, moved: Tensor) -> Tensor:
    """(logits - moved)^2 (B,): of what a head says at points x and at x + s noise.

    Over s^2 its mean is |gradient|^2 for small s: R1 without a second derivative (Seaweed-APT, arXiv 2501.08316)."""
    return (logits - moved).square()


class Head(nn.Module):
    """Features (B, channels, h, w) -> a logit (B,): strided convolutions down to 4 x 4, one over what is left, one to a
    number. It starts as 0."""

    def __init__(self, channels: int, side: int, width: int | None = None) -> None:
        super().__init__()
        width = width or channels
        groups = math.gcd(32, width // 4) if width % 4 == 0 else 1
        self.layers = nn.Sequential()
        while side >= 8:
            self.layers += nn.Sequential(nn.Conv2d(channels, width, 4, 2, 1), nn.GroupNorm(groups, width), nn.SiLU())
            channels, side = width, side // 2
        self.least = min(side, 4)
        self.layers += nn.Sequential(
            nn.Conv2d(channels, width, self.least, self.least), nn.GroupNorm(groups, width), nn.SiLU()
        )
        self.last = nn.Conv2d(width, 1, 1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor) -> Tensor:
        strides = 2 ** (len(self.layers) // 3 - 1)
        # buckets may be narrower than the square that the head was made for
        short = [max(0, self.least * strides - side) for side in features.shape[-2:]]
        features = F.pad(features, (0, short[1], 0, short[0])) if any(short) else features
        return self.last(self.layers(features)).mean((1, 2, 3))


class Adversarial(ScoreDistill[A], Generic[A]):
    """Score distillation with a GAN where ``gan_weight`` is above 0; the data are then captioned pictures.

    The head is trained in the critic phase, with the fake score whose features it reads."""

    @property
    def adversarial(self) -> bool:
        """Whether there is a head."""
        return self.config.gan_weight > 0

    def extra_roles(self) -> tuple[str, ...]:
        return (*super().extra_roles(), "head") if self.adversarial else super().extra_roles()

    def extra_draws(self) -> tuple[str, ...]:
        if not self.adversarial:
            return super().extra_draws()
        own = ("gan-real",) if self.config.gan_draws == "own" else ()
        moved = ("gan-r1",) if self.config.gan_r1 else ()
        return (*super().extra_draws(), "gan", *own, *moved)

    def wants_pictures(self) -> bool:
        return self.adversarial or super().wants_pictures()

    def reason(self) -> str:
        if self.adversarial:
            return "the GAN learns from real captioned pictures; method.gan_weight=0 needs prompts alone"
        return super().reason()

    def build(self, family: Model) -> dict[str, nn.Module]:
        """The head, for the middle block of this U-Net."""
        modules = super().build(family)
        if self.adversarial:
            config = family.unet.config
            side = int(config.sample_size) >> (len(config.block_out_channels) - 1)
            modules["head"] = Head(int(config.block_out_channels[-1]), side, self.config.gan_width)
        return modules

    def logits(self, ctx: Context, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """What the head says of noisy latents (B,): positive for real ones."""
        found: Tensor = ctx.roles.modules["head"](ctx.features(self.config.gan_features, x_t, t, cond))
        return found

    def judge(self, ctx: Context, batch: Batch, x: Tensor, cond: Cond, tag: str = "gan") -> Tensor:
        """What the head says of latents x (B,), noised at a time of their own."""
        return self.logits(ctx, *self.shown(ctx, batch, x, tag), cond)

    def shown(self, ctx: Context, batch: Batch, x: Tensor, tag: str) -> tuple[Tensor, Tensor]:
        """(x_t, t): what the head is shown of latents x."""
        last = min(self.config.gan_times, ctx.denoiser.num_timesteps)
        t = self.times(ctx, batch, f"{tag}-time", [(0, last - 1)] * len(x))
        return x if last == 1 else ctx.denoiser.add_noise(x, ctx.draw(batch, tag)[1], t), t

    def student_term(self, ctx: Context, batch: Batch, sample: Sample) -> Tensor:
        """The student's GAN loss, weighted: (B,)."""
        return self.config.gan_weight * gan_student_loss(self.judge(ctx, batch, sample.x, sample.cond))

    def student_loss(self, ctx: Context, batch: Batch, sample: Sample) -> Loss:
        found = super().student_loss(ctx, batch, sample)
        if self.config.gan_weight:
            term = self.student_term(ctx, batch, sample)
            found.values = found.values + term
            found.metrics["gan"] = term
        return found

    def critic_loss(self, ctx: Context, batch: Batch, sample: Sample) -> Loss:
        found = super().critic_loss(ctx, batch, sample)
        if self.adversarial:
            fake = self.judge(ctx, batch, sample.x, sample.cond)
            tag = "gan-real" if self.config.gan_draws == "own" else "gan"
            x_t, t = self.shown(ctx, batch, batch.latents["image"], tag)
            real = self.logits(ctx, x_t, t, sample.cond)
            term = gan_critic_loss(real, fake)
            found.metrics |= {"gan_real": real.sigmoid(), "gan_fake": fake.sigmoid()}
            if self.config.gan_r1:
                near = x_t + self.config.gan_r1_noise * ctx.draw(batch, "gan-r1")[1]
                penalty = r1_penalty(real, self.logits(ctx, near, t, sample.cond))
                term, found.metrics["gan_r1"] = term + self.config.gan_r1 * penalty, penalty
            found.values = found.values + self.config.gan_critic_weight * term
        return found
