"""Online PSO, for preference and towards pictures: the online sheet's 2A, 2B, A.5, F and catalogue 21 to 23."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from test_online import bright, method
from tiny import SD_SCHEDULE
from torch import Tensor
from world import batch_of, make_trainer, rows_of, stirred

from diffalign.denoiser import Denoiser
from diffalign.facts import RENOISING
from diffalign.methods import make_method
from diffalign.methods.distillation.pso import pso_loss
from diffalign.trainer import Trainer

SD = Denoiser.from_config(SD_SCHEDULE)
TIMES = [999, 749, 499, 249]


def preferring(reward: Any = bright, **options: Any) -> Trainer:
    trainer = make_trainer(method("pso_online", **{"timesteps": TIMES, "share": 1.0, **options}))
    trainer.ctx.rewards = {"tiny-pickscore": reward}
    return trainer


def towards(**options: Any) -> Trainer:
    return make_trainer(make_method("pso_pictures", {"timesteps": TIMES, **options}))


def items(trainer: Trainer) -> Any:
    with torch.no_grad():
        return trainer.method.collect(trainer.ctx, rows_of(trainer))


def loss_of(trainer: Trainer, batch: Any) -> Any:
    return trainer.method.loss(trainer.ctx, batch, trainer.method.phases[0])


@pytest.mark.parametrize("sampler", ["ddim", "renoise"])
def test_the_samplers_own_steps_are_trained_but_for_the_last(sampler: str) -> None:
    """D 23; and the cost of sheet F: 8 passes to sample a pair, 12 to train it, without guidance."""
    trainer, passes = preferring(sampler=sampler), [0]
    record = trainer.method.sampling(SD_SCHEDULE)
    assert record is not None and list(record.timesteps or ()) == TIMES and not record.guided
    assert (record.scheduler in RENOISING) == (sampler == "renoise") and not record.deterministic
    trainer.roles.unet.register_forward_pre_hook(lambda module, args: passes.append(passes.pop() + len(args[0])))
    found = items(trainer)
    assert passes[0] == 4 * 8 and len(found) == 4 * 3
    assert sorted(set(found.columns["t"].tolist()), reverse=True) == TIMES[:3]
    assert not bool((found.latents["x_t_won"] == found.latents["x_t_lost"]).any()), "each from a noise of its own"
    loss = loss_of(trainer, found.take(range(len(found))))
    assert passes[0] == 4 * (8 + 12)
    torch.testing.assert_close(loss.values, torch.full_like(loss.values, math.log(2)))
    if sampler == "renoise":  # DMD2's: the picture that it believes, and all of a noise of its own
        first = found.columns["t"] == 999
        spread = (found.latents["x_s_won"] - found.latents["x_s_lost"])[first].flatten(1).std(1)
        assert float(spread.min()) > float(SD.sigma(749))


def test_equal_samples_teach_nothing() -> None:
    """D 21: no winner, no weight."""
    trainer = preferring(lambda images, prompts, t=None: torch.ones(len(images)))
    assert float(items(trainer).weight.abs().max()) == 0


def test_pictures_are_compared_with_the_students_own_at_its_times() -> None:
    trainer = towards(kept=2)
    found = items(trainer)
    assert len(found) == 8 and set(found.columns["t"].tolist()) <= set(TIMES)
    for row in range(4):
        mine = [i for i, r in enumerate(found.row) if r == row]
        assert len({int(found.columns["t"][i]) for i in mine}) == 2, "two of its times"
        assert torch.equal(found.latents["reference"][mine[0]], found.latents["reference"][mine[1]])
    batch = found.take(range(8))
    seen: list[tuple[Tensor, Tensor]] = []
    error = trainer.ctx.error
    trainer.ctx.error = lambda role, x, t, *rest: seen.append((x, t)) or error(role, x, t, *rest)  # type: ignore
    loss = loss_of(trainer, batch)
    torch.testing.assert_close(loss.values, torch.full((8,), math.log(2)), rtol=0, atol=1e-5)
    x, t = seen[0]
    clean = torch.cat([batch.latents["image"], batch.latents["reference"]])
    noise = ((x - SD.alpha(t) * clean) / SD.sigma(t)).chunk(2)
    torch.testing.assert_close(*noise, rtol=1e-3, atol=1e-3)
    assert torch.equal(*t.chunk(2)) and len(seen) == 2


def test_the_objective_is_offline_psos() -> None:
    """Of the same four errors; its hinge calls no base, and the release's defaults are refused here too."""
    trainer = stirred(towards(beta=50.0))
    batch = batch_of(trainer)
    with torch.no_grad():
        student, base = (trainer.method.errors(trainer.ctx, role, batch) for role in ("student", "base"))  # type: ignore
        found = loss_of(trainer, batch)
    torch.testing.assert_close(found.values, pso_loss(*student, *base, 50.0)[0])
    torch.testing.assert_close(found.metrics["chosen_error"], student[0])
    t, noise = batch.columns["t"], trainer.ctx.draw(batch)[1]
    for name, expected in (("image", student[0]), ("reference", student[1])):
        x_t = SD.add_noise(batch.latents[name], noise, t)
        with torch.no_grad():
            error = trainer.ctx.error("student", x_t, t, batch.cond["prompt"], noise)
        torch.testing.assert_close(error, expected, rtol=1e-4, atol=1e-5)
    assert not make_method("pso_pictures", {"loss": "hinge"}).needs.reference
    with pytest.raises(ValidationError, match="cancel out"):
        make_method("pso_pictures", {"loss": "hinge", "beta": 5.0, "negative": 0.1, "prior": 0.5})
    with pytest.raises(ValidationError, match="kept=5 of 4 timesteps"):
        make_method("pso_pictures", {"timesteps": TIMES, "kept": 5})


def test_training_leaves_its_own_samples_for_the_pictures() -> None:
    trainer = towards(beta=100.0)
    batch = batch_of(trainer)
    for _ in range(3):
        trainer.roles.train_only(("student",))
        loss_of(trainer, batch).values.mean().backward()
        trainer.optimizers["student"].step()
        trainer.optimizers["student"].zero_grad()
    with torch.no_grad():
        assert float(loss_of(trainer, batch).metrics["logit"].mean()) > 0
