"""The one loop: phases, backward, optimisers, precision, checkpoints, logging (DESIGN 2, 3, 8).

Networks are not wrapped for data parallelism: at the optimiser step the phase's gradients are summed over processes on
flat buckets and divided by the weight sum of the whole step: micro-batches, processes, skipped pairs and partial
batches change nothing but rounding.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .context import Context, draw_key, draw_noise
from .data.batch import Batch
from .data.source import Source
from .keyed import generator
from .meter import Meter
from .methods.base import Method, Phase, metric_sums
from .optim import guarded_step, lr_factor, make_optimizer, set_lr
from .recipe import TrainRecipe
from .roles import Ema
from .rollouts import Rollouts, deal

Cut = tuple[list[int], list[int]]  # rows and their visits
BUCKET = 1 << 25  # numbers in one flat bucket of a reduction


@dataclass(frozen=True)
class Slot:
    """One optimiser step of a training step: the phase, its repeat, which fresh batch it uses, and whether it is the
    first to."""

    phase: Phase
    repeat: int
    fresh: int
    first: bool = True


def plan_slots(method: Method[Any]) -> list[Slot]:
    """The optimiser steps of one training step, in order.

    Raises ValueError when the first phase asks to reuse a batch."""
    slots: list[Slot] = []
    fresh = -1
    for phase in method.phases:
        for repeat in range(method.repeats(phase)):
            first = phase.batch == "fresh" or (phase.batch == "round" and repeat == 0)
            fresh += first
            if fresh < 0:
                raise ValueError(
                    f"{type(method).__name__}: phase '{phase.name}' reuses a batch, but none came before it"
                )
            slots.append(Slot(phase, repeat, fresh, first))
    return slots


class Trainer:
    """Runs steps of a method. What it is given is ready to use; files and folders are the run's business.

    Args:
        method, ctx: what is optimised and the tools it gets.
        source: training rows.
        recipe: the loop's settings.
        accelerator: processes and reductions; rank r of w takes its share of every batch.
    """

    def __init__(
        self, method: Method[Any], ctx: Context, source: Source, recipe: TrainRecipe, accelerator: Accelerator
    ) -> None:
        self.method, self.ctx, self.source, self.recipe, self.accelerator = method, ctx, source, recipe, accelerator
        self.roles = ctx.roles
        self.slots = plan_slots(method)
        self.fresh = self.slots[-1].fresh + 1
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.micro = recipe.micro_batch or recipe.batch
        self.step = 0
        self.meter = Meter()
        trained = [role for role in method.roles if role in self.roles.names]
        self._broadcast(trained)
        learning = {role for phase in method.phases for role in phase.trains}
        for role, towards in {pull[:2] for phase in method.phases for pull in phase.pulls}:
            if role in learning:
                self.roles.share_factors(role, towards)
            else:  # an average begins as what it follows
                self.roles.pull(role, towards, 1.0)
        self.optimizers = {r: make_optimizer(recipe, self.roles.parameters(r), r) for r in trained}
        self.ema = {r: Ema(self.roles.parameters(r), recipe.ema) for r in trained} if recipe.ema else {}
        scaled = ctx.autocast == torch.float16
        self.scalers = {phase.name: torch.amp.GradScaler(ctx.device.type, enabled=scaled) for phase in method.phases}
        self.skipped = torch.zeros((), device=ctx.device)  # in all
        self.streak = torch.zeros((), device=ctx.device)  # in a row: fp16's scaler probes a few times by itself
        self.round: list[tuple[Rollouts, list[int]]] = []  # samples of online methods, and which items have weight
        self.round_stats: dict[str, Tensor] = {}
        self.round_share = 0, 1  # items of all processes that have weight, and that were made
        self.memory: dict[str, dict[str, Tensor]] = {}  # what `Method.remember` keeps, by phase
        self.waited = 0.0
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._ahead: dict[int, Future[list[Batch]]] = {}

    def _broadcast(self, roles: Sequence[str]) -> None:
        """Trainables of rank 0 everywhere, once at the start."""
        if self.world == 1 or self.roles.shards is not None:
            return
        for role in roles:
            for parameter in self.roles.parameters(role):
                torch.distributed.broadcast(parameter.data, 0)

    # ---- data -------------------------------------------------------------------------------------------------------

    def _load(self, draw: int) -> list[Batch]:
        """This rank's micro-batches of the ``draw``-th fresh batch, with their noise drawn."""
        indices, visits = self.source.share(draw, self.recipe.batch, self.rank, self.world)
        users = [slot for slot in self.slots if slot.fresh == draw % self.fresh]
        parts = []
        cuts = self.source.cut(indices, visits, self.micro)
        shares = (self.source.share(draw, self.recipe.batch, rank, self.world) for rank in range(self.world))
        for batch in (*(self.source.load(*cut) for cut in cuts), *self.padding(self.source, cuts, shares)):
            shape = self.ctx.shape_of(batch)
            for slot in users:
                for tag in self.method.needs.draws:
                    batch.drawn[draw_key(tag, slot.phase.name, slot.repeat)] = draw_noise(
                        self.ctx.seed, tag, slot.phase.name, slot.repeat, batch, shape, self.ctx.denoiser.num_timesteps
                    )
            # only from pinned memory does a copy to the GPU not wait
            parts.append(batch.pin() if self.ctx.device.type == "cuda" else batch)
        return parts

    def padding(self, source: Source, cuts: Sequence[Cut], shares: Iterable[Cut]) -> list[Batch]:
        """Micro-batches of weight 0 after ``cuts``, where shards make every process call the networks as often as the
        one with the most micro-batches among ``shares``."""
        if self.roles.shards is None:
            return []
        most = max(len(source.cut(*share, self.micro)) for share in shares)
        rows, visits = cuts[-1]
        parts = [source.load(rows[:1], visits[:1]) for _ in range(most - len(cuts))]
        for part in parts:
            part.weight.zero_()
        return parts

    def batches(self, draw: int) -> list[Batch]:
        """The micro-batches of a fresh batch, on the CPU; the next one is prepared meanwhile."""
        started = time.perf_counter()
        for number in (draw, draw + 1):
            if number not in self._ahead:
                self._ahead[number] = self._loader.submit(self._load, number)
        parts = self._ahead.pop(draw).result()
        self._ahead = {n: f for n, f in self._ahead.items() if n > draw}
        self.waited += time.perf_counter() - started
        return parts

    # ---- one step ---------------------------------------------------------------------------------------------------

    def train_step(self) -> None:
        """All phases of one step. Nothing here waits for the device."""
        self.ctx.step = self.step
        factor = lr_factor(self.recipe, self.step)
        for role, optimizer in self.optimizers.items():
            set_lr(optimizer, self.recipe.role_lr.get(role, self.recipe.lr) * factor)
        loaded, parts = -1, []
        for slot in self.slots:
            if slot.fresh != loaded:
                parts, loaded = self.batches(self.step * self.fresh + slot.fresh), slot.fresh
            self.update(slot, parts)
        for ema in self.ema.values():
            ema.update()
        self.step += 1

    def update(self, slot: Slot, parts: Collection[Batch]) -> None:
        """Forward, backward over the micro-batches, and the optimiser step of one phase."""
        ctx, phase = self.ctx, slot.phase
        ctx.phase, ctx.repeat = phase.name, slot.repeat
        self.roles.train_only(phase.trains)
        if self.method.online:
            parts = self.rolled(slot, parts)
        parts = self.placed(parts)
        ctx.stats = self.round_stats | self.statistics(parts)
        if type(self.method).remember is not Method.remember:
            ctx.stats = self.memory[phase.name] = self.method.remember(self.memory.get(phase.name, {}), ctx.stats)
        scaler = self.scalers[phase.name]
        weight = torch.zeros((), device=ctx.device)
        self.roles.dropout(True)
        for number, batch in enumerate(part.to(ctx.device) for part in parts):
            if self.roles.has_dropout:
                torch.manual_seed(
                    int(generator(ctx.seed, "dropout", self.step, slot.fresh, number, self.rank).integers(1 << 31))
                )
            loss = self.method.loss(ctx, batch, phase)
            weights = loss.weights.detach()
            # a nominal divisor keeps fp16 in range; the true weight sum follows once it is known everywhere
            scaler.scale((loss.values * weights).sum() / self.recipe.batch).backward()
            weight += weights.sum()
            for name, (total, share) in metric_sums(loss).items():
                self.meter.add(name if len(self.method.phases) == 1 else f"{phase.name}/{name}", total, share)
        self.roles.dropout(False)
        weight = self._average(phase, weight)
        # a round may leave nothing to learn: then no optimiser moves, by momentum or decay either
        idle = (weight == 0).float() if self.method.online else None
        if idle is not None:
            self.meter.add("idle", idle, torch.ones_like(idle))
        for role in phase.trains:
            optimizer, parameters = self.optimizers[role], self.roles.parameters(role)
            if scaler.is_enabled():
                scaler.unscale_(optimizer)
            across = self.reduce if self.roles.shards is not None else None
            norm, skipped = guarded_step(optimizer, parameters, self.recipe.max_grad_norm, across, idle)
            finite = 1 - skipped
            self.meter.add(f"grad_norm/{role}", torch.nan_to_num(norm, 0.0, 0.0, 0.0) * finite, finite)
            self.skipped += skipped
            self.streak = (self.streak + skipped) * skipped
            optimizer.zero_grad(set_to_none=True)
        if scaler.is_enabled():
            scaler.update()
        for pull in phase.pulls:
            self.roles.pull(*pull)

    def rolled(self, slot: Slot, prompts: Collection[Batch]) -> Collection[Batch]:
        """The items of this update, in micro-batches; the first update of a round has them sampled (`rollouts`).

        A pass over a round that keeps a share of its items has that share of the updates, of the usual size: the others
        are idle. Spread over all of them, updates of a few items would move the weights as far as full ones."""
        if slot.first:
            self.collect(prompts)
            if self.method.recalls(slot.phase):
                self.recall(slot.phase)
        self.ctx.repeat = slot.repeat
        cuts = self.cuts(slot.phase, slot.repeat)
        if cuts:
            return Items(cuts)
        padding = self.round[0][0].take([0])  # every process has the same curves and calls
        padding.weight.zero_()
        return [padding]

    def cuts(self, phase: Phase, repeat: int) -> list[tuple[Rollouts, list[int]]]:
        """The micro-batches of an update of a round."""
        count = self.method.parts(phase)
        epoch, part = divmod(repeat, count)
        kept_of_all, made = self.round_share
        count = max(-(-count * kept_of_all // made), 1)
        found: list[tuple[Rollouts, list[int]]] = []
        for rollouts, kept in self.round:
            mine = deal(rollouts, kept, count, self.ctx.seed, phase.name, epoch)[part] if part < count else []
            found += [(rollouts, mine[start : start + self.micro]) for start in range(0, len(mine), self.micro)]
        return found

    def recall(self, phase: Phase) -> None:
        """What the one that sampled says of a round's items in the micro-batches of the first pass."""
        with torch.no_grad():
            for repeat in range(self.method.parts(phase)):
                for rollouts, items in self.cuts(phase, repeat):
                    rollouts.put(items, self.method.recall(self.ctx, rollouts.take(items)))

    def collect(self, prompts: Iterable[Batch]) -> None:
        """A round's samples, of all micro-batches of prompts, and their sums over processes."""
        self.ctx.repeat, self.round = 0, []
        sums: dict[str, Tensor] = {}
        with torch.no_grad():
            for batch in prompts:
                found = self.method.collect(self.ctx, batch.to(self.ctx.device))
                self.round.append((found, found.kept()))
                for name, value in found.metrics.items():
                    weight = found.prompts.weight
                    self.meter.add(name, (value.float() * weight).sum(), weight.sum())
                for name, value in found.stats.items():
                    sums[name] = sums[name] + value if name in sums else value
        counts = sum(len(kept) for _, kept in self.round), sum(found.made() for found, _ in self.round)
        kept_of_all, made = self.reduce(torch.tensor(counts, device=self.ctx.device)).tolist()
        self.round_share = kept_of_all, max(made, 1)
        empty = torch.tensor(float(not kept_of_all), device="cpu").to(self.ctx.device)
        self.meter.add("rounds_empty", empty, torch.ones_like(empty))
        self.round_stats = {name: self.reduce(value) for name, value in sums.items()}

    def placed(self, parts: Collection[Batch]) -> Collection[Batch]:
        """The micro-batches on the device, all at once, where ``Method.statistics`` sees them before ``loss``."""
        if type(self.method).statistics is Method.statistics:
            return parts
        return [part.to(self.ctx.device) for part in parts]

    def statistics(self, parts: Iterable[Batch]) -> dict[str, Tensor]:
        """Sums of ``Method.statistics`` over micro-batches (`placed`) and processes."""
        if type(self.method).statistics is Method.statistics:
            return {}
        sums: dict[str, Tensor] = {}
        with torch.no_grad():
            for batch in parts:
                found = self.method.statistics(self.ctx, batch)
                for name, value in found.items():
                    sums[name] = sums[name] + value if name in sums else value
        return {name: self.reduce(value) for name, value in sums.items()}

    def _average(self, phase: Phase, weight: Tensor) -> Tensor:
        """Gradients summed over processes in flat buckets, then divided by the weight sum of the whole step, which is
        returned."""
        gradients: list[Tensor] = []
        if self.roles.shards is not None:
            self.roles.shards.take_gradients()
        for role in phase.trains:
            for parameter in self.roles.parameters(role):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        if self.world > 1 and self.roles.shards is None:
            for bucket in _buckets(gradients):
                flat = self.reduce(torch.cat([g.flatten() for g in bucket]))
                pieces = flat.split([g.numel() for g in bucket])
                torch._foreach_copy_(bucket, [p.view_as(g) for p, g in zip(pieces, bucket, strict=True)])
        weight = self.reduce(weight)
        torch._foreach_mul_(gradients, self.recipe.batch / weight.clamp_min(1e-12) * (weight > 0))
        return weight

    def reduce(self, value: Tensor) -> Tensor:
        """Sum over processes."""
        if self.world == 1:
            return value
        summed: Tensor = self.accelerator.reduce(value, "sum")
        return summed

    # ---- state ------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything that an exact continuation needs; no RNG state, since draws are keyed. All processes call it."""
        optimizers = {role: optimizer.state_dict() for role, optimizer in self.optimizers.items()}
        ema = {role: ema.state_dict() for role, ema in self.ema.items()}
        if (shards := self.roles.shards) is not None:
            optimizers = {role: shards.gather_optimizer(state) for role, state in optimizers.items()}
            for state in ema.values():
                state["shadow"] = [shards.gather(*named) for named in zip(shards.local, state["shadow"], strict=True)]
        return {
            "step": self.step,
            "roles": {role: self.roles.state_dict(role) for role in self.optimizers},
            "optimizers": optimizers,
            "scalers": {name: scaler.state_dict() for name, scaler in self.scalers.items()},
            "ema": ema,
            "meter": {name: self.reduce(value) for name, value in sorted(self.meter.sums.items())},
            "skipped": self.skipped,
            "streak": self.streak,
            "memory": self.memory,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        self.step, shards = int(state["step"]), self.roles.shards
        for role, optimizer in self.optimizers.items():
            self.roles.load_state_dict(role, state["roles"][role])
            moments = state["optimizers"][role]
            optimizer.load_state_dict(moments if shards is None else shards.cut_optimizer(moments))
        for name, scaler in self.scalers.items():
            if scaler.is_enabled():
                scaler.load_state_dict(state["scalers"][name])
        for role, ema in self.ema.items():
            held = state["ema"][role]
            if shards is not None:
                held = {
                    **held,
                    "shadow": [shards.cut(*named) for named in zip(shards.local, held["shadow"], strict=True)],
                }
            ema.load_state_dict(held)
        mine = float(self.rank == 0)  # the sums are of all processes: one of them carries on
        self.meter.sums = {name: value.to(self.ctx.device) * mine for name, value in state["meter"].items()}
        self.skipped = state["skipped"].to(self.ctx.device)
        self.streak = state["streak"].to(self.ctx.device)
        kept = state.get("memory", {})
        self.memory = {phase: {k: v.to(self.ctx.device) for k, v in held.items()} for phase, held in kept.items()}
        self._ahead.clear()

    def close(self) -> None:
        """Stop the loader."""
        self._loader.shutdown(wait=True, cancel_futures=True)


class Items(Collection[Batch]):
    """Micro-batches of a round's items, each put together when its turn comes: a prompt's text is many times as large
    as the latents of an item."""

    def __init__(self, cuts: Sequence[tuple[Rollouts, list[int]]]) -> None:
        self.cuts = cuts

    def __len__(self) -> int:
        return len(self.cuts)

    def __iter__(self) -> Iterator[Batch]:
        return (rollouts.take(items) for rollouts, items in self.cuts)

    def __contains__(self, batch: object) -> bool:
        return False


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in groups of at most BUCKET numbers, in order."""
    group: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if group and size + tensor.numel() > BUCKET:
            yield group
            group, size = [], 0
        group.append(tensor)
        size += tensor.numel()
    if group:
        yield group
