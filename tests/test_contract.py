"""What every method must hold on the shared trainer, whoever wrote it (DESIGN 11)."""

from __future__ import annotations

import copy
import functools
import gc
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from world import (
    Rows,
    batch_of,
    every_method,
    gap,
    make_context,
    make_roles,
    make_trainer,
    rows_of,
    shared_family,
    stirred,
    warm,
    weights,
)

from diffalign.context import draw_noise
from diffalign.methods.base import Method
from diffalign.methods.pair import PairErrors, PairMethod
from diffalign.trainer import Trainer

METHODS = every_method()
NAMES = [type(m).__name__ for m in METHODS]
WITHOUT_DRAWS = {"InversionDPO"}
PAIRS = [m for m in METHODS if isinstance(m, PairMethod) and m.needs.batch == "pair"]


@pytest.fixture(params=METHODS, ids=NAMES)
def method(request: pytest.FixtureRequest) -> Method[Any]:
    return request.param


@functools.cache
def ready(method: Method[Any]) -> Trainer:
    """A method's trainer for tests that only compute losses: what they leave behind is its phase."""
    return warm(make_trainer(method))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_gradients_reach_exactly_the_roles_of_the_phase(method: Method[Any], checkpointing: bool) -> None:
    trainer = stirred(make_trainer(method, checkpointing=checkpointing))
    for slot in trainer.slots:
        trainer.ctx.phase, trainer.ctx.repeat = slot.phase.name, slot.repeat
        trainer.roles.train_only(slot.phase.trains)
        batch = batch_of(trainer)
        trainer.ctx.stats |= trainer.statistics(trainer.placed([batch]))
        loss = method.loss(trainer.ctx, batch, slot.phase)
        (loss.values * loss.weights).sum().backward()
        reached = {
            role
            for role in trainer.roles.names
            if any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in trainer.roles.parameters(role))
        }
        assert reached == set(slot.phase.trains)
        assert all(p.grad is None for n, p in trainer.roles.unet.named_parameters() if "lora" not in n)
        for role in trainer.roles.names:
            for p in trainer.roles.parameters(role):
                p.grad = None


def test_adapters_need_one_network_in_memory(method: Method[Any]) -> None:
    """Whatever a method keeps: no copy of the U-Net is made, and what it builds is small beside it."""
    shared_family()  # kept for all trainers
    before = [o for o in gc.get_objects() if isinstance(o, UNet2DConditionModel)]  # kept: an id may come again
    trainer = warm(make_trainer(method), 1)
    known = {id(o) for o in before}
    new = {id(o) for o in gc.get_objects() if isinstance(o, UNet2DConditionModel)} - known
    assert len(new) == 1 and {id(network) for network in trainer.roles.networks.values()} == new
    base = sum(p.numel() for n, p in trainer.roles.unet.named_parameters() if "lora_" not in n)
    beside = sum(p.numel() for module in trainer.roles.modules.values() for p in module.parameters())
    assert beside < 0.25 * base or method.roles == ("spm",)  # a network of its own, and all that trains


@pytest.mark.parametrize("method", [m for m in METHODS if m.couples != "batch"], ids=lambda m: type(m).__name__)
def test_batch_equals_a_loop_of_singles(method: Method[Any]) -> None:
    trainer = ready(method)
    for slot in trainer.slots:
        trainer.ctx.phase, trainer.ctx.repeat = slot.phase.name, slot.repeat
        with torch.no_grad():
            together = method.loss(trainer.ctx, batch_of(trainer), slot.phase)
            size = method.group  # rows that are compared with one another stay together
            parts = [list(range(start, start + size)) for start in range(0, 4, size)]
            alone = [method.loss(trainer.ctx, batch_of(trainer, rows), slot.phase) for rows in parts]
        assert together.values.shape == together.weights.shape == (4,)
        torch.testing.assert_close(together.values, torch.cat([one.values for one in alone]), rtol=1e-4, atol=1e-5)
        for name, value in together.metrics.items():
            if value.ndim:
                torch.testing.assert_close(value, torch.cat([one.metrics[name] for one in alone]), rtol=1e-3, atol=1e-4)


def coupled_values(trainer: Trainer, parts: list[list[int]]) -> dict[int, float]:
    """Each row's value in a step whose micro-batches these are."""
    phase = trainer.method.phases[0]
    with torch.no_grad():
        batches = trainer.placed([batch_of(trainer, rows) for rows in parts])
        trainer.ctx.stats = trainer.statistics(batches)
        losses = [trainer.method.loss(trainer.ctx, batch, phase) for batch in batches]
    assert all(
        loss.values.shape == loss.weights.shape == (len(rows),) for loss, rows in zip(losses, parts, strict=True)
    )
    return {
        row: float(v)
        for loss, rows in zip(losses, parts, strict=True)
        for row, v in zip(rows, loss.values, strict=True)
    }


@pytest.mark.parametrize("method", [m for m in METHODS if m.couples == "batch"], ids=lambda m: type(m).__name__)
def test_a_coupled_loss_knows_neither_order_nor_shards(method: Method[Any]) -> None:
    """The values of a batch in one piece, turned about, and in micro-batches; and the rows do enter one another's."""
    trainer = ready(method)
    whole = coupled_values(trainer, [[0, 1, 2, 3]])
    for parts in ([[2, 0, 3, 1]], [[0, 1], [2, 3]], [[3], [0, 2, 1]], [[0], [1], [2], [3]]):
        assert coupled_values(trainer, parts) == pytest.approx(whole, rel=1e-4, abs=1e-6), parts
    halves = [trainer.statistics(trainer.placed([batch_of(trainer, rows)])) for rows in ([0, 1], [2, 3])]
    for name, value in trainer.ctx.stats.items():  # sums: what two processes add up
        torch.testing.assert_close(halves[0][name] + halves[1][name], value, rtol=1e-4, atol=1e-6)
    alone = {row: value for i in range(4) for row, value in coupled_values(trainer, [[i]]).items()}
    assert max(abs(alone[row] - whole[row]) for row in whole) > 1e-4


# Adam divides by the gradient's own size: with eps far above rounding a gradient near 0 does not become a whole step
STEADY = {"max_grad_norm": None, "eps": 1e-2}


def test_micro_batches_do_not_matter(method: Method[Any]) -> None:
    """A step in one piece, and in unequal ones (rows that are compared with one another stay together)."""
    whole = warm(stirred(make_trainer(method, **STEADY)), 1)
    parts = warm(stirred(make_trainer(method, micro_batch=3 if method.group == 1 else method.group, **STEADY)), 1)
    assert gap(weights(whole), weights(parts)) < 1e-5


def test_resume_is_exact(method: Method[Any]) -> None:
    straight = warm(make_trainer(method, ema=0.9), 2)
    state = copy.deepcopy(straight.state())
    warm(straight, 1)
    second = make_trainer(method, ema=0.9)
    second.load(state)
    warm(second, 1)
    assert all(torch.equal(a, b) for a, b in zip(weights(straight), weights(second), strict=True))
    for role in straight.ema:
        assert all(map(torch.equal, straight.ema[role].shadow, second.ema[role].shadow))
    assert straight.meter.sums.keys() == second.meter.sums.keys()
    assert all(torch.equal(straight.meter.sums[k], second.meter.sums[k]) for k in straight.meter.sums)


def test_seed_changes_the_trajectory(method: Method[Any]) -> None:
    one = warm(stirred(make_trainer(method)), 1)
    other = stirred(make_trainer(method))
    other.ctx.seed = 1
    moved = gap(weights(one), weights(warm(other, 1)))
    assert moved == 0 if type(method).__name__ in WITHOUT_DRAWS else moved > 1e-4


def test_rows_of_weight_zero_change_nothing(method: Method[Any]) -> None:
    trainer, padded = make_trainer(method, **STEADY), make_trainer(method, **STEADY)
    for each, rows in ((trainer, [0, 1]), (padded, [0, 1, 2])):
        for slot in each.slots:
            batch = rows_of(each, rows)
            batch.weight[2:] = 0
            each.update(slot, [batch])
    assert gap(weights(trainer), weights(padded)) < 1e-5


def test_bf16_stays_finite(method: Method[Any]) -> None:
    trainer = warm(make_trainer(method, autocast=torch.bfloat16), 2)
    assert all(bool(torch.isfinite(w).all()) and w.dtype == torch.float32 for w in weights(trainer))
    assert float(trainer.skipped) == 0


def test_fp16_scales_its_losses(method: Method[Any]) -> None:
    trainer = make_trainer(method, autocast=torch.float16)
    fresh = weights(trainer)
    warm(trainer)
    assert all(scaler.is_enabled() for scaler in trainer.scalers.values())
    assert float(trainer.skipped) == 0
    assert all(bool(torch.isfinite(w).all()) for w in weights(trainer)) and gap(fresh, weights(trainer)) > 1e-4


def test_full_copies_train_too(method: Method[Any]) -> None:
    trainer = make_trainer(method, storage="copies")
    before = weights(trainer)
    base = trainer.roles.networks.get("base")
    assert (base is not None) == method.needs.reference
    frozen = [p.clone() for p in base.parameters()] if base else []
    warm(trainer, 1)
    assert gap(before, weights(trainer)) > 1e-4
    assert not base or all(map(torch.equal, base.parameters(), frozen))


@pytest.mark.parametrize("pair", PAIRS, ids=[type(m).__name__ for m in PAIRS])
def test_swapping_winner_and_loser_mirrors_the_margin(pair: PairMethod[Any]) -> None:
    trainer = ready(pair)
    batch = batch_of(trainer)
    with torch.no_grad():
        there = pair.loss(trainer.ctx, batch, pair.phases[0]).metrics
        batch.latents = {"chosen": batch.latents["rejected"], "rejected": batch.latents["chosen"]}
        back = pair.loss(trainer.ctx, batch, pair.phases[0]).metrics
        batch.latents = dict.fromkeys(batch.latents, batch.latents["rejected"])
        winner = pair.loss(trainer.ctx, batch, pair.phases[0]).metrics
    torch.testing.assert_close(winner["chosen_error"], there["chosen_error"])
    assert not torch.allclose(winner["rejected_error"], there["rejected_error"]), "the names are of the right pictures"
    assert float(there["logit"].abs().min()) > 0
    torch.testing.assert_close(there["logit"], -back["logit"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(there["margin"], -back["margin"], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(there["chosen_error"], back["rejected_error"])


@pytest.mark.parametrize("pair", [m for m in PAIRS if type(m).__name__ != "DSPO"], ids=lambda m: type(m).__name__)
def test_the_winners_error_is_lowered_and_the_losers_raised(pair: PairMethod[Any]) -> None:
    """At equal errors, whatever the form of the loss (DSPO's has no such form; it has tests of its own)."""
    four = [torch.full((3,), 0.1, requires_grad=True) for _ in range(4)]
    columns = {"chosen_score": torch.full((3,), 2.0), "rejected_score": torch.full((3,), -2.0), "target": torch.ones(3)}
    values, logits = pair.objective(PairErrors(*four, columns=columns))
    chosen, rejected = torch.autograd.grad(values.sum(), four[:2])
    assert bool((chosen > 0).all()) and bool((rejected < 0).all())
    up, down = (torch.full((3,), 0.1 + shift) for shift in (0.01, -0.01))
    better = pair.objective(PairErrors(down, up, *(e.detach() for e in four[2:]), columns=columns))[1]
    assert bool((better > logits).all()), "a wider margin is a larger logit"


def test_draws_differ_by_seed_tag_visit_phase_repeat_and_id() -> None:
    trainer = make_trainer(METHODS[0])
    batch = batch_of(trainer, [0, 1])
    shape = (4, 8, 8)
    reference = draw_noise(0, "noise", "main", 0, batch, shape, 1000)
    again = draw_noise(0, "noise", "main", 0, batch, shape, 1000)
    assert torch.equal(reference[0], again[0]) and torch.equal(reference[1], again[1])
    assert not torch.equal(reference[1][0], reference[1][1])
    later = trainer.source.load([0, 1], [1, 1])
    ours = trainer.ctx.rng("any", batch)
    theirs = trainer.ctx.rng("any", later)
    assert len({float(r.random()) for r in [*ours, *theirs]}) == 4  # by id and by visit
    changed = [
        draw_noise(1, "noise", "main", 0, batch, shape, 1000),
        draw_noise(2**32, "noise", "main", 0, batch, shape, 1000),  # torch's generators would repeat seed 0 here
        draw_noise(0, "other", "main", 0, batch, shape, 1000),
        draw_noise(0, "noise", "critic", 0, batch, shape, 1000),
        draw_noise(0, "noise", "main", 1, batch, shape, 1000),
        draw_noise(0, "noise", "main", 0, later, shape, 1000),
    ]
    for _, noise in changed:
        assert not torch.equal(noise, reference[1])
    _, noise = draw_noise(0, "noise", "main", 0, batch.take([1]), shape, 1000)
    assert torch.equal(noise[0], reference[1][1])


def test_all_times_are_drawn_equally() -> None:
    rows = Rows(4)
    context = make_context(make_roles())
    times = torch.cat([context.draw(rows.batch([0, 1, 2, 3], [v] * 4))[0] for v in range(400)])
    assert int(times.min()) < 20 and int(times.max()) > 980
    assert abs(float(times.float().mean()) - 499.5) < 30
