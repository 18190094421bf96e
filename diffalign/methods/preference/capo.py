"""CaPO, calibrated preference optimisation over several rewards (Lee et al., CVPR 2025, arXiv 2502.02588)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ..base import Loss, Needs, Paper, Phase
from ..pair import Noised, PairConfig, PairErrors, PairMethod
from .dpo import dpo_loss

if TYPE_CHECKING:
    from ...context import Context
    from ...data.batch import Batch


def calibrated(rewards: Tensor) -> Tensor:
    """Expected win rate (..., K) in [0, 1] of each picture against the others of its list: the mean over j of
    sigmoid(R_i - R_j), from Bradley-Terry rewards (..., K), NaN beyond a list's end."""
    wins = torch.sigmoid(rewards[..., :, None] - rewards[..., None, :]).nan_to_num(0.0)
    others = (~rewards.isnan()).sum(-1, keepdim=True) - 1
    return torch.where(rewards.isnan(), rewards, (wins.sum(-1) - 0.5) / others.clamp_min(1))


def frontiers(worth: Tensor) -> tuple[Tensor, Tensor]:
    """Masks (B, K) of the upper and of the lower Pareto frontier from the worth (B, L, K) under L rewards: the pictures
    that none is better than, and those that are better than none; what is in both is in neither. Better: under no
    reward less and under some more."""
    a, b = worth[..., :, None], worth[..., None, :]
    better = ((a >= b).all(1) & (a > b).any(1)) & ~(a.isnan() | b.isnan()).any(1)
    beaten, beats = better.any(1), better.any(2)
    return ~beaten & beats, beaten & ~beats


def capo_loss(logits: Tensor, target: Tensor) -> Tensor:
    """(target - u)^2 (B,): the implicit preference u follows the difference of the calibrated rewards. At a target of
    1/2 this is beta^2 times ``dpo_loss`` with ``loss="ipo"``."""
    return (target - logits).square()


class CaPOConfig(PairConfig):
    """Settings of CaPO."""

    beta: float = Field(5000.0, gt=0, description="scale of the implicit preference (Diffusion-DPO's convention)")
    scale: Literal["given", "fit"] = Field(
        "given", description="rewards as they are (Bradley-Terry), or each divided by its spread within lists"
    )
    bias: float | None = Field(2.0, description="b of the time weight sigmoid(b - log SNR) of errors; null: no weight")


class CaPO(PairMethod[CaPOConfig]):
    """Of each list one picture of the upper and one of the lower frontier, drawn anew at each visit; the difference of
    their mean calibrated rewards is what the implicit preference regresses on.

    The rewards are the columns that ``data.rewards`` names, else the list's ``scores``. A list in which no picture is
    better than another has weight 0.
    """

    Config = CaPOConfig
    paper = Paper(
        title="Calibrated Multi-Preference Optimization for Aligning Diffusion Models",
        arxiv="2502.02588",
        implements="win rates within a list as rewards, pairs from its Pareto frontiers, the regression loss, the "
        "sigmoid time weight; own noise and shared t",
        differs="written from the project page and a public summary, no code is public. Ours: beta and its "
        "convention, b = 2, scale=fit; lists of any length (the paper: 16 samples of the base a prompt)",
    )
    needs = Needs(batch="ranked", draws=("noise", "noise_1"))

    def __init__(self, config: CaPOConfig) -> None:
        super().__init__(config)
        self.spread: dict[str, float] = {}

    def fit(self, columns: Mapping[str, Tensor]) -> None:
        """The spread of each reward: the root mean square of its distance from its list's mean."""
        for name in reward_names(columns):
            values = stacked(columns, name)
            apart = values - values.nanmean(1, keepdim=True)
            self.spread[name] = max(float(apart.square().nanmean().sqrt()), 1e-12)

    def choose(self, ctx: Context, batch: Batch) -> Batch:
        """The batch as pairs: one picture of each frontier, with ``target`` and the weight 0 where there is none."""
        names = reward_names(batch.columns)
        scale = {n: self.spread.get(n, 1.0) if self.config.scale == "fit" else 1.0 for n in names}
        worth = calibrated(torch.stack([stacked(batch.columns, name) / scale[name] for name in names], 1))
        upper, lower = frontiers(worth)
        count = worth.shape[2]
        chances = np.stack([rng.random(count, dtype=np.float32) for rng in ctx.rng("pair", batch)])
        chance = torch.from_numpy(chances).to(worth.device, non_blocking=True)
        rows = torch.arange(len(batch), device=worth.device)
        places = {
            "chosen": torch.where(upper, chance, -1.0).argmax(1),
            "rejected": torch.where(lower, chance, -1.0).argmax(1),
        }
        mean = worth.mean(1)
        target = mean[rows, places["chosen"]] - mean[rows, places["rejected"]]
        whole = upper.any(1)

        def pick(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
            every = torch.stack([parts[f"image_{k}"] for k in range(count)], 1) if parts else None
            return {} if every is None else {side: every[rows, place] for side, place in places.items()}

        return replace(
            batch,
            latents=pick(batch.latents),
            sizes=pick(batch.sizes),
            columns={"target": torch.where(whole, target, torch.zeros_like(target))},
            weight=batch.weight * whole,
        )

    def noise(self, ctx: Context, batch: Batch) -> Noised:
        """Forward noising at one t a pair, with a noise of its own for each picture."""
        (t, first), (_, second) = ctx.draw(batch), ctx.draw(batch, "noise_1")
        x0, noise = torch.cat([batch.latents["chosen"], batch.latents["rejected"]]), torch.cat([first, second])
        t, denoiser = t.repeat(2), ctx.denoiser
        return Noised(denoiser.add_noise(x0, noise, t), t, denoiser.target(x0, noise, t), self.pair_cond(batch))

    def scale(self, ctx: Context, t: Tensor) -> Tensor | float:
        """The time weight, on top of the space in which errors are measured."""
        if self.config.bias is None:
            return super().scale(ctx, t)
        weight = 1 / (1 + ctx.denoiser.snr(t) * math.exp(-self.config.bias))  # sigmoid(b - log SNR)
        return super().scale(ctx, t) * weight

    def loss(self, ctx: Context, batch: Batch, phase: Phase) -> Loss:
        """``PairMethod.loss`` of the pairs that are drawn from the lists."""
        return super().loss(ctx, self.choose(ctx, batch), phase)

    def objective(self, errors: PairErrors) -> tuple[Tensor, Tensor]:
        """``capo_loss`` at Diffusion-DPO's logit."""
        assert errors.base_chosen is not None and errors.base_rejected is not None
        _, logits = dpo_loss(errors.chosen, errors.rejected, errors.base_chosen, errors.base_rejected, self.config.beta)
        return capo_loss(logits, errors.columns["target"]), logits


def reward_names(columns: Mapping[str, Tensor]) -> Sequence[str]:
    """Rewards whose values stand in columns ``NAME_0``, ``NAME_1``, ...; ``score`` where there are no others."""
    found = [name[:-2] for name in columns if name.endswith("_0") and name != "score_0"]
    return found or ["score"]


def stacked(columns: Mapping[str, Tensor], name: str) -> Tensor:
    """A reward of all pictures (B, K)."""
    count = sum(column.rpartition("_")[0] == name and column.rpartition("_")[2].isdigit() for column in columns)
    return torch.stack([columns[f"{name}_{k}"] for k in range(count)], 1)
