"""DCPO, preference optimisation with a caption for each picture (Saeidi et al. 2025, arXiv 2502.06023)."""

from __future__ import annotations

from pydantic import Field

from ..base import Needs, Paper
from .dpo import DPO, DPOConfig


class DCPOConfig(DPOConfig):
    """Settings of DCPO: those of Diffusion-DPO at the authors' beta."""

    beta: float = Field(500.0, gt=0, description="strength of the tie to the base (authors' convention)")


class DCPO(DPO):
    """Diffusion-DPO in which each member of a pair is denoised under its own caption.

    The winner's caption is ``prompt``, the loser's ``rejected_prompt``; t and noise are shared, student and base see
    the same captions. ``diffalign pairs caption`` makes the captions (captioning, perturbation, hybrid: DCPO-c, -p and
    -h), ``data.perturb`` perturbs them by rules while the rows are read. A pair without ``rejected_prompt`` has its
    prompt for both pictures and trains as in Diffusion-DPO; how many there are is said at the start.

    Pair-specific captions leave DPO's derivation, in which both pictures answer one prompt: where the captions alone
    tell winner from loser (perturbed ones do), the loss can fall without a look at the pictures. Seen on the tiny
    world: accuracy near 1 at once, and the winner's error rises (``chosen_gain`` below 0). Then perturb less, or set
    ``safeguard``.
    """

    Config = DCPOConfig
    paper = Paper(
        title="Dual Caption Preference Optimization for Diffusion Models",
        arxiv="2502.06023",
        implements="the authors' released objective (the printed one was not at hand), for SD1.x, SD2.x and SDXL",
        differs="errors against the network's own target (authors: SD2.1's v output is regressed on the noise, which "
        "leaves an error that no training removes), at its own 768 pixels; two captions on SDXL too (authors: SD1/2)",
    )
    needs = Needs(batch="pair", texts=("rejected_prompt",))
