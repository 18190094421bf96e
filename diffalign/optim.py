"""Optimisers by name, the learning rate as a function of the step, and an update that skips non-finite gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from .errors import UserError
from .recipe import TrainRecipe


def lr_factor(recipe: TrainRecipe, step: int) -> float:
    """Multiplier of the learning rate at update ``step`` (0-based): linear warm-up to 1, then the schedule.

    The first update is 1/warmup, not 0, so that no update is lost."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    if recipe.schedule == "constant":
        return 1.0
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    if recipe.period is not None:
        done = (step - recipe.warmup) % recipe.period / recipe.period
    if recipe.schedule == "linear":
        return max(0.0, 1.0 - done)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def check_optimizer(recipe: TrainRecipe) -> None:
    """Raises UserError when the optimiser's package is not installed."""
    if recipe.optimizer == "adamw8bit" and find_spec("bitsandbytes") is None:
        raise UserError(
            "train.optimizer=adamw8bit needs bitsandbytes; pip install 'diffalign[8bit]' or set train.optimizer=adamw"
        )


def make_optimizer(recipe: TrainRecipe, parameters: Sequence[nn.Parameter], role: str) -> torch.optim.Optimizer:
    """The optimiser of one role over fp32 parameters."""
    lr = recipe.role_lr.get(role, recipe.lr)
    group = list(parameters)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(
            group, lr=lr, betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay, fused=True
        )
    if recipe.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        # the settings of Diffusion-DPO's SDXL launcher: a plain learning rate, no relative step, no parameter scale
        return Adafactor(
            group,
            lr=lr,
            weight_decay=recipe.weight_decay,
            scale_parameter=False,
            relative_step=False,
            clip_threshold=1.0,
        )
    import bitsandbytes as bnb

    optimizer: torch.optim.Optimizer = bnb.optim.AdamW8bit(
        group, lr=lr, betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay
    )
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """One learning rate for every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def total_norm(parameters: Sequence[nn.Parameter], across: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Global L2 norm of the gradients, a scalar on their device, without a synchronisation.

    ``across`` sums over processes where each holds a part of the gradients."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm if across is None else across(norm.square()).sqrt()


def guarded_step(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    max_norm: float | None,
    across: Callable[[Tensor], Tensor] | None = None,
    idle: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Clip, then update unless a gradient is not finite. Returns (norm before clipping, 1.0 if skipped else 0.0).

    ``across``: see `total_norm`. Where ``idle`` is 1 nothing is updated, which counts as no skip. Fused optimisers
    decide on the device and so cost no synchronisation; the others read one number."""
    norm = total_norm(parameters, across)
    skipped = 1.0 - torch.isfinite(norm).float()
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        still = skipped if idle is None else torch.maximum(skipped, idle)
        optimizer.grad_scale, optimizer.found_inf = None, still  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    elif not bool(skipped) and (idle is None or not bool(idle)):
        optimizer.step()
    return norm, skipped
