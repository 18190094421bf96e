"""GRPO on diffusion samplers: DDPO's objective with advantages inside a prompt's group, and a leash to the base.

Two forms of it: Flow-GRPO (arXiv 2505.05470: deviation over all rewards, KL to the base, two updates a round) and
DanceGRPO (2505.07818: one first noise for a prompt's samples, a random share of the steps, no KL).
"""

from __future__ import annotations

from pydantic import Field

from ..base import Paper
from ..policy_gradient import PolicyGradient, PolicyGradientConfig


class GRPOConfig(PolicyGradientConfig):
    """Settings of GRPO; the defaults are DanceGRPO's on Stable Diffusion 1."""

    members: int = Field(16, ge=1, description="samples of each prompt in a round")
    steps: int = Field(50, ge=1, description="steps of the many-step sampler")
    shared_noise: bool = Field(True, description="whether all samples of a prompt start from one noise")
    share: float = Field(0.6, gt=0, le=1, description="share of a sample's steps that is trained, drawn anew")
    skip_last: bool = Field(True, description="leave the last step out of training")
    unbiased: bool = Field(True, description="whether the prompt's deviation divides by n - 1")
    floor: float = Field(1e-8, gt=0, description="added to the deviation")


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
