"""DiffusionNFT: denoising the model's own samples, towards the better and away from the worse (arXiv 2509.16117)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from ...rollouts import Rollouts, whole_picture
from ..base import Loss, Paper, Phase
from ..policy_gradient import AdvantageConfig, AdvantageMethod

if TYPE_CHECKING:
    from ...context import Context
    from ...data.batch import Batch


def optimality(advantage: Tensor, most: float) -> Tensor:
    """How much of a sample counts as good, in [0, 1]: 1/2 for a mean one, from advantages held within ``most``."""
    return (advantage / (2 * most) + 0.5).clamp(0, 1)


def nft_loss(
    student: Tensor, old: Tensor, x0: Tensor, good: Tensor, beta: float, scale: float, floor: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (B,) and its two parts (B,) from what the student and the one that sampled believe x0 to be, and x0 itself,
    all (B, C, h, w), and ``good`` (B,).

    ``scale`` (good / beta L+ + (1 - good) / beta L-), where L+ is the error of old + beta (student - old), L- that of
    old - beta (student - old), each over its own mean absolute error, which has no gradient. At student = old the
    gradient is ``scale`` (2 good - 1) times that of L, whatever ``beta``. Written in x0, where flow's, v's and eps's
    forms are one."""

    def error(belief: Tensor) -> Tensor:
        off = belief - x0
        return (off.square() / off.detach().abs().mean((1, 2, 3), keepdim=True).clamp_min(floor)).mean((1, 2, 3))

    towards, away = error(old + beta * (student - old)), error(old - beta * (student - old))
    return scale * (good * towards + (1 - good) * away) / beta, towards, away


class NFTConfig(AdvantageConfig):
    """Settings of DiffusionNFT."""

    members: int = Field(24, ge=1, description="samples of each prompt in a round")
    steps: int = Field(10, ge=1, description="steps of the many-step sampler")
    eta: float = Field(0.0, ge=0, description="share of new noise in a DDIM step")
    guidance: float = Field(1.0, ge=0, description="of the student, in sampling and in training; 1 is none")
    skip_last: bool = Field(True, description="leave the last step's time out of training")
    floor: float = Field(1e-4, gt=0, description="added to the deviation")
    beta: float = Field(1.0, gt=0, description="how far the implicit good and bad models are from the one that sampled")
    kl: float = Field(1e-4, ge=0, description="weight of the squared distance to the base's prediction")


class NFT(AdvantageMethod[NFTConfig]):
    """A sample needs no likelihood, so that any sampler will do: its picture is noised again at the sampler's times.

    The one that sampled is the student at the start of the round; what it says of the noised picture is kept with it.
    """

    Config = NFTConfig
    paper = Paper(
        title="DiffusionNFT: Online Diffusion Reinforcement with Forward Process",
        arxiv="2509.16117",
        implements="the forward-process objective with implicit good and bad models, for eps, v, x0 and flow networks",
        differs="the model that samples is the student at the start of the round (the release averages it slowly over "
        "rounds); samples are made by DDIM; a prompt's own deviation by default, where the release takes that of all",
    )
    likelihood = False

    def collect(self, ctx: Context, prompts: Batch) -> Rollouts:
        """Each sample's picture, noised at the sampler's times, with what the student says of it."""
        walk, chosen = self.walk(ctx, prompts), self.chosen_steps(ctx, prompts)
        while not walk.done:
            walk.step()
        rewards = self.total(self.score(ctx, walk.x, walk.texts))
        ids: list[str] = []
        samples: list[int] = []
        kept: dict[str, list[Tensor]] = {name: [] for name in ("x0", "x_t", "old", "t")}
        for k, time in enumerate(walk.policy.times):
            mine = [i for i, row in enumerate(walk.row) if k in chosen[row]]
            if not mine:
                continue
            names = [f"{walk.ids[i]}@{k}" for i in mine]
            rows = torch.tensor(mine, device="cpu").to(ctx.device, non_blocking=True)
            t, x0 = torch.full((len(mine),), time, device=ctx.device), walk.x[rows]
            visits = [prompts.visits[walk.row[i]] for i in mine]
            x_t = ctx.denoiser.add_noise(x0, ctx.noise("noised", names, visits, walk.shape), t)
            old = ctx.model("student", x_t, t, walk.told().take(rows), walk.policy.guidance)
            for name, values in (("x0", x0), ("x_t", x_t), ("old", old), ("t", t)):
                kept[name].append(values)
            ids += names
            samples += mine
        held = {name: torch.cat(values) for name, values in kept.items()}
        columns = {"t": held.pop("t")}
        return self.rated(prompts, rewards, ids, samples, held, columns)

    def loss(self, ctx: Context, batch: Batch, phase: Phase) -> Loss:
        """``nft_loss`` of the items, and ``kl`` times the squared distance to the base."""
        config, t, latents = self.config, batch.columns["t"], batch.latents
        x_t, cond = latents["x_t"], whole_picture(batch)
        good = optimality(self.advantage(batch.columns, ctx.stats), config.most)
        output = ctx.model("student", x_t, t, cond, config.guidance)
        student, old = (ctx.denoiser.to_x0(said, x_t, t) for said in (output, latents["old"]))
        values, towards, away = nft_loss(student, old, latents["x0"], good, config.beta, config.most)
        metrics = {"towards": towards.detach(), "away": away.detach(), "good": good}
        metrics["moved"] = (output.detach() - latents["old"]).square().mean((1, 2, 3))
        if config.kl or (config.watch and ctx.repeat == 0):
            with torch.no_grad():
                base = ctx.model("base", x_t, t, cond, config.guidance)
            far = (output - base).square().mean((1, 2, 3))
            metrics["base_distance"] = far.detach()
            values = values + config.kl * far if config.kl else values
        return Loss(values, batch.weight, metrics)
