"""PSO towards pictures: a few-step student leaves its own samples for those of a style or a concept (2410.03190)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...rollouts import Rollouts, Walk, whole_picture
from ..base import Loss, Needs, Paper, Phase, Times
from ..distillation.pso import PSOTerms, pso_objective
from ..pair import PairErrors, pair_curves
from ..rollout import RolloutMethod, SamplerConfig

if TYPE_CHECKING:
    from ...context import Context
    from ...data.batch import Batch


class PSOPicturesConfig(PSOTerms, SamplerConfig):
    """Settings of PSO towards pictures."""

    timesteps: Times = Field(
        (999, 749, 499, 249), min_length=1, description="the student's times, falling, as its sampler takes them"
    )
    sampler: Literal["ddim", "renoise", "flow", "dance", "cps"] = Field(
        "renoise", description="x0 and new noise (LCM, DMD2), or DDIM with eta (Turbo: ddim and eta=1)"
    )
    guidance: float = Field(1.0, ge=0, description="of the student, in sampling and in training; 1 is none")
    kept: int = Field(1, ge=1, description="of the student's times, how many a picture is trained at in a round")

    @model_validator(mode="after")
    def _of_its_times(self) -> PSOPicturesConfig:
        if self.kept > len(self.timesteps):
            raise ValueError(f"kept={self.kept} of {len(self.timesteps)} timesteps; lower it")
        return self


class PSOPictures(RolloutMethod[PSOPicturesConfig]):
    """Offline PSO's objective, with targets from the data (the pictures of a style, a person, a thing) and references
    that the student samples for the same prompts at the start of each round: it learns what tells its own pictures
    from them, at the times that it is sampled at and at no others.
    """

    Config = PSOPicturesConfig
    paper = Paper(
        title="Tuning Timestep-Distilled Diffusion Model Using Pairwise Sample Optimization",
        arxiv="2410.03190",
        implements="style transfer and personalisation: target pictures against samples of the current student, in "
        "denoising errors at the sampler's times",
        differs="references are of the target's own prompt and made anew each round (the concept script makes 20 of a "
        "class prompt once, trains at 750, 500, 250 and 0, and by its defaults cancels them)",
    )
    needs = Needs(batch="image", draws=())
    likelihood = False

    def __init__(self, config: PSOPicturesConfig) -> None:
        super().__init__(config)
        self.needs = Needs(batch="image", draws=(), reference=config.loss == "sigmoid")

    def reason(self) -> str:
        return "it learns from captioned pictures and from the student's own samples for their captions"

    def collect(self, ctx: Context, prompts: Batch) -> Rollouts:
        """A sample of each picture's prompt, and the times that the two are trained at."""
        walk, times = Walk(ctx, prompts, self.policy(ctx.denoiser)), self.config.timesteps
        while not walk.done:
            walk.step()
        drawn = [rng.permutation(len(times))[: self.config.kept].tolist() for rng in ctx.rng("times", prompts)]
        items = [(row, k) for row, places in enumerate(drawn) for k in places]
        rows = [row for row, _ in items]
        t = torch.tensor([times[k] for _, k in items], device="cpu").to(ctx.device, non_blocking=True)
        weight = torch.ones(len(items), device=ctx.device)
        ids = [f"{walk.ids[row]}@{k}" for row, k in items]
        return Rollouts(prompts, ids, rows, {"reference": walk.x[rows]}, {"t": t}, weight)

    def errors(self, ctx: Context, role: str, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean squared errors (B,) of ``role`` in the noise, at the picture and at the reference, both under one noise
        and time."""
        t, noise = batch.columns["t"], ctx.draw(batch)[1].repeat(2, 1, 1, 1)
        x0, both = torch.cat([batch.latents["image"], batch.latents["reference"]]), t.repeat(2)
        x_t, target = ctx.denoiser.add_noise(x0, noise, both), ctx.denoiser.target(x0, noise, both)
        found = ctx.error(role, x_t, both, whole_picture(batch).repeat(2), target, self.config.guidance)
        picture, reference = (found * ctx.denoiser.eps_error_scale(both)).chunk(2)
        return picture, reference

    def loss(self, ctx: Context, batch: Batch, phase: Phase) -> Loss:
        """``pso_objective`` of the items."""
        found = self.errors(ctx, "student", batch)
        with torch.no_grad():
            base = self.errors(ctx, "base", batch) if self.needs.reference else (None, None)
        errors = PairErrors(*found, *base)
        values, logits = pso_objective(self.config, errors)
        return Loss(values, batch.weight, pair_curves(errors, logits))
