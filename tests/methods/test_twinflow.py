"""TwinFlow: flow on any schedule, recursive consistency, the twin and what it mends, Barron's weights (sheet 16)."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from gauss import Net, Teacher, World, level
from pydantic import ValidationError
from tiny import SD_SCHEDULE
from torch import Tensor
from toys import KINDS, make, normal
from world import batch_of, make_trainer, stirred, warm

from diffalign.data.batch import Cond
from diffalign.methods import make_method
from diffalign.methods.distillation.twinflow import Levels, Plan, Told, TwinFlow, barron, gap_weight, to_flow

PLAIN: dict[str, Any] = {"guidance": 1.0, "target_ema": 0.0, "limit": None, "robust": 2.0, "width": 1.0, "rectify": 0.0}
ONE = {"end": (1.0, 0.0, 0.0, 0.0), "any": (1e-9, 0.0, 1.0, 0.0), "flow": (1e-9, 1.0, 0.0, 0.0)}
ONE["twin"] = (1e-9, 0.0, 0.0, 1.0)


def twinflow(**options: Any) -> TwinFlow:
    return make_method("twinflow", options)  # type: ignore[return-value]


# ---- parts -----------------------------------------------------------------------------------------------------------


def test_barron_and_the_weight_of_a_gap() -> None:
    error = normal(6, seed=1).square()
    torch.testing.assert_close(barron(error, 2.0, 0.1), error / 0.1)
    d = normal(5, 1, 4, 4, seed=2).requires_grad_()
    barron(d.square().mean((1, 2, 3)), 1.0, 1e-5).sum().backward()
    rms = d.detach().square().mean((1, 2, 3), keepdim=True).sqrt()
    torch.testing.assert_close(d.grad, 2 * d.detach() / rms / 16, rtol=1e-4, atol=1e-7)
    gaps = torch.tensor([0.0, 1.0, 0.5])
    torch.testing.assert_close(gap_weight(gaps), torch.tensor([4.07768, 1.0, math.tan(math.pi / 5) + 1]))


@pytest.mark.parametrize("kind", KINDS)
def test_every_schedule_is_on_the_straight_path(kind: str) -> None:
    """Latents over alpha + sigma are (1 - t) x0 + t noise, and what an exact network says is noise - x0."""
    denoiser = make(kind)
    levels = Levels.of(denoiser)
    x0, noise, t = normal(3, 1, 2, 2, seed=1), normal(3, 1, 2, 2, seed=2), torch.tensor([3, 500, 990])
    latents = denoiser.add_noise(x0, noise, t)
    flow = torch.tensor([levels.at(int(k)) for k in t])[:, None, None, None]
    straight = (1 - flow) * x0 + flow * noise
    torch.testing.assert_close(latents / (denoiser.alpha(t) + denoiser.sigma(t)), straight, rtol=1e-5, atol=1e-5)
    output = denoiser.target(x0, noise, t)
    torch.testing.assert_close(to_flow(denoiser, output, latents, t), noise - x0, rtol=1e-4, atol=1e-4)
    assert levels.at(-1) == 0 and all(levels.index(levels.at(k)) == k for k in (-1, 0, 1, 500, 999))
    assert levels.below(levels.at(7) + 1e-9) == 7 and levels.below(0.0) == -1 and levels.index(2.0) == 999


@pytest.mark.parametrize("order", [1, 2, 3])
def test_what_is_drawn(order: int) -> None:
    method = twinflow(order=order)
    trainer = make_trainer(method)
    ctx, seen = trainer.ctx, []
    levels = Levels.of(ctx.denoiser)
    for visit in range(30):
        plan = method.plan(ctx, trainer.source.load(list(range(12)), [visit] * 12), levels)
        for mode, t, r, way in zip(plan.mode, plan.t, plan.r, plan.way, strict=True):
            assert 0 <= t <= 999 and -1 <= r <= t and len(way) == order + 1 and way[-1] == r
            assert all(a >= b for a, b in zip((t, *way), way, strict=False))
            if mode in ("flow", "twin"):
                assert r == t and set(way) == {t}
            elif r < t:
                least, next_up = (levels.at(t) - levels.at(k) for k in (way[0], way[0] + 1))
                assert way[0] < t and (way[0] == r or least >= 0.01 > next_up)
            if mode == "end":
                assert r == -1
            seen.append((mode, levels.at(t)))
    shares = [sum(mode == name for mode, _ in seen) / len(seen) for name in ("end", "flow", "any", "twin")]
    assert shares == pytest.approx([0.25] * 4, abs=0.07)
    times = sorted(t for _, t in seen)
    assert times[len(times) // 2] == pytest.approx((levels.at(0) + levels.at(999)) / 2, abs=0.06)


def test_jumps_to_x0_are_told_nothing() -> None:
    told = Told(8)
    torch.nn.init.normal_(told.last.weight)
    share, twin = torch.tensor([0.0, 0.5, 1.0, 1.0]), torch.tensor([0.0, 0.0, 0.0, 1.0])
    found = told(share, twin).detach()
    assert not bool(found[0].any()) and all(float((a - b).abs().max()) > 0.1 for a, b in pairwise(found))
    method = twinflow()
    assert method.sampling(SD_SCHEDULE).timesteps == (999,) and not method.sampling(SD_SCHEDULE).deterministic


def test_a_student_is_sampled_as_it_jumps_to_x0() -> None:
    """What a plain pipeline computes at a recorded time is x_t - t F of a jump to x0, whatever the vector learned."""
    trainer = warm(make_trainer(twinflow(), lr=0.05), 2)
    ctx, batch = trainer.ctx, batch_of(trainer)
    noise, cond, t = ctx.draw(batch)[1], batch.condition("image"), torch.full((4,), 999)
    levels = Levels.of(ctx.denoiser)
    with torch.no_grad():
        plain = ctx.denoiser.to_x0(ctx.model("student", noise, t, cond), noise, t)
        x = noise / trainer.method.scale(ctx, t)
        jump = x - levels.at(999) * trainer.method.velocity(ctx, "student", x, [999] * 4, [-1] * 4, cond)
        short = x - levels.at(999) * trainer.method.velocity(ctx, "student", x, [999] * 4, [500] * 4, cond)
    torch.testing.assert_close(jump, plain, rtol=1e-3, atol=1e-3)
    assert float((short - plain).abs().max()) > 1e-2, "other ends are told"


# ---- losses on the real network --------------------------------------------------------------------------------------


def test_a_jump_of_no_length_is_flow_matching() -> None:
    """4.078 times the error of noise - x0; of the twin once, at the student's own samples."""
    for mode, weight in (("flow", 4.07768), ("twin", 1.0)):
        method = twinflow(**PLAIN, shares=ONE[mode])
        trainer = warm(make_trainer(method, lr=0.05), 1)
        ctx, batch = trainer.ctx, batch_of(trainer)
        ctx.phase = "student"
        levels, cond, noise = Levels.of(ctx.denoiser), batch.condition("image"), ctx.draw(batch)[1]
        plan = method.plan(ctx, batch, levels)
        assert set(plan.mode) == {mode}
        with torch.no_grad():
            loss = method.loss(ctx, batch, method.phases[0]).values
            x0 = batch.latents["image"]
            if mode == "twin":
                first, last = ctx.draw(batch, "start")[1], torch.full((4,), 999)
                x0 = ctx.denoiser.to_x0(ctx.model("student", first, last, cond), first, last)
            t = torch.tensor(plan.t)
            latents = ctx.denoiser.add_noise(x0, noise, t)
            one = torch.ones(4)
            output = ctx.model("student", latents, t, method.tell(ctx, cond, one, one * (mode == "twin")))
            error = (to_flow(ctx.denoiser, output, latents, t) - (noise - x0)).square().mean((1, 2, 3))
        torch.testing.assert_close(loss, weight * error, rtol=1e-3, atol=1e-4)


def test_a_network_that_is_blind_to_the_twin_is_not_rectified() -> None:
    """At first; and where it does tell the twin, the jump moves by the difference, on samples at x0 alone."""
    with_it, without = ({**PLAIN, "shares": (0.5, 0.0, 0.0, 0.5), "rectify": weight} for weight in (1.0, 0.0))
    for blind in (True, False):
        losses = []
        for options in (with_it, without):
            trainer = make_trainer(twinflow(**options))
            if not blind:
                torch.nn.init.normal_(trainer.roles.modules["told"].last.weight, generator=torch.manual_seed(0))
            ctx, batch = trainer.ctx, batch_of(trainer, range(12))
            ctx.phase = "student"
            with torch.no_grad():
                losses.append(trainer.method.loss(ctx, batch, trainer.method.phases[0]))
            modes = trainer.method.plan(ctx, batch, Levels.of(ctx.denoiser)).mode
        gained = losses[0].values - losses[1].values
        jumps = torch.tensor([mode == "end" for mode in modes])
        assert 0 < int(jumps.sum()) < 12 and not bool(gained[~jumps].any())
        if blind:
            assert not bool(gained.any())
        else:
            found, share = losses[0].partial["difference"]
            assert bool((gained[jumps] > 0).all()) and torch.equal(share > 0, jumps)
            torch.testing.assert_close(gained[jumps], found[jumps], rtol=1e-2, atol=1e-5)


def test_rectification_moves_a_jump_as_distribution_matching_would() -> None:
    """y_fake - y_real = -t (F_twin - F): x0 - t F moves against it."""
    method = twinflow(**{**PLAIN, "rectify": 1.0})
    trainer = make_trainer(method)
    torch.nn.init.normal_(trainer.roles.modules["told"].last.weight, generator=torch.manual_seed(0))
    ctx, batch = trainer.ctx, batch_of(trainer)
    x0, cond = batch.latents["image"], batch.condition("image")
    with torch.no_grad():
        found = method.difference(ctx, batch, [0, 1, 2, 3], x0, cond)
        levels = Levels.of(ctx.denoiser)
        low, high = levels.at(0), levels.at(999)
        index = [levels.index(low + (high - low) * rng.random()) for rng in ctx.rng("rectify-time", batch)]
        t = torch.tensor(index)
        latents = ctx.denoiser.add_noise(x0, ctx.draw(batch, "rectify")[1], t)
        one = torch.ones(4)
        fake, real = (
            ctx.denoiser.to_x0(ctx.model("student", latents, t, method.tell(ctx, cond, one, own)), latents, t)
            for own in (one, 0 * one)
        )
    flow = torch.tensor([levels.at(k) for k in index], dtype=torch.float32)[:, None, None, None]
    assert float(found.abs().amax((1, 2, 3)).min()) > 1e-2
    torch.testing.assert_close(fake - real, -flow * found, rtol=1e-2, atol=1e-4)


def test_guidance_is_added_to_the_target() -> None:
    """With squared errors of a jump of no length: the target moves by (w - 1) (F_c - F_u) of who guides."""
    for who, ema, role in (("student", 0.0, "student"), ("student", 0.9, "target"), ("base", 0.0, "base")):
        options = {**PLAIN, "guided_by": who, "target_ema": ema, "guidance": 3.0, "shares": ONE["flow"]}
        method = twinflow(**options)
        assert (
            method.needs.reference == (who == "base") and not twinflow(**{**options, "guidance": 1.0}).needs.reference
        )
        trainer = warm(make_trainer(method, lr=0.05), 2)
        ctx, batch = trainer.ctx, batch_of(trainer)
        cond, x, index = batch.condition("image"), normal(4, 4, 8, 8, dtype=torch.float32), [900, 500, 100, 3]
        t = torch.tensor(index)
        with torch.no_grad():
            found = method.guided(ctx, x, index, cond)
            latents, uncond = x * method.scale(ctx, t), ctx.uncond.expand(4)
            if who == "student":
                cond, uncond = (method.tell(ctx, c, torch.ones(4), torch.zeros(4)) for c in (cond, uncond))
            said = [to_flow(ctx.denoiser, ctx.model(role, latents, t, c), latents, t) for c in (cond, uncond)]
        torch.testing.assert_close(found, 2 * (said[0] - said[1]), rtol=1e-2, atol=1e-3)


def parts(trainer: Any, count: int) -> tuple[Any, ...]:
    """What a loss is made of: the plan, the points, their times, noise - x0 and the text."""
    method, ctx = trainer.method, trainer.ctx
    ctx.phase = "student"
    batch, levels = batch_of(trainer, range(count)), Levels.of(ctx.denoiser)
    plan, noise, x0 = method.plan(ctx, batch, levels), ctx.draw(batch)[1], batch.latents["image"]
    t = torch.tensor([levels.at(k) for k in plan.t], dtype=torch.float32)[:, None, None, None]
    return batch, plan, t * noise + (1 - t) * x0, t, noise - x0, batch.condition("image")


def test_the_loss_has_the_guided_target() -> None:
    trainer = warm(make_trainer(twinflow(**{**PLAIN, "guidance": 3.0, "shares": ONE["flow"]}), lr=0.05), 2)
    method, ctx = trainer.method, trainer.ctx
    batch, plan, x, _, target, cond = parts(trainer, 4)
    trainer.roles.train_only(("student",))
    parameters = trainer.roles.parameters("student")
    loss = method.loss(ctx, batch, method.phases[0]).values
    said = method.velocity(ctx, "student", x, plan.t, plan.r, cond)
    with torch.no_grad():
        wanted = target + method.guided(ctx, x, plan.t, cond)
    plain = 4.07768 * (said - wanted).square().mean((1, 2, 3))
    torch.testing.assert_close(loss, plain, rtol=1e-3, atol=1e-4)
    found, expected = (torch.autograd.grad(v.sum(), parameters, allow_unused=True) for v in (loss, plain))
    for mine, theirs in zip(found, expected, strict=True):
        if theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max()))


def test_the_gradient_of_the_rectification_is_the_difference() -> None:
    """Twice the difference over C h w, at the velocity of the jump; the difference is taken at what the jump makes."""
    found = []
    for weight in (1.0, 0.0):
        method = twinflow(**{**PLAIN, "rectify": weight, "shares": ONE["end"]})
        trainer = stirred(make_trainer(method))
        torch.nn.init.normal_(trainer.roles.modules["told"].last.weight, generator=torch.manual_seed(0))
        batch, plan, x, t, _, cond = parts(trainer, 4)
        parameters = trainer.roles.parameters("student")
        trainer.roles.train_only(("student",))
        loss = method.loss(trainer.ctx, batch, method.phases[0]).values.sum()
        found.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    said = method.velocity(trainer.ctx, "student", x, plan.t, plan.r, cond)
    difference = method.difference(trainer.ctx, batch, range(4), (x - t * said).detach(), cond)
    wanted = torch.autograd.grad((2 * difference * said).mean((1, 2, 3)).sum(), parameters, allow_unused=True)
    gained = [a - b for a, b in zip(*found, strict=True) if a is not None]
    expected = [g for g in wanted if g is not None]
    largest = max(float(g.abs().max()) for g in expected)
    assert largest > 1e-3 and len(gained) == len(expected)
    for mine, theirs in zip(gained, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02 * largest)


# ---- Gaussian worlds -------------------------------------------------------------------------------------------------


class Exact(Net):
    """The mean velocity of N(m, s^2)'s own trajectory for the end that it is told; ``wrong``: always its velocity."""

    def __init__(self, m: float, s: float, wrong: bool = False) -> None:
        super().__init__()
        self.m, self.s, self.wrong = m, s, wrong

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        alpha, sigma = level(t)
        flow = sigma / (alpha + sigma)
        share = torch.ones_like(flow) if self.wrong else cond.embeds[:, 0, 1][:, None, None, None]
        x, end = x / (alpha + sigma), share * flow
        spread, reached = (((1 - of) ** 2 * self.s**2 + of**2).sqrt() for of in (flow, end))
        moved = (1 - end) * self.m + reached / spread * (x - (1 - flow) * self.m)
        slope = (flow - (1 - flow) * self.s**2) / spread**2 * (x - (1 - flow) * self.m) - self.m
        v = torch.where(flow - end > 1e-5, (x - moved) / (flow - end).clamp_min(1e-5), slope)
        return self.denoiser.target_from_xt(x - flow * v, x * (alpha + sigma), t)


def world(m: float, s: float, network: Net, **options: Any) -> World:
    """Real pictures of N(m, s^2); the vector tells the end as a number in the second place of the text."""
    made = World(twinflow(**{**PLAIN, "timesteps": [999, 499], **options}), m_c=m, s=s, rows=64)
    network.denoiser = made.ctx.denoiser
    made.roles.networks["student"] = network
    told = made.roles.modules["told"].last.weight
    with torch.no_grad():
        told[1, 1] = 1.0
        told[2, 0] = 1.0
    return made


@pytest.mark.parametrize("order", [1, 2])
def test_on_a_straight_path_a_constant_velocity_is_consistent(order: int) -> None:
    """Data at one point: the exact network's F is noise - x0 all along, and every loss is 0."""
    for mode in ("end", "any", "flow"):
        made = world(1.5, 1e-6, Teacher(1.5, s=1e-6), shares=ONE[mode], order=order)
        made.ctx.phase = "student"
        with torch.no_grad():
            values = made.method.loss(made.ctx, made.batch(0), made.method.phases[0]).values
        assert float(values.abs().max()) < 2e-2, mode  # of errors 100 x the rounding


@pytest.mark.parametrize("order", [1, 2])
def test_the_exact_jumps_have_no_residual_on_average(order: int) -> None:
    """Given x_t the mean of noise - x0 is the velocity: the residual of exact mean velocities is noise about 0, that of
    a network that says the velocity whatever the end is not."""
    slopes = []
    for wrong in (False, True):
        made = world(1.5, 0.7, Exact(1.5, 0.7, wrong), shares=ONE["end"], order=order)
        method, ctx, count = made.method, made.ctx, 64
        batch, cond, t = made.batch(1), made.batch(1).condition("image"), 700
        levels = Levels.of(ctx.denoiser)
        plan = Plan(("end",) * count, (t,) * count, (-1,) * count, (method.way(levels, t, -1),) * count)
        x0, noise, flow = batch.latents["image"], ctx.draw(batch)[1], levels.at(t)
        x = flow * noise + (1 - flow) * x0
        with torch.no_grad():
            said = method.velocity(ctx, "student", x, plan.t, plan.r, cond)
            residual = method.residual(ctx, plan, range(count), x, said, noise - x0, cond)
        centred = (x - (1 - flow) * 1.5).flatten()
        slopes.append((float((residual.flatten() * centred).mean() / centred.square().mean()), float(residual.mean())))
    assert abs(slopes[0][0]) < 0.15 and abs(slopes[0][1]) < 0.06
    assert abs(slopes[1][0]) > 0.5


def test_refusals() -> None:
    for wrong in (
        {"shares": [0.5, 0.5, 0.5, 0.5]},
        {"shares": [0.0, 0.5, 0.5, 0.0]},
        {"timesteps": [499, 999]},
        {"order": 0},
        {"target_ema": 1.0},
        {"limit": 0},
    ):
        with pytest.raises(ValidationError):
            twinflow(**wrong)
