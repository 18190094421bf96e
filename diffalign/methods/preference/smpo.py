"""SmPO-Diffusion (Lu et al., ICML 2025, arXiv 2506.02698)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from ...errors import UserError
from ..base import Needs, Paper
from ..inverted import InvertedConfig, InvertedPair
from ..pair import PairErrors
from .dpo import dpo_loss

# the authors' bounds of raw PickScore cosines on Pick-a-Pic v2
PICKSCORE_RANGE = (0.11543526500463486, 0.28201571106910706)


def preference_probability(
    chosen: Tensor, rejected: Tensor, low: float | Tensor, high: float | Tensor, temperature: float = 1.0
) -> Tensor:
    """p (B,) that the chosen picture is the better one: sigmoid of the difference of the scores, each brought to
    [0, 1] by the bounds ``low`` and ``high``, over ``temperature``. Adding a constant to both scores changes nothing.
    """
    return torch.sigmoid((chosen - rejected) / (high - low) / temperature)


def smpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    base_chosen: Tensor,
    base_rejected: Tensor,
    p: Tensor,
    beta: float = 2000.0,
    gamma: float = 10.0,
) -> tuple[Tensor, Tensor]:
    """Loss (B,) and logit u (B,) from the four errors and the probability p (B,) that the chosen one is better.

    Diffusion-DPO's logit times gamma (2p - 1): 0 at p = 1/2, and the pair's labels swapped where p < 1/2.
    """
    return dpo_loss(chosen, rejected, base_chosen, base_rejected, beta * gamma * (2 * p - 1))


class SmPOConfig(InvertedConfig):
    """Settings of SmPO. ``inversion_steps``: 5 for SD1.5, 10 for SDXL; ``beta``: 2000 for SD1.5, 5000 for SDXL."""

    beta: float = Field(2000.0, gt=0, description="strength of the tie to the base, in Diffusion-DPO's convention")
    gamma: float = Field(10.0, gt=0, description="times 2p - 1: the pair's multiplier, up to 4.6 at the default range")
    score_range: list[float] | Literal["fit"] = Field(
        list(PICKSCORE_RANGE),
        description="scores that count as 0 and 1 (default: raw PickScore cosines), or fit: own data's",
    )
    temperature: float = Field(1.0, gt=0, description="of the probability, on scores brought to [0, 1]")
    inversion_steps: int = Field(5, ge=1, le=1000, description="points of the inversion's grid over the whole schedule")
    renoise: int = Field(1, ge=0, le=100, description="ReNoise repetitions of each inversion step")
    average: bool = Field(True, description="move by the mean of a step's estimates, not by the last")

    @field_validator("score_range")
    @classmethod
    def _rises(cls, value: list[float] | str) -> list[float] | str:
        if not isinstance(value, str) and not (len(value) == 2 and value[0] < value[1]):
            raise ValueError("the range is two numbers that rise, or fit")
        return value


class SmPO(InvertedPair[SmPOConfig]):
    """Preferences smoothed by a scorer, on latents from ReNoise inversion of each picture.

    The score columns decide: a pair whose rejected picture scores higher is trained as its mirror image, which is what
    the authors reach by ordering pairs by PickScore. With p = 1/2 the gradient is zero (the loss is log 2, not zero as
    the abstract says). ``levels=authors`` tells the network the level left in both estimates of a step and stops at the
    next grid point; the default tells it the level entered, where ReNoise's fixed point is the exact inverse.
    """

    Config = SmPOConfig
    paper = Paper(
        title="Smoothed Preference Optimization via ReNoise Inversion for Aligning Diffusion Models",
        arxiv="2506.02698",
        implements="the released objective; probabilities from any score columns; ReNoise steps with averaging",
        differs="p of each pair its own (authors: the first row's); x_t at the level that the network is told",
    )
    needs = Needs(batch="pair", draws=(), columns=("chosen_score", "rejected_score"))
    bounds = (0.0, 1.0)  # until `fit`

    @property
    def renoise(self) -> int:  # type: ignore[override]
        """Repetitions of each step."""
        return self.config.renoise

    @property
    def average(self) -> tuple[int, ...]:  # type: ignore[override]
        """The estimates whose mean makes the move."""
        return tuple(range(self.config.renoise + 1)) if self.config.average else ()

    def fit(self, columns: Mapping[str, Tensor]) -> None:
        """With ``score_range=fit``: the smallest and the largest score of the training rows. Only the width of the
        range counts, so that a scorer's scale and offset do not: PickScore may be a cosine or tau times it.

        Raises UserError for scores that are all equal, and for scores of another scale than a given range."""
        scores = torch.cat([columns["chosen_score"], columns["rejected_score"]]).double()
        low, high = scores.min().item(), scores.max().item()
        if not isinstance(self.config.score_range, str):
            first, last = self.config.score_range
            if not first - (last - first) <= scores.median().item() <= last + (last - first):
                raise UserError(
                    f"method.score_range is [{first:.4g}, {last:.4g}] (of raw PickScore cosines by default) and the "
                    f"scores lie from {low:.4g} to {high:.4g}; set method.score_range=fit, or their own range"
                )
            return
        if not low < high:
            raise UserError(f"score_range=fit: every score is {low:g}; give pairs whose scores differ")
        self.bounds = (low, high)

    def objective(self, errors: PairErrors) -> tuple[Tensor, Tensor]:
        """``smpo_loss`` with the probabilities of the score columns."""
        assert errors.base_chosen is not None and errors.base_rejected is not None
        config = self.config
        low, high = self.bounds if isinstance(config.score_range, str) else config.score_range
        chosen, rejected = errors.columns["chosen_score"], errors.columns["rejected_score"]
        p = preference_probability(chosen, rejected, low, high, config.temperature)
        four = (errors.chosen, errors.rejected, errors.base_chosen, errors.base_rejected)
        return smpo_loss(*four, p, config.beta, config.gamma)
