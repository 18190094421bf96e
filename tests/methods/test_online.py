"""Policy gradients and D3PO: identities and golden values of the online sheet (0.3, 0.4, 3, 5, 6, C.7, D 6 to 9, 33 to
41), and rounds in the trainer."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import SD_SCHEDULE
from torch import Tensor
from world import SAMPLED, Rows, gap, make_trainer, rows_of, stirred, warm, weights

from diffalign.context import Context
from diffalign.data.batch import Cond
from diffalign.data.source import Source
from diffalign.denoiser import Denoiser, log_prob
from diffalign.methods import make_method
from diffalign.methods.base import Method
from diffalign.methods.online.d3po import dominance
from diffalign.methods.policy_gradient import group_moments, guarded, ppo_loss, standardised
from diffalign.methods.rollout import clipped_pair_loss, pair_bounds, step_kl
from diffalign.recipe import ValidateRecipe
from diffalign.trainer import Trainer
from diffalign.validate import heldout_metrics

SD = Denoiser.from_config(SD_SCHEDULE)
LIKELIHOOD = ("ddpo", "grpo", "d3po")


def method(name: str = "ddpo", **options: Any) -> Method[Any]:
    return make_method(name, {**SAMPLED, **options})


def bright(images: Tensor, prompts: Any, t: Any = None) -> Tensor:
    return 10 * images.mean((1, 2, 3))


def trainer_of(
    name: str = "ddpo", reward: Any = bright, train: dict[str, Any] | None = None, **options: Any
) -> Trainer:
    trainer = make_trainer(method(name, **options), **train or {})
    trainer.ctx.rewards = {"tiny-pickscore": reward}
    return trainer


# ---- formulas --------------------------------------------------------------------------------------------------------


def test_advantages() -> None:
    rewards = torch.tensor([1.0, 3.0, 2.0, 2.0, 5.0, -1.0])
    mean, std = group_moments(rewards, 2)
    assert standardised(rewards, mean, std, 1e-12, 5.0).tolist() == pytest.approx([-1, 1, 0, 0, 1, -1])
    unbiased = group_moments(rewards, 2, unbiased=True)[1]
    assert standardised(rewards, mean, unbiased, 1e-12, 5.0)[:2].tolist() == pytest.approx([-0.7071, 0.7071], abs=1e-4)
    many = torch.randn(3 * 24, dtype=torch.float64)
    a = standardised(many, *group_moments(many, 24), 1e-12, 5.0).view(3, 24)
    torch.testing.assert_close(a.mean(1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(a.square().mean(1), torch.ones(3, dtype=torch.float64))
    moved = 3 * many + 7
    torch.testing.assert_close(standardised(moved, *group_moments(moved, 24), 1e-12, 5.0).view(3, 24), a)
    assert float(standardised(torch.tensor([9.0]), torch.tensor([0.0]), torch.tensor([1e-3]), 1e-6, 5.0)) == 5


def test_ppo_is_a_gate_on_the_better_side_alone() -> None:
    now = torch.tensor([0.0, 0.0, 0.3, 0.3, -0.3, -0.3], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    values, ratio = ppo_loss(now, advantage, 0.1)
    values.sum().backward()
    assert now.grad is not None
    assert values[:2].tolist() == [-1, 1] and ratio[:2].tolist() == [1, 1]
    assert now.grad.tolist() == pytest.approx([-1, 1, 0, math.exp(0.3), -math.exp(-0.3), 0])
    none, _ = ppo_loss(now, torch.zeros(6), 0.1)
    assert torch.equal(none, torch.zeros(6))


def test_the_pair_loss_its_bounds_and_its_gates() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    won = zero.clone().requires_grad_()
    loss, _ = clipped_pair_loss(won, zero, zero, zero, 0.1, 0.1)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)))
    loss.sum().backward()
    torch.testing.assert_close(won.grad, torch.full_like(zero, -0.05))  # -beta / 2
    a, b, c, d = torch.randn(4, 50, dtype=torch.float64)
    there, m = clipped_pair_loss(a, b, c, d, 2.0, 0.1)
    back, n = clipped_pair_loss(b, a, d, c, 2.0, 0.1)
    torch.testing.assert_close(m, -n)
    torch.testing.assert_close(back - there, m)
    free = clipped_pair_loss(a, b, c, d, 2.0, None)[1]
    torch.testing.assert_close(free, 2 * ((a - c) - (b - d)))
    for beta, low, high in ((0.1, 0.68316, 0.70323), (10, 0.1260, 2.1327), (50, 4.39e-5, 10.033)):
        assert pair_bounds(beta, 0.1) == pytest.approx((low, high), rel=2e-3)
        wild = clipped_pair_loss(50 * a, 50 * b, zero[:1], zero[:1], beta, 0.1)[0]
        assert low * 0.99 < float(wild.min()) and float(wild.max()) < high * 1.01
    up, down = torch.tensor([0.2, 0.0], requires_grad=True), torch.tensor([0.0, -0.2], requires_grad=True)
    clipped_pair_loss(up, down, torch.zeros(2), torch.zeros(2), 1.0, 0.1)[0].sum().backward()
    assert up.grad is not None and down.grad is not None
    assert float(up.grad[0]) == 0 and float(down.grad[0]) > 0 and float(up.grad[1]) < 0 and float(down.grad[1]) == 0
    far = clipped_pair_loss(torch.tensor([-1000.0]), torch.zeros(1), torch.zeros(1), torch.zeros(1), 1.0, None)[0]
    assert float(far) == 1000, "finite where -log(sigmoid(m)) is not"


def test_the_kl_is_that_of_two_gaussians() -> None:
    mean, base, std = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.rand(3, 1, 1, 1) + 0.1
    one, other = (torch.distributions.Normal(m, std.expand_as(m)) for m in (mean, base))
    expected = torch.distributions.kl_divergence(one, other).mean((1, 2, 3))
    torch.testing.assert_close(step_kl(mean, base, std), expected)
    assert float(step_kl(mean, mean, std).abs().max()) == 0


def test_dominance_needs_all_scorers() -> None:
    first = torch.tensor([[1.0, 1.0], [1.0, 2.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    second = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    assert dominance(first, second).tolist() == [1, 1, 0, -1, 0]
    assert dominance(second, first).tolist() == [-1, -1, 0, 1, 0]


# ---- rounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddpo", pytest.param("grpo", marks=pytest.mark.slow), "d3po"])
def test_the_first_update_of_a_round_is_on_policy(name: str) -> None:
    """Ratio 1, nothing clipped; D3PO at log 2. Of a student that has moved from the base."""
    trainer = warm(trainer_of(name, train={"lr": 1e-2}, members=2), 2)
    trainer.meter.sums.clear()
    trainer.train_step()
    means = trainer.meter.read(lambda x: x)
    assert means["kl"] > 0, "of a student that has moved, to the base"
    if name == "d3po":
        fresh = trainer_of(name, members=2)
        fresh.train_step()
        assert fresh.meter.read(lambda x: x)["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert means["ratio_won"] != 1, "the base is the start, not the one that sampled"
    else:
        assert means["ratio"] == pytest.approx(1, abs=1e-5) and means["approx_kl"] < 1e-10
        assert means["clipped_above"] == means["clipped_below"] == 0
    assert means["idle"] == 0 and means["reward_spread"] > 0


class OwnRounding(Context):
    """Kernels of half precision that round by the batch they are in, as a GPU's do and this machine's do not."""

    def model(self, role: str, x_t: Tensor, t: Tensor, cond: Any, guidance: float = 1.0, uncond: Any = None) -> Tensor:
        out = super().model(role, x_t, t, cond, guidance, uncond)
        return out + 2e-3 * torch.sin(1e4 * x_t.sum() + torch.arange(out[0].numel())).view(out[0].shape)


@pytest.mark.parametrize(
    ("compute", "ratio"),
    [
        ("fp32", "density"),
        pytest.param("fp32", "guard", marks=pytest.mark.slow),
        ("bf16", "density"),
        pytest.param("bf16", "guard", marks=pytest.mark.slow),
        ("by the batch", "density"),
        pytest.param("by the batch", "guard", marks=pytest.mark.slow),
    ],
)
def test_before_an_update_the_ratio_is_one_by_the_call_that_trains(compute: str, ratio: str) -> None:
    """In all updates of a pass, exactly; without recalling, half precision would be off by more than the authors' band
    of 1e-4, and chance would say what is clipped. What it is off by is logged. Weights stand still here."""
    still = {"lr": 1e-30, "weight_decay": 0.0, "micro_batch": 3}
    options = {"steps": 4, "updates": 2, "clip": 1e-4, "ratio": ratio, "members": 3, "share": 1.0}
    trainer = stirred(make_trainer(method(**options), autocast=torch.bfloat16 if compute == "bf16" else None, **still))
    trainer.ctx.rewards = {"tiny-pickscore": bright}
    trainer.ctx.__class__ = OwnRounding if compute == "by the batch" else Context
    found = {}
    for recalled in (True, False):
        trainer.method.recalls = lambda phase, recalled=recalled: recalled  # type: ignore[method-assign, misc]
        trainer.meter.sums.clear()
        trainer.train_step()
        found[recalled] = trainer.meter.read(lambda x: x)
    there, without = found[True], found[False]
    assert there["ratio"] == 1 and there["approx_kl"] == there["clipped_above"] == there["clipped_below"] == 0
    if compute == "by the batch":
        assert there["drift"] > 1e-4 and without["approx_kl"] > 0
        assert ratio == "guard" or without["clipped_above"] + without["clipped_below"] > 0.2
    else:
        assert there["drift"] < (1e-5 if compute == "fp32" else 0.1)


def test_later_updates_compare_with_the_start_of_their_round() -> None:
    """And the first update of the next round with its own; a round of one update needs no recalling."""
    trainer = warm(trainer_of(updates=1, epochs=2, train={"lr": 1e-2}, share=1.0, clip=1e-4), 1)
    ratios: list[float] = []
    loss = trainer.method.loss

    def watched(ctx: Any, batch: Any, phase: Any) -> Any:
        found = loss(ctx, batch, phase)
        ratios.append(float((found.metrics["ratio"] - 1).abs().max()))
        return found

    trainer.method.loss = watched  # type: ignore[method-assign]
    trainer.train_step()
    assert len(ratios) == 8 and max(ratios[:4]) == 0 and min(ratios[4:]) > 1e-4
    assert not method(updates=1).recalls(trainer.slots[0].phase) and trainer.method.recalls(trainer.slots[0].phase)


def test_the_guarded_ratio_has_no_bias() -> None:
    """Sheet D 41: of what the one that sampled draws its mean is 0, where the plain log-ratio's is below; and it is the
    drawn noise times the way the mean went."""
    torch.manual_seed(0)
    old, z = torch.randn(1, 4, 8, 8, dtype=torch.float64), torch.randn(4000, 4, 8, 8, dtype=torch.float64)
    far, std = 0.3 * torch.randn_like(old), torch.full((4000, 1, 1, 1), 0.4, dtype=torch.float64)
    drawn = old + std * z
    change = log_prob(drawn, old + far, std) - log_prob(drawn, old, std)
    found = guarded(change, old + far, old, std)
    torch.testing.assert_close(found, (z * far).mean((1, 2, 3)))
    error = float(found.std()) / 4000**0.5
    assert abs(float(found.mean())) < 4 * error < -float(change.mean()) / 10


def test_a_round_is_sampled_once_and_dealt_to_its_updates() -> None:
    trainer = trainer_of(share=1.0, updates=3, epochs=2)
    seen: list[tuple[str, ...]] = []
    sampled: list[tuple[str, ...]] = []
    loss, collect = trainer.method.loss, trainer.method.collect

    def watched(ctx: Any, batch: Any, phase: Any) -> Any:
        seen.append(batch.ids)
        return loss(ctx, batch, phase)

    def counted(ctx: Any, prompts: Any) -> Any:
        sampled.append(prompts.ids)
        return collect(ctx, prompts)

    trainer.method.loss = watched  # type: ignore[method-assign]
    type(trainer.method).collect, before = counted_of(counted), type(trainer.method).collect  # type: ignore[method-assign]
    try:
        trainer.train_step()
    finally:
        type(trainer.method).collect = before  # type: ignore[method-assign]
    assert len(sampled) == 1 and len(trainer.slots) == 6 and trainer.fresh == 1
    items = 4 * 2 * 2
    halves = [seen[: len(seen) // 2], seen[len(seen) // 2 :]]
    for half in halves:
        assert sorted({name for ids in half for name in ids}).__len__() == sum(map(len, half)) == items
    assert int(next(iter(trainer.optimizers["student"].state.values()))["step"]) == 6


def test_updates_keep_their_size_where_items_are_left_out() -> None:
    """Of 64 items in 8 updates a quarter is kept: two updates of about 8, none of one or two items."""
    trainer = trainer_of(steps=8, share=1.0, updates=8, members=2)
    loss, collect = trainer.method.loss, trainer.method.collect
    sizes: list[float] = []

    def thinned(ctx: Any, prompts: Any) -> Any:
        found = collect(ctx, prompts)
        found.weight.zero_()
        for row, kept in enumerate((7, 1, 4, 4)):
            found.weight[[i for i, r in enumerate(found.row) if r == row][:kept]] = 1
        return found

    def watched(ctx: Any, batch: Any, phase: Any) -> Any:
        sizes.append(float(batch.weight.sum()))
        return loss(ctx, batch, phase)

    trainer.method.collect, trainer.method.loss = thinned, watched  # type: ignore[method-assign]
    trainer.micro = 100
    trainer.train_step()
    assert len(sizes) == 8 and sum(sizes) == 16 and sorted(sizes)[:6] == [0] * 6 and min(sizes[:2]) >= 7


def test_a_round_is_empty_where_all_processes_have_nothing() -> None:
    trainer = trainer_of(reward=lambda images, prompts, t=None: torch.ones(len(images)))
    trainer.collect([rows_of(trainer)])
    trainer.reduce = lambda value: value + 5 if value.dtype == torch.int64 else value  # type: ignore[method-assign]
    assert float(trainer.meter.sums.pop("rounds_empty")[0]) == 1
    trainer.collect([rows_of(trainer)])  # another process has five items
    assert float(trainer.meter.sums["rounds_empty"][0]) == 0


def counted_of(call: Any) -> Any:
    return lambda self, ctx, prompts: call(ctx, prompts)


def test_equal_rewards_teach_nothing_and_leave_the_weights_alone() -> None:
    """By momentum or decay either; the round is counted as idle and training goes on."""
    for name in ("ddpo", "d3po"):
        trainer = warm(trainer_of(name, members=2), 1)
        trainer.ctx.rewards = {"tiny-pickscore": lambda images, prompts, t=None: torch.ones(len(images))}
        before = weights(trainer)
        trainer.meter.sums.clear()
        trainer.train_step()
        assert all(map(torch.equal, before, weights(trainer)))
        found = trainer.meter.read(lambda x: x)
        assert found["idle"] == 1 and found.get("groups_alike", 1) == 1 and float(trainer.skipped) == 0
        trainer.ctx.rewards = {"tiny-pickscore": bright}
        trainer.train_step()
        assert not all(map(torch.equal, before, weights(trainer)))


def test_moments_of_the_batch_know_no_micro_batches() -> None:
    steady = {"max_grad_norm": None, "eps": 1e-2}
    options = {"mean": "batch", "std": "batch", "members": 1, "clip": 0.2}
    whole = warm(trainer_of(train=steady, **options), 2)
    parts = warm(trainer_of(train={**steady, "micro_batch": 1}, **options), 2)
    assert gap(weights(whole), weights(parts)) < 1e-5
    batch = rows_of(whole)
    with torch.no_grad():
        found = whole.method.collect(whole.ctx, batch)
    rewards = found.columns["reward"]
    assert len(rewards) == 4
    got = whole.method.advantage(found.columns, found.stats)  # type: ignore[attr-defined]
    expected = (rewards - rewards.mean()) / (rewards.std(unbiased=False) + 1e-6)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_round_goes_on_from_a_checkpoint_in_the_middle_of_a_run() -> None:
    """A checkpoint holds no samples: the round that a kill broke off is sampled again, bit for bit."""
    straight = warm(trainer_of(updates=2, epochs=2), 2)
    first = warm(trainer_of(updates=2, epochs=2), 1)
    state = copy.deepcopy(first.state())
    first.collect([rows_of(first)])  # killed here: the rollout of the second round was under way
    second = trainer_of(updates=2, epochs=2)
    second.load(state)
    warm(second, 1)
    assert all(map(torch.equal, weights(straight), weights(second)))


def test_in_one_step_d3po_is_dpo_of_gaussians() -> None:
    """D 27: the policy's last latents are its pictures, and their densities under student and base all there is."""
    trainer = stirred(trainer_of("d3po", steps=1, spacing="trailing", beta=3.0, clip=None, share=1.0))
    found = items_of(trainer)
    batch = found.take(range(len(found)))
    assert len(found) == 4 and torch.equal(batch.latents["x_t_won"], batch.latents["x_t_lost"])
    with torch.no_grad():
        loss = trainer.method.loss(trainer.ctx, batch, trainer.slots[0].phase).values
    policy, t = trainer.method.policy(SD), batch.columns["t"]  # type: ignore[attr-defined]
    margins = []
    for role in ("student", "base"):
        with torch.no_grad():
            output = trainer.ctx.model(role, batch.latents["x_t_won"], t, batch.cond["prompt"])
        step = policy.step(SD, output, batch.latents["x_t_won"], t, batch.columns["s"])
        normal = torch.distributions.Normal(step.mean, step.std.expand_as(step.mean))
        won, lost = (normal.log_prob(batch.latents[f"x_s_{side}"]).mean((1, 2, 3)) for side in ("won", "lost"))
        margins.append(won - lost)
    torch.testing.assert_close(loss, -F.logsigmoid(3.0 * (margins[0] - margins[1])))
    assert float((margins[0] - margins[1]).abs().max()) > 1e-4


def test_gradients_are_clipped() -> None:
    """The authors clip an exhausted iterator, which does nothing (sheet, appendix E)."""
    trainer = trainer_of("ddpo", train={"max_grad_norm": 1e-3, "optimizer": "adamw"}, members=2)
    seen: list[float] = []
    step = trainer.optimizers["student"].step
    trainer.optimizers["student"].step = lambda *a: (
        seen.append(  # type: ignore[method-assign]
            float(torch.cat([p.grad.flatten() for p in trainer.roles.parameters("student")]).norm())
        )
        or step(*a)
    )
    trainer.train_step()
    norm = trainer.meter.read(lambda x: x)["grad_norm/student"]
    assert norm > 2e-3 and seen == [pytest.approx(1e-3, rel=1e-3)]


def seen(trainer: Trainer) -> Tensor:
    """Rewards of twelve prompts under noise that never changes."""
    before, trainer.ctx.phase = trainer.ctx.phase, "look"
    with torch.no_grad():
        found = trainer.method.collect(trainer.ctx, rows_of(trainer, range(12))).metrics["reward"]
    trainer.ctx.phase = before
    return found


@pytest.mark.parametrize("name", ["ddpo", *(pytest.param(n, marks=pytest.mark.slow) for n in LIKELIHOOD[1:])])
def test_the_reward_goes_up(name: str) -> None:
    """On the same noise before and after, so that nothing but the weights tells."""
    options = {"clip": 0.1} if name != "d3po" else {"beta": 10.0, "clip": None}
    trainer = trainer_of(
        name, train={"lr": 3e-3, "batch": 8, "weight_decay": 0.0}, shared_noise=True, members=4, **options
    )
    start = seen(trainer)
    warm(trainer, 7)
    assert float((seen(trainer) - start).mean()) > 5e-4


def test_held_out_prompts_are_sampled_and_scored() -> None:
    trainer = trainer_of(members=2)
    heldout = Source(Rows(4, seed=9, kind="prompt"), range(4), 0, Cond(torch.zeros(1, 5, 16)))  # type: ignore[arg-type]
    found = heldout_metrics(trainer, heldout, ValidateRecipe(draws=1))
    assert found["loss"] == -found["reward"] and found == heldout_metrics(trainer, heldout, ValidateRecipe(draws=1))


def test_scorers_are_summed_by_weight_and_a_picture_is_decoded_once() -> None:
    trainer = trainer_of(reward_weights=[2.0])
    calls = {"decode": 0, "score": 0}
    decode = trainer.ctx.decoder
    assert decode is not None

    def decoded(latents: Tensor) -> Tensor:
        calls["decode"] += len(latents)
        return decode(latents)

    def scored(images: Tensor, prompts: Any, t: Any = None) -> Tensor:
        calls["score"] += len(images)
        return bright(images, prompts)

    trainer.ctx.decoder = decoded
    trainer.ctx.rewards = {"a": scored, "b": scored}
    scores = trainer.method.score(trainer.ctx, torch.randn(10, 4, 8, 8), ["x"] * 10)  # type: ignore[attr-defined]
    assert scores.shape == (10, 2) and calls == {"decode": 10, "score": 20}
    weighted = method(reward="tiny-pickscore,tiny-hps", reward_weights=[2.0, -1.0])
    torch.testing.assert_close(weighted.total(scores), 2 * scores[:, 0] - scores[:, 1])  # type: ignore[attr-defined]


def test_the_better_picture_is_the_preferred_one_at_every_step() -> None:
    """Of each two of three samples; either side is one trajectory that ends on its picture."""
    trainer = trainer_of("d3po", steps=2, spacing="trailing", share=1.0, members=3)
    found = items_of(trainer)
    assert len(found) == 4 * 3 * 2 and float(found.weight.min()) == 1
    early, late = ([i for i, name in enumerate(found.ids) if name.endswith(f"@{k}")] for k in (0, 1))
    pairs = [[found.ids[i].partition("@")[0] for i in items] for items in (early, late)]
    assert pairs[0] == pairs[1] and len(set(pairs[0])) == 12
    for side in ("won", "lost"):
        assert torch.equal(found.latents[f"x_s_{side}"][early], found.latents[f"x_t_{side}"][late])
    decode = trainer.ctx.decoder
    assert decode is not None
    with torch.no_grad():
        won, lost = (bright(decode(found.latents[f"x_s_{side}"][late]), []) for side in ("won", "lost"))
    assert bool((won > lost).all())


def test_a_negative_weight_turns_a_verdict() -> None:
    found, turned = (trainer_of("d3po", reward_weights=[weight]) for weight in (1.0, -1.0))
    one, other = (items_of(trainer) for trainer in (found, turned))
    assert torch.equal(one.latents["x_s_won"], other.latents["x_s_lost"]) and float(one.weight.min()) == 1


def items_of(trainer: Trainer) -> Any:
    with torch.no_grad():
        return trainer.method.collect(trainer.ctx, rows_of(trainer))


def test_a_narrow_loss_is_announced() -> None:
    assert "look at the reward, not at the loss" in method("d3po").notes()[0]
    assert not method("d3po", beta=10.0).notes() and not method("d3po", clip=None).notes()
    assert F.softplus(torch.tensor(0.0)) == pytest.approx(math.log(2))
