"""What is looked at while training: held-out rows under fixed (t, noise), and the best of the looks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .data.source import Source
from .meter import Meter
from .methods.base import metric_sums
from .recipe import ValidateRecipe

if TYPE_CHECKING:
    from .trainer import Trainer

PHASE = "validate"  # keys the draws of held-out rows, so that they never change


@contextmanager
def averaged(trainer: Trainer) -> Iterator[None]:
    """EMA weights in place while validating, sampling and exporting; the live ones where there is no EMA."""
    with ExitStack() as stack:
        for ema in trainer.ema.values():
            stack.enter_context(ema.swapped())
        yield


def heldout_metrics(trainer: Trainer, heldout: Source, recipe: ValidateRecipe) -> dict[str, float]:
    """Loss and metrics of held-out rows, each under ``draws`` fixed (t, noise); the same on any number of processes.

    Of online methods: what the samples of held-out prompts are like (``Rollouts.metrics``), their loss minus the
    reward; of one whose samples nobody scores the loss and metrics of its items."""
    ctx, phase = trainer.ctx, trainer.method.phases[-1]
    meter = Meter()
    shares = [heldout.portion(rank, trainer.world) for rank in range(trainer.world)]
    padding = not shares[trainer.rank]  # more processes than rows: every process must know every metric's name
    shares = [share or heldout.indices[:1].tolist() for share in shares]
    mine = shares[trainer.rank]
    before = ctx.phase, ctx.repeat, ctx.stats
    ctx.phase, ctx.repeat = PHASE, 0
    with torch.no_grad(), averaged(trainer):
        for draw in range(recipe.draws):
            cuts = heldout.cut(mine, [draw] * len(mine), trainer.micro)
            parts = [heldout.load(rows, visits) for rows, visits in cuts]
            for part in parts if padding else ():
                part.weight.zero_()
            parts += trainer.padding(heldout, cuts, ((share, [draw] * len(share)) for share in shares))
            placed = trainer.placed(parts)
            ctx.stats = trainer.statistics(placed)
            for batch in (part.to(ctx.device) for part in placed):
                tried = [batch]
                if trainer.method.online:
                    found = trainer.method.collect(ctx, batch)
                    worth = {"loss": -found.metrics["reward"]} if "reward" in found.metrics else {}
                    for name, value in (found.metrics | worth).items():
                        meter.add(name, (value.float() * batch.weight).sum(), batch.weight.sum())
                    starts = () if found.metrics else range(0, len(found), trainer.micro)
                    tried = [found.take(range(at, min(at + trainer.micro, len(found)))) for at in starts]
                for each in tried:
                    for name, (total, weight) in metric_sums(trainer.method.loss(ctx, each, phase)).items():
                        meter.add(name, total, weight)
    ctx.phase, ctx.repeat, ctx.stats = before
    return meter.read(trainer.reduce)


class BestKeeper:
    """Remembers the step with the lowest held-out loss."""

    def __init__(self, step: int | None = None, value: float | None = None) -> None:
        self.step, self.value = step, value

    def offer(self, step: int, value: float, save: Callable[[], Path]) -> None:
        """Save if this is the best so far."""
        if math.isfinite(value) and (self.value is None or value < self.value):
            self.step, self.value = step, value
            save()
