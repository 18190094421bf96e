"""AGD (Jensen and Sadat 2025, arXiv 2503.07274): adapters that make one forward of a frozen network a guided one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from ...data.batch import Cond
from ...denoiser import Denoiser, guide
from ...errors import UserError
from ...families.guidance import GUIDANCE, GuidanceAdapters, in_units, widths_of
from ...rollouts import Rollouts, whole_picture
from ..base import Loss, Method, MethodConfig, Needs, Paper, Phase, on_device

if TYPE_CHECKING:
    from ...context import Context
    from ...data.batch import Batch
    from ...families import Model


def guidance_loss(output: Tensor, cond: Tensor, uncond: Tensor, w: Tensor | float) -> tuple[Tensor, Tensor]:
    """Mean squared error (B,) of a student's output to the guided teacher's u + w (c - u), and that of c alone (B,),
    which is (w - 1)^2 mean (c - u)^2; all (B, C, h, w). The teacher's branches carry no gradient."""
    c, u = cond.detach().float(), uncond.detach().float()
    target = guide(c, u, w)
    return (output.float() - target).square().mean((1, 2, 3)), (c - target).square().mean((1, 2, 3))


class AGDConfig(MethodConfig):
    """Settings of AGD."""

    guidance: tuple[float, float] = Field(
        (1.0, 12.0), description="each trajectory's guidance is drawn from this range: u + w (c - u)"
    )
    steps: int = Field(50, ge=1, description="DDIM steps of a trajectory of the guided teacher (authors: 999 or 1000)")
    updates: int = Field(50, ge=1, description="optimiser steps for the points of a round's trajectories")
    hidden: int = Field(320, ge=1, description="width of the adapters")
    heads: int = Field(8, ge=1, description="heads of their attention")
    sees_time: bool = Field(True, description="whether the adapters are told the time")
    sees_prompt: bool = Field(True, description="whether they are told the prompt")

    @field_validator("guidance")
    @classmethod
    def _rise(cls, guidance: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= guidance[0] <= guidance[1]:
            raise ValueError(f"a range of guidance is two rising numbers from 0 on, not {list(guidance)}")
        return guidance


class AGD(Method[AGDConfig]):
    """The base's own guided trajectories, and at each of their points the guided prediction to be learned.

    A step of training is a round: ``train.batch`` prompts are sampled by the guided base from noise, each under a
    guidance of its own and at times shifted by an own number, so that all times of the schedule come; all points are
    then trained on once, in ``updates`` optimiser steps. That costs two forwards a point, as storing them would; only a
    round is kept, in half precision as the authors store theirs.
    """

    Config = AGDConfig
    paper = Paper(
        title="Efficient Distillation of Classifier-Free Guidance using Adapters",
        arxiv="2503.07274",
        implements="adapters on the cross-attentions, told guidance, time and prompt, trained on guided trajectories",
        differs="trajectories are made while training, of 50 steps at shifted times, not stored ones of 1000; the form "
        "of the tokens is ours",
    )
    needs = Needs(batch="prompt", draws=())
    phases = (Phase("adapters", ("student",), "updates", "round"),)

    def parts(self, phase: Phase) -> int:
        return self.config.updates

    def check(self, denoiser: Denoiser) -> None:
        if denoiser.prediction == "flow":
            raise UserError("method 'agd' samples by DDIM, which flow models do not; take another model")
        if self.config.steps > denoiser.num_timesteps:
            raise UserError(f"method.steps {self.config.steps} is more than the schedule's {denoiser.num_timesteps}")

    def build(self, family: Model) -> dict[str, nn.Module]:
        """The adapters as the student: the frozen U-Net with them is its network."""
        config, (low, high) = self.config, self.config.guidance
        text, shape = int(family.unet.config.cross_attention_dim), (config.hidden, config.heads)
        prediction = str(family.scheduler_config.get("prediction_type", "epsilon"))
        seen = config.sees_time, config.sees_prompt
        return {"student": GuidanceAdapters(widths_of(family.unet), text, *shape, low, high, *seen, prediction)}

    def collect(self, ctx: Context, prompts: Batch) -> Rollouts:
        """The points of one guided trajectory of each prompt, with the base's two predictions there."""
        (low, high), steps, count = self.config.guidance, self.config.steps, len(prompts)
        stride = ctx.denoiser.num_timesteps // steps
        drawn = [(low + (high - low) * rng.random(), int(rng.integers(stride))) for rng in ctx.rng("path", prompts)]
        w = on_device([each for each, _ in drawn], ctx.device).float()
        offset, cond = on_device([each for _, each in drawn], ctx.device), whole_picture(prompts)
        both = Cond.cat([ctx.uncond.expand(count).beside(cond), cond])
        x = ctx.noise("start", prompts.ids, prompts.visits, ctx.shape_of(prompts))
        kept: dict[str, list[Tensor]] = {"x_t": [], "cond": [], "uncond": []}
        times = []
        for k in reversed(range(steps)):
            t = k * stride + offset
            u, c = ctx.model("base", x.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
            for name, found in (("x_t", x), ("cond", c), ("uncond", u)):
                kept[name].append(found.half())
            times.append(t)
            if k:
                x = ctx.denoiser.ddim_step(guide(c, u, w.view(-1, 1, 1, 1)), x, t, t - stride).sample
        return Rollouts(
            prompts,
            [f"{name}@{k}" for k in range(steps) for name in prompts.ids],
            list(range(count)) * steps,
            {name: torch.cat(found) for name, found in kept.items()},
            {"t": torch.cat(times), "w": w.repeat(steps)},
            torch.ones(steps * count, device=ctx.device),
        )

    def loss(self, ctx: Context, batch: Batch, phase: Phase) -> Loss:
        """``guidance_loss`` at the items' points."""
        x_t, t, w, cond = batch.latents["x_t"].float(), batch.columns["t"], batch.columns["w"], whole_picture(batch)
        told = Cond(cond.embeds, {**cond.added, GUIDANCE: in_units(w)})
        output = ctx.model("student", x_t, t, told)
        error, unguided = guidance_loss(output, batch.latents["cond"], batch.latents["uncond"], w.view(-1, 1, 1, 1))
        return Loss(error, batch.weight, {"guided_error": error, "unguided_error": unguided})
