"""Distillation-DPO: distribution matching towards better samples and away from worse ones, each with its fake score."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from ...context import draw_key
from ..base import Loss, Paper, Phase
from ..score_distill import DistillConfig, Sample, ScoreDistill, dm_direction, gap, surrogate

if TYPE_CHECKING:
    from ...context import Context
    from ...data.batch import Batch


class DistillationDPOConfig(DistillConfig):
    """One step by default; nothing is published for pictures."""

    reward: str = Field(
        "",
        description="scorers whose sum ranks two samples a prompt, such as pickscore or hpsv21=FILE; empty: by noise",
    )
    loser_noise: float = Field(
        1.1, gt=0, description="without a reward the loser is the winner's noise times this, as in the release"
    )
    loser_weight: float = Field(1.0, ge=0, description="how hard losers are pushed off; 0: distribution matching alone")


class DistillationDPO(ScoreDistill[DistillationDPOConfig]):
    """Two samples a prompt. The better goes down fake minus teacher's score, as in DMD; the worse goes up its own.

    Each kind has a fake score of its own, ``fake`` and ``loser``. The published surrogate multiplies the scores'
    difference by a constant and so has no gradient; here the difference is what x itself is moved by.
    """

    Config = DistillationDPOConfig
    paper = Paper(
        title="Diffusion Distillation With Direct Preference Optimization For Efficient 3D LiDAR Scene Completion",
        arxiv="2504.11447",
        implements="pairs of the student's own samples, ranked by rewards or by their noise; two fake scores; "
        "distribution matching on winners and against losers",
        differs="on pictures in place of point clouds; the surrogate acts on x (the released one has no gradient); "
        "DMD's divisor on both directions, and a weight on the losers",
    )

    def __init__(self, config: DistillationDPOConfig) -> None:
        super().__init__(config)
        if config.reward:
            self.needs = replace(self.needs, reward=True, decode=True)

    def extra_roles(self) -> tuple[str, ...]:
        return ("loser", *super().extra_roles())

    def extra_draws(self) -> tuple[str, ...]:
        """A second sample's own noise, where a reward ranks them."""
        return tuple(f"loser-{tag}" for tag in self._tags) if self.config.reward else ()

    @property
    def _tags(self) -> list[str]:
        return ["start", *(f"renoise-{k}" for k in range(1, len(self.config.timesteps)))]

    def second(self, ctx: Context, batch: Batch) -> Batch:
        """The same rows under the noise of the second sample: its own, or the first's scaled."""
        if self.config.reward:
            drawn = {tag: ctx.draw(batch, f"loser-{tag}") for tag in self._tags}
        else:
            t, noise = ctx.draw(batch, "start")
            drawn = {"start": (t, self.config.loser_noise * noise)}
        keyed = {draw_key(tag, ctx.phase, ctx.repeat): value for tag, value in drawn.items()}
        return replace(batch, drawn={**batch.drawn, **keyed})

    def pair(self, ctx: Context, batch: Batch) -> tuple[Sample, Sample, Tensor]:
        """(winners, losers, whether the first sample won (B,) bool); both stopped at the same step."""
        first, second = self.generate(ctx, batch), self.generate(ctx, self.second(ctx, batch))
        if not self.config.reward:
            return first, second, torch.ones(len(first.x), dtype=torch.bool, device=first.x.device)
        with torch.no_grad():
            scores = [self._score(ctx, batch, sample.x.detach()) for sample in (first, second)]
        won = scores[0] >= scores[1]
        return _choose(won, first, second), _choose(~won, first, second), won

    def _score(self, ctx: Context, batch: Batch, x: Tensor) -> Tensor:
        images = ctx.decode(x)
        return torch.stack([ctx.reward(name, images, batch.prompts) for name in ctx.rewards]).sum(0)

    def score_of(self, ctx: Context, role: str, x_t: Tensor, t: Tensor, sample: Sample) -> Tensor:
        """A fake score's network output (B, C, h, w): that of winners (``fake``) or of losers (``loser``)."""
        return ctx.model(role, x_t, t, self.told(ctx, sample)[0])

    def loss(self, ctx: Context, batch: Batch, phase: Phase) -> Loss:
        """Either phase; in the critics' the samples are made without gradient."""
        if phase.name == "critic":
            with torch.no_grad():
                winners, losers, _ = self.pair(ctx, batch)
            return self.critics_loss(ctx, batch, winners, losers)
        winners, losers, won = self.pair(ctx, batch)
        towards, near = self.directed(ctx, batch, "fake", winners)
        away, far = self.directed(ctx, batch, "loser", losers)
        values = surrogate(winners.x, towards) - self.config.loser_weight * surrogate(losers.x, away)
        metrics = {"gap": near, "loser_gap": far, "first_won": won.float()}
        for name, sample in (("latent", winners), ("loser_latent", losers)):
            x = sample.x.detach().flatten(1)
            metrics |= {f"{name}_mean": x.mean(1), f"{name}_std": x.std(1)}
        return Loss(values, batch.weight, metrics)

    @torch.no_grad()
    def directed(self, ctx: Context, batch: Batch, role: str, sample: Sample) -> tuple[Tensor, Tensor]:
        """DMD's direction (B, C, h, w) by this fake score, and the scores' gap (B,); time and noise are a row's own."""
        x = sample.x.detach()
        x_t, t = self.noised(ctx, batch, x, self.time_window(ctx, sample))
        y_fake = ctx.denoiser.to_x0(self.score_of(ctx, role, x_t, t, sample), x_t, t)
        y_real = self.real_x0(ctx, x_t, t, sample, self.config.guidance)
        return dm_direction(x, y_fake, y_real, self.divisor), gap(x, y_fake, y_real)

    def critics_loss(self, ctx: Context, batch: Batch, winners: Sample, losers: Sample) -> Loss:
        """Each fake score learns to denoise its own kind of sample."""
        t = self.times(ctx, batch, "score-time", self.critic_window(ctx, winners))
        noise, errors = ctx.draw(batch, "score")[1], []
        for role, sample in (("fake", winners), ("loser", losers)):
            x_t, target = ctx.denoiser.add_noise(sample.x, noise, t), ctx.denoiser.target(sample.x, noise, t)
            errors.append((self.score_of(ctx, role, x_t, t, sample) - target).square().mean((1, 2, 3)))
        return Loss(errors[0] + errors[1], batch.weight, {"fake_error": errors[0], "loser_error": errors[1]})


def _choose(chosen: Tensor, a: Sample, b: Sample) -> Sample:
    """Row by row from ``a`` where ``chosen`` (B,), else from ``b``."""
    mask = chosen.reshape(-1, 1, 1, 1)
    x, x_in, output = (torch.where(mask, *both) for both in ((a.x, b.x), (a.x_in, b.x_in), (a.output, b.output)))
    return replace(a, x=x, x_in=x_in, output=output)
