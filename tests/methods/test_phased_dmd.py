"""Phased DMD: noise from the end of a phase, the fake score's target there, and one phase as DMD2 (sheet 17)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gauss import DENOISER, Net, Student, World, level
from pydantic import ValidationError
from tiny import SD_SCHEDULE
from torch import Tensor
from toys import make, normal
from world import batch_of, make_trainer, warm

from diffalign.denoiser import Denoiser
from diffalign.errors import UserError
from diffalign.methods import make_method
from diffalign.methods.distillation.phased_dmd import PhasedDMD, ending, fake_target, further_noise
from diffalign.methods.score_distill import dm_direction

FOUR = (999, 749, 499, 249)


def phased(**options: Any) -> PhasedDMD:
    return make_method("phased_dmd", {"guidance": 1.0, **options})  # type: ignore[return-value]


# ---- parts -----------------------------------------------------------------------------------------------------------


def test_noise_from_the_end_of_a_phase_gives_the_schedules_own_level() -> None:
    t, end = torch.tensor([980, 600, 519, 499, 300]), torch.tensor([499, 249, 499, 499, -1])
    ratio, beta = further_noise(DENOISER, t, end)
    sigma = torch.where(end < 0, 0.0, DENOISER.sigma(end.clamp_min(0)).flatten())[:, None, None, None]
    torch.testing.assert_close((ratio * sigma) ** 2 + beta**2, DENOISER.sigma(t) ** 2)
    assert beta[3] == 0 and ratio[3] == 1, "at the end itself nothing is added"
    torch.testing.assert_close(ratio[4], DENOISER.alpha(t[4:])[0])
    torch.testing.assert_close(beta[4], DENOISER.sigma(t[4:])[0])


def test_the_flow_target_is_the_papers() -> None:
    """-x_s / (1 - s) + (t + (1 - t) s^2 / (1 - s)^2) / beta noise, at t = 1 too; noise - x0 where it ends at x0."""
    flow = Denoiser.from_config({"shift": 3.0}, "flow")
    x, noise = normal(3, 1, 4, 4, seed=1), normal(3, 1, 4, 4, seed=2)
    t, end = torch.tensor([900, 999, 700]), torch.tensor([400, 400, -1])
    found, _ = fake_target(flow, x, noise, t, end)
    sigma_t, sigma_s = flow.sigma(t).double(), flow.sigma(end.clamp_min(0)).double()
    beta = (sigma_t**2 - ((1 - sigma_t) / (1 - sigma_s) * sigma_s) ** 2).sqrt()
    wanted = -x / (1 - sigma_s) + (sigma_t + (1 - sigma_t) * sigma_s**2 / (1 - sigma_s) ** 2) / beta * noise
    torch.testing.assert_close(found[:2], wanted[:2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[2], noise[2] - x[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_the_targets_mean_given_x_t_is_that_of_the_score(kind: str) -> None:
    """x_s of Gaussian data: the best linear guess of the target is what the exact network says at x_t."""
    denoiser, m, s, n = make(kind), 1.5, 0.7, 400_000
    t, end = torch.tensor([700]), torch.tensor([400])
    noises = normal(3, n, 1, 1, 1, seed=3)
    x_s = denoiser.add_noise(m + s * noises[0], noises[1], end)
    ratio, beta = further_noise(denoiser, t, end)
    x_t = ratio * x_s + beta * noises[2]
    target, _ = fake_target(denoiser, x_s, noises[2], t, end)
    x, y = x_t.flatten() - x_t.mean(), target.flatten() - target.mean()
    slope = float((x * y).mean() / (x * x).mean())
    alpha, sigma = (float(c) for c in (denoiser.alpha(t), denoiser.sigma(t)))

    def exact(at: float) -> float:
        x0 = (m * sigma**2 + s**2 * alpha * at) / (alpha**2 * s**2 + sigma**2)
        return float(denoiser.target_from_xt(torch.full((1, 1, 1, 1), x0), torch.full((1, 1, 1, 1), at), t))

    assert slope == pytest.approx(exact(1.0) - exact(0.0), rel=0.01)
    assert float(target.mean()) == pytest.approx(exact(alpha * m), abs=0.01)


def test_phases_ends_and_windows() -> None:
    assert phased().ends() == (499, 499, -1, -1) and phased().marks() == (0, 0, 1, 1)
    assert phased(phases=[1, 2, 1]).ends() == (749, 249, 249, -1)
    assert phased(timesteps=[999]).ends() == (-1,)
    method = phased()
    trainer = warm(make_trainer(method, lr=0.05), 1)
    ctx, seen = trainer.ctx, set()
    for visit in range(4):
        batch = trainer.source.load(list(range(12)), [visit] * 12)
        with torch.no_grad():
            sample = method.generate(ctx, batch)
            x_s, end = method.land(ctx, batch, sample)
            _, t, _ = method.diffused(ctx, batch, x_s, end, method.time_window(ctx, sample))
        for k, time in zip(sample.steps, t.tolist(), strict=True):
            assert (519 if k < 2 else 20) <= time <= 980
            seen.add(k)
        last = [row for row, k in enumerate(sample.steps) if k > 1]
        torch.testing.assert_close(x_s[last], sample.x[last])
        assert {*method.critic_window(ctx, sample)} <= {(519, 999), (0, 999)}
        assert method.told(ctx, sample)[0].embeds.shape == sample.cond.embeds.shape
    assert seen == {0, 1, 2, 3} and trainer.roles.modules["steps"].weight.shape[0] == 2


def test_a_phase_ends_by_ddim_where_the_roll_out_is() -> None:
    method = phased(rollout="ddim")
    trainer = warm(make_trainer(method, lr=0.05), 1)
    ctx, batch = trainer.ctx, batch_of(trainer)
    with torch.no_grad():
        sample = method.generate(ctx, batch)
        x_s, end = method.land(ctx, batch, sample)
        jump = ctx.denoiser.ddim_step(sample.output, sample.x_in, sample.t, end.clamp_min(0)).sample
    wanted = torch.where((end < 0)[:, None, None, None], sample.x, jump)
    torch.testing.assert_close(x_s, wanted)
    assert bool((end >= 0).any()) and "land" not in method.needs.draws and "land" in phased().needs.draws
    assert method.sampling(SD_SCHEDULE).deterministic and not phased().sampling(SD_SCHEDULE).deterministic
    assert phased().sampling(SD_SCHEDULE).timesteps == FOUR


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_one_phase_is_dmd2(prediction: str) -> None:
    """Both losses, number by number, at several steps."""
    shared = {"timesteps": [999, 499], "guidance": 3.0, "step_fake": False}
    one, two = phased(**shared, phases=[2]), make_method("dmd2", shared)
    trainer = warm(make_trainer(two, lr=0.05), 2)
    trainer.ctx.denoiser = Denoiser.from_config(SD_SCHEDULE, prediction)
    for phase in two.phases:
        trainer.ctx.phase = phase.name
        with torch.no_grad():
            mine, theirs = (method.loss(trainer.ctx, batch_of(trainer), phase) for method in (one, two))
        torch.testing.assert_close(mine.values, theirs.values, rtol=1e-4, atol=1e-6)


def test_what_is_pushed_is_the_end_of_the_phase() -> None:
    """The student's x0 has alpha_s times the direction; the fake score's error is in units of the new noise."""
    method = phased(timesteps=[999, 499], guidance=3.0)
    trainer = warm(make_trainer(method, lr=0.05), 2)
    ctx, batch = trainer.ctx, batch_of(trainer, range(12))
    ctx.phase = "student"
    trainer.roles.train_only(("student",))
    sample = method.generate(ctx, batch)
    sample.x.retain_grad()
    method.student_loss(ctx, batch, sample).values.sum().backward()
    with torch.no_grad():
        x_s, end = method.land(ctx, batch, sample)
        x_t, t, noise = method.diffused(ctx, batch, x_s, end, method.time_window(ctx, sample))
        y_fake, y_real = method.fake_x0(ctx, x_t, t, sample), method.real_x0(ctx, x_t, t, sample, 3.0)
        direction = dm_direction(sample.x, y_fake, y_real)
        alpha, _ = ending(ctx.denoiser, end)
        assert {round(float(a), 4) for a in alpha} == {0.5269, 1.0}
        torch.testing.assert_close(sample.x.grad * 256, alpha * direction, rtol=1e-3, atol=1e-5)
        loss = method.critic_loss(ctx, batch, sample).values
        x_t, t, noise = method.diffused(ctx, batch, x_s, end, method.critic_window(ctx, sample))
        _, beta = further_noise(ctx.denoiser, t, end)
        share = ctx.denoiser.sigma(t) / beta
        eps = method.fake(ctx, x_t, t, sample)
        torch.testing.assert_close(loss, ((eps - share * noise) / share).square().mean((1, 2, 3)))
        assert float(share.max()) > 1.05


def test_equal_scores_move_nothing() -> None:
    trainer = make_trainer(phased())
    trainer.ctx.phase = "student"
    trainer.roles.train_only(("student",))
    loss = trainer.method.loss(trainer.ctx, batch_of(trainer), trainer.method.phases[0])
    loss.values.sum().backward()
    gradients = [p.grad for p in trainer.roles.parameters("student") if p.grad is not None]
    assert (
        gradients and max(float(g.abs().max()) for g in gradients) == 0 and float(loss.values.detach().abs().max()) == 0
    )


def test_refusals() -> None:
    for wrong in ({"phases": [2, 1]}, {"phases": [4, 0]}, {"rollout": "data"}, {"margin": 0}):
        with pytest.raises(ValidationError):
            phased(**wrong)
    with pytest.raises(ValidationError, match=r"add up to the student's 4, such as \[2, 2\]"):
        phased(phases=[3])
    phased().check(DENOISER)
    with pytest.raises(UserError, match=r"time_range ends at 500, .* above 499, where the phase of .* time 999 ends"):
        phased(time_range=[0.02, 0.5]).check(DENOISER)


# ---- where it ends ---------------------------------------------------------------------------------------------------


def test_each_phase_reaches_the_teachers_law() -> None:
    """Two phases of a step each, a fake score that is exact for the phase that it is told."""
    world = World(phased(timesteps=[999, 99], normalise="none"), init="teacher", rows=4)
    with torch.no_grad():
        world.student.a.copy_(torch.tensor([0.4, 0.4]))
        world.student.b.copy_(torch.tensor([1.0, 1.0]))
    means, stds = world.descend(150, lr=1.5).reached()
    assert means == pytest.approx([1.5, 1.5], abs=0.03) and stds == pytest.approx([0.7, 0.7], abs=0.03)


class Landed(Net):
    """The exact score of what a student of two phases of a step each lands at by DDIM, told which of them it is."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.source = (student,)

    @torch.no_grad()
    def laws(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Mean and variance at the end of the first phase, and of x0."""
        (student,) = self.source
        (alpha, sigma), (to_a, to_s) = (tuple(float(c) for c in level(t)) for t in student.times)
        a, b = float(student.a[0]), float(student.b[0])
        slope, shift = to_a * a + to_s * (1 - alpha * a) / sigma, (to_a - to_s * alpha / sigma) * b
        means, variances = student.moments()
        return (shift, slope**2), (float(means[1]), float(variances[1]))

    def x0(self, x: Tensor, t: Tensor, flag: Tensor, step: Tensor) -> Tensor:
        (student,) = self.source
        alpha, sigma = level(t)
        end = torch.where(step.argmax(1) == 0, student.times[1], -1)
        ratio, beta = further_noise(DENOISER, t, end)
        mean, var = (torch.tensor(law)[step.argmax(1)].reshape(-1, 1, 1, 1) for law in zip(*self.laws(), strict=True))
        eps = sigma * (x - ratio * mean) / (ratio**2 * var + beta**2)
        return (x - sigma * eps) / alpha


def test_by_ddim_a_phase_ends_on_the_teachers_marginal() -> None:
    """Where x_s is no x0 under new noise: alpha m and (alpha s)^2 + sigma^2 at 99, and the teacher's law at last."""
    method = phased(timesteps=[999, 99], rollout="ddim", normalise="none")
    world = World(method, init="teacher", rows=4)
    world.fake = Landed(world.student)
    world.roles.networks["fake"], world.roles._parameters["fake"] = world.fake, {}
    with torch.no_grad():
        world.student.b.copy_(torch.tensor([1.0, 0.2]))
    (mean, var), (last, spread) = world.descend(150, lr=0.4).fake.laws()
    alpha, sigma = (float(c) for c in level(99))
    assert mean == pytest.approx(1.5 * alpha, abs=0.03)
    assert var == pytest.approx((alpha * 0.7) ** 2 + sigma**2, abs=0.03)
    assert last == pytest.approx(1.5, abs=0.03) and spread**0.5 == pytest.approx(0.7, abs=0.03)


def test_the_fake_score_rests_where_it_knows_the_students_law() -> None:
    """Within a phase that ends at a noisy time: a fake score that is right has no gradient, a wrong one has."""
    method = phased(timesteps=[999, 499], normalise="none", step_fake=False)
    world = World(method, "learned", rows=192, init="teacher")
    with torch.no_grad():  # both steps make N(1.2, .6): the first from unit noise, the second from what it makes
        level = DENOISER._levels(torch.tensor([499]), torch.device("cpu"))
        alpha, sigma = (float(c) for c in level)
        world.student.a.copy_(torch.tensor([0.6, 0.6 / (alpha**2 * 0.36 + sigma**2) ** 0.5]))
        world.student.b.copy_(torch.tensor([1.2, 1.2 - float(world.student.a[1]) * alpha * 1.2]))
    assert world.reached()[0] == pytest.approx([1.2, 1.2]) and world.reached()[1] == pytest.approx([0.6, 0.6])

    def pull(mean: float, std: float) -> tuple[float, float]:
        with torch.no_grad():
            world.fake.mean.fill_(mean), world.fake.log_std.fill_(torch.tensor(std).log())
        world.gradient("critic", visit=1)
        return float(world.fake.mean.grad), float(world.fake.log_std.grad)

    right = pull(1.2, 0.6)
    assert max(map(abs, right)) < 0.03
    assert pull(1.5, 0.6)[0] > 5 * max(abs(right[0]), 0.01) and pull(1.2, 0.9)[1] > 3 * max(abs(right[1]), 0.01)
