"""DisBack: the path by degrading the teacher, which of its points gives the score when, none as DMD2 (sheet 14)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gauss import DENOISER, Net, Student, Teacher, World, posterior
from pydantic import ValidationError
from tiny import SD_SCHEDULE
from torch import Tensor
from world import batch_of, make_trainer, warm, weights

from diffalign import load_recipe, train
from diffalign.checkpoint import load_checkpoint
from diffalign.errors import UserError
from diffalign.methods import make_method
from diffalign.methods.distillation.disback import DisBack
from diffalign.publish import without_paths
from diffalign.run import Run


def disback(**options: Any) -> DisBack:
    return make_method("disback", {"guidance": 1.0, **options})  # type: ignore[return-value]


@pytest.fixture(scope="module")
def degraded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the first stage on the tiny model: a checkpoint a step."""
    folder = tmp_path_factory.mktemp("disback")
    prompts = folder / "prompts.txt"
    prompts.write_text("a red circle\na blue square\na green triangle\n")
    values = {"data.path": prompts, "data.cache_dir": folder / "cache", "output.dir": folder / "run"}
    run = train(load_recipe("tiny/disback-path", small(values)), progress=False)
    assert run.step == 2 and not (run.model / "scheduler").exists(), "a degraded teacher takes many steps"
    return run.dir


def small(values: dict[str, object]) -> list[str]:
    short = {"model.lora.rank": 2, "data.resolution": 32, "train.steps": 2, "train.batch": 2, "train.save_every": 1}
    quiet = {
        "validate.pairs": 0,
        "validate.images": 1,
        "validate.steps": 1,
        "output.trackers": "[]",
        "train.log_every": 1,
    }
    return [f"{key}={value}" for key, value in (short | quiet | values).items()]


# ---- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gan", [0.0, 0.1])
def test_without_a_path_it_is_dmd2(gan: float) -> None:
    shared = {"timesteps": [999, 499], "guidance": 3.0, "gan_weight": gan, "gan_width": 8, "critic_steps": 1}
    trainers = [make_trainer(make_method(name, shared)) for name in ("disback", "dmd2")]
    mine, theirs = (weights(warm(trainer, 2)) for trainer in trainers)
    assert all(map(torch.equal, mine, theirs))


def test_the_first_stage_denoises_what_the_teacher_makes_in_few_steps() -> None:
    method = disback(stage="degrade", timesteps=[999, 499])
    assert method.roles == ("student",) and method.sampling(SD_SCHEDULE) is None
    assert disback(timesteps=[999, 499]).sampling(SD_SCHEDULE).timesteps == (999, 499)
    trainer = warm(make_trainer(method, lr=0.05), 2)
    ctx, batch = trainer.ctx, batch_of(trainer, range(12))
    ctx.phase = "degrade"
    with torch.no_grad():
        loss = method.loss(ctx, batch, method.phases[0]).values
        sample = method.generate(ctx, batch)
        assert set(sample.steps) == {0, 1}
        x = ctx.model("base", sample.x_in, sample.t, sample.cond)
        torch.testing.assert_close(sample.x, ctx.denoiser.to_x0(x, sample.x_in, sample.t))
        t = method.times(ctx, batch, "score-time", [(0, 999)] * 12)
        noise = ctx.draw(batch, "score")[1]
        error = ctx.error("student", ctx.denoiser.add_noise(sample.x, noise, t), t, sample.cond, noise)
    torch.testing.assert_close(loss, error)


def test_the_teacher_moves_along_the_path() -> None:
    method = disback(every=10)
    method.path = (Path("a"), Path("b"), Path("c"))
    found = [method.teacher(step) for step in (0, 9, 10, 19, 20, 29, 30, 1000)]
    assert found == ["path-3", "path-3", "path-2", "path-2", "path-1", "path-1", "base", "base"]
    assert "from step 30 on the teacher is the base" in method.notes()[-1]
    assert disback().teacher(0) == "base" and "this is DMD2" in disback().notes()[-1]


def test_refusals(tmp_path: Path) -> None:
    for wrong in ({"path": "run"}, {"gan_weight": 0.1}, {"step_fake": True}, {"align": 0.02}):
        with pytest.raises(ValidationError, match=f"{next(iter(wrong))} is for stage=distill"):
            disback(stage="degrade", **wrong)
    with pytest.raises(UserError, match="is no run folder"):
        disback(path=str(tmp_path))


def test_a_path_of_another_kind_is_refused(degraded: Path, tmp_path: Path) -> None:
    other = tmp_path / "run"
    other.mkdir()
    text = (degraded / "recipe.yaml").read_text()
    (other / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match="has no checkpoints"):
        disback(path=str(other))
    (other / "recipe.yaml").write_text(text.replace("stage: degrade", "stage: distill"))
    with pytest.raises(UserError, match="a run of method 'disback', not of disback with stage=degrade"):
        disback(path=str(other))


# ---- a path from files -----------------------------------------------------------------------------------------------


def test_a_student_is_distilled_along_the_checkpoints(
    degraded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One point a step, the last first, and the base at the end; the points stay as they were trained."""
    asked, plain = [], DisBack.teacher
    monkeypatch.setattr(DisBack, "teacher", lambda self, step: asked.append(plain(self, step)) or asked[-1])
    assert len(Run.open(degraded).checkpoints) == 2
    values = {"data.path": degraded.parent / "prompts.txt", "data.cache_dir": degraded.parent / "cache"}
    values |= {"output.dir": tmp_path / "run", "method.path": degraded, "method.every": 1, "method.critic_steps": 1}
    recipe = load_recipe("tiny/disback", [*small(values), "train.steps=3", "train.keep=9"])
    run = train(recipe, progress=False)
    assert without_paths(recipe.dump())["method"]["path"] == "run", "what is published names no folder of this machine"
    assert (run.model / "scheduler").is_dir() and asked == ["path-2", "path-1", "base"]
    first, last = (load_checkpoint(folder)[0]["roles"] for folder in (run.checkpoints[0], run.checkpoints[-1]))
    assert set(first) == {"student", "fake", "path-1", "path-2"}
    for number, folder in enumerate(Run.open(degraded).checkpoints, 1):
        made = load_checkpoint(folder)[0]["roles"]["student"]
        for state in (first, last):
            found = {k.replace(f".path-{number}.", ".student."): v for k, v in state[f"path-{number}"].items()}
            assert made.keys() == found.keys() and all(torch.equal(made[k], found[k]) for k in made)
    with pytest.raises(UserError, match=r"other settings of model.storage or model.lora"):
        train(load_recipe(recipe, ["model.lora.alpha=7", f"output.dir={tmp_path / 'other'}"]), progress=False)


# ---- Gaussian worlds -------------------------------------------------------------------------------------------------


def on_path(points: list[Teacher], **options: Any) -> World:
    """A world whose path leads through these laws, from the teacher's on."""
    method = disback(every=10, normalise="none")
    method.path = tuple(Path(str(number)) for number, _ in enumerate(points))
    world = World(method, rows=4, **options)
    for role, network in zip(method.points, points, strict=True):
        world.roles.networks[role] = network
    return world


def test_a_student_follows_the_laws_of_the_path_to_the_teacher() -> None:
    world = on_path([Teacher(1.2, s=0.6), Teacher(0.4, s=0.3)])
    seen = []
    for step in (0, 10, 20):
        world.ctx.step = step
        (mean,), (std,) = world.descend(100, lr=0.3).reached()
        seen += [mean, std]
    assert seen == pytest.approx([0.4, 0.3, 1.2, 0.6, 1.5, 0.7], abs=0.02)


class Reached(Net):
    """The exact score of what a student makes in one step."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.law = [float(c) for c in student.moments()[0]], [float(c) for c in student.moments()[1]]

    def x0(self, x: Tensor, t: Tensor, flag: Tensor, step: Tensor) -> Tensor:
        alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in DENOISER._levels(t, t.device))
        return posterior(x, alpha.float(), sigma.float(), self.law[0][0], self.law[1][0])


def test_where_the_path_begins_at_the_students_law_nothing_moves_at_first() -> None:
    world = on_path([Teacher()])
    world.roles.networks["path-1"] = Reached(world.student)
    world.ctx.step = 0
    world.gradient()
    assert abs(float(world.student.b.grad)) < 1e-5 and abs(float(world.student.a.grad)) < 1e-5
    world.ctx.step = 10
    world.gradient()
    assert abs(float(world.student.b.grad)) > 0.1


def test_a_path_of_the_teacher_itself_is_dmd2() -> None:
    found = [on_path([Teacher(), Teacher()][:points]).descend(5).reached() for points in (0, 2)]
    assert found[0] == found[1]
