"""SiD: identities of its loss, the gradient through both scores, guidance, and where it converges (sheet 5 and 27)."""

from __future__ import annotations

import math

import pytest
import torch
from gauss import ExactFake, World
from tiny import SD_SCHEDULE
from torch import Tensor
from world import batch_of, make_trainer, warm

from diffalign.methods import make_method
from diffalign.methods.distillation.sid import SiD, sid_loss
from diffalign.methods.score_distill import dm_direction


def sid(**options: object) -> SiD:
    return make_method("sid", {"timesteps": [999], "start": "unit", "guidance": 1.0, **options})  # type: ignore[return-value]


def latents(n: int = 3) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(4, 2, 3, 3, dtype=torch.float64) for _ in range(n)]


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_identities_of_the_loss() -> None:
    x, f, r = latents()
    mean = lambda v: v.mean((1, 2, 3))  # noqa: E731
    divisor = mean((x - r).abs())
    half, found = sid_loss(x, f, r, 0.5)
    torch.testing.assert_close(found, divisor)
    torch.testing.assert_close(half, 0.5 * mean((r - x) ** 2 - (f - x) ** 2) / divisor)
    torch.testing.assert_close(sid_loss(x, f, r, 0.0)[0], mean((r - f) * (r - x)) / divisor)
    torch.testing.assert_close(sid_loss(x, f, r, 1.0)[0], mean((r - f) * (f - x)) / divisor)
    torch.testing.assert_close(sid_loss(3 * x, 3 * f, 3 * r)[0], 3 * sid_loss(x, f, r)[0])
    torch.testing.assert_close(sid_loss(x, f, r, 1.2, None)[0], divisor * sid_loss(x, f, r, 1.2)[0])
    assert sid_loss(x, r, r)[0].abs().max() == 0
    stuck, floor = sid_loss(r, f, r)
    assert bool(torch.isfinite(stuck).all()) and floor.max() == 1e-5


def test_without_gradient_through_the_scores_it_would_be_dmd() -> None:
    """alpha = 1 and fixed scores: the direction of distribution matching, to the last digit."""
    x, f, r = latents()
    x.requires_grad_()
    sid_loss(x, f, r, 1.0)[0].sum().backward()
    torch.testing.assert_close(x.grad * x[0].numel(), dm_direction(x.detach(), f, r, 1e-5))


def test_nothing_moves_while_both_scores_agree() -> None:
    """Long-short guidance starts at exactly 0; guidance of the teacher alone does not."""
    for strategy, still in (("lsg", True), ("long", False), ("zero", False), ("anti", False)):
        trainer = make_trainer(sid(guidance=4.5, strategy=strategy))
        phase = trainer.method.phases[1]
        assert phase.name == "student" and trainer.method.phases[0].name == "critic"
        trainer.roles.train_only(phase.trains)
        loss = trainer.method.loss(trainer.ctx, batch_of(trainer), phase)
        assert (float(loss.values.detach().max()) < 1e-14) == still, strategy  # half a mean square


# ---- the gradient ----------------------------------------------------------------------------------------------------


def value(method: SiD, trainer: object, batch: object) -> Tensor:
    """The loss itself as a number, by the networks and draws of the student phase."""
    ctx = trainer.ctx  # type: ignore[attr-defined]
    with torch.no_grad():
        sample = method.generate(ctx, batch)  # type: ignore[arg-type]
        x_t, t = method.noised(ctx, batch, sample.x, method.time_window(ctx, sample))  # type: ignore[arg-type]
        _, fake, real = method.scales
        scores = method.fake_x0(ctx, x_t, t, sample, fake), method.real_x0(ctx, x_t, t, sample, real)
        return sid_loss(sample.x, *scores, method.config.alpha, method.divisor)[0].double().sum()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_the_students_gradient_is_that_of_the_loss_by_finite_differences(checkpointing: bool) -> None:
    """Along its own direction, through student, x_t and both networks; half of it is missing without the Jacobians."""
    method = sid(guidance=2.0, alpha=1.2, normalise="none", time_range=[0.3, 0.6], timesteps=[499])
    trainer = warm(make_trainer(method, checkpointing=checkpointing, lr=0.05), 3)
    trainer.ctx.phase, trainer.ctx.repeat = "student", 0
    trainer.roles.train_only(("student",))
    batch = batch_of(trainer)
    parameters = trainer.roles.parameters("student")
    method.loss(trainer.ctx, batch, method.phases[1]).values.sum().backward()
    gradients = [p.grad.clone() for p in parameters if p.grad is not None]
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    assert len(gradients) == len(parameters) and norm > 1e-4
    steps = []
    for sign in (1, -1):
        with torch.no_grad():
            torch._foreach_add_(parameters, [g * (sign * 0.02 / norm) for g in gradients])
            steps.append(float(value(method, trainer, batch)))
            torch._foreach_sub_(parameters, [g * (sign * 0.02 / norm) for g in gradients])
    assert (steps[0] - steps[1]) / 0.04 == pytest.approx(norm, rel=0.02)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
def test_the_mean_gradient_is_the_golden_one_for_every_alpha(alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """At b = .2, a = s: dE[L]/db = -.78356 (all times 20..979, no divisor), and E[L] = (1 - alpha) 1.01863."""
    method = sid(alpha=alpha, normalise="none")
    world = World(method, rows=960)
    assert method.time_window(world.ctx, type("S", (), {"steps": (0,)})) == [(20, 979)]  # type: ignore[arg-type]
    monkeypatch.setattr(method, "times", lambda *args, **options: torch.arange(20, 980))
    world.student.a.data.fill_(0.7)
    world.student.b.data.fill_(0.2)
    loss = world.gradient("student")
    assert float(world.student.b.grad) == pytest.approx(-0.78356, abs=0.01)
    assert float(loss.metrics["sid"].mean()) == pytest.approx((1 - alpha) * 1.01863, abs=0.02)
    # std: .111, .099, .088, .083 at a = 1
    world.student.a.data.fill_(1.0)
    world.gradient("student")
    assert float(world.student.a.grad) == pytest.approx({0: 0.111, 0.5: 0.099, 1: 0.088, 1.2: 0.083}[alpha], abs=0.01)


# ---- where it ends ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 1.5, *(pytest.param(a, marks=pytest.mark.slow) for a in (0.5, 1.0, 1.2))])
def test_it_reaches_the_teacher_in_one_step(alpha: float) -> None:
    """SiD's own start: sigma of time 625 times noise."""
    method = make_method("sid", {"alpha": alpha, "guidance": 1.0})
    means, stds = World(method, rows=4).descend(120, lr=0.3).reached()
    assert means[0] == pytest.approx(1.5, abs=0.02) and abs(stds[0]) == pytest.approx(0.7, abs=0.02)


def test_long_short_guidance_keeps_the_guided_target_and_a_mismatch_cancels_it() -> None:
    """kappa 4, means 1.5 and .5: N(4.5, .7). A critic fitted without guidance, pinned without text: N(1.5, .7)."""
    guided = sid(guidance=4.0)
    means, stds = World(guided, m_u=0.5, rows=4).descend(120, lr=0.3).reached()
    assert means[0] == pytest.approx(4.5, abs=0.05) and stds[0] == pytest.approx(0.7, abs=0.05)
    world = World(sid(guidance=4.0, critic_guidance=1.0), m_u=0.5, rows=4)
    world.student.a.data.fill_(1.0)
    world.student.b.data.fill_(1.0)
    world.fake = ExactFake(world.student, pinned=world.teacher)
    world.roles.networks["fake"] = world.fake
    means, stds = world.descend(180, lr=0.15).reached()
    assert means[0] == pytest.approx(1.5, abs=0.05) and stds[0] == pytest.approx(0.7, abs=0.05)


def test_several_steps_with_a_critic_that_is_told_the_step() -> None:
    """Each step's samples reach N(1.5, .7); sampled as trained."""
    method = sid(timesteps=[999, 499], step_fake=True)
    means, stds = World(method).descend(120, lr=0.3).reached()
    assert means == pytest.approx([1.5, 1.5], abs=0.03) and [abs(s) for s in stds] == pytest.approx([0.7] * 2, abs=0.03)
    assert method.sampling(SD_SCHEDULE).timesteps == (999, 499)
    one = make_method("sid", {}).sampling(SD_SCHEDULE)
    assert one is not None and one.scale == pytest.approx(0.928564, abs=1e-6) and one.timesteps == (625,)


# ---- critic, guidance and GAN ----------------------------------------------------------------------------------------


def test_where_each_strategy_guides() -> None:
    for strategy, scales in (("lsg", (3, 3, 3)), ("long", (1, 1, 3)), ("zero", (0, 0, 1)), ("anti", (-1, -1, 1))):
        assert sid(guidance=3.0, strategy=strategy).scales == scales
    assert sid(guidance=3.0, fake_guidance=2.0, critic_guidance=1.5).scales == (1.5, 2.0, 3.0)


def test_the_fake_score_learns_through_its_guidance_and_some_empty_prompts() -> None:
    """Its error is that of u + k (c - u), with the drawn share of prompts dropped; Zero-CFG never sees the text.

    Prompts are dropped too where only the student's loss guides it: it is asked without one there."""
    for strategy, dropout, options in (
        ("lsg", 0.0, {}),
        ("lsg", 1.0, {}),
        ("lsg", 1.0, {"critic_guidance": 1.0}),
        ("zero", 0.0, {}),
        ("long", 1.0, {}),
    ):
        method = sid(guidance=3.0, strategy=strategy, text_dropout=dropout, **options)
        trainer = warm(make_trainer(method, lr=0.05), 2)
        ctx, batch = trainer.ctx, batch_of(trainer)
        ctx.phase, ctx.repeat = "critic", 0
        with torch.no_grad():
            loss = method.loss(ctx, batch, method.phases[0])
            sample = method.generate(ctx, batch)
            t, noise = method.times(ctx, batch, "score-time", [(20, 979)] * 4), ctx.draw(batch, "score")[1]
            x_t = ctx.denoiser.add_noise(sample.x, noise, t)
            c, u = ctx.branches("fake", x_t, t, sample.cond)
        expected = {"lsg": u + 3 * (c - u), "zero": u, "long": c}[strategy]
        if dropout and strategy != "long":
            expected = u
        torch.testing.assert_close(loss.values, (expected - noise).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-5)


def test_the_gan_has_no_head_and_needs_pictures() -> None:
    method = make_method("sid", {"gan_weight": 0.5, "timesteps": [999, 499], "start": "unit"})
    assert method.roles == ("student", "fake") and method.needs.batch == "image" and sid().needs.batch == "prompt"
    trainer = warm(make_trainer(method), 2)
    ctx, batch = trainer.ctx, batch_of(trainer)
    without = make_method("sid", {"timesteps": [999, 499], "start": "unit"})
    for number, phase in enumerate(method.phases):
        ctx.phase = phase.name
        trainer.roles.train_only(phase.trains)
        loss, plain = method.loss(ctx, batch, phase), without.loss(ctx, batch, without.phases[number])
        assert not torch.allclose(loss.values, plain.values)
