"""sCM: TrigFlow of eps and v models, tangents by differences and forward mode, closed forms of Gaussians (sheet 11)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gauss import DENOISER, SHAPE, World
from tiny import SD_SCHEDULE
from torch import Tensor, nn
from world import batch_of, make_trainer, stirred

from diffalign.data.batch import Cond
from diffalign.denoiser import Denoiser
from diffalign.errors import UserError
from diffalign.methods import make_method
from diffalign.methods.distillation.scm import SCM, Angles, LogVariance, scm_direction, to_velocity

ANGLES = Angles.of(DENOISER)


def scm(**options: Any) -> SCM:
    plain = {"guidance": [1.0, 1.0], "adaptive": False, "warmup": 0}
    return make_method("scm", {**plain, **options})  # type: ignore[return-value]


class Smooth(nn.Module):
    """A network of eps given by its x0 at any time, between those of the schedule too."""

    def __init__(self, kind: str, mean: float, std: float) -> None:
        super().__init__()
        self.kind, self.mean, self.std = kind, mean, std
        self.share = nn.Parameter(torch.tensor(1.0))
        self.double()

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        low = t.long().clamp(0, 998)
        table = torch.from_numpy(ANGLES.table)
        angle = table[low] + (t - low) * (table[low + 1] - table[low])
        alpha, sigma = (f(angle)[:, None, None, None] for f in (torch.cos, torch.sin))
        wide = (alpha**2 * self.std**2 + sigma**2).sqrt()
        centred = x - alpha * self.mean
        x0 = self.mean + self.std**2 * alpha / wide**2 * centred
        if self.kind == "student":  # where the trajectory ends, by a share; the rest is the teacher's
            x0 = torch.lerp(x0, self.mean + self.std / wide * centred, self.share)
        return (x - alpha * x0) / sigma


def world(method: SCM, mean: float = 1.5, std: float = 0.7, rows: int = 8) -> World:
    made = World(method, "teacher", m_c=mean, s=std, rows=rows)
    teacher, student = Smooth("teacher", mean, std), Smooth("student", mean, std)
    made.roles.networks |= {"base": teacher, "student": student}
    made.roles._parameters["student"] = dict(student.named_parameters())
    made.ctx.phase = "student"
    return made


def test_angles_are_those_of_the_schedule() -> None:
    """The sheet's second time of 1.3 is 719; between two times both angle and time grow evenly."""
    assert ANGLES.table[999] == pytest.approx(1.502478, abs=1e-6) and abs(ANGLES.table - 1.3).argmin() == 719
    t, rate = ANGLES.time(torch.from_numpy(ANGLES.table))
    torch.testing.assert_close(t, torch.arange(1000.0, dtype=torch.float64), rtol=0, atol=1e-9)
    a = torch.tensor([0.0300, 0.7, 1.5], dtype=torch.float64)
    near = [(ANGLES.time(a + side * 1e-7)[0]) for side in (-1, 1)]
    torch.testing.assert_close((near[1] - near[0]) / 2e-7, ANGLES.time(a)[1], rtol=1e-4, atol=0)
    assert rate.min() > 0
    record = make_method("scm", {}).sampling(SD_SCHEDULE)
    assert record is not None and record.timesteps == (999, 719) and not record.deterministic


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_velocities_of_every_prediction(prediction: str) -> None:
    denoiser = Denoiser.from_config(SD_SCHEDULE, prediction)
    torch.manual_seed(0)
    x0, noise, t = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.tensor([20, 500, 900])
    x, output = denoiser.add_noise(x0, noise, t), denoiser.target(x0, noise, t)
    angle = torch.from_numpy(ANGLES.table)[t].float()
    torch.testing.assert_close(
        to_velocity(output, x, angle, prediction), denoiser.to_v(output, x, t), rtol=1e-4, atol=1e-4
    )


def test_the_direction() -> None:
    """r = 0 draws to the teacher's velocity alone; a size below 1; nothing at the exact map of a unit Gaussian."""
    torch.manual_seed(0)
    v, slope, tangent, x = (torch.randn(3, 2, 4, 4, dtype=torch.float64) for _ in range(4))
    angle = torch.tensor([0.1, 0.8, 1.4], dtype=torch.float64)
    g, size = scm_direction(v, slope, tangent, x, angle, 0.0)
    expected = -(angle.cos()[:, None, None, None] ** 2) * (v - slope)
    torch.testing.assert_close(g, expected / (expected.flatten(1).norm(dim=1) + 0.1)[:, None, None, None])
    torch.testing.assert_close(size, expected.flatten(1).norm(dim=1))
    assert bool((scm_direction(v, slope, tangent, x, angle, 1.0)[0].flatten(1).norm(dim=1) < 1).all())
    a = angle[:, None, None, None]
    exact = -torch.tan(a / 2) * x  # x does not move: dv along it is cos sin dv/da
    change = a.cos() * a.sin() * -0.5 / (a / 2).cos() ** 2 * x
    nothing = scm_direction(exact, 0 * x, change, x, angle, 1.0)[1]
    torch.testing.assert_close(nothing, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.5, 0.7)])
def test_the_exact_map_is_left_alone(mean: float, std: float) -> None:
    """By either tangent; and a map that is not exact is not."""
    for tangent, least in (("difference", 1e-3), ("jvp", 1e-5)):
        made = world(scm(tangent=tangent), mean, std)
        assert float(made.loss().metrics["direction"].max()) < least
        made.roles.networks["student"].share.data.fill_(0.8)  # type: ignore[union-attr]
        assert float(made.loss().metrics["direction"].min()) > 5 * 1e-3


def test_a_share_is_learned() -> None:
    made = world(scm(tangent="jvp", time_mean=0.0, time_std=1.0), 0.0, 1.0, rows=4)
    student = made.roles.networks["student"]
    student.share.data.fill_(0.5)  # type: ignore[union-attr]
    made.descend(20, lr=1.0)
    assert float(student.share.detach()) == pytest.approx(1.0, abs=0.1)  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_forward_mode_is_what_differences_say(checkpointing: bool) -> None:
    """On a U-Net with an adapter."""
    trainer = stirred(make_trainer(scm(), checkpointing=checkpointing))
    ctx, batch = trainer.ctx, batch_of(trainer)
    ctx.phase = "student"
    torch.manual_seed(0)
    x, slope = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    angle, cond = torch.tensor([0.3, 0.7, 1.0, 1.3], dtype=torch.float64), batch.condition("image")
    found = {}
    with torch.no_grad():
        for name, options in (("jvp", {"tangent": "jvp"}), ("difference", {"step": 1e-4})):
            found[name] = scm(**options).tangent(ctx, x, angle, ANGLES, slope, cond)
    size = found["jvp"].flatten(1).norm(dim=1)
    assert bool(((found["jvp"] - found["difference"]).flatten(1).norm(dim=1) < 0.02 * size).all()) and size.min() > 0.1


def test_the_gradient_is_that_of_the_direction() -> None:
    """Of v alone, against g, by the weight of the time; and the variance has its own."""
    trainer = stirred(make_trainer(make_method("scm", {"guidance": [1.0, 1.0]})))
    method, ctx, batch = trainer.method, trainer.ctx, batch_of(trainer)
    ctx.phase = "student"
    trainer.roles.train_only(("student", "variance"))
    loss = method.loss(ctx, batch, method.phases[0])
    assert loss.values.shape == (4,)
    head = LogVariance()
    assert not bool(head(torch.randn(3)).any())
    loss.values.sum().backward()
    assert all(
        any(p.grad is not None and bool(p.grad.any()) for p in trainer.roles.parameters(role)) for role in method.roles
    )
    # warm-up: r grows with the updates that the run remembers
    stats = method.remember({}, {"rows": torch.ones(())})
    assert float(stats["updates"]) == 0 and float(method.remember(stats, {"rows": torch.ones(())})["updates"]) == 1
    ctx.stats = {"updates": torch.zeros(())}
    first = method.loss(ctx, batch, method.phases[0]).metrics["direction"]
    ctx.stats = {"updates": torch.tensor(1e6)}
    assert float((method.loss(ctx, batch, method.phases[0]).metrics["direction"] - first).abs().min()) > 1e-3


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(*args: Any) -> Any:
        raise NotImplementedError("no forward AD")

    monkeypatch.setattr(torch.func, "jvp", lacks)
    made = world(scm(tangent="jvp"))
    with pytest.raises(UserError, match=r"no forward-mode derivative; set method.tangent=difference"):
        made.loss()
    flow = Denoiser.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler"})
    with pytest.raises(UserError, match="variance-preserving"):
        scm().check(flow)
    assert math.prod(SHAPE) == 256
