"""DMD's family on Gaussian worlds: fixed points, first gradients, golden values, identities (sheet 2-4, 7, 8, 27)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gauss import DENOISER, Net, World
from tiny import SD_SCHEDULE
from torch import Tensor
from world import batch_of, make_trainer, warm, weights

from diffalign.methods import make_method
from diffalign.methods.score_distill import DistillConfig, ScoreDistill, dm_direction, surrogate
from diffalign.trainer import plan_slots

FOUR = (999, 749, 499, 249)
TDM = {"timesteps": [899], "normalise": "none", "loss": "mse"}


def score(**options: Any) -> ScoreDistill[Any]:
    return ScoreDistill(DistillConfig(**{"guidance": 1.0, **options}))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- fixed points -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "world", "mean", "std"),
    [
        (score(), {}, 1.5, 0.7),
        (score(normalise="none"), {}, 1.5, 0.7),
        (score(start="sigma", timesteps=[625]), {"prediction": "v_prediction"}, 1.5, 0.7),
        (score(guidance=4.0, normalise="none"), {"m_u": 0.5}, 4.5, 0.7),
        (make_method("diff_instruct", {"guidance": 4.0, "divergence": "kl"}), {"m_u": 0.5}, 4.5, 0.7),
        (make_method("diff_instruct", {"guidance": 1.0, "divergence": "fisher"}), {}, 1.5, 0.7),
        (make_method("diff_instruct", {"guidance": 1.0, "divergence": "huber", "huber": 0.1}), {}, 1.5, 0.7),
        (make_method("dmd", {"guidance": 1.0, "regression_weight": 0.0}), {}, 1.5, 0.7),
        (make_method("tdm", {**TDM, "guidance": 1.0}), {}, 1.5, 0.703),
        (make_method("tdm", {**TDM, "guidance": 3.0}), {"m_u": 0.5}, 3.5, 0.703),
    ],
    ids=["dmd", "no divisor", "sigma, v", "guided", "di++", "fisher", "huber", "dmd method", "tdm", "tdm, guided"],
)
def test_one_step_reaches_the_teachers_law(method: Any, world: dict[str, Any], mean: float, std: float) -> None:
    (found,), (spread,) = World(method, **world).descend(120, lr=0.3).reached()
    assert found == pytest.approx(mean, abs=1e-2) and spread == pytest.approx(std, abs=1e-2)


def test_a_learned_fake_score_follows_the_student() -> None:
    """Both phases: five updates of the fake score for one of the student."""
    world = World(score(normalise="none", critic_steps=5), "learned", rows=4).descend(60, lr=0.15)
    (mean,), (std,) = world.reached()
    assert mean == pytest.approx(1.5, abs=0.1) and std == pytest.approx(0.7, abs=0.15)
    assert world.fake.mean.item() == pytest.approx(mean, abs=0.1)


@pytest.mark.parametrize(
    ("level", "ratio"), [(749, 0.882187), pytest.param(499, 0.675963, marks=pytest.mark.slow), (249, 0.369260)]
)
def test_decoupled_schedules_reach_their_closed_form(level: int, ratio: float) -> None:
    """Mean m_c + (w - 1) (m_c - m_u) E_CA[k] / E_DM[k]; the std stays."""
    options = {"timesteps": [level], "guidance": 4.0, "normalise": "none"}
    world = World(make_method("decoupled_dmd", options), m_u=0.5, rows=4).descend(60, lr=0.3)
    world.rows = 16
    found = [world.descend(1, lr=0.15, start=visit).reached() for visit in range(60, 120)]
    mean, std = (sum(each[k][0] for each in found[20:]) / 40 for k in (0, 1))
    assert mean == pytest.approx(1.5 + 3 * ratio, abs=0.1) and std == pytest.approx(0.7, abs=0.05)


def test_guidance_alone_has_no_fixed_point() -> None:
    """Each step adds lr (w - 1) (m_c - m_u) E[k] to the mean, wherever it is."""
    options = {"timesteps": [999], "guidance": 4.0, "normalise": "none", "matching_weight": 0.0}
    world = World(make_method("decoupled_dmd", options), m_u=0.5, rows=512)
    found = [world.descend(1, lr=1.0, start=visit).reached()[0][0] for visit in range(3)]
    for before, after in zip([-1.0, *found], found, strict=False):
        assert after - before == pytest.approx(3 * 0.7200660, rel=0.05)


def test_backward_simulation_with_a_fake_score_told_the_step_reaches_the_law_at_every_step() -> None:
    world = World(score(timesteps=FOUR, step_fake=True, normalise="none"), init="teacher", rows=4)
    with torch.no_grad():
        world.student.b.add_(0.5)
    means, stds = world.descend(150, lr=2.5).reached()
    assert means == pytest.approx([1.5] * 4, abs=0.02) and stds == pytest.approx([0.7] * 4, abs=0.02)


def test_a_fake_score_shared_by_the_steps_binds_only_their_mixture() -> None:
    """Sheet 3.7-9: the mixture is right, the steps are not."""
    world = World(score(timesteps=FOUR, normalise="none"), init="teacher").descend(100, lr=2.0)
    means, stds = (torch.tensor(found) for found in world.reached())
    assert float(means.mean()) == pytest.approx(1.5, abs=0.03)
    assert float((stds**2 + means**2).mean() - means.mean() ** 2) == pytest.approx(0.49, abs=0.02)
    assert float((means - 1.5).abs().max()) > 0.2 and float(stds.max() - stds.min()) > 0.1


# ---- first gradients and golden values ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dmd", "dmd2", "decoupled_dmd", "f_distill", "diff_instruct"])
def test_no_gradient_where_fake_and_teacher_agree(name: str) -> None:
    """U1, on the real network: a LoRA starts as nothing, so the fake score starts as the teacher, to the bit."""
    options: dict[str, Any] = {"guidance": 1.0, "timesteps": [999]}
    options |= {"regression_weight": 0.0} if name == "dmd" else {}
    trainer = make_trainer(make_method(name, options))
    trainer.ctx.phase = "student"
    trainer.roles.train_only(("student",))
    loss = trainer.method.loss(trainer.ctx, batch_of(trainer), trainer.method.phases[0])
    values = loss.values.detach() - (5e-3 * math.log(2) if name == "f_distill" else 0)  # its GAN's head starts at 0
    loss.values.sum().backward()
    gradients = [p.grad for p in trainer.roles.parameters("student") if p.grad is not None]
    # Diff-Instruct*'s runs through both networks' Jacobians, which agree to rounding
    assert gradients and max(float(g.abs().max()) for g in gradients) <= (1e-5 if name == "diff_instruct" else 0)
    assert float(values.abs().max()) < 1e-6


def test_the_first_gradient_is_pure_guidance() -> None:
    """g = -(w - 1) (y_cond - y_uncond) / mean |x - y_real|, fake and teacher being one."""
    method = make_method("dmd2", {"timesteps": [999, 499], "guidance": 8.0})
    trainer = make_trainer(method)
    ctx, batch = trainer.ctx, batch_of(trainer)
    ctx.phase = "student"
    with torch.no_grad():
        sample = method.generate(ctx, batch)
        direction, _ = method.direction(ctx, batch, sample)
        x_t, t = method.noised(ctx, batch, sample.x, method.time_window(ctx, sample))
        y_cond, y_uncond = (ctx.denoiser.to_x0(y, x_t, t) for y in ctx.branches("base", x_t, t, sample.cond))
    size = (sample.x - (y_uncond + 8 * (y_cond - y_uncond))).abs().mean((1, 2, 3), keepdim=True)
    assert float((y_cond - y_uncond).abs().max()) > 1e-3
    torch.testing.assert_close(direction, -7 * (y_cond - y_uncond) / size, rtol=1e-2, atol=2e-4)


def test_golden_gradients_at_one_point() -> None:
    """At mean .2 and the right std: dE[L]/db = E[k] (.2 - 1.5) with E[k] = .72007 over times 20..980; SiM as SiD at
    alpha 1: -E[k^2] 1.3 = -.78356 over 20..979."""

    def slope(method: Any) -> float:
        world = World(method, rows=1024)
        with torch.no_grad():
            world.student.a.fill_(0.7), world.student.b.fill_(0.2)
        world.gradient()
        return float(world.student.b.grad)

    assert slope(score(normalise="none")) == pytest.approx(-0.93609, rel=0.03)
    fisher = make_method("diff_instruct", {"divergence": "fisher", "guidance": 1.0, "time_range": [0.02, 0.979]})
    assert slope(fisher) == pytest.approx(-0.78356, rel=0.04)


class Echo(Net):
    """A network that gives back the noise that it was started from."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return x / self.scale


@pytest.mark.parametrize(
    ("time", "start", "factor"), [(999, "unit", 0.03417), (399, "unit", 0.37139), (625, "sigma", 0.0)]
)
def test_the_first_step_from_unit_noise_and_from_sigmas(time: int, start: str, factor: float) -> None:
    world = World(score(timesteps=[time], start=start))
    world.roles.networks["student"] = Echo(0.928564 if start == "sigma" else 1.0)
    batch = world.batch(0)
    x = world.method.generate(world.ctx, batch).x
    noise = world.ctx.draw(batch, "start")[1]
    torch.testing.assert_close(x, factor * noise, rtol=1e-3, atol=1e-5)


def test_directions_are_scale_free_per_sample_and_finite() -> None:
    x, y_fake, y_real = (normal(3, 4, 8, 8, seed=s) for s in range(3))
    g = dm_direction(x, y_fake, y_real)
    torch.testing.assert_close(dm_direction(3 * x, 3 * y_fake, 3 * y_real), g)  # U3
    leaf = x.clone().requires_grad_()
    values = surrogate(leaf, g)
    values.sum().backward()
    torch.testing.assert_close(leaf.grad, g / g[0].numel(), atol=1e-7, rtol=1e-6)  # U2
    torch.testing.assert_close(values, g.square().mean((1, 2, 3)) / 2)
    other = y_real.clone()
    other[2] += 5
    assert torch.equal(dm_direction(x, y_fake, other)[:2], g[:2])  # U7
    assert not bool(dm_direction(x, x, x).any())  # U6
    assert bool(torch.isfinite(dm_direction(x, y_fake, x)).all())


def test_times_reach_both_ends_of_their_windows() -> None:
    """U8: 20..980 for the student, 0..999 for the fake score, below the student's own step for the augmentation."""
    world = World(make_method("decoupled_dmd", {}), rows=4096)
    world.ctx.phase = "student"
    batch = world.batch(0)
    with torch.no_grad():
        sample = world.method.generate(world.ctx, batch)
    for window, first, last in (
        (world.method.time_window(world.ctx, sample), 20, 980),
        (world.method.critic_window(world.ctx, sample), 0, 999),
    ):
        times = world.method.times(world.ctx, batch, "t", window)
        assert (int(times.min()), int(times.max())) == (pytest.approx(first, abs=3), pytest.approx(last, abs=3))
        assert int(times.min()) >= first and int(times.max()) <= last
        assert {(int(a), int(b)) for a, b in window} == {(first, last)}
    times = world.method.times(world.ctx, batch, "t", world.method.augment_window(world.ctx, sample))
    for step, highest in enumerate((980, 749, 499, 249)):
        mine = times[[row for row, own in enumerate(sample.steps) if own == step]]
        assert len(mine) > 900 and highest - 8 <= int(mine.max()) <= highest and int(mine.min()) >= 20


# ---- backward simulation ------------------------------------------------------------------------------------------


def test_only_the_last_call_of_a_roll_out_has_a_gradient() -> None:
    world = World(score(timesteps=FOUR), rows=1)
    seen = set()
    for visit in range(24):
        world.ctx.phase = "student"
        step = world.method.generate(world.ctx, world.batch(visit)).steps[0]
        world.gradient(visit=visit)
        assert world.student.b.grad.nonzero().flatten().tolist() == [step]
        seen.add(step)
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize("rollout", ["renoise", "ddim"])
def test_a_roll_out_is_the_sampler_that_is_recorded(rollout: str) -> None:
    """What the last step is given and makes, against the recorded diffusers scheduler with the same noise."""
    import diffusers

    method = score(timesteps=FOUR, rollout=rollout)
    world = World(method, rows=2, init="teacher")
    with torch.no_grad():
        world.student.b.add_(0.3)
    batch, ctx = world.batch(0), world.ctx
    cond, trace = batch.cond["prompt"], []
    x_in = method.reach(ctx, batch, cond, (3, 3), trace)
    t = torch.full((2,), 249)
    x, _ = method.call_student(ctx, x_in, t, cond)
    assert len(trace) == 4 and torch.equal(trace[3], x_in)
    draws = [ctx.draw(batch, tag)[1] for tag in ("start", "renoise-1", "renoise-2", "renoise-3", "score")]
    assert all(float((a - b).abs().min()) > 0 or a is b for a in draws for b in draws)  # no noise is used twice
    record = method.sampling(SD_SCHEDULE)
    scheduler = getattr(diffusers, record.scheduler).from_config(record.scheduler_config())
    scheduler.set_timesteps(timesteps=list(FOUR))
    y = draws[0]
    for k, time in enumerate(scheduler.timesteps):
        eps = ctx.roles("student", y, torch.full((2,), int(time)), cond)
        if rollout == "renoise":
            y = scheduler.step(eps, time, y).denoised
            y = DENOISER.add_noise(y, draws[k + 1], FOUR[k + 1]) if k < 3 else y
        else:
            y = scheduler.step(eps, time, y).prev_sample
    torch.testing.assert_close(y, x, rtol=1e-3, atol=1e-3)


def test_the_steps_vector_starts_as_nothing_and_is_learned_with_the_fake_score() -> None:
    plain, told = (make_method("dmd2", {"timesteps": [999, 499], "step_fake": told}) for told in (False, True))
    losses = []
    for method in (plain, told):
        trainer = make_trainer(method)
        trainer.ctx.phase = "critic"
        losses.append(method.loss(trainer.ctx, batch_of(trainer), method.phases[1]).values)
    torch.testing.assert_close(*losses)
    table = warm(trainer, 2).roles.modules["steps"].weight.detach()
    assert told.phases[1].trains == ("fake", "steps") and bool((table.abs().sum(1) > 0).all())
    assert not torch.equal(table[0], table[1])


def test_the_base_is_bitwise_the_same_after_training() -> None:
    """U11, and U9: five updates of the fake score for one of the student."""
    trainer = make_trainer(make_method("dmd2", {"timesteps": [999], "batches": "reuse"}))
    slots = [(slot.phase.name, slot.repeat, slot.fresh) for slot in plan_slots(trainer.method)]
    assert slots == [("student", 0, 0), *(("critic", repeat, 0) for repeat in range(5))]
    batch, t = batch_of(trainer), torch.full((4,), 500)
    x, cond = normal(4, 4, 8, 8), batch.cond["prompt"]
    before = trainer.ctx.model("base", x, t, cond)
    assert torch.equal(before, trainer.ctx.model("fake", x, t, cond))  # the fake score starts as the teacher
    assert torch.equal(before, trainer.ctx.model("student", x, t, cond))
    start = weights(trainer)
    warm(trainer, 2)
    assert all(not torch.equal(a, b) for a, b in zip(start, weights(trainer), strict=True))
    assert torch.equal(before, trainer.ctx.model("base", x, t, cond))
    assert not torch.equal(before, trainer.ctx.model("fake", x, t, cond))
