"""DRaFT and AlignProp: identities of the sheet (online, 9 and catalogue 48), the guard, and what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import SD_SCHEDULE
from torch import Tensor
from world import Rows, batch_of, make_trainer, small_clip, stirred, warm

from diffalign.errors import UserError
from diffalign.facts import Facts, student_record
from diffalign.guards import Guards
from diffalign.methods.online.draft import DRaFT, DRaFTConfig
from diffalign.recipe import GuardsRecipe, load_recipe
from diffalign.students import check_students
from diffalign.trainer import Trainer

REWARD = f"pickscore={small_clip()}"


def make(judge: Any = None, **settings: Any) -> Trainer:
    method = DRaFT(DRaFTConfig(**{"reward": REWARD, "steps": 4, "guidance": 1.0, **settings}))
    trainer = make_trainer(method, rows=Rows(60, kind="prompt"))
    trainer.ctx.decoder = lambda latents: latents[:, :3]
    if judge:
        trainer.ctx.rewards = {"pickscore": judge}
    return stirred(trainer)


def field(images: Tensor, prompts: Any, t: Tensor | None = None) -> Tensor:
    """A reward whose gradient is the same everywhere."""
    return (images * torch.linspace(-1, 1, images[0].numel()).view(images[0].shape)).mean((1, 2, 3))


def gradient(trainer: Trainer) -> Tensor:
    trainer.roles.train_only(("student",))
    trainer.method.loss(trainer.ctx, batch_of(trainer), trainer.method.phases[0]).values.sum().backward()
    return torch.cat([p.grad.flatten() for p in trainer.roles.parameters("student") if p.grad is not None])


def chain(trainer: Trainer, learnt: int, only: Any = slice(None)) -> Tensor:
    """The same by a plain loop over the steps; ``only``: of these samples."""
    method, ctx, batch = trainer.method, trainer.ctx, batch_of(trainer)
    policy = method.policy(ctx.denoiser)  # type: ignore[attr-defined]
    trainer.roles.train_only(("student",))
    x = ctx.noise("start", batch.ids, batch.visits, (4, 8, 8))
    for k, (time, end) in enumerate(zip(policy.times, policy.ends, strict=True)):
        t, s = torch.full((len(x),), time), torch.full((len(x),), end)
        x = ctx.denoiser.ddim_step(ctx.model("student", x, t, batch.cond["prompt"]), x, t, s).sample
        x = x.detach() if k < len(policy) - learnt else x
    (-0.01 * field(x[:, :3], None))[only].sum().backward()
    return torch.cat([p.grad.flatten() for p in trainer.roles.parameters("student") if p.grad is not None])


def off(found: Tensor, expected: Tensor) -> float:
    """Largest difference in parts of the largest number: the last step's gradient is far below any fixed tolerance."""
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("through", [1, 3, 4])
def test_the_gradient_goes_through_just_the_last_steps(through: int) -> None:
    found = gradient(make(field, through=through))
    assert off(found, chain(make(field), through)) < 1e-3 < 1e-2 < off(found, chain(make(field), 2))


def test_samples_of_different_depths_stop_each_at_its_own() -> None:
    trainer = make(field)
    trainer.method.depths = lambda ctx, batch: [1, 3, 4, 2]  # type: ignore[attr-defined]
    parts = [chain(make(field), depth, i) for i, depth in enumerate((1, 3, 4, 2))]
    assert off(gradient(trainer), torch.stack(parts).sum(0)) < 1e-3


def test_a_constant_reward_teaches_nothing() -> None:
    assert not bool(gradient(make(lambda images, prompts, t=None: 0 * images.sum((1, 2, 3)) + 7.0, through=2)).any())


def test_each_sample_draws_its_own_depth() -> None:
    trainer = make(field, steps=50, through=8, spread=5.0)
    batch = batch_of(trainer, range(60))
    depths = trainer.method.depths(trainer.ctx, batch)  # type: ignore[attr-defined]
    assert 6 < sum(depths) / 60 < 10 and len(Counter(depths)) > 8 and min(depths) >= 1
    fixed = make(field, steps=50, through=8).method
    assert set(fixed.depths(trainer.ctx, batch)) == {8}  # type: ignore[attr-defined]


def test_the_reward_rises_and_the_anchor_holds() -> None:
    def after(anchor: float) -> tuple[float, float]:
        trainer = make(field, through=2, anchor=anchor, coefficient=1.0)
        warm(trainer, 4)
        with torch.no_grad():
            found = trainer.method.loss(trainer.ctx, batch_of(trainer), trainer.method.phases[0])
            apart = trainer.method.sample(trainer.ctx, batch_of(trainer))[1]  # type: ignore[attr-defined]
        return float(found.metrics["reward"].mean()), float(apart.mean())

    with torch.no_grad():
        start = make(field, through=2)
        before = float(start.method.loss(start.ctx, batch_of(start), start.method.phases[0]).metrics["reward"].mean())
    free, held = after(1e-9), after(100.0)
    assert free[0] > before and free[1] > held[1]


def test_a_guard_looks_on_and_tells_of_hacking() -> None:
    trainer = make(guard=f"clip={small_clip()}")
    assert trainer.method.rewards() == f"{REWARD},clip={small_clip()}"
    with torch.no_grad():
        found = trainer.method.loss(trainer.ctx, batch_of(trainer), trainer.method.phases[0])
    assert {"reward", "guard_score"} <= found.metrics.keys() and not trainer.method.notes()
    torch.testing.assert_close(found.values, -0.01 * found.metrics["reward"])
    usual = [(20.0, 30.0), (20.2, 30.2), (20.1, 29.9), (20.3, 30.1), (20.2, 29.8)]
    for reward, guard, fires in ((22.0, 28.9, True), (22.0, 29.6, False), (19.0, 28.0, False)):
        guards = Guards(GuardsRecipe(hacking="stop"))
        for step in (*usual, (reward, guard)):
            alarms = guards.logged({"reward": step[0], "guard_score": step[1]})
        assert [(a.guard, a.policy) for a in alarms] == ([("hacking", "stop")] if fires else [])


def test_a_few_step_student_is_refused(tmp_path: Path) -> None:
    """It would be sampled in many steps, at times that it never saw."""
    record = student_record(SD_SCHEDULE, [999, 749, 499, 249])
    (tmp_path / "diffalign.json").write_text(Facts(sampling=record).text())
    model: Any = SimpleNamespace(scheduler_config=SD_SCHEDULE)
    with pytest.raises(UserError, match=r"'draft' samples in many steps, but the student .*; take a many-step model"):
        check_students(DRaFT(DRaFTConfig()), load_recipe("tiny/draft", [f"model.start={tmp_path}"]), model)
    check_students(DRaFT(DRaFTConfig()), load_recipe("tiny/draft"), model)


def test_what_cannot_be_climbed_is_refused() -> None:
    denoiser = make(field).ctx.denoiser
    with pytest.raises(UserError, match="more than the 4 steps"):
        DRaFT(DRaFTConfig(steps=4, through=5)).check(denoiser)
    with pytest.raises(UserError, match="oracle"):
        make_trainer(DRaFT(DRaFTConfig(reward="oracle")))
    assert DRaFT(DRaFTConfig()).notes()
