"""Online PSO: of two samples of a few-step student the better one's steps are raised over the other's (2410.03190)."""

from __future__ import annotations

from pydantic import Field

from ..base import Paper, Times
from .d3po import D3PO, D3POConfig


class PSOOnlineConfig(D3POConfig):
    """Settings of online PSO; the defaults are the release's for SDXL-Turbo."""

    timesteps: Times = Field(
        (999, 749, 499, 249), min_length=2, description="the student's times, falling, as its sampler takes them"
    )
    guidance: float = Field(1.0, ge=0, description="of the student, in sampling and in training; 1 is none")
    shared_noise: bool = Field(False, description="whether all samples of a prompt start from one noise")
    beta: float = Field(50.0, gt=0, description="strength of the tie to the base")


class PSOOnline(D3PO):
    """D3PO on a distilled student, at exactly the times and by the kind of steps that it is sampled with, so that it
    stays a few-step student: ``ddim`` with eta = 1 is Turbo's Euler-ancestral, ``renoise`` LCM's and DMD2's. Its last
    step adds no noise, has no likelihood and is not trained. The student comes in by ``model.loras``, ``model.start``
    or as the model itself; the base is what training starts from.
    """

    Config = PSOOnlineConfig
    paper = Paper(
        title="Tuning Timestep-Distilled Diffusion Model Using Pairwise Sample Optimization",
        arxiv="2410.03190",
        implements="the online objective for human preference: pairs of the student's own samples, judged by scorers, "
        "on Euler-ancestral and re-noising steps",
        differs="several scorers judge by dominance (the Turbo script draws one of them for every step); every picture "
        "is re-noised by a noise of its own (the DMD2 script has one for all prompts); pairs without a winner are left "
        "out of the mean",
    )
