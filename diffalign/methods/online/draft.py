"""DRaFT and AlignProp: a scorer's own gradient through the last steps of sampling (arXiv 2309.17400, 2310.03739)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from ...denoiser import Denoiser
from ...errors import UserError
from ...rollouts import Policy, many_steps, whole_picture
from ..base import Loss, Method, MethodConfig, Needs, Paper, Phase

if TYPE_CHECKING:
    from ...context import Context
    from ...data.batch import Batch


class DRaFTConfig(MethodConfig):
    """Settings of DRaFT and AlignProp."""

    reward: str = Field("pickscore", description="the scorer that is climbed; it has to give gradients")
    guard: str = Field(
        "", description="a scorer that is looked at alone: train.guards.hacking acts where it falls as the reward rises"
    )
    steps: int = Field(50, ge=1, description="DDIM steps of a sample")
    eta: float = Field(0.0, ge=0, description="share of new noise in a step")
    guidance: float = Field(5.0, ge=0, description="of the student, in sampling as in training; 1 is none")
    through: int = Field(1, ge=1, description="K: the last steps that the gradient goes through")
    spread: float = Field(0.0, ge=0, description="deviation of a sample's own K (AlignProp: 5, around 8 of 50 steps)")
    coefficient: float = Field(0.01, gt=0, description="of the reward; it counts beside the anchor and clipping")
    anchor: float = Field(0.0, ge=0, description="weight of the mean squared distance of outputs to the base's")


class DRaFT(Method[DRaFTConfig]):
    """Sample, decode, score, and follow the score's gradient back through the VAE and the last K steps.

    It is quick, and it hacks: pictures drift to whatever the scorer likes. So another scorer can stand guard, the
    base can hold the outputs (``anchor``), and the samples' diversity is watched as in every run.
    """

    Config = DRaFTConfig
    paper = Paper(
        title="Directly Fine-Tuning Diffusion Models on Differentiable Rewards",
        arxiv="2309.17400",
        implements="DRaFT-K, and AlignProp (Aligning Text-to-Image Diffusion Models with Reward Backpropagation, arXiv "
        "2310.03739) by a K that is drawn; a guard and an anchor of our own",
        differs="K is drawn for each sample, not for each batch; without DRaFT-LV",
    )
    needs = Needs(batch="prompt", draws=(), reward=True, decode=True, reference=False)

    def __init__(self, config: DRaFTConfig) -> None:
        super().__init__(config)
        self.needs = replace(type(self).needs, reference=config.anchor > 0)

    @property
    def samples(self) -> bool:
        return True

    def rewards(self) -> str:
        return ",".join(filter(None, (self.config.reward, self.config.guard)))

    def notes(self) -> list[str]:
        if self.config.guard:
            return []
        return ["a reward that is climbed by its own gradient gets hacked: let another scorer watch with method.guard"]

    def check(self, denoiser: Denoiser) -> None:
        config = self.config
        if config.through > config.steps:
            raise UserError(f"method.through {config.through} is more than the {config.steps} steps; lower it")
        if denoiser.prediction == "flow":
            raise UserError("method 'draft' samples by DDIM, which flow models do not; take another model")

    def policy(self, denoiser: Denoiser) -> Policy:
        """How samples are made."""
        times, ends = many_steps(denoiser, self.config.steps)
        return Policy(tuple(times), tuple(ends), "ddim", self.config.eta, self.config.guidance)

    def depths(self, ctx: Context, batch: Batch) -> list[int]:
        """K of each sample, within 1 and all steps."""
        config = self.config
        drawn = [config.through + config.spread * rng.standard_normal() for rng in ctx.rng("depth", batch)]
        return [min(max(round(depth), 1), config.steps) for depth in drawn]

    def sample(self, ctx: Context, batch: Batch) -> tuple[Tensor, Tensor]:
        """Clean latents (B, C, h, w) with a gradient through each sample's last steps, and these steps' mean squared
        distance (B,) to what the base says there; 0 without an anchor."""
        policy, depths, cond = self.policy(ctx.denoiser), self.depths(ctx, batch), whole_picture(batch)
        shape, grad, steps = ctx.shape_of(batch), torch.is_grad_enabled(), self.config.steps
        x = ctx.noise("start", batch.ids, batch.visits, shape)
        apart = torch.zeros(len(batch), device=x.device)
        for k, (time, end) in enumerate(zip(policy.times, policy.ends, strict=True)):
            learns = [steps - k <= depth for depth in depths]
            t, s = (torch.full((len(batch),), at, device=x.device) for at in (time, end))
            noise = ctx.noise(f"step-{k}", batch.ids, batch.visits, shape) if self.config.eta else None
            with torch.set_grad_enabled(grad and any(learns)):
                output = ctx.model("student", x, t, cond, policy.guidance)
                reached = policy.step(ctx.denoiser, output, x, t, s, noise).sample
                share = torch.tensor(learns, device="cpu").to(x.device, non_blocking=True).view(-1, 1, 1, 1)
                if self.needs.reference and any(learns):
                    with torch.no_grad():
                        base = ctx.model("base", x, t, cond, policy.guidance)
                    distance = (output - base).square().mean((1, 2, 3))
                    apart = apart + torch.where(share.flatten(), distance, torch.zeros_like(distance))
                x = torch.where(share, reached, reached.detach())
        counts = torch.tensor(depths, dtype=torch.float32, device="cpu").to(x.device, non_blocking=True)
        return x, apart / counts

    def loss(self, ctx: Context, batch: Batch, phase: Phase) -> Loss:
        """The score's negative, and the anchor."""
        from ...eval.scorers import parse_scorers

        config = self.config
        latents, apart = self.sample(ctx, batch)
        images = ctx.decode(latents)
        score = sum(ctx.reward(name, images, batch.prompts) for name in parse_scorers(config.reward))
        assert isinstance(score, Tensor)
        metrics = {"reward": score}
        if config.anchor:
            metrics["apart"] = apart
        if config.guard:
            with torch.no_grad():
                seen = [ctx.reward(name, images, batch.prompts) for name in parse_scorers(config.guard)]
            metrics["guard_score"] = torch.stack(seen).sum(0)
        return Loss(config.anchor * apart - config.coefficient * score, batch.weight, metrics)
