"""What every distribution matching method holds in common: signs, guidance, divisors, draws, starts (sheet 27)."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from gauss import Teacher, World, level
from torch import Tensor
from world import batch_of, make_trainer

from diffalign.context import Context
from diffalign.methods import make_method
from diffalign.methods.score_distill import dm_direction, times_of

TIME = 500


def gain(t: int, s: float = 0.7) -> float:
    """k_t: how far the posterior mean moves with the law's mean."""
    alpha, sigma = (float(c) for c in level(t, torch.float64))
    return sigma**2 / (alpha**2 * s**2 + sigma**2)


def world(name: str, options: dict[str, Any], **more: Any) -> World:
    """A Gaussian world of this method, whose further fake score, if any, is a teacher too."""
    made = World(make_method(name, options), **{"rows": 3, "m_u": 0.5, **more})
    if "loser" in made.method.roles:
        made.roles.networks["loser"], made.roles._parameters["loser"] = Teacher(1.5, 0.5), {}
    return made


@dataclass
class Form:
    """A method in one step without divisor, and what its gradient at x is per unit of the scores' difference."""

    options: dict[str, Any] = field(default_factory=dict)
    power: int = 1  # of the gain: 2 where the gradient runs through the scores
    factor: float = 1.0


FORMS = {
    "dmd": Form({"regression_weight": 0.0}),
    "dmd2": Form({"gan_weight": 0.1, "gan_width": 4}),
    "decoupled_dmd": Form(),
    "decoupled_dmd coupled": Form({"schedule": "coupled"}),
    "f_distill": Form({"divergence": "jeffreys", "gan_width": 4}),
    "diff_instruct kl": Form({"divergence": "kl"}),
    "diff_instruct fisher": Form({"divergence": "fisher"}, power=2),
    "sid": Form({"strategy": "long", "alpha": 1.0}, power=2),
    "distillation_dpo": Form({"loser_weight": 0.0}),
    "distillation_dpo pushes": Form({"loser_weight": 0.25, "loser_noise": 1.0}, factor=0.75),
    "tdm": Form({"loss": "mse"}, factor=2.0),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_first_gradient_is_guidance_in_size_and_sign(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake score and teacher one: x is pushed by (w - 1) (y_cond - y_uncond), that is by (w - 1) (m_c - m_u) k_t; not
    at all at w = 1, and away from the prompt at w = 0."""
    form = FORMS[name]
    for guidance, extra in ((4.0, 3.0), (1.0, 0.0), (0.0, -1.0)):
        options = {"timesteps": [899], "start": "unit", "normalise": "none", "guidance": guidance, **form.options}
        made = world(name.split()[0], options, fake="teacher")
        monkeypatch.setattr(made.method, "times", lambda ctx, batch, *rest: torch.full((len(batch.ids),), TIME))
        made.gradient()
        expected = -form.factor * extra * gain(TIME) ** form.power
        assert float(made.student.b.grad) == pytest.approx(expected, rel=1e-3, abs=1e-6), guidance


@pytest.mark.parametrize("name", FORMS)
def test_the_student_follows_the_teacher_and_leaves_the_fake_score(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """w = 1, and the fake score's law .25 below the teacher's: x is pushed up, by .25 k_t."""
    form = FORMS[name]
    options = {"timesteps": [899], "start": "unit", "normalise": "none", "guidance": 1.0, **form.options}
    if name == "sid":
        options["strategy"] = "long"
    made = world(name.split()[0], options, fake=Teacher(1.25, 1.25))
    if "loser" in made.method.roles:
        made.roles.networks["loser"] = Teacher(1.25, 1.25)
    monkeypatch.setattr(made.method, "times", lambda ctx, batch, *rest: torch.full((len(batch.ids),), TIME))
    made.gradient()
    assert float(made.student.b.grad) == pytest.approx(-form.factor * 0.25 * gain(TIME) ** form.power, rel=1e-3)


# ---- draws ----------------------------------------------------------------------------------------------------------

THREE = {"timesteps": [899, 599, 299]}
GAN = {"gan_weight": 0.1, "gan_width": 4}
# of each phase: the noise drawn besides "start", "renoise-1", "renoise-2" and "score"
DRAWS: dict[str, tuple[str, dict[str, Any], set[str], set[str]]] = {
    "dmd2": ("dmd2", {**THREE, **GAN, "gan_r1": 1.0}, {"gan"}, {"gan", "gan-real", "gan-r1"}),
    "decoupled": ("decoupled_dmd", THREE, {"augment"}, set()),
    "coupled": ("decoupled_dmd", {**THREE, "schedule": "coupled"}, set(), set()),
    "f_distill": ("f_distill", {**THREE, **GAN}, {"gan"}, {"gan", "gan-real"}),
    "diff_instruct": ("diff_instruct", THREE, set(), set()),
    "sid": ("sid", {**THREE, "gan_weight": 0.1, "gan_draws": "own"}, {"gan"}, {"gan", "gan-real"}),
    "tdm": ("tdm", THREE, set(), set()),
}


@pytest.mark.parametrize("case", DRAWS)
def test_no_noise_has_two_uses(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a loss every tag is drawn once; all that is drawn is announced; and the phases' noises are apart."""
    name, options, *more = DRAWS[case]
    made = world(name, {**options, "guidance": 2.0}, fake="learned")
    drawn: Counter[str] = Counter()
    values: list[Tensor] = []
    draw, rng = Context.draw, Context.rng

    def counted(self: Context, batch: Any, tag: str = "noise") -> tuple[Tensor, Tensor]:
        drawn[tag] += 1
        values.append(draw(self, batch, tag)[1])
        return draw(self, batch, tag)

    def stopped(self: Context, tag: str, batch: Any) -> Any:
        return [_Last()] * len(batch.ids) if tag == "stop" else rng(self, tag, batch)

    monkeypatch.setattr(Context, "draw", counted)
    monkeypatch.setattr(Context, "rng", stopped)
    renoise = set() if made.method.config.rollout == "ddim" else {"renoise-1", "renoise-2"}
    for phase, others in zip(("student", "critic"), more, strict=True):
        drawn.clear()
        made.loss(phase)
        assert drawn == Counter({"start", "score"} | renoise | others), phase
        assert set(drawn) <= set(made.method.needs.draws)
    for k, one in enumerate(values):
        assert all(float((one - other).abs().min()) > 0 for other in values[:k])


class _Last:
    """A generator that says the last of its numbers."""

    def integers(self, stop: int) -> int:
        return stop - 1


# ---- identities -----------------------------------------------------------------------------------------------------


def test_a_dirac_law_is_matched_at_every_step() -> None:
    """Sheet 3.7-5: data in one point, the student exact: every roll-out lands there and nothing moves."""
    made = world("dmd2", {"timesteps": [999, 749, 499, 249], "guidance": 1.0}, fake="teacher", s=0.0, rows=8)
    made.student.set(made.teacher)
    made.ctx.phase = "student"
    sample = made.method.generate(made.ctx, made.batch(0))
    assert len(set(sample.steps)) > 1
    torch.testing.assert_close(sample.x.detach(), torch.full_like(sample.x, 1.5))
    loss = made.gradient()
    assert not bool(loss.values.any()) and not bool(made.student.b.grad.any())


def test_dmd_without_regression_is_the_bare_direction() -> None:
    """Sheet 27.5: lambda = 0, and DMD2 without GAN in one step with one critic update, are one method."""
    found = []
    for name, options in (
        ("dmd", {"regression_weight": 0.0}),
        ("dmd2", {}),
        ("decoupled_dmd", {"schedule": "coupled"}),
    ):
        parity = {"divisor": "shared", "relative_floor": 0.0} if name == "decoupled_dmd" else {}
        made = world(name, {"timesteps": [999], "guidance": 3.0, **options, **parity})
        made.gradient()
        found.append(torch.cat([made.student.a.grad, made.student.b.grad]))
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=1e-6)


def test_the_divisor_is_the_distance_from_x_to_the_guided_teacher() -> None:
    x, y_fake, y_real = (torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(3))
    size = (x - y_real).abs().flatten(1).mean(1)[:, None, None, None]
    torch.testing.assert_close(dm_direction(x, y_fake, y_real) * size, y_fake - y_real)
    assert torch.equal(dm_direction(x, y_fake, y_real, None), y_fake - y_real)
    # x = y_real != y_fake: the floor
    torch.testing.assert_close(dm_direction(x, y_fake, x, 0.5), (y_fake - x) / 0.5)


@pytest.mark.parametrize("storage", ["adapters", "copies"])
def test_every_score_starts_as_the_teacher(storage: str) -> None:
    """Whatever holds the networks, before the first update all of them answer alike, to the bit."""
    for name, options in (("dmd2", {"timesteps": [999]}), ("distillation_dpo", {})):
        trainer = make_trainer(make_method(name, options), storage=storage)
        batch, t = batch_of(trainer), torch.full((4,), TIME)
        x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        base = trainer.ctx.model("base", x, t, batch.cond["prompt"])
        for role in trainer.roles.trained:
            assert torch.equal(trainer.ctx.model(role, x, t, batch.cond["prompt"]), base), role


@pytest.mark.parametrize("storage", ["adapters", "copies"])
def test_the_fake_score_follows_the_student(storage: str) -> None:
    """After the student's update alone, by the share; adapters begin alike, and the first answers are the teacher's."""
    trainer = make_trainer(make_method("dmd2", {"timesteps": [999], "align": 0.25}), storage=storage)
    student, fake = (trainer.roles.parameters(role) for role in ("student", "fake"))
    asked = torch.ones(4, 4, 8, 8), torch.full((4,), TIME), batch_of(trainer).cond["prompt"]
    assert torch.equal(trainer.ctx.model("fake", *asked), trainer.ctx.model("base", *asked))
    before = [p.clone() for p in fake]
    assert all(torch.equal(a, b) for a, b in zip(student, fake, strict=True))
    first, second = (slot for slot in trainer.slots if slot.repeat == 0)
    trainer.update(first, trainer.batches(0))
    assert any(not torch.equal(a, b) for a, b in zip(student, before, strict=True))
    for mine, old, theirs in zip(fake, before, student, strict=True):
        torch.testing.assert_close(mine, 0.75 * old + 0.25 * theirs)
    kept = [p.clone() for p in student]
    trainer.update(second, trainer.batches(0))
    assert all(torch.equal(a, b) for a, b in zip(student, kept, strict=True))


def test_ranges_stay_inside_the_schedule() -> None:
    assert times_of((0.02, 0.98), 1000) == (20, 980) and times_of((0.02, 0.979), 1000) == (20, 979)
    assert times_of((0.0, 1.0), 1000) == (0, 999) and times_of((1.0, 1.0), 1000) == (999, 999)


def test_closed_forms_that_the_other_tests_rest_on() -> None:
    """E[k_t] = .7200660 over 20..980, E[k_t^2] = .602741 over 20..979, and the ratios of Decoupled DMD."""
    gains = [gain(t) for t in range(1000)]
    mean = lambda a, b, p=1: math.fsum(g**p for g in gains[a : b + 1]) / (b + 1 - a)  # noqa: E731
    assert mean(20, 980) == pytest.approx(0.7200660, abs=1e-6)
    assert mean(20, 979, 2) == pytest.approx(0.602741, abs=1e-5)
    for high, ratio in ((749, 0.882187), (499, 0.675963), (249, 0.369260)):
        assert mean(20, high) / mean(20, 980) == pytest.approx(ratio, abs=1e-5)
