"""What a reward is worth beside others (`AdvantageMethod`), and PPO's objective on sampled steps (`PolicyGradient`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..rollouts import Rollouts
from .base import Loss, Phase
from .rollout import RolloutConfig, ScoredRollouts

if TYPE_CHECKING:
    from ..context import Context
    from ..data.batch import Batch


def ppo_loss(now: Tensor, old: Tensor, advantage: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Loss (B,) and ratio (B,) from mean log-densities (B,) now and when sampled, and advantages (B,).

    max(-A r, -A clamp(r, 1 - ``clip``, 1 + ``clip``)) with r = exp(now - old): no gradient once a good step is more
    likely than the band allows, all of it while a bad one is."""
    ratio = torch.exp(now - old)
    values = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
    return values, ratio


def group_moments(rewards: Tensor, members: int, unbiased: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each sample's own group, both (P * members,), from rewards (P * members,)."""
    groups = rewards.view(-1, members)
    spread = groups.std(1, unbiased=unbiased) if members > 1 else torch.zeros_like(groups[:, 0])
    return groups.mean(1).repeat_interleave(members), spread.repeat_interleave(members)


def standardised(reward: Tensor, mean: Tensor, std: Tensor, floor: float, most: float) -> Tensor:
    """Advantages (N,): (r - mean) / (std + ``floor``), held within ``most``."""
    return ((reward - mean) / (std + floor)).clamp(-most, most)


class AdvantageConfig(RolloutConfig):
    """How rewards become advantages."""

    mean: Literal["prompt", "batch"] = Field("prompt", description="whose mean is taken off a reward")
    std: Literal["prompt", "batch", "none"] = Field("prompt", description="whose deviation it is divided by")
    unbiased: bool = Field(False, description="whether the prompt's deviation divides by n - 1")
    floor: float = Field(1e-6, gt=0, description="added to the deviation")
    most: float = Field(5.0, gt=0, description="largest size of an advantage")

    @model_validator(mode="after")
    def _comparable(self) -> AdvantageConfig:
        if self.members == 1 and "prompt" in (self.mean, self.std):
            raise ValueError(
                "one sample a prompt has nothing to be compared with; raise members, or set mean=batch and std=batch"
            )
        return self


A = TypeVar("A", bound=AdvantageConfig)


class AdvantageMethod(ScoredRollouts[A], Generic[A]):
    """Rewards beside those of the same prompt, or of the whole round: sums of a round go through ``ctx.stats``."""

    def __init__(self, config: A) -> None:
        super().__init__(config)
        self.couples = "batch" if "batch" in (config.mean, config.std) else "none"
        self.needs = replace(type(self).needs, reference=self.anchored)

    @property
    def anchored(self) -> bool:
        """Whether the base is called in training."""
        return False

    def rated(
        self,
        prompts: Batch,
        rewards: Tensor,
        ids: list[str],
        samples: Sequence[int],
        latents: dict[str, Tensor],
        columns: dict[str, Tensor],
    ) -> Rollouts:
        """Items of ``samples`` (N,), positions among the P * members samples that have ``rewards``.

        Where a prompt's mean is taken off, a prompt whose samples all have one reward teaches nothing: weight 0."""
        config, members = self.config, self.config.members
        mean, std = group_moments(rewards, members, config.unbiased)
        groups = rewards.view(-1, members)
        differ = (groups.amax(1) > groups.amin(1)).float()
        weight = differ if config.mean == "prompt" else torch.ones_like(differ)
        kept, of_prompt = list(samples), prompts.weight.repeat_interleave(members)
        # a mean far above the deviation leaves nothing of E[r^2] - E[r]^2 in fp32
        wide = rewards if rewards.device.type == "mps" else rewards.double()
        moments = {"reward": rewards, "prompt_mean": mean, "prompt_std": std}
        return Rollouts(
            prompts,
            ids,
            [sample // members for sample in kept],
            latents,
            columns | {name: values[kept] for name, values in moments.items()},
            weight.repeat_interleave(members)[kept],
            {"reward": mean[::members], "reward_spread": std[::members], "groups_alike": 1 - differ},
            {
                "count": of_prompt.sum(),
                "reward": (wide * of_prompt).sum(),
                "square": (wide.square() * of_prompt).sum(),
            },
        )

    def advantage(self, columns: Mapping[str, Tensor], stats: Mapping[str, Tensor]) -> Tensor:
        """Advantages (B,) of items, from their prompt's moments and the sums over the round's samples."""
        config, mean, std = self.config, columns["prompt_mean"], columns["prompt_std"]
        if self.couples == "batch":
            centre = stats["reward"] / stats["count"]
            spread = (stats["square"] / stats["count"] - centre.square()).clamp(min=0).sqrt().float()
            centre = centre.float()
            mean, std = centre if config.mean == "batch" else mean, spread if config.std == "batch" else std
        if config.std == "none":
            std = torch.ones_like(columns["reward"])
        return standardised(columns["reward"], mean, std, config.floor, config.most)


class PolicyGradientConfig(AdvantageConfig):
    """The band besides."""

    clip: float = Field(1e-4, gt=0, lt=1, description="half the band of the ratio, which is of densities a number")


D = TypeVar("D", bound=PolicyGradientConfig)


class PolicyGradient(AdvantageMethod[D], Generic[D]):
    """PPO's clipped objective on every step of every sample; the reward of a sample is that of its picture."""

    def collect(self, ctx: Context, prompts: Batch) -> Rollouts:
        """All steps of all samples that are to be trained, with their density when they were taken."""
        walk, chosen = self.walk(ctx, prompts), self.chosen_steps(ctx, prompts)
        ids: list[str] = []
        samples: list[int] = []
        kept: dict[str, list[Tensor]] = {name: [] for name in ("x_t", "x_s", "t", "s", "log_prob")}
        while not walk.done:
            mine = [i for i, row in enumerate(walk.row) if walk.k in chosen[row]]
            taken = walk.step()
            if not mine:
                continue
            ids += [f"{walk.ids[i]}@{taken.k}" for i in mine]
            samples += mine
            for name, values in kept.items():
                values.append(getattr(taken, name)[mine])
        rewards = self.total(self.score(ctx, walk.x, walk.texts))
        held = {name: torch.cat(values) for name, values in kept.items()}
        latents = {name: held.pop(name) for name in ("x_t", "x_s")}
        return self.rated(prompts, rewards, ids, samples, latents, held)

    def loss(self, ctx: Context, batch: Batch, phase: Phase) -> Loss:
        """``ppo_loss`` of the items."""
        columns = batch.columns
        now = self.densities(ctx, "student", batch.latents["x_t"], batch.latents["x_s"], batch)
        values, ratio = ppo_loss(now, columns["log_prob"], self.advantage(columns, ctx.stats), self.config.clip)
        return Loss(values, batch.weight, ratio_metrics(now - columns["log_prob"], ratio, self.config.clip))


def ratio_metrics(change: Tensor, ratio: Tensor, clip: float) -> dict[str, Tensor]:
    """Curves of how far the student is from the one that sampled, from log-ratios (B,) and ratios (B,)."""
    change, ratio = change.detach(), ratio.detach()
    return {
        "ratio": ratio,
        "approx_kl": 0.5 * change.square(),
        "clipped_above": (ratio > 1 + clip).float(),
        "clipped_below": (ratio < 1 - clip).float(),
    }
