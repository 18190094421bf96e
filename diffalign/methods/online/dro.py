"""Diffusion-DRO: pictures of experts against what the model makes meanwhile, in denoising errors (arXiv 2510.18353)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...rollouts import Rollouts, Walk, whole_picture
from ..base import Loss, Needs, Paper, Phase
from ..rollout import RolloutMethod, SamplerConfig

if TYPE_CHECKING:
    from ...context import Context
    from ...data.batch import Batch


def dro_loss(
    expert: Tensor, policy: Tensor, base_expert: Tensor, base_policy: Tensor, margin: float
) -> tuple[Tensor, Tensor]:
    """Loss (B,) and gap (B,) from mean squared errors (B,) of the student and of the base.

    relu(gap + ``margin``) with gap = (e - e_base) - (p - p_base): e at the expert's noised picture against its noise, p
    at a state of the student's own sampling against what it said there."""
    gap = (expert - base_expert) - (policy - base_policy)
    return torch.relu(gap + margin), gap


class DROConfig(SamplerConfig):
    """Settings of Diffusion-DRO."""

    steps: int = Field(20, ge=1, description="steps of the many-step sampler")
    offset: int = Field(0, ge=0, description="added to times of leading spacing; each sample's are shifted besides")
    eta: float = Field(0.0, ge=0, description="share of new noise in a DDIM step")
    guidance: float = Field(1.0, ge=0, description="of the student, in sampling and in training; 1 is none")
    updates: int = Field(4, ge=1, description="optimiser steps for one pass over a round's samples; see negatives")
    kept: int = Field(4, ge=1, description="states of a sample that are trained on, drawn from all its steps")
    margin: float = Field(1e-3, ge=0, description="how far the gap has to be below 0 for a sample to be left alone")

    @model_validator(mode="after")
    def _enough(self) -> DROConfig:
        if min(self.kept, len(self.timesteps) or self.steps) < self.updates:
            raise ValueError(
                f"{self.updates} updates share a sample's states: set kept (and steps) to as many at least"
            )
        return self


class DRO(RolloutMethod[DROConfig]):
    """The student denoises the expert's picture better than the base does, and its own samples worse, up to a margin.

    Its own samples are those that it made at the start of the round. In the first update of a round it is still the one
    that made them: there the negatives have no gradient and only decide whose expert counts. ``updates`` of 1, the
    released default, is therefore fine-tuning on the pictures with a gate; from the second update on they push.
    """

    Config = DROConfig
    paper = Paper(
        title="Ranking-based Preference Optimization for Diffusion Models from Implicit User Feedback",
        arxiv="2510.18353",
        implements="the hinge on denoising errors with negatives sampled while training, at stratified times",
        differs="samples are made by DDIM (the release: DPM-Solver++); several updates share a round's samples, where "
        "the release's defaults copy the student at every update, so that negatives have no gradient",
    )
    needs = Needs(batch="image", draws=())
    likelihood = False

    def reason(self) -> str:
        return "Diffusion-DRO learns from captioned pictures of experts and from samples for their captions"

    def notes(self) -> list[str]:
        if self.repeats(self.phases[0]) > 1:
            return []
        return [
            "with one update a round the student is the one that sampled, so that its samples give no gradient and "
            "this is fine-tuning on the pictures with a gate; method.updates=4 makes them push"
        ]

    def collect(self, ctx: Context, prompts: Batch) -> Rollouts:
        """States of one sample a picture, with what the student said there."""
        config, policy = self.config, self.policy(ctx.denoiser)
        stride = ctx.denoiser.num_timesteps // len(policy)
        top = ctx.denoiser.num_timesteps - 1 - policy.times[0]
        shifts = [int(rng.integers(min(stride, top + 1))) for rng in ctx.rng("shift", prompts)]
        chosen = [set(rng.permutation(len(policy))[: config.kept].tolist()) for rng in ctx.rng("states", prompts)]
        walk = Walk(ctx, prompts, policy, shifts=shifts)
        ids: list[str] = []
        rows: list[int] = []
        kept: dict[str, list[Tensor]] = {name: [] for name in ("state", "said", "t")}
        while not walk.done:
            mine = [i for i in range(len(walk)) if walk.k in chosen[i]]
            said, k = walk.output(), walk.k
            taken = walk.step()
            if not mine:
                continue
            ids += [f"{walk.ids[i]}@{k}" for i in mine]
            rows += mine
            for name, values in (("state", taken.x_t), ("said", said), ("t", taken.t)):
                kept[name].append(values[mine])
        held = {name: torch.cat(values) for name, values in kept.items()}
        weight = torch.ones(len(ids), device=held["state"].device)
        return Rollouts(prompts, ids, rows, held, {"t": held.pop("t")}, weight)

    def errors(self, ctx: Context, role: str, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean squared errors (B,) of ``role`` at the expert's noised picture and at the student's own state."""
        t, noise = batch.columns["t"], ctx.draw(batch)[1]
        image = batch.latents["image"]
        x = torch.cat([ctx.denoiser.add_noise(image, noise, t), batch.latents["state"]])
        target = torch.cat([ctx.denoiser.target(image, noise, t), batch.latents["said"]])
        cond = whole_picture(batch).repeat(2)
        expert, policy = ctx.error(role, x, t.repeat(2), cond, target, self.config.guidance).chunk(2)
        return expert, policy

    def loss(self, ctx: Context, batch: Batch, phase: Phase) -> Loss:
        """``dro_loss`` of the items."""
        expert, policy = self.errors(ctx, "student", batch)
        with torch.no_grad():
            base_expert, base_policy = self.errors(ctx, "base", batch)
        values, gap = dro_loss(expert, policy, base_expert, base_policy, self.config.margin)
        metrics = {
            "expert_gain": base_expert - expert,
            "policy_gain": base_policy - policy,
            "policy_error": policy,
            "gap": gap,
            "active": (values > 0).float(),
        }
        return Loss(values, batch.weight, {name: value.detach() for name, value in metrics.items()})
