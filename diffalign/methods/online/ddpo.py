"""DDPO: the steps of well scored samples are made likelier, within a narrow band (arXiv 2305.13301)."""

from __future__ import annotations

from pydantic import Field

from ..base import Paper
from ..policy_gradient import PolicyGradient, PolicyGradientConfig


class DDPOConfig(PolicyGradientConfig):
    """Settings of DDPO."""

    steps: int = Field(50, ge=1, description="steps of the many-step sampler")


class DDPO(PolicyGradient[DDPOConfig]):
    """PPO on the steps of a sampler, as its authors have it."""

    Config = DDPOConfig
    paper = Paper(
        title="Training Diffusion Models with Reinforcement Learning",
        arxiv="2305.13301",
        implements="importance-sampled policy gradient with PPO's clipping on mean log-densities of all steps",
        differs="a prompt's rewards are compared within a round (several samples each) or over the round, not with a "
        "memory of former ones; every update holds some steps of every sample instead of all steps of some",
    )
