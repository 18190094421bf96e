"""D3PO: of two samples of a prompt, every step of the preferred one is raised over the other's (arXiv 2311.13231)."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from ...denoiser import log_prob
from ...rollouts import Rollouts
from ..base import Loss, Paper, Phase
from ..rollout import RolloutConfig, ScoredRollouts, clipped_pair_loss, pair_bounds, step_kl

if TYPE_CHECKING:
    from ...context import Context
    from ...data.batch import Batch


def dominance(first: Tensor, second: Tensor) -> Tensor:
    """1, -1 or 0 (N,): whether the first scores (N, R) are nowhere below the second and somewhere above, the other way
    round, or neither (a tie, or scorers that disagree)."""
    above, below = first >= second, first <= second
    return (above.all(1) & ~below.all(1)).float() - (below.all(1) & ~above.all(1)).float()


class D3POConfig(RolloutConfig):
    """Settings of D3PO."""

    members: int = Field(2, ge=2, description="samples of each prompt in a round; all pairs of them are compared")
    shared_noise: bool = Field(True, description="whether all samples of a prompt start from one noise")
    beta: float = Field(0.1, gt=0, description="strength of the tie to the base")
    clip: float | None = Field(0.1, gt=0, lt=1, description="half the band of each ratio; null: the paper's, without")


class D3PO(ScoredRollouts[D3POConfig]):
    """DPO on the steps of two trajectories; the verdict on the final pictures holds for all their steps."""

    Config = D3POConfig
    paper = Paper(
        title="Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model",
        arxiv="2311.13231",
        implements="pairs of trajectories from one noise, judged by scorers (by dominance where there are several), "
        "and the released code's held ratios",
        differs="pairs without a winner are left out of the mean instead of counting as log 2; every update holds some "
        "steps of every pair",
    )

    def notes(self) -> list[str]:
        config = self.config
        if config.clip is None:
            return []
        low, high = pair_bounds(config.beta, config.clip)
        if high - low >= 0.05:
            return []
        return [
            f"with method.beta={config.beta:g} and method.clip={config.clip:g} the loss stays within {low:.4f} and "
            f"{high:.4f}: look at the reward, not at the loss"
        ]

    def collect(self, ctx: Context, prompts: Batch) -> Rollouts:
        """An item is a step of a pair of one prompt's samples, the preferred one first."""
        config, walk, chosen = self.config, self.walk(ctx, prompts), self.chosen_steps(ctx, prompts)
        steps = []
        while not walk.done:
            taken = walk.step()
            if any(taken.k in ks for ks in chosen):
                steps.append(taken)
        scores = self.score(ctx, walk.x, walk.texts)
        pairs = [
            (row, row * config.members + a, row * config.members + b)
            for row in range(len(prompts))
            for a, b in combinations(range(config.members), 2)
        ]
        first, second = ([pair[place] for pair in pairs] for place in (1, 2))
        verdict = dominance(*(self.weighted(scores)[side] for side in (first, second)))
        turned = (verdict < 0)[:, None, None, None]
        ids: list[str] = []
        place: list[int] = []
        kept: dict[str, list[Tensor]] = {name: [] for name in ("x_t_won", "x_t_lost", "x_s_won", "x_s_lost", "t", "s")}
        for taken in steps:
            mine = [i for i, (row, _, _) in enumerate(pairs) if taken.k in chosen[row]]
            ids += [f"{walk.ids[first[i]]}|{walk.ids[second[i]]}@{taken.k}" for i in mine]
            place += mine
            kept["t"].append(taken.t[first][mine])
            kept["s"].append(taken.s[first][mine])
            for name, x in (("x_t", taken.x_t), ("x_s", taken.x_s)):
                one, other = x[first], x[second]
                kept[f"{name}_won"].append(torch.where(turned, other, one)[mine])
                kept[f"{name}_lost"].append(torch.where(turned, one, other)[mine])
        held = {name: torch.cat(values) for name, values in kept.items()}
        columns = {name: held.pop(name) for name in ("t", "s")}
        each = len(pairs) // len(prompts)
        rewards = self.total(scores).view(len(prompts), -1)
        metrics = {
            "reward": rewards.mean(1),
            "reward_spread": rewards.std(1, unbiased=False),
            "decided": verdict.abs().view(-1, each).mean(1),
        }
        return Rollouts(prompts, ids, [pairs[i][0] for i in place], held, columns, verdict.abs()[place], metrics)

    def loss(self, ctx: Context, batch: Batch, phase: Phase) -> Loss:
        """``clipped_pair_loss`` of the items."""
        x_t, x_s = (torch.cat([batch.latents[f"{name}_{side}"] for side in ("won", "lost")]) for name in ("x_t", "x_s"))
        found = self.replay(ctx, "student", x_t, batch)
        with torch.no_grad():
            base = self.replay(ctx, "base", x_t, batch)
        (won, lost), (base_won, base_lost) = (log_prob(x_s, step.mean, step.std).chunk(2) for step in (found, base))
        values, logits = clipped_pair_loss(won, lost, base_won, base_lost, self.config.beta, self.config.clip)
        metrics = pair_metrics(won - base_won, lost - base_lost, logits, self.config.clip)
        metrics["kl"] = torch.stack(step_kl(found.mean.detach(), base.mean, found.std).chunk(2)).mean(0)
        return Loss(values, batch.weight, metrics)


def pair_metrics(up: Tensor, down: Tensor, logits: Tensor, clip: float | None) -> dict[str, Tensor]:
    """Curves of a pair of steps, from the log-ratios (B,) of the preferred and of the other."""
    up, down = up.detach().exp(), down.detach().exp()
    found = {"ratio_won": up, "ratio_lost": down, "accuracy": (logits.detach() > 0).float()}
    if clip is not None:
        found |= {"clipped_won": ((up - 1).abs() > clip).float(), "clipped_lost": ((down - 1).abs() > clip).float()}
    return found
