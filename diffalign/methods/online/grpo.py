"""GRPO on diffusion samplers: DDPO's objective with advantages inside a prompt's group, and a leash to the base.

Two forms of it: Flow-GRPO (arXiv 2505.05470: deviation over all rewards, KL to the base, two updates a round) and
DanceGRPO (2505.07818: one first noise for a prompt's samples, a random share of the steps, no KL).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from ...denoiser import log_prob
from ..base import Loss, Paper, Phase
from ..policy_gradient import PolicyGradient, PolicyGradientConfig, ppo_loss, ratio_metrics

if TYPE_CHECKING:
    from ...context import Context
    from ...data.batch import Batch


def step_kl(mean: Tensor, base_mean: Tensor, std: Tensor) -> Tensor:
    """KL (B,) between two steps of one ``std`` (B, 1, 1, 1), averaged over the latents' numbers: that of two Gaussians.

    (Flow-GRPO's code divides by 2 g^2 alone, not by the variance g^2 |ds|: its number is |ds| times this one.)"""
    return ((mean - base_mean) / std).square().mean((1, 2, 3)) / 2


class GRPOConfig(PolicyGradientConfig):
    """Settings of GRPO; the defaults are DanceGRPO's on Stable Diffusion 1."""

    members: int = Field(16, ge=1, description="samples of each prompt in a round")
    steps: int = Field(50, ge=1, description="steps of the many-step sampler")
    shared_noise: bool = Field(True, description="whether all samples of a prompt start from one noise")
    share: float = Field(0.6, gt=0, le=1, description="share of a sample's steps that is trained, drawn anew")
    skip_last: bool = Field(True, description="leave the last step out of training")
    unbiased: bool = Field(True, description="whether the prompt's deviation divides by n - 1")
    floor: float = Field(1e-8, gt=0, description="added to the deviation")
    kl: float = Field(0.0, ge=0, description="weight of the KL to the base, of each step and a number of the latents")


class GRPO(PolicyGradient[GRPOConfig]):
    """Group-relative policy optimisation of a many-step or few-step sampler."""

    Config = GRPOConfig
    paper = Paper(
        title="Flow-GRPO: Training Flow Matching Models via Online RL; DanceGRPO",
        arxiv="2505.05470",
        implements="PPO's clipping with advantages within a prompt's group, on DDIM, re-noising and flow SDE steps; "
        "KL to the base (Flow-GRPO), shared first noise and a random share of the steps (DanceGRPO)",
        differs="the KL is that of the Gaussians, not the released code's, which lacks a factor of the step; guidance "
        "has its gradient in both branches; every update holds some steps of every sample",
    )

    @property
    def anchored(self) -> bool:
        return self.config.kl > 0

    def loss(self, ctx: Context, batch: Batch, phase: Phase) -> Loss:
        """``ppo_loss`` of the items, and ``kl`` times ``step_kl``."""
        config, columns, x_t = self.config, batch.columns, batch.latents["x_t"]
        found = self.replay(ctx, "student", x_t, batch)
        now = log_prob(batch.latents["x_s"], found.mean, found.std)
        values, ratio = ppo_loss(now, columns["log_prob"], self.advantage(columns, ctx.stats), config.clip)
        metrics = ratio_metrics(now - columns["log_prob"], ratio, config.clip)
        if config.kl:
            with torch.no_grad():
                base = self.replay(ctx, "base", x_t, batch)
            metrics["kl"] = step_kl(found.mean, base.mean, found.std)
            values = values + config.kl * metrics["kl"]
        return Loss(values, batch.weight, metrics)
