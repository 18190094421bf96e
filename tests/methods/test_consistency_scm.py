"""sCM: TrigFlow of eps and v models, tangents by differences and forward mode, closed forms of Gaussians (sheet 11)."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from gauss import DENOISER, SHAPE, World
from tiny import SD_SCHEDULE
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from world import batch_of, family, make_trainer, stirred

from diffalign.data.batch import Cond
from diffalign.denoiser import Denoiser
from diffalign.errors import Note, UserError
from diffalign.families.attention import FlashProcessor
from diffalign.families.guidance import EMBEDDING, guidance_embedding
from diffalign.methods import make_method
from diffalign.methods.distillation.scm import SCM, Angles, LogVariance, scm_direction, to_velocity
from diffalign.trainer import Trainer

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


# ---- the attention of the tangent -----------------------------------------------------------------------------------


class Fused(AttnProcessor2_0):
    """Torch's own attention, held to a fused kernel: without a forward-mode derivative, on every device."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            found: Tensor = super().__call__(*args, **kwargs)
        return found


@pytest.mark.parametrize(("processor", "fails"), [(Fused, NotImplementedError), (FlashProcessor, UserError)])
def test_other_attention_makes_way_for_the_tangent(processor: type[AttnProcessor2_0], fails: type[Exception]) -> None:
    """Said once, by name; the tangent is that of torch's own attention, and the kernel is back afterwards."""
    trainer = stirred(make_trainer(scm()))
    ctx, cond, method = trainer.ctx, batch_of(trainer).condition("image"), scm(tangent="jvp")
    unet: Any = trainer.roles.networks["student"]
    torch.manual_seed(0)
    x, slope = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    angle = torch.tensor([0.3, 0.7, 1.0, 1.3], dtype=torch.float64)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        plain = method.tangent(ctx, x, angle, ANGLES, slope, cond)
        unet.set_attn_processor(processor())
        with pytest.raises(fails):
            torch.func.jvp(lambda x: ctx.roles("student", x, torch.tensor([3.0] * 4), cond), (x,), (slope,))
        with pytest.warns(Note, match=f"math attention in the place of {processor.__name__}, which lacks"):
            found = method.tangent(ctx, x, angle, ANGLES, slope, cond)
        assert torch.equal(method.tangent(ctx, x, angle, ANGLES, slope, cond), found), "said once"
        assert {type(each) for each in unet.attn_processors.values()} == {processor}
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)


# ---- SANA-Sprint's options ------------------------------------------------------------------------------------------

GAN = {"adaptive": True, "gan_weight": 0.5, "gan_width": 8, "tangent": "jvp"}


def gradients(trainer: Trainer, phase: str) -> dict[str, list[Tensor | None]]:
    """Of every role, by one loss of a phase."""
    found = next(each for each in trainer.method.phases if each.name == phase)
    trainer.roles.train_only(found.trains)
    trainer.ctx.phase = phase
    trainer.method.loss(trainer.ctx, batch_of(trainer), found).values.sum().backward()
    taken = {role: [p.grad for p in trainer.roles.parameters(role)] for role in trainer.roles.names}
    for role in trainer.roles.names:
        for parameter in trainer.roles.parameters(role):
            parameter.grad = None
    return taken


def test_without_weight_the_gan_is_not_there_and_with_fresh_heads_it_says_nothing() -> None:
    """The gradient of sCM to the last bit: heads start at 0, and 0 is all that they give back."""
    bare, gan = make_method("scm", {}), make_method("scm", {**GAN, "gan_weight": 0.0})
    assert bare.roles == gan.roles == ("student", "variance")
    assert [phase.name for phase in gan.phases] == ["student"] and gan.needs == bare.needs
    plain, trainer = (stirred(make_trainer(scm(**GAN | {"gan_weight": w}))) for w in (0.0, 0.5))
    for parameter in trainer.roles.modules["heads"].parameters():
        parameter.data.zero_()
    expected, found = gradients(plain, "student"), gradients(trainer, "student")
    for role in ("student", "variance"):
        assert all(
            a is not None and b is not None and torch.equal(a, b)
            for a, b in zip(expected[role], found[role], strict=True)
        )
    trainer.ctx.phase = "critic"
    critic = trainer.method.loss(trainer.ctx, batch_of(trainer), trainer.method.phases[1])
    assert critic.values.tolist() == [2.0] * 4


def test_the_gans_gradients_reach_their_roles() -> None:
    """The student's its own weights, through the frozen teacher's blocks and still heads; the heads' the heads."""
    trainer, plain = stirred(make_trainer(scm(**GAN))), stirred(make_trainer(scm(**GAN | {"gan_weight": 0.0})))
    heads = trainer.roles.modules["heads"].heads
    assert [(h.layers[0].in_channels, h.least) for h in heads] == [(16, 4), (32, 4), (32, 4)]  # type: ignore[union-attr, operator]
    student, critic = gradients(trainer, "student"), gradients(trainer, "critic")
    alone = gradients(plain, "student")["student"]
    assert any(not torch.equal(a, b) for a, b in zip(student["student"], alone, strict=True))  # type: ignore[arg-type]
    assert student["heads"] == [None] * len(student["heads"])
    assert critic["student"] == [None] * len(alone) and critic["variance"] == [None, None]
    assert all(grad is not None and bool(grad.any()) for grad in critic["heads"] if grad is not None and grad.ndim > 1)
    for head in heads:  # each has its say
        assert any(p.requires_grad for p in head.parameters())


def test_what_the_heads_are_shown() -> None:
    """Pictures against the student's x0, from where it was asked or from the schedule's last time, at one noise."""
    trainer = stirred(make_trainer(scm(**GAN)))
    ctx, batch = trainer.ctx, batch_of(trainer)
    ctx.phase = "student"
    real, noise, cond = batch.latents["image"], ctx.draw(batch)[1], batch.condition("image")
    half = sorted(rng.random() for rng in ctx.rng("gan-last", batch))[2]  # of which two samples are below
    for share, count in ((0.0, 0), (1.0, 4), (half, 2)):
        method = scm(**GAN | {"gan_last": share, "time_mean": -0.5, "time_std": 0.3})
        method.build(family())
        with torch.no_grad():
            x, angle, t = method.point(ctx, batch, ANGLES)
            v = method.velocity(ctx, "student", x, angle, t, cond)
            made = method.made(ctx, batch, ANGLES, cond, x, angle, v)
            found = method.student_loss(ctx, batch).metrics["gan"]
            angle_seen = method.angle(ctx, batch, ANGLES, "gan-time", (0.093, 1.0)).float()
            a, b = (f(angle_seen)[:, None, None, None] for f in (torch.cos, torch.sin))
            x_t, t_seen = a * made + b * ctx.draw(batch, "gan")[1], ANGLES.time(angle_seen.double())[0].float()
            names = ("down_blocks.0", "down_blocks.1", "mid_block")
            seen = [ctx.features("base", x_t, t_seen, cond, name) for name in names]
            said = [h(f) for h, f in zip(ctx.roles.modules["heads"].heads, seen, strict=True)]  # type: ignore[arg-type]
            torch.testing.assert_close(found, -0.5 * torch.stack(said).mean(0), rtol=1e-4, atol=1e-5)
        last = torch.full_like(t, 999)
        full = ctx.denoiser.add_noise(real, noise, last.long())
        with torch.no_grad():
            from_last = ctx.denoiser.to_x0(ctx.model("student", full, last, cond), full, last.long())
            from_here = (
                torch.cos(angle).float()[:, None, None, None] * x - torch.sin(angle).float()[:, None, None, None] * v
            )
        far = [not torch.allclose(one, other, atol=1e-3) for one, other in zip(made, from_here, strict=True)]
        near = [torch.allclose(one, other, rtol=1e-3, atol=1e-2) for one, other in zip(made, from_last, strict=True)]
        assert far == near and sum(far) == count, (share, far, near)
    ctx.phase = "critic"
    with torch.no_grad():
        critic = trainer.method.loss(ctx, batch, trainer.method.phases[1])
        judged = trainer.method.judge(ctx, batch, ANGLES, real)  # type: ignore[attr-defined]
        x, angle, t = trainer.method.point(ctx, batch, ANGLES)  # type: ignore[attr-defined]
        v = trainer.method.velocity(ctx, "student", x, angle, t, cond)  # type: ignore[attr-defined]
        made = trainer.method.made(ctx, batch, ANGLES, cond, x, angle, v)  # type: ignore[attr-defined]
        fake = trainer.method.judge(ctx, batch, ANGLES, made)  # type: ignore[attr-defined]
    torch.testing.assert_close(critic.metrics["gan_real"], judged.mean(1))
    torch.testing.assert_close(critic.values, ((1 - judged).relu() + (1 + fake).relu()).mean(1))
    assert float((judged - fake).abs().max()) > 1e-4


def test_a_batch_of_the_gan_is_a_loop_of_singles() -> None:
    trainer = stirred(make_trainer(scm(**GAN)))
    for phase in trainer.method.phases:
        trainer.ctx.phase = phase.name
        with torch.no_grad():
            whole = trainer.method.loss(trainer.ctx, batch_of(trainer), phase).values
            singles = [trainer.method.loss(trainer.ctx, batch_of(trainer, [row]), phase).values for row in range(4)]
        torch.testing.assert_close(torch.cat(singles), whole, rtol=1e-3, atol=1e-4)


def test_the_student_alone_is_told_its_guidance() -> None:
    """At the point, in the tangent and from the last time; the same w that guides the teacher."""
    method = make_method("scm", {**GAN, "tell_guidance": True, "gan_last": 1.0})
    trainer = stirred(make_trainer(scm(**GAN)))
    told_family = family()
    told_family.unet.register_to_config(time_cond_proj_dim=32)
    method.build(told_family)
    seen: list[tuple[int, Tensor | None]] = []
    plain = trainer.roles.forward

    def spied(unet: Any, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        seen.append((len(x), cond.added.get(EMBEDDING)))
        return plain(unet, x, t, Cond(cond.embeds))

    trainer.roles.forward = spied
    ctx, batch = trainer.ctx, batch_of(trainer)
    ctx.phase = "student"
    w = method.guidance(ctx, batch)  # type: ignore[attr-defined]
    method.loss(ctx, batch, method.phases[0])
    # the guided teacher, the tangent, the point, the last time, and the teacher's features
    assert [(rows, told is not None) for rows, told in seen] == [
        (8, False),
        (4, True),
        (4, True),
        (4, True),
        (4, False),
    ]
    assert all(told is None or torch.equal(told, guidance_embedding(w, 32)) for _, told in seen)
    assert 4 <= float(w.min()) < float(w.max()) <= 5
    record = method.sampling(SD_SCHEDULE)
    assert record is not None and record.told == (4.0, 5.0) and record.guidance == 5.0
    with pytest.raises(UserError, match="tell_guidance=true asks for a guidance embedding"):
        make_method("scm", {"tell_guidance": True}).build(family())


def test_several_features_by_one_call() -> None:
    trainer = stirred(make_trainer(scm()))
    ctx, cond = trainer.ctx, batch_of(trainer).condition("image")
    x, t, names = torch.randn(4, 4, 8, 8), torch.tensor([5, 300, 600, 999]), ("mid_block", "down_blocks.0")
    calls: list[int] = []
    trainer.roles.networks["base"].conv_in.register_forward_hook(lambda *args: calls.append(1))  # type: ignore[union-attr]
    with torch.no_grad():
        both = ctx.features_of("student", x, t, cond, names)
        assert len(calls) == 1
        for found, name in zip(both, names, strict=True):
            assert torch.equal(found, ctx.features("student", x, t, cond, name))
    with pytest.raises(UserError, match=r"gan_blocks: this U-Net has no 'up_blocks.0'; did you mean"):
        scm(**GAN, gan_blocks=["up_blocks.0"]).build(family())


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
