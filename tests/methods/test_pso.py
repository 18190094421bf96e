"""Offline PSO: its formula, its times, and the traps of the release (online sheet 2B, A.5 and identities 23 to 25)."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from tiny import SD_SCHEDULE
from torch import Tensor
from world import batch_of, make_trainer, warm

from diffalign.denoiser import Denoiser
from diffalign.errors import UserError
from diffalign.facts import Facts, student_record
from diffalign.methods import make_method
from diffalign.methods.distillation.pso import pso_hinge_loss, pso_loss
from diffalign.methods.preference.dpo import dpo_loss
from diffalign.recipe import load_recipe
from diffalign.students import check_students

DENOISER = Denoiser.from_config(SD_SCHEDULE)


def errors(n: int = 8) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.rand(n, dtype=torch.float64) for _ in range(4)]


def test_the_formula_and_its_neutral_points() -> None:
    m_w, m_l, r_w, r_l = errors()
    loss, u = pso_loss(m_w, m_l, r_w, r_l, 5.0)
    torch.testing.assert_close(u, 5 * ((r_w - r_l) - (m_w - m_l)))
    torch.testing.assert_close(loss, dpo_loss(m_w, m_l, r_w, r_l, 10.0)[0])  # twice the beta
    assert torch.allclose(pso_loss(r_w, r_l, r_w, r_l, 50.0)[0], torch.full((8,), math.log(2), dtype=torch.float64))
    swapped, back = pso_loss(m_l, m_w, r_l, r_w, 5.0)
    torch.testing.assert_close(back, -u)
    torch.testing.assert_close(torch.exp(-loss) + torch.exp(-swapped), torch.ones_like(loss))
    pulled, _ = pso_loss(m_w, m_l, r_w, r_l, 5.0, negative=0.1, prior=0.5)
    expected = -torch.nn.functional.logsigmoid(5 * ((r_w - 0.1 * r_l) - (m_w - 0.1 * m_l))) + 0.5 * m_l
    torch.testing.assert_close(pulled, expected)


@pytest.mark.parametrize(("prior", "pushed"), [(0.5, False), (0.2, True)])
def test_the_releases_defaults_cancel_the_negatives(prior: float, pushed: bool) -> None:
    """beta 5, negative 0.1: with prior 0.5 the hinge is 1 + 5 L_w and rejected pictures have no gradient."""
    m_w, m_l = (e.requires_grad_() for e in errors()[:2])
    loss, _ = pso_hinge_loss(m_w, m_l, 5.0, 0.1, prior)
    assert bool((loss > prior * m_l).all()), "the hinge is active"
    loss.sum().backward()
    torch.testing.assert_close(m_w.grad, torch.full((8,), 5.0, dtype=torch.float64))
    assert m_l.grad is not None and (float(m_l.grad.abs().max()) > 1e-9) == pushed
    options = {"loss": "hinge", "beta": 5.0, "negative": 0.1, "prior": prior}
    if pushed:
        make_method("pso", options)
    else:
        with pytest.raises(ValidationError, match="cancel out"):
            make_method("pso", options)


def test_weighted_x0_error_is_the_noise_error() -> None:
    x0, noise, guess = (torch.randn(3, 4, 2, 2, dtype=torch.float64) for _ in range(3))
    for t in (999, 249):
        x_t = DENOISER.add_noise(x0, noise, t)
        varsigma = float(DENOISER.sigma(t) / DENOISER.alpha(t))
        weighted = (DENOISER.to_x0(guess, x_t, t) - x0).square().mean() / varsigma**2
        torch.testing.assert_close(weighted, (guess - noise).square().mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("rollout", ["renoise", "ddim"])
def test_trained_times_are_the_samplers(rollout: str) -> None:
    """As values, not as positions in a falling list: neither 750 nor 0 is among them; each comes as often."""
    method = make_method("pso", {"timesteps": [999, 749, 499, 249], "rollout": rollout})
    trainer = make_trainer(method)
    seen: list[int] = []
    for visit in range(50):
        batch = trainer.source.load(list(range(12)), [visit] * 12)
        noised = method.noise(trainer.ctx, batch)
        t = noised.t.chunk(2)
        assert torch.equal(*t), "a pair shares its time"
        eps = [DENOISER.to_eps(method.residual(trainer.ctx, "base", noised) * 0 + noised.target, noised.x_t, noised.t)]
        assert torch.equal(*eps[0].chunk(2)), "and its noise"
        seen += t[0].tolist()
    record = method.sampling(SD_SCHEDULE)
    assert sorted(set(seen), reverse=True) == list(record.timesteps or ())
    counts = [seen.count(t) for t in set(seen)]
    assert min(counts) > 110 and record.deterministic == (rollout == "ddim")
    assert record.scheduler == ("LCMScheduler" if rollout == "renoise" else "DPMSolverMultistepScheduler")


def test_training_starts_at_log_two_and_prefers_the_chosen() -> None:
    trainer = make_trainer(make_method("pso", {"beta": 50.0}), lr=1e-2)
    start = trainer.method.loss(trainer.ctx, batch_of(trainer), trainer.method.phases[0])
    torch.testing.assert_close(start.values, torch.full((4,), math.log(2)), rtol=0, atol=1e-5)
    warm(trainer, 20)
    batch = trainer.source.load(list(range(12)), [0] * 12)
    assert float(trainer.method.loss(trainer.ctx, batch, trainer.method.phases[0]).values.detach().mean()) < 0.6


def test_the_hinge_needs_no_base() -> None:
    method = make_method("pso", {"loss": "hinge", "negative": 0.1})
    assert not method.needs.reference
    warm(make_trainer(method, storage="copies"), 1)


@pytest.mark.parametrize("times", [[249, 499], [999, 999], [], [-1]])
def test_wrong_times_are_refused(times: list[int]) -> None:
    with pytest.raises(ValidationError):
        make_method("pso", {"timesteps": times})


def test_a_recipe_of_more_steps_than_its_student_has_is_refused(tmp_path: Path) -> None:
    """A 1-step student in ``model.loras`` and four times; and times outside of the schedule."""
    (tmp_path / "student").mkdir()
    facts = Facts(sampling=student_record(SD_SCHEDULE, [399]))
    (tmp_path / "student" / "diffalign.json").write_text(facts.text())
    recipe = load_recipe("tiny/pso", [f"model.loras=[{{path: {tmp_path / 'student'}}}]"])
    model = SimpleNamespace(scheduler_config=SD_SCHEDULE)
    with pytest.raises(
        UserError, match=r"trains 4 steps, but the student .* was made for LCMScheduler, 1 steps? at 399"
    ):
        check_students(make_method("pso", {}), recipe, model)  # type: ignore[arg-type]
    check_students(make_method("pso", {"timesteps": [399]}), recipe, model)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="beyond the scheduler's range"):
        check_students(make_method("pso", {"timesteps": [1500]}), recipe, model)  # type: ignore[arg-type]
