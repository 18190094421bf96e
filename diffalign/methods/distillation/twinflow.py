"""TwinFlow: one network whose own samples have times of their own; where it tells both apart, its samples are off.

Latents count on the straight path x_t = t noise + (1 - t) x0 of rectified flow. Any schedule is on it: the level
sigma / (alpha + sigma) is the flow's time t, latents over alpha + sigma are the flow's, and the velocity that a network
of any prediction says is F = noise - x0. Times are those of the schedule's table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from ...data.batch import Cond
from ...denoiser import Denoiser
from ...facts import SamplingRecord, student_record
from ..base import Loss, Method, MethodConfig, Needs, Paper, Phase, Times, on_device
from ..score_distill import Share

if TYPE_CHECKING:
    from ...context import Context
    from ...data.batch import Batch
    from ...families.base import Model

MODES = ("end", "flow", "any", "twin")
WAVES = 7
STEP = 0.01  # of the flow's time, from a point to the one that its velocity is checked with


class TwinFlowConfig(MethodConfig):
    """The authors' settings for LoRAs."""

    timesteps: Times = Field((999,), min_length=1, description="the times that the student is sampled at, falling")
    shares: tuple[Share, Share, Share, Share] = Field(
        (0.25, 0.25, 0.25, 0.25),
        description="how many samples learn the jump to x0, the velocity, the jump to any time between, and (as the "
        "twin) the velocity of the student's own samples",
    )
    guidance: float = Field(
        1.8, ge=0, description="guidance u + w (c - u) in the target: w - 1 times the difference is added; 1: none"
    )
    guided_by: Literal["student", "base"] = Field(
        "student", description="whose branches differ: the student's (its average's), or the teacher's (then about 5)"
    )
    target_ema: float = Field(
        0.99,
        ge=0,
        lt=1,
        description="decay of the average of the student that targets are made with; 0: the student itself",
    )
    order: int = Field(1, ge=1, description="calls that make the way from beside a point to its end (full training: 2)")
    limit: float | None = Field(1.0, gt=0, description="residuals and differences are cut at plus and minus this")
    robust: float = Field(1.0, description="Barron's alpha: 2 is the squared error, 1 gives all samples the same pull")
    width: float = Field(1e-3, gt=0, description="Barron's width c")
    rectify: float = Field(0.5, ge=0, description="weight of the rectification by the twin; 0: none")

    @field_validator("shares")
    @classmethod
    def _add_up(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        if abs(sum(shares) - 1) > 1e-6 or shares[0] == 0:
            raise ValueError(f"shares {list(shares)} must add up to 1, and the first must not be 0")
        return shares


def barron(error: Tensor, alpha: float = 1.0, width: float = 1e-3) -> Tensor:
    """A mean squared error (B,) times (error / c^2 + 1)^(alpha / 2 - 1) / c, a fixed number: (B,).

    alpha = 2: error / c; alpha = 1: its gradient is that of a difference of unit RMS (arXiv 1701.03077, detached)."""
    weight = (error.detach() / width**2 + 1) ** (alpha / 2 - 1) / width
    return error * weight


def gap_weight(gap: Tensor) -> Tensor:
    """tan((1 - gap) pi / 2.5) + 1 of the way t - r from a point to its end: 4.078 where there is none, 1 from t = 1."""
    return torch.tan((1 - gap) * math.pi / 2.5) + 1


@dataclass
class Levels:
    """The flow's time of each index of a schedule, rising; index -1 is x0, at time 0."""

    table: np.ndarray

    @classmethod
    def of(cls, denoiser: Denoiser) -> Levels:
        signal = denoiser.alphas_cumprod.numpy()
        alpha, sigma = np.sqrt(signal), np.sqrt(1 - signal)
        return cls(sigma / (alpha + sigma))

    def at(self, index: int) -> float:
        """The flow's time of an index."""
        return float(self.table[index]) if index >= 0 else 0.0

    def below(self, t: float) -> int:
        """The last index whose time is at most t; -1 where none is."""
        return int(np.searchsorted(self.table, t, side="right")) - 1

    def index(self, t: float) -> int:
        """The index whose time is nearest to t; -1 where x0 is nearer than the first."""
        around = self.below(t), min(self.below(t) + 1, len(self.table) - 1)
        return min(around, key=lambda k: abs(self.at(k) - t))


@dataclass
class Plan:
    """Where each sample stands, drawn on the CPU: its mode, the index t where it is and r where its jump ends (-1: x0),
    and the way between: the index beside t, then ``order`` ends down to r."""

    mode: tuple[str, ...]
    t: tuple[int, ...]
    r: tuple[int, ...]
    way: tuple[tuple[int, ...], ...]

    def rows(self, *modes: str) -> list[int]:
        """Samples of these modes."""
        return [row for row, mode in enumerate(self.mode) if mode in modes]


class Told(nn.Module):
    """What the network is told besides the time, as a vector beside its text: where the jump ends and whether the point
    is the twin's. Zeros at first, and always for a jump to x0: so a student is sampled without it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.last = nn.Linear(2 + WAVES, width, bias=False)
        nn.init.zeros_(self.last.weight)

    def forward(self, share: Tensor, twin: Tensor) -> Tensor:
        """(B, width) of r / t and of whether it is the twin's time, (B,) each."""
        waves = (share[:, None] * math.pi / 2 * torch.arange(1, WAVES + 1, device=share.device)).sin()
        real = torch.cat([share[:, None], waves], 1) * (1 - twin[:, None])
        found: Tensor = self.last(torch.cat([twin[:, None], real], 1))
        return found


class TwinFlow(Method[TwinFlowConfig]):
    """Each sample draws what it learns, its time and its noise.

    Real samples learn the mean velocity F(x_t, t, r) of the way from t to r: one step of 0.01 by noise - x0 (guided)
    and the rest as the student itself says it must make the whole way; with r = t that is flow matching. The student's
    own samples of one step learn their velocity at the twin's times. Where both velocities differ at noised samples of
    a jump to x0, the difference moves that jump, as distribution matching would: y_fake - y_real = -t (F_twin - F).
    """

    Config = TwinFlowConfig
    paper = Paper(
        title="TwinFlow: Realizing One-step Generation on Large Models with Self-adversarial Flows",
        arxiv="2512.05150",
        implements="the twin's flow matching, recursive consistency of any order, guided targets, rectification, "
        "Barron's weights; eps, v and flow models",
        differs="the sign of the time and the end of a jump are told by a vector beside the text, which is nothing for "
        "jumps to x0, so that plain pipelines sample the student (by x0 and new noise; no any-step sampler); every "
        "sample draws its own mode; times are the schedule's; equal shares of modes are our guess",
    )
    needs = Needs(batch="image", draws=("noise", "start", "rectify"))
    roles: tuple[str, ...] = ("student", "told")
    phases: tuple[Phase, ...] = (Phase("student", ("student", "told")),)

    def __init__(self, config: TwinFlowConfig) -> None:
        super().__init__(config)
        self.needs = replace(self.needs, reference=config.guided_by == "base" and config.guidance != 1)
        self.teller = "student"
        if config.target_ema:
            self.teller = "target"
            self.roles = ("student", "target", "told")
            self.phases = (
                Phase("student", ("student", "told"), pulls=(("target", "student", 1 - config.target_ema),)),
            )

    def build(self, family: Model) -> dict[str, nn.Module]:
        """The vector that tells a jump's end and the twin's time."""
        return {"told": Told(int(family.unet.config.cross_attention_dim))}

    def reason(self) -> str:
        return "the real trajectory begins at real captioned pictures, noised"

    def notes(self) -> list[str]:
        return [
            "TwinFlow's residuals are differences times 100: in half precision they are mostly rounding, cut at "
            "method.limit; train.precision=fp32 and model.dtype=fp32 keep them"
        ]

    def sampling(self, scheduler: Mapping[str, Any]) -> SamplingRecord:
        """x0 and new noise, at the times of the settings."""
        return student_record(scheduler, self.config.timesteps)

    # ---- what is drawn ----------------------------------------------------------------------------------------------

    def plan(self, ctx: Context, batch: Batch, levels: Levels) -> Plan:
        """A mode and times for each sample: the flow's times evenly, those of the ends evenly below."""
        modes, times, ends, ways = [], [], [], []
        low, high = levels.at(0), levels.at(len(levels.table) - 1)
        for rng in ctx.rng("plan", batch):
            mode = MODES[int(np.searchsorted(np.cumsum(self.config.shares)[:-1], rng.random(), side="right"))]
            t = max(levels.index(low + (high - low) * rng.random()), 0)
            between = min(levels.index(levels.at(t) * rng.random()), t)
            end = {"end": -1, "any": between}.get(mode, t)
            modes.append(mode)
            times.append(t)
            ends.append(end)
            ways.append(self.way(levels, t, end))
        return Plan(tuple(modes), tuple(times), tuple(ends), tuple(ways))

    def way(self, levels: Levels, t: int, end: int) -> tuple[int, ...]:
        """Indices from beside ``t`` to ``end``, falling, ``order`` steps; none where ``t`` is the end."""
        beside = max(levels.below(levels.at(t) - STEP), end)
        first, last, order = levels.at(beside), levels.at(end), self.config.order
        inner = [levels.index(first + (last - first) * k / order) for k in range(1, order)]
        return (beside, *(max(min(k, beside), end) for k in inner), end)

    # ---- the network ------------------------------------------------------------------------------------------------

    def velocity(
        self,
        ctx: Context,
        role: str,
        x: Tensor,
        index: Sequence[int],
        end: Sequence[int],
        cond: Cond,
        twin: Sequence[bool] = (),
    ) -> Tensor:
        """F (B, C, h, w) of a role at the flow's latents x and the indices ``index``, for jumps to ``end``; at the
        twin's times where ``twin`` says so."""
        levels, device = Levels.of(ctx.denoiser), x.device
        t = on_device(index, device)
        share = on_device([levels.at(r) / levels.at(k) for k, r in zip(index, end, strict=True)], device).float()
        own = on_device([float(flag) for flag in twin], device).float() if twin else torch.zeros_like(share)
        latents = x * self.scale(ctx, t)
        output = ctx.model(role, latents, t, self.tell(ctx, cond, share, own))
        return to_flow(ctx.denoiser, output, latents, t)

    def scale(self, ctx: Context, t: Tensor) -> Tensor:
        """alpha + sigma (B, 1, 1, 1): the schedule's latents in units of the flow's."""
        return ctx.denoiser.alpha(t) + ctx.denoiser.sigma(t)

    def tell(self, ctx: Context, cond: Cond, share: Tensor, twin: Tensor) -> Cond:
        """The text (B rows) with the vector of `Told`."""
        vector = ctx.roles.modules["told"](share, twin)[:, None]
        return Cond(cond.embeds + vector, cond.added)

    def guided(self, ctx: Context, x: Tensor, index: Sequence[int], cond: Cond) -> Tensor:
        """What guidance adds to a velocity (B, C, h, w)."""
        t = on_device(index, x.device)
        uncond, latents = ctx.uncond.expand(len(x)), x * self.scale(ctx, t)
        if self.config.guided_by == "base":
            branches = ctx.branches("base", latents, t, cond, uncond)
        else:
            share = torch.ones(len(x), device=x.device)
            cond, uncond = (self.tell(ctx, c, share, 0 * share) for c in (cond, uncond))
            branches = ctx.branches(self.teller, latents, t, cond, uncond)
        said, unsaid = (to_flow(ctx.denoiser, output, latents, t) for output in branches)
        return (self.config.guidance - 1) * (said - unsaid)

    # ---- targets ----------------------------------------------------------------------------------------------------

    def cut(self, difference: Tensor) -> Tensor:
        """Cut at the limit."""
        limit = self.config.limit
        return difference if limit is None else difference.clamp(-limit, limit)

    @torch.no_grad()
    def residual(
        self, ctx: Context, plan: Plan, rows: Sequence[int], x: Tensor, said: Tensor, target: Tensor, cond: Cond
    ) -> Tensor:
        """How much more the velocity ``said`` at x goes than ``target`` for the first step and the student's own jumps
        for the rest, in units of that step (B, C, h, w); 0 for a consistent one.

        ((t - r) F - sum of F's over the way) / (t - t') - target; F - target where the way is one step."""
        levels = Levels.of(ctx.denoiser)

        def spread(values: Sequence[float]) -> Tensor:
            return on_device(values, x.device).to(x.dtype)[:, None, None, None]

        first = [levels.at(plan.t[row]) - levels.at(plan.way[row][0]) for row in rows]
        whole = [levels.at(plan.t[row]) - levels.at(plan.r[row]) for row in rows]
        x, rest = x - spread(first) * target, torch.zeros_like(x)
        for k in range(self.config.order):
            going = [i for i, row in enumerate(rows) if plan.way[row][k] > plan.way[row][k + 1]]
            if not going:
                continue
            here, ends = ([plan.way[rows[i]][j] for i in going] for j in (k, k + 1))
            index = on_device(going, x.device)
            v = self.velocity(ctx, self.teller, x[index], here, ends, cond.take(index))
            moved = spread([levels.at(a) - levels.at(b) for a, b in zip(here, ends, strict=True)]) * v
            rest, x = rest.index_add(0, index, moved), x.index_add(0, index, -moved)
        ratio = spread([w / f if f else 1.0 for w, f in zip(whole, first, strict=True)])
        inverse = spread([1 / f if f else 0.0 for f in first])
        return ratio * said - inverse * rest - target

    @torch.no_grad()
    def own_samples(self, ctx: Context, noise: Tensor, cond: Cond) -> Tensor:
        """x0 (B, C, h, w) that the student makes of noise in one step, at its first time."""
        t = torch.full((len(noise),), self.config.timesteps[0], device=noise.device)
        return ctx.denoiser.to_x0(ctx.model("student", noise, t, cond), noise, t)

    @torch.no_grad()
    def difference(self, ctx: Context, batch: Batch, rows: Sequence[int], x0: Tensor, cond: Cond) -> Tensor:
        """What the network says of samples x0 of these rows as the twin's, less what it says of them as real ones, both
        noised to times of their own: (B, C, h, w), cut."""
        levels = Levels.of(ctx.denoiser)
        low, high = levels.at(0), levels.at(len(levels.table) - 1)
        rngs = ctx.rng("rectify-time", batch)
        index = [max(levels.index(low + (high - low) * rngs[row].random()), 0) for row in rows]
        noise = ctx.draw(batch, "rectify")[1][on_device(rows, x0.device)]
        t = on_device([levels.at(k) for k in index], x0.device).to(x0)[:, None, None, None]
        x = t * noise + (1 - t) * x0
        count = len(index)
        twin, real = (self.velocity(ctx, "student", x, index, index, cond, [own] * count) for own in (True, False))
        return self.cut(twin - real)

    # ---- one loss ---------------------------------------------------------------------------------------------------

    def loss(self, ctx: Context, batch: Batch, phase: Phase) -> Loss:
        """Barron's error of the velocity, by mode; of jumps to x0 the rectification besides."""
        config, cond, x0 = self.config, batch.condition("image"), batch.latents["image"].float()
        levels, noise, device = Levels.of(ctx.denoiser), ctx.draw(batch)[1], x0.device
        plan = self.plan(ctx, batch, levels)
        twins, reals, jumps = plan.rows("twin"), plan.rows("end", "flow", "any"), plan.rows("end")
        if twins:
            index = on_device(twins, device)
            made = self.own_samples(ctx, ctx.draw(batch, "start")[1][index], cond.take(index))
            x0 = x0.index_copy(0, index, made)
        t, r = (on_device([levels.at(k) for k in of], device).float() for of in (plan.t, plan.r))
        x = t[:, None, None, None] * noise + (1 - t[:, None, None, None]) * x0
        said = self.velocity(ctx, "student", x, plan.t, plan.r, cond, [mode == "twin" for mode in plan.mode])
        target = noise - x0
        if reals:
            index = on_device(reals, device)
            asked = x[index], [plan.t[row] for row in reals], cond.take(index)
            towards = target[index]
            if config.guidance != 1:
                with torch.no_grad():
                    towards = towards + self.guided(ctx, *asked)
            fixed = said.detach()[index]
            residual = self.residual(ctx, plan, reals, asked[0], fixed, towards, asked[2])
            target = target.index_copy(0, index, fixed - self.cut(residual))
        error = (said - target).square().mean((1, 2, 3))
        twin = on_device([float(mode == "twin") for mode in plan.mode], device)
        values = barron(error, config.robust, config.width) * torch.where(twin > 0, 1.0, gap_weight(t - r))
        partial = {
            f"error/{mode}": (error, on_device([float(own == mode) for own in plan.mode], device)) for mode in MODES
        }
        if jumps and config.rectify:
            index = on_device(jumps, device)
            with torch.no_grad():
                made = x[index] - t[index][:, None, None, None] * said[index]
                difference = self.difference(ctx, batch, jumps, made, cond.take(index))
                wanted = said[index] - difference
            moved = (said[index] - wanted).square().mean((1, 2, 3))
            values = values.index_add(0, index, config.rectify * barron(moved, config.robust, config.width))
            found = torch.zeros_like(error).index_copy(0, index, moved.detach())
            partial["difference"] = (found, partial["error/end"][1])
        return Loss(values, batch.weight, {}, partial)


def to_flow(denoiser: Denoiser, output: Tensor, latents: Tensor, t: Tensor) -> Tensor:
    """F = noise - x0 (B, C, h, w) that a network's ``output`` says at the schedule's latents and times (B,)."""
    return denoiser.to_eps(output, latents, t) - denoiser.to_x0(output, latents, t)
