"""Dynamic-TreeRPO: samples that share their past and part in a window of noisy steps (arXiv 2509.23352)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...denoiser import Denoiser
from ...errors import UserError
from ...rollouts import Rollouts, Taken
from ..base import Paper, on_device
from ..policy_gradient import PolicyGradient, PolicyGradientConfig

if TYPE_CHECKING:
    from ...context import Context
    from ...data.batch import Batch


def tree_passes(steps: int, start: int, depth: int, branch: int) -> int:
    """U-Net passes of a tree that parts in steps ``start`` .. ``start + depth - 1`` of ``steps``: children share the
    pass at their parent's state."""
    return start + sum(branch**i for i in range(depth)) + (steps - start - depth) * branch**depth


def means_below(node: list[int], rewards: Tensor) -> Tensor:
    """Mean reward (M,) of the leaves below each of M nodes, from each leaf's node and reward (N,)."""
    index, sums = on_device(node, rewards.device), rewards.new_zeros(max(node) + 1)
    return sums.index_add(0, index, rewards) / sums.index_add(0, index, torch.ones_like(rewards)).clamp(min=1)


class TreeRPOConfig(PolicyGradientConfig):
    """Settings of Dynamic-TreeRPO. The paper's are not public; these are ours."""

    members: int = Field(1, ge=1, description="trees of each prompt in a round, each from a noise of its own")
    branch: int = Field(2, ge=1, description="children of a state in the window; 1 makes plain samples")
    depth: int = Field(3, ge=1, description="steps of the window; a tree has branch ** depth samples")
    start: int | None = Field(
        None, ge=0, description="first step of the window; null: it slides, drawn for each prompt"
    )
    eta_end: float | None = Field(
        None, gt=0, description="eta of the window's last step, where eta is that of its first; null: the same"
    )
    credit: Literal["leaves", "siblings"] = Field(
        "leaves",
        description="what a step's reward, the mean of all samples that come of it, is compared with: all samples of "
        "the prompt, or those that come of its siblings and itself",
    )

    @property
    def group(self) -> int:
        return self.members * self.branch**self.depth

    @model_validator(mode="after")
    def _compared(self) -> TreeRPOConfig:
        if self.credit == "siblings" and self.mean != "prompt":
            raise ValueError("credit=siblings takes the siblings' mean off a reward; set mean=prompt")
        return self


@dataclass(frozen=True)
class Layer:
    """A step of some samples of which ``mine`` are trained; ``parents``: the state that each sample left; ``node``:
    which sample of this step each sample comes from now; ``eta``: of ``mine``."""

    taken: Taken
    mine: list[int]
    parents: list[int]
    node: list[int]
    eta: list[float]


class TreeRPO(PolicyGradient[TreeRPOConfig]):
    """GRPO on trees. Outside of a window of ``depth`` steps samples go without noise, and all that have the same past
    go as one; in it each state has ``branch`` children, which part by the noise of that step alone. Rewards are those
    of the pictures at the end; an item is a step in the window, and its reward the mean of all pictures that come of
    it. So branch ** depth pictures cost as many U-Net passes before and in the window as a few samples do.
    """

    Config = TreeRPOConfig
    paper = Paper(
        title="Dynamic-TreeRPO: Breaking the Independent Trajectory Bottleneck with Structured Sampling",
        arxiv="2509.23352",
        implements="trees of samples in a sliding window of noisy steps, noise by depth, advantages among a prompt's "
        "leaves or among siblings; on DDIM and flow SDE steps",
        differs="from the abstract, no code is public: the window is drawn for each prompt instead of moving with the "
        "training; without LayerTuning-RL (fine-tuning as a process reward with adaptive bounds)",
    )
    noisy = False

    def layers(self) -> list[float]:
        """eta of each step of the window."""
        config = self.config
        last = config.eta if config.eta_end is None else config.eta_end
        return torch.linspace(config.eta, last, config.depth, dtype=torch.float64, device="cpu").tolist()

    def windows(self, denoiser: Denoiser) -> list[int]:
        """Where a window may start."""
        may, config = set(self.trained_steps(denoiser)), self.config
        found = [k for k in sorted(may) if all(k + i in may for i in range(config.depth))]
        return found if config.start is None else [k for k in found if k == config.start]

    def check(self, denoiser: Denoiser) -> None:
        super().check(denoiser)
        config = self.config
        if config.sampler == "renoise":
            raise UserError(
                "method.sampler=renoise adds noise at every step, and a tree's samples part in its window alone; set "
                "method.sampler=ddim"
            )
        if not self.windows(denoiser):
            at = "" if config.start is None else f" from step {config.start} on"
            raise UserError(
                f"method.depth {config.depth} finds no window{at} among the {len(self.trained_steps(denoiser))} of "
                f"{len(self.policy(denoiser))} steps that may be trained; lower it{at and ', or method.start'}"
            )

    def warnings(self, denoiser: Denoiser) -> list[str]:
        config, steps, starts = self.config, len(self.policy(denoiser)), self.windows(denoiser)
        shared = [tree_passes(steps, start, config.depth, config.branch) * config.members for start in starts]
        return [
            *super().warnings(denoiser),
            f"{config.group} samples of a prompt take {sum(shared) / len(shared):g} U-Net passes, and would take "
            f"{config.group * steps} if each went alone",
        ]

    def collect(self, ctx: Context, prompts: Batch) -> Rollouts:
        """The steps in every tree's window that are to be trained."""
        config, layers = self.config, self.layers()
        starts = self.windows(ctx.denoiser)
        first = [starts[int(rng.integers(len(starts)))] for rng in ctx.rng("window", prompts)]
        count = max(1, round(config.share * config.depth))
        chosen = [set(rng.permutation(config.depth)[:count].tolist()) for rng in ctx.rng("steps", prompts)]
        walk = self.walk(ctx, prompts)
        kept: list[Layer] = []
        ids: list[str] = []
        while not walk.done:
            depth = [walk.k - first[row] for row in walk.row]
            inside = [0 <= i < config.depth for i in depth]
            if not any(inside):
                walk.step(eta=0.0)
                continue
            walk.output()  # before the fork: one pass for all children
            parents = walk.fork([config.branch if noisy else 1 for noisy in inside])
            kept = [Layer(x.taken, x.mine, x.parents, [x.node[i] for i in parents], x.eta) for x in kept]
            eta = [layers[depth[i]] if inside[i] else 0.0 for i in parents]
            mine = [i for i, parent in enumerate(parents) if inside[parent] and depth[parent] in chosen[walk.row[i]]]
            step = walk.step(eta=on_device(eta, ctx.device))
            if mine:
                kept.append(Layer(step, mine, parents, list(range(len(walk))), [eta[i] for i in mine]))
                ids += [f"{walk.ids[i]}@{step.k}" for i in mine]
        return self.grown(ctx, prompts, ids, kept, self.total(self.score(ctx, walk.x, walk.texts)))

    def grown(self, ctx: Context, prompts: Batch, ids: list[str], kept: list[Layer], rewards: Tensor) -> Rollouts:
        """Items of the layers, each with the rewards (N,) of the leaves below it."""
        leaves: list[int] = []
        found: dict[str, list[Tensor]] = {"reward": [], "prompt_mean": []}
        for layer in kept:
            below = means_below(layer.node, rewards)
            above = means_below([layer.parents[node] for node in layer.node], rewards)
            found["reward"].append(below[layer.mine])
            found["prompt_mean"].append(above[[layer.parents[i] for i in layer.mine]])
            one = {node: leaf for leaf, node in enumerate(layer.node)}
            leaves += [one[i] for i in layer.mine]
        latents, columns = self.held([layer.taken.take(layer.mine) for layer in kept])
        columns["eta"] = on_device([eta for layer in kept for eta in layer.eta], ctx.device)
        columns["reward"] = torch.cat(found["reward"])
        if self.config.credit == "siblings":
            columns["prompt_mean"] = torch.cat(found["prompt_mean"])
        return self.rated(prompts, rewards, ids, leaves, latents, columns)
