"""Consistency distillation: the grid, distances, LCM's boundary, and Gaussians whose consistency map has a closed form
(sheet 9, 10 and 27)."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler
from gauss import DENOISER, Net, Teacher, World, level
from pydantic import ValidationError
from tiny import SD_SCHEDULE
from torch import Tensor, nn
from world import make_trainer, warm

from diffalign.errors import UserError
from diffalign.methods import make_method
from diffalign.methods.base import Method
from diffalign.methods.consistency import Consistency, distance, lognormal_shares, make_grid
from diffalign.methods.distillation.lcm import boundary

M, S = 1.5, 0.7


def exact_end(x: Tensor, t: Tensor, end: Tensor, mean: float = M, std: float = S) -> Tensor:
    """Where the trajectory of N(mean, std^2) through x at t is at another time: (x - alpha m) / sqrt(alpha^2 s^2 +
    sigma^2) stays."""
    (alpha, sigma), (to_a, to_s) = level(t, x.dtype), level(end, x.dtype)
    grow = ((to_a**2 * std**2 + to_s**2) / (alpha**2 * std**2 + sigma**2)).sqrt()
    return to_a * mean + grow * (x - alpha * mean)


class Table(Net):
    """x0 = a x + b, with a and b for each time of the schedule: all that a student of Gaussians needs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.full((1000,), 0.5)), nn.Parameter(torch.full((1000,), -1.0))

    def x0(self, x: Tensor, t: Tensor, flag: Tensor, step: Tensor) -> Tensor:
        return self.a[t].reshape(-1, 1, 1, 1) * x + self.b[t].reshape(-1, 1, 1, 1)


class Exact(Net):
    """The x0 whose jump ends on the exact trajectory: by LCM's boundary, or by DDIM to the end of the segment."""

    def __init__(self, method: Consistency[Any]) -> None:
        super().__init__()
        self.grid, self.lcm = method.grid(1000), type(method).__name__ == "LCM"

    def x0(self, x: Tensor, t: Tensor, flag: Tensor, step: Tensor) -> Tensor:
        ends = dict(zip(self.grid.tops, self.grid.ends, strict=True))
        end = torch.tensor([ends[min(top for top in ends if top >= int(time))] for time in t])
        reached = exact_end(x.double(), t, end)
        if self.lcm:
            skip, out = boundary(t)
            return torch.where(t.reshape(-1, 1, 1, 1) > 0, (reached - skip * x) / out, reached).float()
        (alpha, sigma), (to_a, to_s) = level(t, torch.float64), level(end, torch.float64)
        found = (reached - to_s / sigma * x) / (to_a - to_s * alpha / sigma)
        return torch.where((end == t).reshape(-1, 1, 1, 1), x.double(), found).float()  # nothing to jump over


def world(method: Method[Any], student: nn.Module | None = None, **options: Any) -> World:
    """A Gaussian world with another student, which has answers at all times."""
    made = World(method, "teacher", **options)
    made.student = student or Table()  # type: ignore[assignment]
    made.student.denoiser = made.ctx.denoiser
    made.roles.networks["student"] = made.student
    made.roles._parameters["student"] = dict(made.student.named_parameters())
    return made


def lcm(**options: Any) -> Consistency[Any]:
    return make_method("lcm", {"guidance": [1.0, 1.0], **options})  # type: ignore[return-value]


# ---- parts ----------------------------------------------------------------------------------------------------------


def test_the_solvers_grid() -> None:
    grid = make_grid(1000, 50)
    assert grid.times == tuple(range(19, 1000, 20)) and grid.before == (0, *range(19, 980, 20))
    assert set(grid.ends) == {0} and set(grid.tops) == {999}


def test_distances() -> None:
    torch.manual_seed(0)
    d = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    for form in ("huber", "vector", "mse"):
        assert not bool(distance(0 * d.float(), form).any()), "equal ends are no distance apart"
        one = distance(d[1:2], form)
        torch.testing.assert_close(distance(d, form)[1:2], one)
    torch.testing.assert_close(distance(d, "huber", 1e4) * 2e4, distance(d, "mse"), rtol=1e-3, atol=1e-4)
    c = 0.00054 * math.sqrt(32)
    torch.testing.assert_close(distance(d, "vector"), (d.flatten(1).norm(dim=1) ** 2 + c**2).sqrt() - c)
    assert float(distance(d, "huber", 1e-9).sub(d.abs().mean((1, 2, 3))).abs().max()) < 1e-5


def test_lognormal_times_lie_between_their_levels() -> None:
    """All of the normal that lies between the lowest and the highest level, each step its own part of it."""
    above, below = [0.1, 1.0, 10.0], [0.01, 0.1, 1.0]
    normal = torch.distributions.Normal(-1.1, 2.0)
    parts = [float(normal.cdf(torch.tensor(math.log(x)))) for x in (0.01, 0.1, 1.0, 10.0)]
    expected = [(b - a) / (parts[-1] - parts[0]) for a, b in pairwise(parts)]
    assert lognormal_shares(above, below, -1.1, 2.0).tolist() == pytest.approx(expected, rel=1e-5)
    made = world(lcm(times="lognormal", time_mean=0.0, time_std=0.3), rows=64)
    drawn = torch.cat([made.method.point(made.ctx, made.batch(v)).t for v in range(8)])
    noise = DENOISER.snr(drawn).rsqrt().log()
    assert abs(float(noise.mean())) < 0.1 and 0.2 < float(noise.std()) < 0.4


def test_lcms_boundary() -> None:
    """The sheet's numbers; at time 0 the student says its input bit for bit, whatever its network does."""
    skip, out = (c.flatten() for c in boundary(torch.tensor([999, 19, 0])))
    assert skip.tolist() == pytest.approx([2.50501e-9, 6.92516e-6, 1.0], rel=1e-5)
    torch.testing.assert_close(skip[:2] ** 2 / 0.25 * 0.25 + out[:2] ** 2, torch.ones(2), rtol=1e-4, atol=0)
    assert out[2] == 0
    made = world(lcm())
    point = made.method.point(made.ctx, made.batch(0))
    zero = torch.zeros_like(point.t)
    said = made.method.reach(made.ctx, torch.randn(point.x_t.shape), point.x_t, zero, point)
    assert torch.equal(said, point.x_t)


def test_the_teachers_steps_have_ddims_error() -> None:
    """All the way down from 1.3 at 999, in so many steps: how far from the exact end (the sheet's numbers)."""
    for steps, expected in ((4, 0.285), (50, 0.030), (250, 0.0064), (1000, 0.0016)):
        grid = make_grid(1000, steps)
        x = torch.full((1, 1, 1, 1), 1.3, dtype=torch.float64)
        start = exact_end(x, torch.tensor([999]), torch.tensor([0]))
        teacher = Teacher(M, s=S)
        for t, before in zip(reversed(grid.times), reversed(grid.before), strict=True):
            at = torch.tensor([t])
            x0 = (M * level(t, x.dtype)[1] ** 2 + S**2 * level(t, x.dtype)[0] * x) / (
                level(t, x.dtype)[0] ** 2 * S**2 + level(t, x.dtype)[1] ** 2
            )
            x = DENOISER.ddim_step(DENOISER.target_from_xt(x0, x, at), x, at, before).sample
        assert float((x - start).abs()) == pytest.approx(expected, rel=0.05), steps
    assert teacher.s == S


# ---- Gaussians ------------------------------------------------------------------------------------------------------


def test_the_exact_map_has_no_loss_but_the_solvers() -> None:
    errors = {}
    for steps in (50, 250):
        made = world(lcm(solver_steps=steps, loss="mse"))
        made = world(made.method, Exact(made.method))
        errors[steps] = float(made.loss().metrics["consistency_error"].mean())
        assert float(world(made.method).loss().metrics["consistency_error"].mean()) > 100 * errors[steps]
    assert errors[250] < errors[50] / 20 < 1e-6  # a step's error falls with its square, and this is squared


def test_the_learned_map_is_the_solvers() -> None:
    """From a far start to the chain of the teacher's own steps, and so nearly to the exact map."""
    made = world(lcm(solver_steps=5, loss="mse"), rows=20)
    made.descend(400, lr=0.25)
    x = torch.linspace(-1, 1, 256).reshape(1, 1, 16, 16)
    last = torch.tensor([999])
    with torch.no_grad():
        batch = made.batch(0).take([0])
        point = made.method.point(made.ctx, batch)
        said = made.student(x, last, point.cond)
        said = made.method.reach(made.ctx, said, x, last, point)
        chain = DENOISER.sample(
            lambda x, t: made.teacher(x, t, point.cond), x, torch.tensor([999, 799, 599, 399, 199]), last=0
        )
    torch.testing.assert_close(said, chain, rtol=0, atol=0.02)
    off = (chain - exact_end(x, last, torch.tensor([0]))).abs().max()
    assert float(off) > 0.1, "five steps are coarse: it is the solver's map and not the exact one"


def test_a_steps_guidance_is_the_samples_own() -> None:
    """Where c and u differ by their mean, guided by w the teacher is that of the mean u + w (c - u)."""
    made = world(lcm(guidance=[2.0, 6.0]), m_c=1.5, m_u=0.5, rows=32)
    point = made.method.point(made.ctx, made.batch(0))
    assert 2 <= float(point.w.min()) < 2.5 and 5.5 < float(point.w.max()) <= 6
    with torch.no_grad():
        found = made.method.solve(made.ctx, point)
        for row in range(4):
            one = Teacher(0.5 + float(point.w[row]), s=S)
            at = slice(row, row + 1)
            output = one(point.x_t[at], point.t[at], point.cond.take(at))
            step = DENOISER.ddim_step(output, point.x_t[at], point.t[at], point.before[at]).sample
            torch.testing.assert_close(found[at], step, rtol=1e-4, atol=1e-4)
        plain = world(lcm(), m_c=1.5, m_u=0.5)
        point = plain.method.point(plain.ctx, plain.batch(0))
        alone = plain.teacher(point.x_t, point.t, point.cond)
        step = DENOISER.ddim_step(alone, point.x_t, point.t, point.before).sample
        assert torch.equal(plain.method.solve(plain.ctx, point), step), "w = 1 is the conditional teacher"


def test_a_step_that_leads_nowhere_has_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffalign.methods import consistency

    whole = make_grid(1000, 50)
    still = consistency.Grid(whole.times, whole.times, whole.ends, whole.tops)
    monkeypatch.setattr(consistency, "make_grid", lambda *args: still)
    assert float(world(lcm()).loss().values.detach().max()) < 1e-6


def test_the_target_has_no_gradient() -> None:
    """The student moves at the time it is asked at, never at the one before."""
    made = world(lcm(loss="mse"), rows=1)
    for visit in range(3):
        made.gradient(visit=visit)
        point = made.method.point(made.ctx, made.batch(visit))
        assert made.student.a.grad.nonzero().flatten().tolist() == point.t.tolist() != point.before.tolist()


# ---- on a network ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["adapters", "copies"])
def test_targets_by_an_average(storage: str) -> None:
    """It starts as the student, wherever that starts, follows by 1 - decay and takes no gradient."""
    method = lcm(target_ema=0.9, loss="mse")
    trainer = make_trainer(method, storage=storage)
    roles = trainer.roles
    assert all(map(torch.equal, roles.parameters("target"), roles.parameters("student")))
    with torch.no_grad():
        for parameter in roles.parameters("student"):
            parameter.add_(0.1)
    before = [p.clone() for p in roles.parameters("target")]
    warm(trainer, 1)
    for old, new, student in zip(before, roles.parameters("target"), roles.parameters("student"), strict=True):
        torch.testing.assert_close(new, old.lerp(student, 0.1))
    warm(trainer, 2)
    assert all(p.grad is None or not bool(p.grad.any()) for p in roles.parameters("target"))


def test_what_is_recorded() -> None:
    """Four times as LCMScheduler's own spacing has them; new noise between."""
    record = make_method("lcm", {}).sampling(SD_SCHEDULE)
    assert record is not None and record.scheduler == "LCMScheduler" and not record.deterministic
    scheduler = LCMScheduler.from_config({**record.config, "original_inference_steps": 50})
    scheduler.set_timesteps(4)
    assert list(record.timesteps or ()) == scheduler.timesteps.tolist() == [999, 759, 499, 259]
    assert record.guidance == 1.0


def test_refusals() -> None:
    for options, message in (
        ({"timesteps": [499, 999]}, "must fall"),
        ({"guidance": [6.0, 4.0]}, "two rising numbers"),
        ({"loss": "l1"}, "huber"),
    ):
        with pytest.raises((ValidationError, UserError), match=message):
            make_method("lcm", options)
    with pytest.raises(UserError, match=r"solver_steps 30 does not divide the schedule's 1000 times; .* 25, 40"):
        lcm(solver_steps=30).check(DENOISER)
    lcm().check(DENOISER)
