"""Segments: trajectories end at edges of the schedule, to which the student jumps by DDIM, and a GAN may judge its
landings (PCM, Hyper-SD's TSCD)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ..facts import SamplingRecord, student_record
from .adversarial import Head
from .base import Loss, Needs, Phase, on_device
from .consistency import Consistency, ConsistencyConfig, Grid, Point, check_divides, make_grid
from .distillation.tdm import segment_noise

if TYPE_CHECKING:
    from ..context import Context
    from ..data.batch import Batch
    from ..denoiser import Denoiser
    from ..families.base import Model


class SegmentedConfig(ConsistencyConfig):
    """Settings of segments and of their GAN."""

    segments: int = Field(
        4, ge=1, description="equal parts of the schedule, whose times they divide; sampling takes a step for each"
    )
    gan_weight: float = Field(0.0, ge=0, description="weight of the student's GAN loss; 0: no GAN")
    gan_width: int | None = Field(None, gt=0, description="channels of the head; null: as many as the features")


G = TypeVar("G", bound=SegmentedConfig)


def hinge_critic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """max(0, 1 - real) + max(0, 1 + fake) of logits (B,): 2 where the head knows nothing."""
    return F.relu(1 - real) + F.relu(1 + fake)


class Segmented(Consistency[G], Generic[G]):
    """What is real to the GAN is where the target lands, and what is fake is where the student does: both are noised to
    one time of the segment above and shown to the frozen teacher, whose middle block a head looks at."""

    def __init__(self, config: G) -> None:
        super().__init__(config)
        if config.gan_weight:
            self.roles = (*self.roles, "head")
            self.phases = (*self.phases, Phase("critic", ("head",)))
            self.needs = Needs(batch="image", draws=("noise", "gan"))

    def grid(self, steps: int) -> Grid:
        return make_grid(steps, self.config.solver_steps, self.config.segments)

    def check(self, denoiser: Denoiser) -> None:
        """That solver's steps and segments divide the schedule."""
        super().check(denoiser)
        check_divides("segments", self.config.segments, denoiser.num_timesteps)

    def build(self, family: Model) -> dict[str, nn.Module]:
        """The head, for the middle block of this U-Net."""
        if not self.config.gan_weight:
            return {}
        config = family.unet.config
        side = int(config.sample_size) >> (len(config.block_out_channels) - 1)
        return {"head": Head(int(config.block_out_channels[-1]), side, self.config.gan_width)}

    def edges(self, scheduler: Mapping[str, Any]) -> tuple[int, ...]:
        """The first time of each segment, falling: what sampling asks the student at."""
        steps, count = int(scheduler.get("num_train_timesteps", 1000)), self.config.segments
        return tuple(steps * j // count - 1 for j in range(count, 0, -1))

    def sampling(self, scheduler: Mapping[str, Any]) -> SamplingRecord:
        """DDIM from edge to edge."""
        return student_record(scheduler, self.edges(scheduler), renoise=False)

    def reach(self, ctx: Context, output: Tensor, x: Tensor, t: Tensor, point: Point) -> Tensor:
        """The DDIM jump to the segment's end; from there it is x itself."""
        return ctx.denoiser.ddim_step(output, x, t, point.end).sample

    # ---- the GAN ----------------------------------------------------------------------------------------------------

    def shown(self, ctx: Context, batch: Batch, x: Tensor, point: Point) -> tuple[Tensor, Tensor]:
        """(x_t, t): a landing x (B, C, h, w), noised to a time (B,) of the segment that led there, by its own draw."""
        drawn = [int(r.integers(a, b + 1)) for r, (a, b) in zip(ctx.rng("gan-time", batch), point.spans, strict=True)]
        t = on_device(drawn, x.device)
        ratio, beta = segment_noise(ctx.denoiser, t, point.end)
        return ratio * x + beta * ctx.draw(batch, "gan")[1], t

    def judge(self, ctx: Context, batch: Batch, x: Tensor, point: Point) -> Tensor:
        """What the head says of landings (B,): positive for the target's."""
        found: Tensor = ctx.roles.modules["head"](
            ctx.features("base", *self.shown(ctx, batch, x, point), point.cond, "mid_block")
        )
        return found

    def critic_loss(self, ctx: Context, batch: Batch) -> Loss:
        """The head learns to tell the student's landings from the target's."""
        with torch.no_grad():
            point = self.point(ctx, batch)
            target, (reached, _) = self.target(ctx, point), self.predict(ctx, point)
        real, fake = (self.judge(ctx, batch, x, point) for x in (target, reached))
        return Loss(hinge_critic_loss(real, fake), batch.weight, {"gan_real": real, "gan_fake": fake})

    def loss(self, ctx: Context, batch: Batch, phase: Phase) -> Loss:
        """The distance of landings, and what the head says of the student's."""
        if phase.name == "critic":
            return self.critic_loss(ctx, batch)
        found, point, reached, output = self.consistency(ctx, batch)
        self.add_terms(ctx, batch, found, ctx.denoiser.to_x0(output, point.x_t, point.t))
        if self.config.gan_weight:
            term = -self.config.gan_weight * self.judge(ctx, batch, reached, point)
            found.values = found.values + term
            found.metrics["gan"] = term
        return found

    def add_terms(self, ctx: Context, batch: Batch, found: Loss, x0: Tensor) -> None:
        """Hook: further terms of the student's loss, of its x0 (B, C, h, w) at the points."""
