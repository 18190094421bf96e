"""ScoreDistill: what the methods share that distil a many-step teacher through the scores of teacher and student.

Student, fake score and teacher are one network: two adapters on the frozen base, and the base itself. A LoRA starts as
nothing, so that the student and the fake score both start as the teacher. Times here are indices of the schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from ..data.batch import Cond
from ..facts import SamplingRecord, student_record
from .base import Loss, Method, MethodConfig, Needs, Phase, Times, on_device

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..context import Context
    from ..data.batch import Batch
    from ..families.base import Model

Share = Annotated[float, Field(ge=0, le=1)]
Window = Sequence[tuple[int, int]]  # first and last time of each sample


class DistillConfig(MethodConfig):
    """Settings that every score distillation has."""

    timesteps: Times = Field(
        (999,), min_length=1, description="the student's times, falling: what it is trained for and sampled at"
    )
    rollout: Literal["renoise", "ddim", "data"] = Field(
        "renoise",
        description="how a later step gets its input: x0 and new noise, deterministic DDIM, or real pictures noised",
    )
    start: Literal["unit", "sigma"] = Field(
        "unit", description="the first input: unit noise, or noise times sigma of the first time"
    )
    guidance: float = Field(7.5, ge=0, description="the teacher's guidance: u + w (c - u); 1 is conditional only")
    order: Literal["student", "critic"] = Field("student", description="which phase comes first in a step")
    critic_steps: int = Field(5, ge=1, description="updates of the fake score for one of the student")
    batches: Literal["fresh", "reuse"] = Field(
        "fresh", description="whether the second phase takes new rows or those of the first, with noise of its own"
    )
    time_range: tuple[Share, Share] = Field((0.02, 0.98), description="times of the scores, as shares of the schedule")
    critic_range: tuple[Share, Share] = Field((0.0, 1.0), description="times at which the fake score learns")
    normalise: Literal["sample", "none"] = Field(
        "sample", description="divide the direction by the mean of |x - teacher's x0| of the sample, or by nothing"
    )
    floor: float = Field(1e-6, ge=0, description="least divisor")
    align: Share = Field(
        0.0,
        description="share of the way by which the fake score's weights follow the student's after each of its updates "
        "(SenseFlow's implicit distribution alignment: 0.02 to 0.03); 0: not",
    )
    step_fake: bool = Field(
        False, description="tell the fake score which step made a sample, by a learned vector added to its text"
    )

    @field_validator("time_range", "critic_range")
    @classmethod
    def _rise(cls, window: tuple[float, float]) -> tuple[float, float]:
        if window[0] > window[1]:
            raise ValueError("the first end of a range must not be above the second")
        return window


D = TypeVar("D", bound=DistillConfig)


@dataclass
class Sample:
    """What the student made of a batch: ``x`` (B, C, h, w) from ``x_in`` at ``t`` (B,), its ``steps``-th time, with the
    network's ``output``. ``cond`` is what all networks are told."""

    x: Tensor
    x_in: Tensor
    t: Tensor
    steps: tuple[int, ...]
    output: Tensor
    cond: Cond


def dm_direction(x: Tensor, y_fake: Tensor, y_real: Tensor, floor: float | None = 1e-6) -> Tensor:
    """Direction of distribution matching in x0-space: (y_fake - y_real) / mean |x - y_real|, all (B, C, h, w).

    The mean is a sample's own, at least ``floor``; None divides by nothing. In x0-space all of DMD's alpha and sigma
    cancel (arXiv 2311.18828, eq. 7 and 8)."""
    difference = y_fake - y_real
    if floor is None:
        return difference
    return difference / (x - y_real).abs().mean((1, 2, 3), keepdim=True).clamp_min(floor)


def times_of(shares: tuple[float, float], steps: int) -> tuple[int, int]:
    """First and last time of a range that is given as shares of a schedule of ``steps``."""
    first, last = (min(round(share * steps), steps - 1) for share in shares)
    return first, last


def surrogate(x: Tensor, direction: Tensor) -> Tensor:
    """A loss (B,) whose gradient at ``x`` is ``direction`` / (C h w): half the mean square to a fixed target."""
    return 0.5 * (x - (x - direction).detach()).square().mean((1, 2, 3))


class ScoreDistill(Method[D], Generic[D]):
    """A student phase and a critic phase.

    Hooks: ``generate`` (what the student makes), ``direction`` (the gradient of x, up to 1 / (C h w)), ``time_window``
    and ``critic_window`` (where the scores are asked), ``student_loss`` and ``critic_loss`` (either phase's whole
    loss). Every sample draws its own step, times and noise, so that a batch is a loop of singles.
    """

    needs = Needs(batch="prompt")
    roles: tuple[str, ...] = ("student", "fake")
    phases: tuple[Phase, ...] = (Phase("student", ("student",)), Phase("critic", ("fake",), "critic_steps"))

    def __init__(self, config: D) -> None:
        super().__init__(config)
        self.roles = ("student", "fake", *self.extra_roles())
        pulls = (("fake", "student", config.align),) if config.align else ()
        first = Phase("student", ("student",), pulls=pulls)
        second = Phase("critic", self.roles[1:], "critic_steps")
        if config.order == "critic":
            first, second = second, first
        self.phases = (first, replace(second, batch=config.batches))
        tags = ("start", *(f"renoise-{k}" for k in range(1, len(config.timesteps))), "score", *self.extra_draws())
        self.needs = Needs("image" if self.wants_pictures() else "prompt", draws=tags)

    # ---- what a method is made of -----------------------------------------------------------------------------------

    def extra_roles(self) -> tuple[str, ...]:
        """Trained roles of the critic phase beside the fake score."""
        return ("steps",) if self.config.step_fake else ()

    def extra_draws(self) -> tuple[str, ...]:
        """Tags of further noise."""
        return ()

    def wants_pictures(self) -> bool:
        """Whether these settings need real pictures; prompts alone otherwise."""
        return self.config.rollout == "data"

    def reason(self) -> str:
        if self.config.rollout == "data":
            return "method.rollout=data noises real captioned pictures; renoise and ddim need prompts alone"
        return ""

    def notes(self) -> list[str]:
        if len(self.config.timesteps) == 1 or self.config.step_fake:
            return []
        return [
            "one fake score serves all steps, as the authors have it, and binds only the mixture of what they make; "
            "method.step_fake=true tells it the step"
        ]

    def marks(self) -> tuple[int, ...]:
        """Which of the learned vectors that tell the fake score the step (``step_fake``) each step has."""
        return tuple(range(len(self.config.timesteps)))

    def build(self, family: Model) -> dict[str, nn.Module]:
        """The vector that tells the fake score the step: zeros at first, as wide as the text."""
        if not self.config.step_fake:
            return {}
        steps = nn.Embedding(max(self.marks()) + 1, int(family.unet.config.cross_attention_dim))
        nn.init.zeros_(steps.weight)
        return {"steps": steps}

    def sampling(self, scheduler: Mapping[str, Any]) -> SamplingRecord | None:
        """The student's own times, without guidance."""
        config = self.config
        return student_record(
            scheduler, config.timesteps, renoise=config.rollout != "ddim", scale=self._scale(scheduler)
        )

    def _scale(self, scheduler: Mapping[str, Any]) -> float:
        from ..denoiser import Denoiser

        if self.config.start == "unit":
            return 1.0
        return float(Denoiser.from_config(scheduler).sigma(self.config.timesteps[0]))

    # ---- the student ------------------------------------------------------------------------------------------------

    def condition(self, batch: Batch) -> Cond:
        """The prompt; networks that take sizes are told those of a whole picture of this size, as at sampling."""
        cond = batch.cond["prompt"]
        if not cond.added:
            return cond
        side = batch.sizes["image"][:, 4:]
        return cond.sized(torch.cat([side, torch.zeros_like(side), side], 1))

    def generate(self, ctx: Context, batch: Batch) -> Sample:
        """Each sample stops at a step of its own, drawn evenly; the steps before it run without gradient."""
        times = self.config.timesteps
        steps = tuple(int(rng.integers(len(times))) for rng in ctx.rng("stop", batch))
        cond = self.condition(batch)
        x_in = self.reach(ctx, batch, cond, steps)
        t = on_device([times[k] for k in steps], x_in.device)
        x, output = self.call_student(ctx, x_in, t, cond)
        return Sample(x, x_in, t, steps, output, cond)

    def call_student(self, ctx: Context, x_in: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """The student's x0 (B, C, h, w) and its network's own output; never guided."""
        output = ctx.model("student", x_in, t, cond)
        return ctx.denoiser.to_x0(output, x_in, t), output

    def first_input(self, ctx: Context, batch: Batch) -> Tensor:
        """Noise (B, C, h, w) that the first step starts from."""
        noise = ctx.draw(batch, "start")[1]
        return noise if self.config.start == "unit" else ctx.denoiser.sigma(self.config.timesteps[0]).to(noise) * noise

    @torch.no_grad()
    def reach(
        self, ctx: Context, batch: Batch, cond: Cond, steps: Sequence[int], trace: list[Tensor] | None = None
    ) -> Tensor:
        """What each sample's ``steps``-th call is given (B, C, h, w), by running the student through the earlier ones.

        ``trace`` receives the inputs of step 0, 1, ... of all samples (those that have stopped stay as they are)."""
        times = self.config.timesteps
        if self.config.rollout == "data":
            noise, real = ctx.draw(batch, "start")[1], batch.latents["image"]
            return ctx.denoiser.add_noise(real, noise, on_device([times[k] for k in steps], real.device))
        x = self.first_input(ctx, batch)
        if trace is not None:
            trace.append(x)
        for k in range(max(steps)):
            going = [row for row, stop in enumerate(steps) if stop > k]
            rows = on_device(going, x.device)
            x_in, t = x[rows], torch.full((len(going),), times[k], device=x.device)
            x0, output = self.call_student(ctx, x_in, t, cond.take(rows))
            if self.config.rollout == "ddim":
                reached = ctx.denoiser.ddim_step(output, x_in, t, times[k + 1]).sample
            else:
                reached = ctx.denoiser.add_noise(x0, ctx.draw(batch, f"renoise-{k + 1}")[1][rows], times[k + 1])
            x = x.index_copy(0, rows, reached)
            if trace is not None:
                trace.append(x)
        return x

    # ---- scores -----------------------------------------------------------------------------------------------------

    def window(self, ctx: Context, shares: tuple[float, float], count: int) -> Window:
        """A range of the settings as times, for ``count`` samples."""
        return [times_of(shares, ctx.denoiser.num_timesteps)] * count

    def time_window(self, ctx: Context, sample: Sample) -> Window:
        """Where the student's scores are asked."""
        return self.window(ctx, self.config.time_range, len(sample.steps))

    def critic_window(self, ctx: Context, sample: Sample) -> Window:
        """Where the fake score learns."""
        return self.window(ctx, self.config.critic_range, len(sample.steps))

    def times(self, ctx: Context, batch: Batch, tag: str, window: Window) -> Tensor:
        """Times (B,), each drawn evenly from the sample's own window, both ends included."""
        drawn = [int(rng.integers(a, b + 1)) for rng, (a, b) in zip(ctx.rng(tag, batch), window, strict=True)]
        return on_device(drawn, ctx.device)

    def noised(
        self, ctx: Context, batch: Batch, x: Tensor, window: Window, tag: str = "score"
    ) -> tuple[Tensor, Tensor]:
        """(x_t, t): ``x`` at a time of its window, under noise of its own."""
        t = self.times(ctx, batch, f"{tag}-time", window)
        return ctx.denoiser.add_noise(x, ctx.draw(batch, tag)[1], t), t

    def fake(self, ctx: Context, x_t: Tensor, t: Tensor, sample: Sample, guidance: float = 1.0) -> Tensor:
        """The fake score's network output (B, C, h, w)."""
        cond, uncond = self.told(ctx, sample)
        return ctx.model("fake", x_t, t, cond, guidance, uncond)

    def told(self, ctx: Context, sample: Sample) -> tuple[Cond, Cond]:
        """What a fake score is told with and without the prompt: the step besides, where the settings say so."""
        cond, uncond = sample.cond, ctx.uncond.expand(len(sample.cond))
        if self.config.step_fake:
            marks = self.marks()
            told = on_device([marks[k] for k in sample.steps], cond.embeds.device)
            vector = ctx.roles.modules["steps"](told)[:, None]
            cond, uncond = Cond(cond.embeds + vector, cond.added), Cond(uncond.embeds + vector, uncond.added)
        return cond, uncond

    def fake_x0(self, ctx: Context, x_t: Tensor, t: Tensor, sample: Sample, guidance: float = 1.0) -> Tensor:
        """The fake score as x0 (B, C, h, w)."""
        return ctx.denoiser.to_x0(self.fake(ctx, x_t, t, sample, guidance), x_t, t)

    def real_x0(self, ctx: Context, x_t: Tensor, t: Tensor, sample: Sample, guidance: float = 1.0) -> Tensor:
        """The teacher's score as x0 (B, C, h, w)."""
        return ctx.denoiser.to_x0(ctx.model("base", x_t, t, sample.cond, guidance), x_t, t)

    # ---- losses -----------------------------------------------------------------------------------------------------

    def direction(self, ctx: Context, batch: Batch, sample: Sample) -> tuple[Tensor, dict[str, Tensor]]:
        """What x is pushed away from (B, C, h, w), and metrics (B,). Called without gradients."""
        x_t, t = self.noised(ctx, batch, sample.x, self.time_window(ctx, sample))
        y_fake = self.fake_x0(ctx, x_t, t, sample)
        y_real = self.real_x0(ctx, x_t, t, sample, self.config.guidance)
        return dm_direction(sample.x, y_fake, y_real, self.divisor), {"gap": gap(sample.x, y_fake, y_real)}

    @property
    def divisor(self) -> float | None:
        """Least divisor of the direction, None where it is divided by nothing."""
        return self.config.floor if self.config.normalise == "sample" else None

    def student_loss(self, ctx: Context, batch: Batch, sample: Sample) -> Loss:
        """The surrogate of ``direction``. Its value says nothing of progress."""
        with torch.no_grad():
            fixed = Sample(sample.x.detach(), sample.x_in, sample.t, sample.steps, sample.output.detach(), sample.cond)
            direction, metrics = self.direction(ctx, batch, fixed)
        return Loss(surrogate(sample.x, direction), batch.weight, metrics)

    def critic_loss(self, ctx: Context, batch: Batch, sample: Sample) -> Loss:
        """The fake score learns to denoise what the student makes: squared error of the network's own target."""
        t = self.times(ctx, batch, "score-time", self.critic_window(ctx, sample))
        noise = ctx.draw(batch, "score")[1]
        x_t, target = ctx.denoiser.add_noise(sample.x, noise, t), ctx.denoiser.target(sample.x, noise, t)
        error = (self.fake(ctx, x_t, t, sample) - target).square().mean((1, 2, 3))
        return Loss(error, batch.weight, {"fake_error": error})

    def loss(self, ctx: Context, batch: Batch, phase: Phase) -> Loss:
        """Either phase; in the critic's, the student makes its samples without gradient."""
        if phase.name == "critic":
            with torch.no_grad():
                sample = self.generate(ctx, batch)
            return self.critic_loss(ctx, batch, sample)
        sample = self.generate(ctx, batch)
        found = self.student_loss(ctx, batch, sample)
        x = sample.x.detach().flatten(1)
        found.metrics |= {"latent_mean": x.mean(1), "latent_std": x.std(1)}
        for k, time in enumerate(self.config.timesteps if len(self.config.timesteps) > 1 else ()):
            share = on_device([float(step == k) for step in sample.steps], x.device)
            found.partial |= {f"latent_mean/{time}": (x.mean(1), share), f"latent_std/{time}": (x.std(1), share)}
        return found


def gap(x: Tensor, y_fake: Tensor, y_real: Tensor) -> Tensor:
    """How far apart the scores are, beside how far the teacher's is from x: a ratio (B,), for the curves."""
    return (y_fake - y_real).abs().mean((1, 2, 3)) / (x - y_real).abs().mean((1, 2, 3)).clamp_min(1e-12)
