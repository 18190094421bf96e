"""Trainers on a random tiny U-Net and random latents: what the contract tests run every method in."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from eval_tiny import write_tiny_clip
from peft import LoraConfig
from tiny import SD_SCHEDULE, tiny_unet, tiny_vae
from torch import Tensor, nn

from diffalign import keyed
from diffalign.context import Context
from diffalign.data.batch import Batch, Cond
from diffalign.data.source import Source
from diffalign.denoiser import Denoiser
from diffalign.methods import make_method
from diffalign.methods.base import Loss, Method, MethodConfig, Needs, Paper, Phase
from diffalign.recipe import TrainRecipe
from diffalign.rewards import load_rewards
from diffalign.roles import Roles
from diffalign.setup import build_modules
from diffalign.trainer import Trainer

WIDTH, TOKENS = 16, 5
USERS = ("ann", "bob", "cem")
SAMPLED = {"reward": "tiny-pickscore", "members": 2, "steps": 2, "share": 0.5, "guidance": 1.0}


class Rows:
    """Random rows of a kind in memory, with what a cache offers to a Source."""

    def __init__(self, n: int = 12, seed: int = 3, kind: str = "pair") -> None:
        self.kind = kind
        self.ids = [f"row-{i}" for i in range(n)]
        self.prompts = [f"a {name}" for name in self.ids]
        self.places = np.zeros(n, np.uint16)
        self.chosen = keyed.normal((n, 4, 8, 8), seed, "chosen")
        self.rejected = keyed.normal((n, 4, 8, 8), seed, "rejected")
        self.embeds = keyed.normal((n, TOKENS, WIDTH), seed, "text")
        scores = keyed.normal((2, n), seed, "scores")
        self.columns = {"chosen_score": scores.amax(0) + 1, "rejected_score": scores.amin(0) - 1}
        self.columns["user"] = torch.arange(n) % len(USERS) * 1.0
        if kind == "rated":
            self.columns["label"] = (torch.arange(n) % 3 > 0) * 2.0 - 1
        if kind == "ranked":  # lists of four, every third one of three, whose last picture is there again
            self.third = keyed.normal((n, 4, 8, 8), seed, "third")
            short = torch.arange(n) % 3 == 2
            self.fourth = torch.where(short[:, None, None, None], self.third, keyed.normal((n, 4, 8, 8), seed, "4th"))
            falling = keyed.normal((n, 4), seed, "ranks").sigmoid().sort(1, descending=True).values
            falling[short, 3] = math.nan
            self.columns |= {f"score_{k}": falling[:, k] for k in range(4)}
            for name in ("beauty", "truth"):
                values = torch.where(falling.isnan(), falling, keyed.normal((n, 4), seed, name))
                self.columns |= {f"{name}_{k}": values[:, k] for k in range(4)}

    def latents(self) -> dict[str, Tensor]:
        """Those that batches of this kind have."""
        if self.kind == "ranked":
            return {f"image_{k}": x for k, x in enumerate((self.chosen, self.rejected, self.third, self.fourth))}
        if self.kind == "prompt":
            return {}
        return {"chosen": self.chosen, "rejected": self.rejected} if self.kind == "pair" else {"image": self.chosen}

    def batch(self, indices: Sequence[int], visits: Sequence[int], seed: int = 0) -> Batch:
        rows = list(indices)
        return Batch(
            tuple(self.ids[i] for i in rows),
            tuple(visits),
            {name: latents[rows] for name, latents in self.latents().items()},
            {"prompt": Cond(self.embeds[rows])},
            {name: column[rows] for name, column in self.columns.items()},
            torch.ones(len(rows)),
            prompts=tuple(self.prompts[i] for i in rows),
        )


def forward(unet: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    dtype = next(unet.parameters()).dtype
    return unet(x.to(dtype), t, cond.embeds.to(dtype), added_cond_kwargs=cond.added).sample.float()


def make_roles(names: Sequence[str] = ("student",), storage: str = "adapters", **options: Any) -> Roles:
    torch.manual_seed(1)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets) if storage == "adapters" else None
    return Roles(tiny_unet(cross=WIDTH), forward, names, lora, **options)


def make_context(roles: Roles, seed: int = 0, **options: Any) -> Context:
    uncond = Cond(torch.zeros(1, TOKENS, WIDTH))
    denoiser, device = Denoiser.from_config(SD_SCHEDULE), torch.device("cpu")
    return Context(roles, denoiser, seed, device, uncond, latent_shape=(4, 8, 8), **options)


@functools.cache
def _vae() -> Any:
    torch.manual_seed(2)
    return tiny_vae().requires_grad_(False)


@functools.cache
def small_clip() -> str:
    """The folder of a random CLIP of few weights, whose scale does not make fp16's losses overflow."""
    folder = Path(os.environ["DIFFALIGN_CACHE"]) / "small-clip"
    return str(folder if (folder / "config.json").is_file() else write_tiny_clip(folder, tau=5.0))


def tools(method: Method[Any], prompts: Sequence[str] = ()) -> dict[str, Any]:
    """What a method's context holds besides: a VAE's decoder (8 x 8 latents, 64 px), and its scorers."""
    found: dict[str, Any] = {}
    if method.online:  # many are decoded: as they are
        found["decoder"] = lambda latents: latents[:, :3].sigmoid()
    elif method.needs.decode:
        found["decoder"] = lambda latents: (_vae().decode(latents).sample / 2 + 0.5).clamp(0, 1)
    return {**found, "rewards": _rewards(method.rewards(), tuple(prompts), method.needs)}


@functools.cache
def _rewards(names: str, prompts: tuple[str, ...], needs: Needs) -> dict[str, Any]:
    method: Any = SimpleNamespace(rewards=lambda: names, needs=needs)
    return load_rewards(method, torch.device("cpu"), None, prompts)


def family() -> Any:
    """What ``Method.build`` looks at of a model."""
    unet, text = tiny_unet(cross=WIDTH), Cond(keyed.normal((1, TOKENS, WIDTH), 4, "empty"))
    settings = {"family": "sd1", "device": torch.device("cpu"), "scheduler_config": SD_SCHEDULE}
    return SimpleNamespace(unet=unet, encode_prompts=lambda texts: text, **settings)


@functools.cache
def shared_family() -> Any:
    """One for all trainers, which only read it."""
    return family()


def make_trainer(
    method: Method[Any],
    *,
    storage: str = "adapters",
    seed: int = 0,
    rows: Rows | None = None,
    checkpointing: bool = False,
    autocast: torch.dtype | None = None,
    accelerator: Accelerator | None = None,
    **train: Any,
) -> Trainer:
    settings = TrainRecipe(**{"batch": 4, "lr": 1e-3, "seed": seed, "steps": 100} | train)
    method.users = USERS
    modules = build_modules(method, shared_family(), seed)
    names = [role for role in method.roles if role not in modules]
    roles = make_roles(
        names, storage, modules=modules, checkpointing=checkpointing, reference=method.needs.reference, seed=seed
    )
    rows = rows or Rows(kind=method.needs.batch)
    uncond = Cond(torch.zeros(1, TOKENS, WIDTH))
    source = Source(rows, range(len(rows.ids)), seed, uncond, group=method.group)  # type: ignore[arg-type]
    ctx = make_context(roles, seed, autocast=autocast, **tools(method, rows.prompts))
    return Trainer(method, ctx, source, settings, accelerator or Accelerator(cpu=True))


def warm(trainer: Trainer, steps: int = 2) -> Trainer:
    """A few steps, so that no adapter is at its neutral start (LoRA's B is 0 there)."""
    for _ in range(steps):
        trainer.train_step()
    return trainer


def stirred(trainer: Trainer) -> Trainer:
    """The same away from any neutral start without the steps: every trained tensor moves a little."""
    with torch.no_grad():
        for role in trainer.optimizers:
            for name, p in trainer.roles.named_parameters(role).items():
                p.add_(5e-3 * keyed.normal((p.numel(),), "stirred", role, name).view_as(p))
    return trainer


def rows_of(trainer: Trainer, rows: Sequence[int] = (0, 1, 2, 3)) -> Batch:
    return trainer.source.load(list(rows), [0] * len(rows))


def batch_of(trainer: Trainer, rows: Sequence[int] = (0, 1, 2, 3)) -> Batch:
    """What a loss is given for these rows: the rows, or of an online method one item of each row's samples."""
    batch, method = rows_of(trainer, rows), trainer.method
    if not method.online:
        return batch
    with torch.no_grad():
        found = method.collect(trainer.ctx, batch)
    trainer.ctx.stats = dict(found.stats)
    return found.take([found.row.index(row) for row in range(len(rows))])


def weights(trainer: Trainer) -> list[Tensor]:
    return [p.detach().clone() for role in trainer.optimizers for p in trainer.roles.parameters(role)]


def gap(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference relative to the largest weight."""
    scale = max(float(x.abs().max()) for x in a)
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True)) / scale


class TwoRoleConfig(MethodConfig):
    critic_steps: int = 2


class TwoRole(Method[TwoRoleConfig]):
    """A student and a critic (fake score and head) in turn, as distillation methods are built: two phases, three
    trained roles, fresh and reused batches, gradients through a frozen role, features by hook."""

    Config = TwoRoleConfig
    paper = Paper("an alternating method", "0000.00000", "alternation")
    needs = Needs(batch="image")
    roles = ("student", "fake", "head")
    phases = (Phase("critic", ("fake", "head"), "critic_steps"), Phase("student", ("student",), 1, "reuse"))

    def build(self, family: Any) -> dict[str, nn.Module]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            return {"head": nn.Sequential(nn.Conv2d(32, 4, 1), nn.SiLU(), nn.Flatten(), nn.Linear(64, 1))}

    def loss(self, ctx: Context, batch: Batch, phase: Phase) -> Loss:
        cond, head = batch.cond["prompt"], ctx.roles.modules["head"]
        t, noise = ctx.draw(batch)
        _, latent = ctx.draw(batch, "generate")
        last = torch.full_like(t, 999)
        with torch.set_grad_enabled(phase.name == "student"):
            x = ctx.denoiser.to_x0(ctx.model("student", latent, last, cond), latent, last)
        x_t = ctx.denoiser.add_noise(x, noise, t)
        score = head(ctx.features("fake", x_t, t, cond)).flatten()
        if phase.name == "critic":
            real = ctx.denoiser.add_noise(batch.latents["image"], noise, t)
            truth = head(ctx.features("fake", real, t, cond)).flatten()
            error = ctx.error("fake", x_t, t, cond, noise)
            return Loss(error + score.sigmoid() - truth.sigmoid(), batch.weight, {"fake_error": error})
        with torch.no_grad():
            gradient = ctx.model("fake", x_t, t, cond) - ctx.model("base", x_t, t, cond)
        values = (x * gradient).mean((1, 2, 3)) - 0.1 * score.sigmoid()
        return Loss(values, batch.weight)


def every_method() -> list[Method[Any]]:
    """Each method of the package, and the alternating one of this file."""
    from diffalign.methods import method_modules

    # beta 5000 turns the rounding of errors near 1 into 1e-3 of a logit; the contract is about everything else
    moderate = {
        "dpo": {"beta": 100.0},
        "dcpo": {"beta": 100.0},
        "dspo": {"beta": 1.0},  # at the authors' 0.001 the logit is rounding
        "inpo": {"beta": 100.0, "eta": 0.0, "inversion_steps": 3},  # winner's and loser's eta noise differ
        "smpo": {"beta": 20.0, "inversion_steps": 3, "score_range": [-4.0, 4.0]},
        "inversion_dpo": {"beta": 100.0, "inversion_steps": 3},
        "softrepa": {"group": 2, "times": 100, "temperature": 1.0},  # errors near 1: at 0.07 the contrast vanishes
        "kto": {"beta": 100.0},
        "rankdpo": {"beta": 100.0},
        "spm": {"start": small_clip()},
        "spo": {
            "reward": f"spm={small_clip()}",
            "steps": 4,
            "start_step": 1,
            "pool": 2,
            "threshold": -1.0,
            "beta": 1.0,
        },
        "draft": {"reward": f"pickscore={small_clip()}", "steps": 3, "through": 2, "spread": 1.0, "guidance": 1.0},
        "capo": {"beta": 100.0},
        "ppd": {"beta": 100.0, "user_dropout": 0.25},
        "agd": {"hidden": 8, "heads": 2, "steps": 4, "updates": 1},
        "dmd": {"regression_weight": 0.0},  # its rows are of `pairs teacher`
        "sid": {"timesteps": [999, 499], "start": "unit", "gan_weight": 0.1, "step_fake": True},
        "tdm": {"timesteps": [899, 449], "loss": "mse", "step_fake": True},  # pseudo-Huber makes a sign of rounding
        "lcm": {"loss": "mse", "target_ema": 0.5},  # as TDM's
        "pcm": {"loss": "mse", "gan_width": 8, "target_ema": 0.5},
        "scm": {"tangent": "jvp"},  # differences are rounding, a thousandfold
        "distillation_dpo": {"timesteps": [999], "critic_steps": 1},
        "dmd2": {"timesteps": [999, 499], "critic_steps": 1, "gan_weight": 0.1, "gan_width": 8, "step_fake": True},
        "decoupled_dmd": {"timesteps": [999], "critic_steps": 1},
        "f_distill": {"timesteps": [999], "critic_steps": 1, "gan_width": 8},
        "twinflow": {"robust": 2.0, "width": 1.0, "target_ema": 0.5, "order": 2},  # as TDM's
        "disback": {"timesteps": [999, 499], "critic_steps": 1},
        "phased_dmd": {"timesteps": [999, 499], "critic_steps": 1},
        "ddpo": {**SAMPLED, "clip": 0.2},
        "grpo": {**SAMPLED, "clip": 0.2, "kl": 0.1},
        "d3po": {**SAMPLED, "beta": 10.0},
        "tree_rpo": {**SAMPLED, "steps": 3, "members": 1, "depth": 1, "clip": 0.2},
        "pso_online": {**SAMPLED, "timesteps": [999, 499], "beta": 10.0},
        "pso_pictures": {"timesteps": [999, 499], "beta": 100.0},
        "nft": {**SAMPLED, "share": 1.0},
        "dro": {"steps": 2, "updates": 2, "kept": 2},
        "diff_instruct": {"timesteps": [399], "reward": "tiny-pickscore", "reward_weight": 0.1},
    }
    return [make_method(name, moderate.get(name, {})) for name in method_modules()] + [TwoRole(TwoRoleConfig())]
