"""What a reward is worth beside others (`AdvantageMethod`), and PPO's objective on sampled steps (`PolicyGradient`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..denoiser import Step, log_prob
from ..rollouts import Rollouts
from .base import Columns, Loss, Phase
from .rollout import RolloutConfig, ScoredRollouts, step_kl

if TYPE_CHECKING:
    from ..context import Context
    from ..data.batch import Batch
    from ..rollouts import Taken


def ppo_loss(change: Tensor, advantage: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Loss (B,) and ratio (B,) from log-ratios (B,) of the student to the one that sampled, and advantages (B,).

    max(-A r, -A clamp(r, 1 - ``clip``, 1 + ``clip``)) with r = exp(change): no gradient once a good step is more likely
    than the band allows, all of it while a bad one is."""
    ratio = torch.exp(change)
    values = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
    return values, ratio


def guarded(change: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """GRPO-Guard's log-ratio (B,) (arXiv 2510.22319) from the plain one: std change + mean[(m - m_old)^2] / (2 std).

    It is mean[z (m - m_old)] for the noise z that was drawn: its mean is 0 under the one that sampled, where that of
    the plain one is below 0, and it weighs all steps alike."""
    far = (mean - old_mean).square().mean((1, 2, 3))
    return std.flatten() * change + far / (2 * std.flatten())


def group_moments(rewards: Tensor, members: int, unbiased: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each sample's own group, both (P * members,), from rewards (P * members,)."""
    groups = rewards.view(-1, members)
    spread = groups.std(1, unbiased=unbiased) if members > 1 else torch.zeros_like(groups[:, 0])
    return groups.mean(1).repeat_interleave(members), spread.repeat_interleave(members)


def standardised(reward: Tensor, mean: Tensor, std: Tensor, floor: float, most: float) -> Tensor:
    """Advantages (N,): (r - mean) / (std + ``floor``), held within ``most``."""
    return ((reward - mean) / (std + floor)).clamp(-most, most)


class AdvantageConfig(RolloutConfig):
    """How rewards become advantages, and the leash."""

    mean: Literal["prompt", "batch"] = Field("prompt", description="whose mean is taken off a reward")
    std: Literal["prompt", "batch", "none"] = Field("prompt", description="whose deviation it is divided by")
    unbiased: bool = Field(False, description="whether the prompt's deviation divides by n - 1")
    floor: float = Field(1e-6, gt=0, description="added to the deviation")
    most: float = Field(5.0, gt=0, description="largest size of an advantage")
    kl: float = Field(0.0, ge=0, description="weight of the KL to the base, of each step and a number of the latents")
    watch: bool = Field(True, description="whether the first update of a round looks how far the base is, for a curve")

    @property
    def group(self) -> int:
        """Samples of a prompt in a round that are scored."""
        return self.members

    @model_validator(mode="after")
    def _comparable(self) -> AdvantageConfig:
        if (self.mean, self.std) == ("batch", "prompt"):
            raise ValueError(
                "mean=batch with std=prompt divides a distance from the round's mean by one prompt's deviation, which "
                "may be 0; set std=batch, or mean=prompt"
            )
        if self.group == 1 and "prompt" in (self.mean, self.std):
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
        return self.config.kl > 0 or self.config.watch

    def rated(
        self,
        prompts: Batch,
        rewards: Tensor,
        ids: list[str],
        samples: Sequence[int],
        latents: dict[str, Tensor],
        columns: dict[str, Tensor],
    ) -> Rollouts:
        """Items of ``samples`` (N,), positions among the P * group samples that have ``rewards``; ``columns`` may say
        other moments of them.

        Where a prompt's mean is taken off, a prompt whose samples all have one reward teaches nothing: weight 0."""
        config, members = self.config, self.config.group
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
            {name: values[kept] for name, values in moments.items()} | columns,
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
    ratio: Literal["density", "guard"] = Field(
        "density", description="of the steps' densities, or GRPO-Guard's, which has no bias and is alike at all steps"
    )


D = TypeVar("D", bound=PolicyGradientConfig)


class PolicyGradient(AdvantageMethod[D], Generic[D]):
    """PPO's clipped objective on every step of every sample; the reward of a sample is that of its picture.

    The band is narrower than the rounding of half precision: a step recomputed in another batch than it was sampled in
    has a ratio that is some 1e-3 off 1, so that chance would say what is clipped. So what the ratio is taken to is what
    the student of the round's start says by the very call that trains (``recall``); the curve ``drift`` is what the
    ratio would be off by without."""

    def collect(self, ctx: Context, prompts: Batch) -> Rollouts:
        """All steps of all samples that are to be trained, with their density when they were taken."""
        walk, chosen = self.walk(ctx, prompts), self.chosen_steps(ctx, prompts)
        ids: list[str] = []
        samples: list[int] = []
        taken: list[Taken] = []
        while not walk.done:
            mine = [i for i, row in enumerate(walk.row) if walk.k in chosen[row]]
            step = walk.step()
            if not mine:
                continue
            ids += [f"{walk.ids[i]}@{step.k}" for i in mine]
            samples += mine
            taken.append(step.take(mine))
        rewards = self.total(self.score(ctx, walk.x, walk.texts))
        return self.rated(prompts, rewards, ids, samples, *self.held(taken))

    def held(self, taken: Sequence[Taken]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Latents and columns of the items that these steps are."""

        def all_of(name: str) -> Tensor:
            return torch.cat([getattr(step, name) for step in taken])

        latents, columns = {name: all_of(name) for name in ("x_t", "x_s")}, {name: all_of(name) for name in ("t", "s")}
        columns["sampled"] = columns["old"] = all_of("log_prob")
        if self.config.ratio == "guard":
            latents["old_mean"] = all_of("mean")
        return latents, columns

    def recall(self, ctx: Context, items: Batch) -> Columns:
        """The items' densities under the student of the round's start, and its means."""
        found = self.replay(ctx, "student", items.latents["x_t"], items)
        old: Columns = {"old": log_prob(items.latents["x_s"], found.mean, found.std)}
        return old | ({"old_mean": found.mean} if self.config.ratio == "guard" else {})

    def change(self, found: Step, now: Tensor, batch: Batch) -> Tensor:
        """Log-ratios (B,) of the student to the one that sampled; 0 in the only update of a round."""
        alone = self.repeats(self.phases[0]) == 1
        change = now - (now.detach() if alone else batch.columns["old"])
        if self.config.ratio == "density":
            return change
        return guarded(change, found.mean, found.mean.detach() if alone else batch.latents["old_mean"], found.std)

    def loss(self, ctx: Context, batch: Batch, phase: Phase) -> Loss:
        """``ppo_loss`` of the items, and ``kl`` times ``step_kl``."""
        config, x_t = self.config, batch.latents["x_t"]
        found = self.replay(ctx, "student", x_t, batch)
        now = log_prob(batch.latents["x_s"], found.mean, found.std)
        change = self.change(found, now, batch)
        values, ratio = ppo_loss(change, self.advantage(batch.columns, ctx.stats), config.clip)
        metrics = ratio_metrics(change, ratio, config.clip)
        if ctx.repeat == 0:  # still the one that sampled
            metrics["drift"] = (now.detach() - batch.columns["sampled"]).expm1().abs()
        if config.kl or (config.watch and ctx.repeat == 0):
            with torch.no_grad():
                base = self.replay(ctx, "base", x_t, batch)
            kl = step_kl(found.mean, base.mean, found.std)
            metrics["kl"] = kl.detach()
            values = values + config.kl * kl if config.kl else values
        return Loss(values, batch.weight, metrics)


def ratio_metrics(change: Tensor, ratio: Tensor, clip: float) -> dict[str, Tensor]:
    """Curves of how far the student is from the one that sampled, from log-ratios (B,) and ratios (B,)."""
    change, ratio = change.detach(), ratio.detach()
    return {
        "ratio": ratio,
        "approx_kl": 0.5 * change.square(),
        "clipped_above": (ratio > 1 + clip).float(),
        "clipped_below": (ratio < 1 - clip).float(),
    }
