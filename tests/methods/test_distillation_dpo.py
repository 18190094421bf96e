"""Distillation-DPO: who wins, the signs, and the published surrogate that moves nothing (sheet 20 and 27.5)."""

from __future__ import annotations

import pytest
import torch
from gauss import ExactFake, World, level
from torch import Tensor
from world import batch_of, make_trainer, warm

from diffalign.methods import make_method
from diffalign.methods.distillation.distillation_dpo import DistillationDPO
from diffalign.methods.score_distill import surrogate
from diffalign.trainer import Trainer


def ddpo(**options: object) -> DistillationDPO:
    return make_method("distillation_dpo", {"guidance": 1.0, **options})  # type: ignore[return-value]


def gradients(trainer: Trainer, method: DistillationDPO) -> list[Tensor]:
    """Of the student, for one batch."""
    parameters = trainer.roles.parameters("student")
    for p in parameters:
        p.grad = None
    trainer.ctx.phase, trainer.ctx.repeat = "student", 0
    trainer.roles.train_only(("student",))
    method.loss(trainer.ctx, batch_of(trainer), method.phases[0]).values.sum().backward()
    return [p.grad.clone() for p in parameters if p.grad is not None]


def test_the_published_surrogate_has_no_gradient_and_this_one_is_the_difference() -> None:
    """(eps_T - eps_aux) times the noise that was added does not depend on the student."""
    torch.manual_seed(0)
    x, difference, noise = (torch.randn(2, 4, 3, 3, dtype=torch.float64) for _ in range(3))
    x.requires_grad_()
    x_t = 0.8 * x + 0.6 * noise
    published = (difference * (x_t - 0.8 * x)).sum()
    assert torch.autograd.grad(published, x)[0].abs().max() < 1e-14
    (found,) = torch.autograd.grad(surrogate(x, difference).sum(), x)
    torch.testing.assert_close(found * 36, difference)


def test_equal_scores_and_equal_samples_move_nothing() -> None:
    method = ddpo()
    assert (
        max(float(g.abs().max()) for g in gradients(make_trainer(method), method)) < 1e-7
    )  # fakes = teacher = student
    same = ddpo(loser_noise=1.0)
    trainer = warm(make_trainer(same, lr=0.02), 2)
    trainer.roles.load_state_dict(
        "loser", {n.replace(".fake.", ".loser."): p for n, p in trainer.roles.state_dict("fake").items()}
    )
    found = gradients(trainer, same)
    assert max(float(g.abs().max()) for g in found) < 1e-7
    alone = gradients(trainer, ddpo(loser_noise=1.0, loser_weight=0.0))
    assert max(float(g.abs().max()) for g in alone) > 1e-5, "the winners alone do move"


def test_swapping_winner_and_loser_flips_the_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    method = ddpo()
    trainer = warm(make_trainer(method, lr=0.02), 2)
    there = gradients(trainer, method)
    original, score = DistillationDPO.pair, DistillationDPO.score_of
    swap = {"fake": "loser", "loser": "fake"}

    def mirrored(self: DistillationDPO, ctx: object, batch: object) -> object:
        winners, losers, won = original(self, ctx, batch)  # type: ignore[arg-type]
        return losers, winners, won

    monkeypatch.setattr(DistillationDPO, "pair", mirrored)
    monkeypatch.setattr(DistillationDPO, "score_of", lambda self, ctx, role, *rest: score(self, ctx, swap[role], *rest))
    back = gradients(trainer, method)
    for a, b in zip(there, back, strict=True):
        torch.testing.assert_close(a, -b, rtol=1e-4, atol=1e-8)
    assert max(float(g.abs().max()) for g in there) > 1e-5


def test_the_loser_is_the_noisier_or_the_worse_by_the_reward() -> None:
    method = ddpo(timesteps=[999, 499])
    trainer = warm(make_trainer(method, lr=0.02), 1)
    ctx, batch = trainer.ctx, batch_of(trainer)
    with torch.no_grad():
        winners, losers, _ = method.pair(ctx, batch)
    first = [row for row, k in enumerate(winners.steps) if k == 0]
    torch.testing.assert_close(losers.x_in[first], 1.1 * winners.x_in[first])
    assert winners.steps == losers.steps and torch.equal(winners.t, losers.t)

    method = ddpo(timesteps=[999, 499], reward="tiny-pickscore")
    assert method.needs.reward and method.needs.decode and "loser-renoise-1" in method.needs.draws
    trainer = warm(make_trainer(method, lr=0.02), 1)
    ctx, batch = trainer.ctx, trainer.source.load(list(range(12)), [0] * 12)
    with torch.no_grad():
        winners, losers, won = method.pair(ctx, batch)
        scores = [method._score(ctx, batch, sample.x) for sample in (winners, losers)]
    assert bool((scores[0] >= scores[1]).all()) and 0 < int(won.sum()) < 12, "either may win"
    assert not torch.allclose(winners.x_in, losers.x_in)
    assert max(float(g.abs().max()) for g in gradients(trainer, method)) > 1e-6


def test_each_fake_score_learns_its_own_kind() -> None:
    """The winners' at the winners, the losers' at the losers, under one noise and time; by hand."""
    method = ddpo(timesteps=[999, 499])
    trainer = make_trainer(method)
    with torch.no_grad():  # two different scores
        for parameter in trainer.roles.parameters("loser"):
            parameter.add_(0.1)
        ctx, batch, phase = trainer.ctx, batch_of(trainer), method.phases[1]
        ctx.phase = phase.name
        assert phase.name == "critic" and {"fake", "loser"} <= set(phase.trains)
        winners, losers, _ = method.pair(ctx, batch)
        loss = method.loss(ctx, batch, phase)
        t, noise = method.times(ctx, batch, "score-time", [(0, 999)] * len(batch)), ctx.draw(batch, "score")[1]
        expected = {}
        for role, sample in (("fake", winners), ("loser", losers)):
            said = ctx.model(role, ctx.denoiser.add_noise(sample.x, noise, t), t, sample.cond)
            expected[role] = (said - noise).square().mean((1, 2, 3))
    torch.testing.assert_close(loss.metrics["fake_error"], expected["fake"])
    torch.testing.assert_close(loss.metrics["loser_error"], expected["loser"])
    torch.testing.assert_close(loss.values, expected["fake"] + expected["loser"])
    assert not torch.allclose(expected["fake"], expected["loser"], rtol=1e-4)


def fixed_point(weight: float, noise: float, s: float = 0.7) -> float:
    """The std at which pull and push balance: E[alpha (g(a) - g(s))] = weight noise^2 E[alpha (g(noise a) - g(s))]."""
    alpha, sigma = (c.flatten().double() for c in level(torch.arange(20, 981)))

    def gain(std: float) -> Tensor:
        return std**2 * alpha / (alpha**2 * std**2 + sigma**2)

    def force(a: float) -> float:
        pull, push = gain(a) - gain(s), gain(noise * a) - gain(s)
        return float((alpha * (pull - weight * noise**2 * push)).mean())

    low, high = 0.3, 3.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if force(middle) > 0 else (middle, high)
    return low


def test_on_gaussians_winners_reach_the_teacher_and_losers_balance_them() -> None:
    """Without losers N(1.5, .7). With them the same mean, and the std where pull and push are equal: wider."""
    for weight in (0.0, 0.5):
        world = World(ddpo(loser_weight=weight, normalise="none"), rows=4)
        world.roles.networks["loser"] = LoserFake(world.student, 1.1)
        world.roles._parameters["loser"] = {}
        mean, std = (values[0] for values in world.descend(120 if not weight else 250, lr=0.3).reached())
        assert mean == pytest.approx(1.5, abs=0.04) and std == pytest.approx(fixed_point(weight, 1.1), abs=0.03)
    assert fixed_point(0.0, 1.1) == pytest.approx(0.7) and fixed_point(0.5, 1.1) > 0.75


class LoserFake(ExactFake):
    """Exact for samples from noise that is ``scale`` times as strong."""

    def __init__(self, student: torch.nn.Module, scale: float) -> None:
        super().__init__(student)  # type: ignore[arg-type]
        self.scale = scale

    def x0(self, x: Tensor, t: Tensor, flag: Tensor, step: Tensor) -> Tensor:
        student, _ = self.source
        before, student.scale = student.scale, self.scale
        found = super().x0(x, t, flag, step)
        student.scale = before
        return found
