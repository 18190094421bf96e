"""SPO: each denoising step learns from a win and a loss in a pool of its own (Liang et al. 2024, arXiv 2406.04314)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from ...denoiser import Denoiser, Step, log_prob
from ...errors import UserError
from ...rollouts import Rollouts, Taken, Walk
from ..base import Loss, Needs, Paper, Phase
from ..rollout import AT_ONCE, RolloutMethod, SamplerConfig, clipped_pair_loss, pair_bounds, step_kl

if TYPE_CHECKING:
    from ...context import Context
    from ...data.batch import Batch

NARROW = 0.05  # a loss that cannot move further tells nothing


class SPOConfig(SamplerConfig):
    """Settings of SPO; the defaults are the authors' for SD1.5."""

    reward: str = Field(
        "spm=runs/spm-sd15",
        description="who judges what a step believes: spm=RUN of method spm; another scorer is not told the time",
    )
    pool: int = Field(4, description="candidates of a step, of which the best and the worst make a pair")
    start_step: int = Field(4, ge=0, description="steps that are sampled plainly before the first pool")
    segment: int = Field(
        1, ge=1, description="steps that candidates go apart before they are judged; one verdict for all (SDXL: 4)"
    )
    threshold: float = Field(
        0.3, ge=-1, lt=1, description="least difference of the pair's softmax shares; below 0 every pair is kept"
    )
    beta: float = Field(10.0, gt=0, description="of the logit")
    clip: float | None = Field(
        0.1, gt=0, lt=1, description="half the band of each ratio of densities; null: none, as in the paper"
    )
    time_weight: Literal["none", "equal", "gradspo"] = Field(
        "none",
        description="what a difference of two noises weighs at a step: as the densities have it, the same at all "
        "steps, or GradSPO's sqrt(1 - alpha_bar)",
    )

    @field_validator("pool")
    @classmethod
    def _two(cls, pool: int) -> int:
        if pool < 2:
            raise ValueError("a pool of one has no winner and loser; make it 2 or more")
        return pool


def choose(scores: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Places of the best and of the worst (P,), and whether the pair is kept (P,) in fp32, from scores (P, pool).

    Kept where p_w - p_l > ``threshold`` for the softmax of the two scores, which is tanh of half their gap: 0.3 is a
    gap of 0.619. Equal scores are never kept from 0 on."""
    won, lost = scores.argmax(1), scores.argmin(1)
    gap = (scores.amax(1) - scores.amin(1)).double()
    return won, lost, (torch.tanh(gap / 2) > threshold).float()


class SPO(RolloutMethod[SPOConfig]):
    """From ``start_step`` on every step makes a pool of next states from one state. A step-aware preference model
    scores the picture that each of them leads to by the network's own x0; the best and the worst are the pair, where
    they are far enough apart. A random one of the pool goes on, whatever its score and whether the pair is kept.

    With ``segment`` above 1 candidates go that many steps apart before they are judged, and the verdict holds for all
    of these transitions, of which only the first has one state for both (the authors' way for SDXL).
    """

    Config = SPOConfig
    paper = Paper(
        title="Aesthetic Post-Training Diffusion Models from Generic Preferences with Step-by-step Preference "
        "Optimization",
        arxiv="2406.04314",
        implements="pools of candidates a step or segment, judged by a step-aware preference model, a random survivor; "
        "the pair loss with or without the code's clipping; GradSPO's weights by option",
        differs="the updates of a round are a number, not so many pairs each; gradients are really clipped where "
        "train.max_grad_norm says so; one call serves a pair of one state",
    )
    needs = Needs(batch="prompt", draws=(), reward=True, scores_only=True, decode=True)
    evens = "method.time_weight=equal weighs all steps alike"

    def notes(self) -> list[str]:
        config = self.config
        if config.clip is None:
            return []
        low, high = pair_bounds(config.beta, config.clip)
        if high - low >= NARROW:
            return []
        return [f"method.beta {config.beta:g} keeps the loss within {low:.4f} and {high:.4f}: its curve says little"]

    def trained_steps(self, denoiser: Denoiser) -> list[int]:
        return [k for k in super().trained_steps(denoiser) if k >= self.config.start_step]

    def check(self, denoiser: Denoiser) -> None:
        steps = len(self.policy(denoiser))
        if self.config.start_step >= steps:
            raise UserError(
                f"method.start_step {self.config.start_step} leaves none of the {steps} steps to learn from; lower it"
            )
        super().check(denoiser)

    # ---- a round ----------------------------------------------------------------------------------------------------

    def collect(self, ctx: Context, prompts: Batch) -> Rollouts:
        """The transitions of every pool's best and worst, with weight 0 where the pair is not kept."""
        config, pool = self.config, self.config.pool
        walk = Walk(ctx, prompts, self.policy(ctx.denoiser))
        may, pairs = set(self.trained_steps(ctx.denoiser)), _Pairs(self.scales(ctx.denoiser).to(ctx.device))
        while walk.k < config.start_step:
            walk.step()
        first = torch.arange(len(prompts), device=ctx.device) * pool
        means, spreads, shares = [], [], {}
        while not walk.done:
            walk.output()  # before the fork: one call for all of a pool
            walk.fork(pool)
            end = min(walk.k + config.segment, len(walk.policy))
            steps = [walk.step() for _ in range(walk.k, end)]
            scores = self.judge(ctx, walk).view(len(prompts), pool)
            won, lost, kept = choose(scores, config.threshold)
            means.append(scores.mean(1))
            spreads.append(scores.amax(1) - scores.amin(1))
            shares[f"kept_t{0 if walk.done else walk.policy.times[walk.k]}"] = kept
            for taken in steps:
                if taken.k in may:
                    pairs.add(taken, prompts, first + won, first + lost, {"kept": kept, "gap": spreads[-1]})
            if not walk.done:
                drawn = survivors(ctx, prompts, walk.k, pool)
                walk.take([row * pool + place for row, place in enumerate(drawn)])
        metrics = {
            "preference": torch.stack(means).mean(0),
            "reward": means[-1],
            "preference_spread": torch.stack(spreads).mean(0),
            **shares,
        }
        if config.threshold >= 0:  # else all pairs are
            metrics["kept"] = torch.stack(list(shares.values())).mean(0)
        return pairs.rollouts(prompts, metrics, config.segment > 1)

    def scales(self, denoiser: Denoiser) -> Tensor:
        """What the log-ratios of each step are multiplied by, fp32 (K,) on the CPU."""
        policy, kind = self.policy(denoiser), self.config.time_weight
        if kind == "none":
            return super().scales(denoiser)
        weights = policy.weights(denoiser)
        wanted = torch.ones_like(weights) if kind == "equal" else denoiser.sigma(torch.tensor(policy.times)).flatten()
        return torch.where(weights > 0, wanted / weights, torch.zeros_like(weights))

    def judge(self, ctx: Context, walk: Walk) -> Tensor:
        """Scores (N,) of what the samples lead to: the x0 that the network says at their time, or where they ended."""
        latents = walk.x if walk.done else walk.x0()
        t = torch.zeros(len(walk), dtype=torch.int64, device=ctx.device) if walk.done else walk.t
        found, texts = [], walk.texts
        for start in range(0, len(walk), AT_ONCE):
            some = slice(start, start + AT_ONCE)
            images = ctx.decode(latents[some])
            scores = [ctx.reward(name, images, texts[some], t[some]).float() for name in ctx.rewards]
            found.append(torch.stack(scores).sum(0))
        return torch.cat(found)

    # ---- an update --------------------------------------------------------------------------------------------------

    def sides(self, ctx: Context, role: str, batch: Batch) -> tuple[Tensor, Tensor, Step]:
        """Mean log-density (B,) of the winner's and of the loser's step under ``role``, and the steps themselves: one
        Gaussian for both where they come from one state, else the winners' first."""
        latents = batch.latents
        if "lost_x_t" not in latents:
            found = self.replay(ctx, role, latents["x_t"], batch)
            won, lost = (log_prob(latents[name], found.mean, found.std) for name in ("x_won", "x_lost"))
            return won, lost, found
        found = self.replay(ctx, role, torch.cat([latents["x_t"], latents["lost_x_t"]]), batch)
        won, lost = log_prob(torch.cat([latents["x_won"], latents["x_lost"]]), found.mean, found.std).chunk(2)
        return won, lost, found

    def loss(self, ctx: Context, batch: Batch, phase: Phase) -> Loss:
        """The pair loss of transitions; one call of each network where both members come from one state."""
        *now, step = self.sides(ctx, "student", batch)
        with torch.no_grad():
            *base, base_step = self.sides(ctx, "base", batch)
        scale, config = batch.columns["scale"], self.config
        won, lost, base_won, base_lost = (side * scale for side in (*now, *base))
        values, logits = clipped_pair_loss(won, lost, base_won, base_lost, config.beta, config.clip)
        logits = logits.detach()
        metrics = {
            "ratio_won": (won - base_won).detach().exp(),
            "ratio_lost": (lost - base_lost).detach().exp(),
            "logit": logits,
            "accuracy": (logits > 0).float() + 0.5 * (logits == 0).float(),
            "saturated": (logits.abs() > 5).float(),
            "kl": step_kl(step.mean.detach(), base_step.mean, step.std)[: len(batch)],
            "gap": batch.columns["gap"],
        }
        return Loss(values, batch.weight, metrics)


def survivors(ctx: Context, prompts: Batch, k: int, pool: int) -> list[int]:
    """Who of each prompt's pool goes on from step ``k``: drawn by a key of its own, so that no score enters."""
    return [int(rng.integers(pool)) for rng in ctx.rng(f"survivor-{k}", prompts)]


class _Pairs:
    """Transitions of a round, as they come."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale
        self.ids: list[str] = []
        self.held: dict[str, list[Tensor]] = {}

    def add(self, taken: Taken, prompts: Batch, won: Tensor, lost: Tensor, more: dict[str, Tensor]) -> None:
        """A step of every prompt's pool, of which ``won`` and ``lost`` (P,) are the places; ``more``: columns (P,)."""
        self.ids += [f"{name}@{taken.k}" for name in prompts.ids]
        found = {"x_t": taken.x_t[won], "x_won": taken.x_s[won], "x_lost": taken.x_s[lost], **more}
        found |= {"t": taken.t[won], "s": taken.s[won], "lost_x_t": taken.x_t[lost]}
        found["scale"] = self.scale[taken.k].expand(len(prompts))
        for name, values in found.items():
            self.held.setdefault(name, []).append(values)

    def rollouts(self, prompts: Batch, metrics: dict[str, Tensor], apart: bool) -> Rollouts:
        """All of them; ``apart``: the two of a pair may come from states of their own."""
        held = {name: torch.cat(values) for name, values in self.held.items() if apart or name != "lost_x_t"}
        latents = {name: held.pop(name) for name in list(held) if "x_" in name}
        rows = list(range(len(prompts))) * (len(self.ids) // len(prompts))
        return Rollouts(prompts, self.ids, rows, latents, held, held.pop("kept"), metrics)
