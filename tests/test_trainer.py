"""The loop: slots and their batches, the keyed order, schedules, skipped updates, what a checkpoint holds."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from world import Rows, TwoRole, TwoRoleConfig, gap, make_trainer, warm, weights

from diffalign.checkpoint import checkpoint_dirs, load_checkpoint, prune, save_checkpoint
from diffalign.data.batch import Cond
from diffalign.data.source import Source, split_heldout
from diffalign.errors import UserError
from diffalign.methods import make_method
from diffalign.methods.base import Loss
from diffalign.methods.preference.sft import SFT, SFTConfig
from diffalign.optim import guarded_step, lr_factor, make_optimizer
from diffalign.recipe import TrainRecipe, ValidateRecipe
from diffalign.trainer import plan_slots
from diffalign.validate import heldout_metrics


def source(n: int = 10, seed: int = 0, dropout: float = 0.0) -> Source:
    return Source(Rows(n), range(n), seed, Cond(torch.full((1, 5, 16), 7.0)), dropout)  # type: ignore[arg-type]


def test_slots_repeat_and_reuse() -> None:
    slots = plan_slots(TwoRole(TwoRoleConfig(critic_steps=3)))
    assert [(s.phase.name, s.repeat, s.fresh) for s in slots] == [
        ("critic", 0, 0),
        ("critic", 1, 1),
        ("critic", 2, 2),
        ("student", 0, 2),  # reuses the last critic batch
    ]


def test_alternation_trains_each_role_its_number_of_times() -> None:
    trainer = make_trainer(TwoRole(TwoRoleConfig(critic_steps=3)))
    seen: list[tuple[str, tuple[str, ...]]] = []
    loss = trainer.method.loss

    def watched(ctx, batch, phase) -> Loss:  # type: ignore[no-untyped-def]
        seen.append((phase.name, batch.ids))
        return loss(ctx, batch, phase)

    trainer.method.loss = watched  # type: ignore[method-assign]
    warm(trainer, 2)
    steps = {r: int(next(iter(o.state.values()))["step"]) for r, o in trainer.optimizers.items()}
    assert steps == {"student": 2, "fake": 6, "head": 6}
    assert [name for name, _ in seen] == ["critic"] * 3 + ["student"] + ["critic"] * 3 + ["student"]
    assert seen[3][1] == seen[2][1] and len({ids for _, ids in seen}) == 6
    assert {"critic/loss", "student/loss", "grad_norm/fake"} <= trainer.meter.sums.keys()


def test_every_epoch_visits_every_row_once_in_its_own_order() -> None:
    rows, visits = source().rows(0, 30)
    assert visits == [0] * 10 + [1] * 10 + [2] * 10
    epochs = [rows[k : k + 10] for k in (0, 10, 20)]
    assert all(sorted(e) == list(range(10)) for e in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert source().rows(7, 5) == (rows[7:12], visits[7:12])  # a position needs no history
    assert source(seed=1).rows(0, 10)[0] != epochs[0]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_a_batch_without_overlap(world: int) -> None:
    whole = source().share(2, 5, 0, 1)
    parts = [source().share(2, 5, rank, world) for rank in range(world)]
    assert [row for p in parts for row in p[0]] == whole[0] and [visit for p in parts for visit in p[1]] == whole[1]
    assert max(len(p[0]) for p in parts) - min(len(p[0]) for p in parts) <= 1


def test_caption_dropout_takes_both_members_and_its_share() -> None:
    rows = source(10, dropout=0.2)
    dropped = torch.cat([(rows.load(range(10), [v] * 10).cond["prompt"].embeds == 7).all((1, 2)) for v in range(100)])
    assert 0.15 < float(dropped.float().mean()) < 0.25
    assert torch.equal(rows.load([3], [5]).cond["prompt"].embeds, rows.load([2, 3], [5, 5]).cond["prompt"].embeds[1:])


def test_heldout_rows_are_apart_and_stay_when_rows_are_added() -> None:
    ids = [f"r{i}" for i in range(100)]
    training, held = split_heldout(ids, 20, 0)
    assert len(held) == 20 and not set(training) & set(held) and len(training) == 80
    assert split_heldout(ids, 90, 0)[1].__len__() == 25  # at most a quarter
    assert split_heldout(ids, 20, 1)[1] != held
    assert split_heldout(ids, 0, 0)[1] == []
    twins = [name for name in ids for _ in range(2)]  # as the two rated pictures of each pair
    held = split_heldout(twins, 5, 0)[1]
    assert len(held) == 6 and held[::2] == [row - 1 for row in held[1::2]], "an odd count parts no pair"


def test_learning_rate_schedules() -> None:
    warm = TrainRecipe(steps=100, warmup=10)
    assert [lr_factor(warm, s) for s in (0, 4, 9, 10, 99)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    linear = TrainRecipe(steps=110, warmup=10, schedule="linear")
    assert [lr_factor(linear, s) for s in (10, 60, 110)] == [1.0, 0.5, 0.0]
    cosine = TrainRecipe(steps=110, warmup=10, schedule="cosine")
    assert lr_factor(cosine, 60) == pytest.approx(0.5) and lr_factor(cosine, 35) == pytest.approx(
        math.cos(math.pi / 8) ** 2
    )
    again = TrainRecipe(steps=110, warmup=10, schedule="cosine", period=40)
    assert [lr_factor(again, s) for s in (10, 30, 50, 70, 90)] == pytest.approx([1.0, 0.5, 1.0, 0.5, 1.0])


def test_learning_rates_reach_the_optimisers_by_role() -> None:
    trainer = make_trainer(TwoRole(TwoRoleConfig()), lr=1e-3, role_lr={"fake": 5e-3}, warmup=4)
    trainer.train_step()
    rates = {role: o.param_groups[0]["lr"] for role, o in trainer.optimizers.items()}
    assert rates == pytest.approx({"student": 2.5e-4, "fake": 1.25e-3, "head": 2.5e-4})


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_non_finite_gradients_are_skipped_whole(name: str) -> None:
    p = [torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(2))]
    optimizer = make_optimizer(TrainRecipe(optimizer=name, lr=0.1), p, "student")
    p[0].grad, p[1].grad = torch.ones(4), torch.tensor([1.0, float("nan")])
    _, skipped = guarded_step(optimizer, p, 1.0)
    assert float(skipped) == 1 and all(torch.equal(x.detach(), torch.ones_like(x)) for x in p)
    p[0].grad, p[1].grad = torch.full((4,), 10.0), torch.full((2,), 10.0)
    norm, skipped = guarded_step(optimizer, p, 1.0)
    assert float(skipped) == 0 and float(norm) == pytest.approx(10 * math.sqrt(6))
    assert all(bool((x < 1).all()) for x in p)


def test_clipping_is_by_role() -> None:
    p = [torch.nn.Parameter(torch.zeros(4))]
    p[0].grad = torch.full((4,), 3.0)
    guarded_step(torch.optim.SGD(p, lr=1.0), p, 1.0)
    assert float(p[0].detach().norm()) == pytest.approx(1.0, rel=1e-4)


def test_a_skipped_update_is_counted_and_training_goes_on() -> None:
    trainer = make_trainer(make_method("sft", {}))
    before = weights(trainer)
    good = trainer.method.loss

    def broken(ctx, batch, phase) -> Loss:  # type: ignore[no-untyped-def]
        loss = good(ctx, batch, phase)
        return Loss(loss.values * float("nan"), loss.weights)

    trainer.method.loss = broken  # type: ignore[method-assign]
    trainer.train_step()
    assert float(trainer.skipped) == 1 and all(map(torch.equal, before, weights(trainer)))
    trainer.method.loss = good  # type: ignore[method-assign]
    trainer.train_step()
    assert float(trainer.skipped) == 1 and not all(map(torch.equal, before, weights(trainer)))


def test_no_step_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = warm(make_trainer(make_method("dpo", {})))

    def wait(self: torch.Tensor, *args: object) -> None:
        raise AssertionError("a number was read in the step")

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, wait)
    trainer.train_step()


def test_checkpoints_are_whole_or_absent(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, {"x": torch.tensor(step)}, {"step": step})
    (tmp_path / "step-000009").mkdir()  # as a kill could leave it, were it not renamed into place
    assert [p.name for p in checkpoint_dirs(tmp_path)] == [f"step-{s:06d}" for s in (1, 2, 3, 4)]
    prune(tmp_path, 2, spare=[1])
    assert [p.name for p in checkpoint_dirs(tmp_path)] == ["step-000001", "step-000003", "step-000004"]
    tensors, facts = load_checkpoint(tmp_path / "step-000004")
    assert int(tensors["x"]) == 4 and facts == {"step": 4}
    (tmp_path / "step-000004/state.pt").write_bytes(b"torn")
    with pytest.raises(UserError, match="no readable checkpoint"):
        load_checkpoint(tmp_path / "step-000004")


class Centred(SFT):
    """A coupled method: each error against the mean of the whole batch."""

    couples = "batch"

    def statistics(self, ctx, batch):  # type: ignore[no-untyped-def]
        loss = super().loss(ctx, batch, self.phases[0])
        return {"sum": loss.values.sum(), "count": loss.weights.sum()}

    def loss(self, ctx, batch, phase) -> Loss:  # type: ignore[no-untyped-def]
        loss = super().loss(ctx, batch, phase)
        mean = ctx.stats["sum"] / ctx.stats["count"]
        return Loss((loss.values - mean).square() + loss.values, loss.weights, {"mean": mean})


def test_statistics_are_of_the_whole_batch_whatever_the_micro_batch() -> None:
    steady = {"max_grad_norm": None, "eps": 1e-2}
    whole = warm(make_trainer(Centred(SFTConfig()), **steady), 2)
    parts = warm(make_trainer(Centred(SFTConfig()), micro_batch=1, **steady), 2)
    assert gap(weights(whole), weights(parts)) < 1e-5


def test_heldout_metrics_have_their_own_statistics_and_never_change() -> None:
    trainer = make_trainer(Centred(SFTConfig()), micro_batch=2)
    heldout = Source(Rows(3, seed=9, kind="image"), range(3), 0, Cond(torch.zeros(1, 5, 16)))  # type: ignore[arg-type]
    recipe = ValidateRecipe(draws=2)
    first = heldout_metrics(trainer, heldout, recipe)
    assert heldout_metrics(trainer, heldout, recipe) == first
    warm(trainer, 1)
    kept = dict(trainer.ctx.stats)
    assert heldout_metrics(trainer, heldout, recipe) != first
    assert trainer.ctx.stats == kept
