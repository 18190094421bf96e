"""RolloutMethod: what the methods share that learn from samples of the model that is trained.

A training step is a round (see `diffalign.rollouts`): ``train.batch`` prompts are sampled, ``members`` times each, and
scored; then ``updates`` optimiser steps, ``epochs`` times over, train on the steps that were taken.
``train.micro_batch`` is how many prompts are sampled, and how many taken steps are trained on, at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from ..denoiser import Denoiser, Step
from ..errors import UserError
from ..facts import SamplingRecord, student_record
from ..rollouts import FLOWS, Policy, Walk, few_steps, many_steps, whole_picture
from .base import Method, MethodConfig, Needs, Phase, Times

if TYPE_CHECKING:
    from ..context import Context
    from ..data.batch import Batch

DOMINANT = 0.5  # of the steps' weights; one that has more is told of
AT_ONCE = 8  # pictures that are decoded and scored together


class SamplerConfig(MethodConfig):
    """How samples are made, and spread over updates."""

    steps: int = Field(20, ge=1, description="steps of the many-step sampler")
    timesteps: Times = Field((), description="times of a few-step student, falling, in place of steps")
    sampler: Literal["ddim", "renoise", "flow", "dance", "cps"] = Field(
        "ddim", description="DDIM with eta, x0 and new noise (LCM, DMD2), or of flow models an SDE of level eta, or CPS"
    )
    spacing: Literal["leading", "trailing", "linspace"] = Field("leading", description="spacing of the steps' times")
    offset: int = Field(1, ge=0, description="added to times of leading spacing (diffusers' steps_offset)")
    eta: float = Field(1.0, ge=0, description="share of new noise in a DDIM step; 1 is DDPM's and Euler-ancestral's")
    guidance: float = Field(5.0, ge=0, description="of the student, in sampling and in training; 1 is none")
    scale: float = Field(1.0, gt=0, description="what the first noise is multiplied by, as a student's record says")
    skip_last: bool = Field(False, description="leave the last step out of training")
    updates: int = Field(1, ge=1, description="optimiser steps for one pass over a round's samples")
    epochs: int = Field(1, ge=1, description="passes over a round's samples")


class RolloutConfig(SamplerConfig):
    """How samples are grouped and scored besides."""

    reward: str = Field("pickscore", description="scorers, such as pickscore,hpsv21=FILE; a picture is decoded once")
    reward_weights: tuple[float, ...] = Field((), description="factor of each scorer in the sum; empty: 1 each")
    members: int = Field(4, ge=1, description="samples of each prompt in a round")
    shared_noise: bool = Field(False, description="whether all samples of a prompt start from one noise")
    share: float = Field(1.0, gt=0, le=1, description="share of a sample's steps that is trained, drawn anew")

    @model_validator(mode="after")
    def _weights_fit(self) -> RolloutConfig:
        names = [part for part in self.reward.split(",") if part.strip()]
        if self.reward_weights and len(self.reward_weights) != len(names):
            raise ValueError(f"reward_weights has {len(self.reward_weights)} numbers for {len(names)} scorers")
        return self


S = TypeVar("S", bound=SamplerConfig)
R = TypeVar("R", bound=RolloutConfig)


class RolloutMethod(Method[S], Generic[S]):
    """A policy phase of ``updates`` times ``epochs`` optimiser steps on one round of samples.

    ``likelihood`` is False for a method that needs none, and then a deterministic sampler will do."""

    needs = Needs(batch="prompt", draws=())
    phases: tuple[Phase, ...] = (Phase("policy", ("student",), "updates", "round"),)
    likelihood: bool = True
    noisy: ClassVar[bool] = True
    """Whether every step is sampled with ``eta``, and so a few-step student is to be."""
    evens: ClassVar[str] = "method.spacing=trailing with method.skip_last=true leaves the widest out"
    """What a person may do where one step outweighs all others."""

    def repeats(self, phase: Phase) -> int:
        return self.config.updates * self.config.epochs

    def parts(self, phase: Phase) -> int:
        return self.config.updates

    def policy(self, denoiser: Denoiser) -> Policy:
        """How the student samples."""
        config = self.config
        if config.timesteps:
            times, ends = few_steps(config.timesteps)
        else:
            times, ends = many_steps(denoiser, config.steps, config.spacing, config.offset)
        return Policy(tuple(times), tuple(ends), config.sampler, config.eta, config.guidance, config.scale)

    def trained_steps(self, denoiser: Denoiser) -> list[int]:
        """The steps that may be trained: all with a likelihood, but for the last where the settings leave it out."""
        policy = self.policy(denoiser)
        found = policy.trainable(denoiser) if self.likelihood else list(range(len(policy)))
        return [k for k in found if not (self.config.skip_last and k == len(policy) - 1)]

    def check(self, denoiser: Denoiser) -> None:
        config = self.config
        if (config.sampler in FLOWS) != (denoiser.prediction == "flow"):
            kind = "flow, dance or cps" if denoiser.prediction == "flow" else "ddim or renoise"
            raise UserError(f"method.sampler={config.sampler} does not go with this model's schedule; set it to {kind}")
        if self.likelihood and config.sampler != "renoise" and config.eta == 0:
            raise UserError(
                "method.eta=0 makes sampling deterministic, and its steps have no likelihood to train by; set "
                "method.eta above 0 (1 is the usual)"
            )
        if config.timesteps and config.timesteps[0] >= denoiser.num_timesteps:
            raise UserError(f"method.timesteps: {config.timesteps[0]} is beyond the model's schedule")
        if config.timesteps and config.sampler == "ddim" and config.eta not in (0, 1):
            raise UserError(
                f"method.eta={config.eta:g} with method.timesteps: no sampler of diffusers takes both; set method.eta=1"
                + ("" if self.likelihood else " or 0")
            )
        if not self.trained_steps(denoiser):
            raise UserError(
                "no step of this sampler has a likelihood to train by: a student's last step adds no noise; give "
                "method.timesteps two or more, or method.skip_last=false"
            )

    def scales(self, denoiser: Denoiser) -> Tensor:
        """What the densities of each step are multiplied by, fp32 (K,) on the CPU."""
        return torch.ones(len(self.policy(denoiser)), device="cpu")

    def warnings(self, denoiser: Denoiser) -> list[str]:
        trained, policy = self.trained_steps(denoiser), self.policy(denoiser)
        if not self.likelihood or len(trained) < 2 or policy.kernel in FLOWS:
            return []
        weights = (policy.weights(denoiser) * self.scales(denoiser)).square()[trained]
        share, widest = float(weights.max() / weights.sum()), policy.times[trained[int(weights.argmax())]]
        if share <= DOMINANT:
            return []
        return [f"the step at time {widest} has {share:.0%} of the weight of all steps in what is learnt; {self.evens}"]

    def sampling(self, scheduler: Mapping[str, Any]) -> SamplingRecord | None:
        """A few-step student is sampled as it is trained; a many-step one as its base."""
        config = self.config
        if not config.timesteps:
            return None
        renoise = config.sampler == "renoise"
        ancestral = not renoise and config.eta > 0 and self.noisy
        found = student_record(scheduler, config.timesteps, renoise=renoise, scale=config.scale, ancestral=ancestral)
        return found.model_copy(update={"guidance": max(config.guidance, 1.0)})

    def replay(self, ctx: Context, role: str, x_t: Tensor, batch: Batch) -> Step:
        """The Gaussian that ``role`` would step by from ``x_t`` at the items' own times; ``x_t`` (n B, C, h, w) may
        hold several latents of each item after one another."""
        copies, policy = len(x_t) // len(batch), self.policy(ctx.denoiser)
        t, s = (batch.columns[name].repeat(copies) for name in ("t", "s"))
        output = ctx.model(role, x_t, t, whole_picture(batch).repeat(copies), policy.guidance)
        eta = batch.columns["eta"].repeat(copies) if "eta" in batch.columns else None
        return policy.step(ctx.denoiser, output, x_t, t, s, eta=eta)


class ScoredRollouts(RolloutMethod[R], Generic[R]):
    """Samples that scorers judge: each prompt ``members`` times."""

    needs = Needs(batch="prompt", draws=(), reward=True, scores_only=True, decode=True)

    def check(self, denoiser: Denoiser) -> None:
        config = self.config
        super().check(denoiser)
        if config.shared_noise and config.eta == 0 and config.sampler != "renoise":
            raise UserError(
                "method.shared_noise with method.eta=0 makes all samples of a prompt the same; set method.eta above 0, "
                "or method.shared_noise=false"
            )

    def walk(self, ctx: Context, prompts: Batch, role: str = "student") -> Walk:
        """Samples of a round at their start."""
        config = self.config
        return Walk(ctx, prompts, self.policy(ctx.denoiser), role, config.members, config.shared_noise)

    def chosen_steps(self, ctx: Context, prompts: Batch) -> list[list[int]]:
        """The steps that each prompt's samples are trained on: ``share`` of those that may be, keyed."""
        may = self.trained_steps(ctx.denoiser)
        count = max(1, round(self.config.share * len(may)))
        if count == len(may):
            return [may] * len(prompts)
        return [sorted(may[i] for i in rng.permutation(len(may))[:count].tolist()) for rng in ctx.rng("steps", prompts)]

    def score(self, ctx: Context, latents: Tensor, texts: Sequence[str]) -> Tensor:
        """Scores (N, R) of clean latents (N, C, h, w) by the R scorers; each picture is decoded once."""
        names = list(ctx.rewards)
        found = []
        for start in range(0, len(latents), AT_ONCE):
            images, prompts = ctx.decode(latents[start : start + AT_ONCE]), texts[start : start + AT_ONCE]
            found.append(torch.stack([ctx.reward(name, images, prompts).float() for name in names], 1))
        return torch.cat(found)

    def weighted(self, scores: Tensor) -> Tensor:
        """The scorers' scores (N, R) times their weights."""
        weights = self.config.reward_weights
        return scores * torch.tensor(weights, device=scores.device) if weights else scores

    def total(self, scores: Tensor) -> Tensor:
        """One reward (N,) of the scorers' (N, R)."""
        return self.weighted(scores).sum(1)


def step_kl(mean: Tensor, base_mean: Tensor, std: Tensor) -> Tensor:
    """KL (B,) between two steps of one ``std`` (B, 1, 1, 1), averaged over the latents' numbers: that of two Gaussians.

    (Flow-GRPO's code divides by 2 g^2 alone, not by the variance g^2 |ds|: its number is |ds| times this one.)"""
    return ((mean - base_mean) / std).square().mean((1, 2, 3)) / 2


def clipped_pair_loss(
    won: Tensor, lost: Tensor, base_won: Tensor, base_lost: Tensor, beta: float, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Loss (B,) and logit (B,) of a pair of steps from their mean log-densities (B,) under the student and the base.

    -log sigmoid(beta (log r_w - log r_l)) with r = exp(l - l_base) held within 1 - ``clip`` and 1 + ``clip``; None does
    not hold it, as the papers have it (D3PO arXiv 2311.13231, SPO 2406.04314; their code clips by 0.1)."""
    up, down = won - base_won, lost - base_lost
    if clip is not None:
        low, high = math.log1p(-clip), math.log1p(clip)
        up, down = up.clamp(low, high), down.clamp(low, high)
    logits = beta * (up - down)
    return F.softplus(-logits), logits


def pair_bounds(beta: float, clip: float) -> tuple[float, float]:
    """Least and largest value of ``clipped_pair_loss``."""
    widest = beta * (math.log1p(clip) - math.log1p(-clip))
    return math.log1p(math.exp(-widest)), widest + math.log1p(math.exp(-widest))
