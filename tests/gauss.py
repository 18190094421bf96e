"""Gaussian worlds: every number of a latent is an independent sample of N(m, s^2), whose scores have a closed form.

A method runs here through its own ``loss``, on the real roles and context; only the networks are these: the teacher is
the exact posterior mean (given the prompt N(m_c, s^2), without it N(m_u, s^2)), the student is x0 = a x + b at each of
its times, and the fake score is exact for what the student makes now, learned, or the teacher. All of them speak the
network's own prediction, so that the library's conversions are exercised.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from tiny import SD_SCHEDULE
from torch import Tensor, nn

from diffalign.context import Context
from diffalign.data.batch import Batch, Cond
from diffalign.denoiser import Denoiser
from diffalign.keyed import normal
from diffalign.methods.base import Loss, Method
from diffalign.roles import Roles
from diffalign.trainer import plan_slots

DENOISER = Denoiser.from_config(SD_SCHEDULE)
SHAPE = (1, 16, 16)


def posterior(x: Tensor, alpha: Tensor, sigma: Tensor, mean: Tensor | float, var: Tensor | float) -> Tensor:
    """E[x0 | x_t = x] where x0 ~ N(mean, var)."""
    return (mean * sigma**2 + var * alpha * x) / (alpha**2 * var + sigma**2)


def level(t: Tensor | int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """alpha and sigma as (B, 1, 1, 1)."""
    t = torch.tensor([t]) if isinstance(t, int) else t
    return tuple(c.to(dtype).reshape(-1, 1, 1, 1) for c in DENOISER._levels(t, t.device))  # type: ignore[return-value]


class Net(nn.Module):
    """A network given by its x0 (B, 1, h, w), told in its own prediction.

    ``cond.embeds`` (B, 1, 1 + K) is 1 with a prompt and 0 without, then the step as a unit vector, or zeros."""

    denoiser = DENOISER

    def __init__(self) -> None:
        super().__init__()
        self.mid_block = nn.Identity()

    def x0(self, x: Tensor, t: Tensor, flag: Tensor, step: Tensor) -> Tensor:
        raise TypeError

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        flag, step = cond.embeds[:, 0, :1, None, None], cond.embeds[:, 0, 1:]
        self.mid_block(x)
        return self.denoiser.target_from_xt(self.x0(x, t, flag, step), x, t)


class Teacher(Net):
    """Exact for N(m_c, s^2) with a prompt and N(m_u, s^2) without."""

    def __init__(self, m_c: float = 1.5, m_u: float | None = None, s: float = 0.7) -> None:
        super().__init__()
        self.m_c, self.m_u, self.s = m_c, m_c if m_u is None else m_u, s

    def x0(self, x: Tensor, t: Tensor, flag: Tensor, step: Tensor) -> Tensor:
        return posterior(x, *level(t), self.m_u + flag * (self.m_c - self.m_u), self.s**2)


class Student(Net):
    """x0 = a x + b, with a and b for each of its times."""

    def __init__(self, times: tuple[int, ...], rollout: str = "renoise", scale: float = 1.0) -> None:
        super().__init__()
        self.times, self.rollout, self.scale = times, rollout, scale
        self.a, self.b = nn.Parameter(torch.full((len(times),), 2.0)), nn.Parameter(torch.full((len(times),), -1.0))

    def x0(self, x: Tensor, t: Tensor, flag: Tensor, step: Tensor) -> Tensor:
        index = torch.tensor([self.times.index(int(time)) for time in t])
        return self.a[index].reshape(-1, 1, 1, 1) * x + self.b[index].reshape(-1, 1, 1, 1)

    @torch.no_grad()
    def set(self, teacher: Teacher) -> None:
        """As the teacher would answer."""
        alpha, sigma = (c.flatten() for c in level(torch.tensor(self.times)))
        bottom = alpha**2 * teacher.s**2 + sigma**2
        self.a.copy_(teacher.s**2 * alpha / bottom)
        self.b.copy_(teacher.m_c * sigma**2 / bottom)

    @torch.no_grad()
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance (K,) of what each step makes, in its roll-out."""
        mean, var, means, variances = torch.zeros(()), torch.tensor(self.scale**2), [], []
        for k, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
            means.append(a * mean + b)
            variances.append(a**2 * var)
            if k + 1 < len(self.times):
                (alpha, sigma), (to_a, to_s) = (map(torch.squeeze, level(self.times[j])) for j in (k, k + 1))
                if self.rollout == "ddim":
                    slope = to_a * a + to_s * (1 - alpha * a) / sigma
                    mean, var = slope * mean + (to_a - to_s * alpha / sigma) * b, slope**2 * var
                else:
                    mean, var = to_a * means[-1], to_a**2 * variances[-1] + to_s**2
        return torch.stack(means), torch.stack(variances)


class ExactFake(Net):
    """The posterior mean of what the student makes now: of the step it is told, else of the mixture over all steps.

    It is the same with and without a prompt; with ``pinned`` the teacher answers without one."""

    def __init__(self, student: Student, pinned: Teacher | None = None) -> None:
        super().__init__()
        self.source = (student, pinned)  # in a tuple: no sub-modules

    def x0(self, x: Tensor, t: Tensor, flag: Tensor, step: Tensor) -> Tensor:
        student, pinned = self.source
        alpha, sigma = (c[..., None] for c in level(t))
        mean, var = student.moments()
        scale = alpha**2 * var + sigma**2
        log = -0.5 * ((x[..., None] - alpha * mean) ** 2 / scale + scale.log())
        told = step[:, None, None, None] if step.shape[1] else torch.zeros(len(x), 1, 1, 1, len(mean))
        share = torch.where(told.sum(-1, keepdim=True) > 0, told, log.softmax(-1))
        found = (share * posterior(x[..., None], alpha, sigma, mean, var)).sum(-1)
        return found if pinned is None else torch.where(flag > 0, found, pinned.x0(x, t, 0 * flag, step))


class LearnedFake(Net):
    """The posterior mean of a Gaussian whose mean and log std are learned; one Gaussian, whatever the step."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(std).log())

    def x0(self, x: Tensor, t: Tensor, flag: Tensor, step: Tensor) -> Tensor:
        return posterior(x, *level(t), self.mean, (2 * self.log_std).exp())


class World:
    """A method on Gaussian networks.

    Args:
        fake: ``exact`` (its critic phase is left out), ``learned``, ``teacher`` (frozen at the start), or a network.
        rows: samples of a batch, each of 256 numbers at one time.
        init: the student starts with a = 2 and b = -1 (``far``), or as the ``teacher``.
        prediction: what the networks predict.
    """

    def __init__(
        self,
        method: Method[Any],
        fake: str | nn.Module = "exact",
        *,
        m_c: float = 1.5,
        m_u: float | None = None,
        s: float = 0.7,
        rows: int = 8,
        init: str = "far",
        seed: int = 0,
        prediction: str = "epsilon",
    ) -> None:
        self.method, self.rows, self.kind = method, rows, fake
        config = method.config
        self.times: tuple[int, ...] = tuple(getattr(config, "timesteps", None) or (999,))
        self.teacher = Teacher(m_c, m_u, s)
        scale = float(level(self.times[0])[1]) if getattr(config, "start", "unit") == "sigma" else 1.0
        self.student = Student(self.times, getattr(config, "rollout", "renoise"), scale)
        if init == "teacher":
            self.student.set(self.teacher)
        made: dict[str, Any] = {"exact": lambda: ExactFake(self.student), "teacher": lambda: Teacher(m_c, m_u, s)}
        made["learned"] = lambda: LearnedFake(m_c, s)
        self.fake = made[fake]() if isinstance(fake, str) else fake
        steps = len(self.times)
        sizes = {"cross_attention_dim": 1 + steps, "block_out_channels": (1,), "sample_size": 1}
        unet = SimpleNamespace(config=SimpleNamespace(**sizes))
        modules = method.build(SimpleNamespace(unet=unet, scheduler_config=SD_SCHEDULE))  # type: ignore[arg-type]
        if "steps" in modules:
            modules["steps"].weight.data[:, 1:] = torch.eye(steps)
        self.roles = Roles(self.teacher, lambda net, x, t, cond: net(x, t, cond), (), modules=modules)
        denoiser = Denoiser.from_config(SD_SCHEDULE, prediction)
        for net in (self.teacher, self.student, self.fake):
            net.denoiser = denoiser
        for name, net in (("student", self.student), ("fake", self.fake)):
            self.roles.networks[name] = net
            self.roles._parameters[name] = dict(net.named_parameters())
        self.roles.trained = ("student", "fake")
        uncond = Cond(torch.zeros(1, 1, 1 + steps))
        self.ctx = Context(self.roles, denoiser, seed, torch.device("cpu"), uncond, latent_shape=SHAPE)

    def batch(self, visit: int) -> Batch:
        """Fresh noise at each visit; real pictures where the method asks for them."""
        n = self.rows
        embeds = torch.zeros(n, 1, 1 + len(self.times))
        embeds[..., 0] = 1
        ids = tuple(f"row-{i}" for i in range(n))
        real = self.teacher.m_c + self.teacher.s * normal((n, *SHAPE), "real", visit)
        images = {"image": real} if self.method.needs.batch == "image" else {}
        return Batch(ids, (visit,) * n, images, {"prompt": Cond(embeds)}, {}, torch.ones(n))

    def loss(self, phase: str = "student", visit: int = 0, repeat: int = 0) -> Loss:
        """One loss of a phase, of which the roles alone take gradients."""
        found = next(p for p in self.method.phases if p.name == phase)
        self.ctx.phase, self.ctx.repeat = phase, repeat
        self.roles.train_only(found.trains)
        return self.method.loss(self.ctx, self.batch(visit), found)

    def gradient(self, phase: str = "student", visit: int = 0, repeat: int = 0) -> Loss:
        """A loss with its gradients left on the networks."""
        for name in self.roles._parameters:
            for parameter in self.roles.parameters(name):
                parameter.grad = None
        loss = self.loss(phase, visit, repeat)
        ((loss.values * loss.weights).sum() / loss.weights.sum()).backward()
        return loss

    def descend(self, steps: int, lr: float = 0.2, fake_lr: float | None = None, start: int = 0) -> World:
        """Plain gradient descent through the method's phases; a fake score without parameters has no critic phase."""
        for visit in range(start, start + steps):
            for slot in plan_slots(self.method):
                trains = [p for role in slot.phase.trains for p in self.roles.parameters(role)]
                if slot.phase.name == "critic" and not self.roles.parameters("fake"):
                    continue
                self.gradient(slot.phase.name, visit, slot.repeat)
                rate = (fake_lr or lr) if slot.phase.name == "critic" else lr
                with torch.no_grad():
                    for parameter in trains:
                        if parameter.grad is not None:
                            parameter -= rate * parameter.grad
        return self

    def reached(self) -> tuple[list[float], list[float]]:
        """Mean and std of what each of the student's steps makes."""
        mean, var = self.student.moments()
        return mean.tolist(), var.sqrt().tolist()
