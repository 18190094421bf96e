"""What each method of DMD's family adds: decoupled terms, reward, teacher pairs; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gauss import DENOISER, World
from PIL import Image
from pydantic import ValidationError
from tiny import SD_SCHEDULE
from torch import Tensor
from world import Rows, batch_of, make_trainer, warm

from diffalign.data.batch import Batch, Cond
from diffalign.data.teacher import teacher_noise, teacher_pairs
from diffalign.errors import UserError
from diffalign.methods import make_method
from diffalign.methods.distillation.diff_instruct import implicit_matching
from diffalign.methods.distillation.sid import sid_loss

CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- Decoupled DMD --------------------------------------------------------------------------------------------------


def directions(name: str, **options: Any) -> Tensor:
    trainer = make_trainer(make_method(name, {"timesteps": [999, 499], **options}))
    trainer.ctx.phase = "student"
    with torch.no_grad():
        sample = trainer.method.generate(trainer.ctx, batch_of(trainer))
        return trainer.method.direction(trainer.ctx, batch_of(trainer), sample)[0]


def test_tied_terms_are_dmd2() -> None:
    parity = {"schedule": "coupled", "divisor": "shared", "relative_floor": 0.0}
    ours, theirs = directions("decoupled_dmd", **parity), directions("dmd2")
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=2e-4)
    apart = directions("decoupled_dmd", **{**parity, "schedule": "decoupled"})
    assert float((apart - theirs).abs().max()) > 0.05
    half = directions("decoupled_dmd", **{**parity, "schedule": "constrained"})
    assert float((half - theirs).abs().max()) > 1e-3  # those that stop at 499 look at cleaner levels


def test_each_term_has_its_own_divisor() -> None:
    """g = (y_fake - y_c) / n1 - (w - 1) (y_c - y_u) / n2 at two noisy points, both divisors above a share of |x|."""
    for floor in (0.0, 2.0):
        made = World(make_method("decoupled_dmd", {"guidance": 3.0, "relative_floor": floor}), "learned", m_u=0.5)
        made.fake.mean.data += 0.4
        ctx, batch, method = made.ctx, made.batch(0), made.method
        ctx.phase = "student"
        with torch.no_grad():
            sample = method.generate(ctx, batch)
            found, _ = method.direction(ctx, batch, sample)
            x = sample.x
            x_t, t = method.noised(ctx, batch, x, method.time_window(ctx, sample))
            y_cond = method.real_x0(ctx, x_t, t, sample)
            matching = method.fake_x0(ctx, x_t, t, sample) - y_cond
            x_t, t = method.noised(ctx, batch, x, method.augment_window(ctx, sample), "augment")
            cond, uncond = method.teacher(ctx, x_t, t, sample)
        one, two = ((x - y).abs().mean((1, 2, 3), keepdim=True) for y in (y_cond, cond))
        assert float((one - two).abs().min()) > 0
        least = floor * x.abs().mean((1, 2, 3), keepdim=True)
        expected = matching / one.maximum(least) - 2 * (cond - uncond) / two.maximum(least)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert bool((one < least).any()) == (floor > 0)


def test_without_guidance_nothing_is_augmented() -> None:
    hybrid, decoupled = (directions("decoupled_dmd", guidance=1.0, schedule=s) for s in ("hybrid", "decoupled"))
    assert torch.equal(hybrid, decoupled)
    world = World(make_method("decoupled_dmd", {"timesteps": [999], "guidance": 6.0}), "teacher")  # cond = uncond
    world.gradient()
    assert not bool(world.student.a.grad.any()) and not bool(world.student.b.grad.any())


# ---- Diff-Instruct* -------------------------------------------------------------------------------------------------


def test_implicit_matching_with_the_square_is_sid_at_alpha_one() -> None:
    x, y_fake, y_real = (normal(3, 4, 8, 8, seed=s) for s in range(3))
    ours = implicit_matching(x, y_fake, y_real, None)
    torch.testing.assert_close(ours, sid_loss(x, y_fake, y_real, 1.0, None)[0])
    far = implicit_matching(x, y_fake, y_real, 1e4) * 1e4  # a constant far above the difference: the square again
    torch.testing.assert_close(far, ours, rtol=1e-4, atol=1e-5)
    # the slope of the distance is bounded by 1, however far apart the scores are
    bound = (y_fake + 1e6 - x).square().mean((1, 2, 3)).sqrt()
    assert bool((implicit_matching(x, y_fake + 1e6, y_real, 1e-3).abs() <= 1.001 * bound).all())
    weight = torch.tensor([2.0, 1.0, 0.5])[:, None, None, None]
    torch.testing.assert_close(implicit_matching(x, y_fake, y_real, None, weight), ours * torch.tensor([4, 1, 0.25]))
    size = (y_fake - y_real).square().mean((1, 2, 3)).add(0.09).sqrt()  # d' = d / sqrt(mean d^2 + c^2)
    torch.testing.assert_close(implicit_matching(x, y_fake, y_real, 0.3), ours / size)


def test_gradients_run_through_every_factor() -> None:
    """By finite differences, with scores that bend with x: neither d' nor a score is held still."""
    x = normal(2, 1, 2, 2).double().requires_grad_()
    for constant in (None, 0.3):
        assert torch.autograd.gradcheck(lambda x, c=constant: implicit_matching(x, x.sin(), 0.7 * x**2, c, 1.5), (x,))
    assert torch.autograd.gradcheck(lambda x: sid_loss(x, x.sin(), 0.7 * x**2, 1.2, None)[0], (x,))


def test_differences_of_scores_are_those_of_x0_by_alpha_over_sigma_squared() -> None:
    """At one time the divergences in either space differ by that weight: twice for the square, once for huber's."""
    values = {}
    for divergence in ("fisher", "huber"):
        for space in ("x0", "score"):
            options = {"divergence": divergence, "space": space, "guidance": 2.0, "huber": 1e-9, "timesteps": [999]}
            made = World(make_method("diff_instruct", {**options, "time_range": [0.5, 0.5]}), "learned", m_u=0.5)
            made.fake.mean.data += 0.4
            values[divergence, space] = made.loss().metrics["divergence"]
    weight = float(DENOISER.alpha(500) / DENOISER.sigma(500) ** 2)
    torch.testing.assert_close(values["fisher", "score"], weight**2 * values["fisher", "x0"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(values["huber", "score"], weight * values["huber", "x0"], rtol=1e-4, atol=1e-6)


def test_reward_alone_where_the_scores_agree() -> None:
    """f = r: only the reward's gradient is left; without a reward Diff-Instruct++ is DMD undivided."""
    options = {
        "timesteps": [399],
        "guidance": 1.0,
        "divergence": "kl",
        "reward": "tiny-pickscore",
        "reward_weight": 2.0,
    }
    trainer = make_trainer(make_method("diff_instruct", options))
    ctx, batch = trainer.ctx, batch_of(trainer)
    ctx.phase = "student"
    with torch.no_grad():
        loss = trainer.method.loss(ctx, batch, trainer.method.phases[0])
        x = trainer.method.generate(ctx, batch).x
    x.requires_grad_()
    reward = ctx.reward("tiny-pickscore", ctx.decode(x), batch.prompts)
    (slope,) = torch.autograd.grad(reward.sum(), x)
    reward = reward.detach()
    torch.testing.assert_close(loss.values, -2.0 * reward, rtol=1e-4, atol=1e-4)
    trainer.roles.train_only(("student",))
    sample = trainer.method.generate(ctx, batch)
    sample.x.retain_grad()
    trainer.method.student_loss(ctx, batch, sample).values.sum().backward()
    torch.testing.assert_close(sample.x.grad, -2 * slope, rtol=1e-3, atol=1e-6)
    assert float(slope.abs().max()) > 1e-5
    torch.testing.assert_close(loss.metrics["reward/tiny-pickscore"], reward, rtol=1e-4, atol=1e-4)
    assert trainer.method.needs.decode and trainer.method.needs.reward
    assert torch.equal(
        directions("diff_instruct", divergence="kl", guidance=3.0), directions("dmd2", guidance=3.0, normalise="none")
    )


# ---- DMD's regression -----------------------------------------------------------------------------------------------


def test_teacher_pairs_are_noise_and_what_the_teacher_makes_of_it(tmp_path: Path) -> None:
    """Through the sampler: the noise that a row's id says is the one that its picture came from."""
    from diffalign.data.readers import read_images
    from diffalign.eval.prompts import Prompt
    from diffalign.families import load_model
    from diffalign.pipelines.sample import SampleSpec
    from diffalign.recipe import ModelRecipe, data_recipe

    prompts = [Prompt("a", "a red circle"), Prompt("b|1", "a blue square")]
    spec = SampleSpec("tiny-sd", steps=3, guidance=1.0, seed=(0, 7), per_prompt=2, scheduler="ddim")
    table = teacher_pairs(spec, prompts, tmp_path, progress=False)
    rows = read_images(data_recipe(str(tmp_path), [])).rows
    assert [row.id for row in rows][3:5] == ["teacher|7|1|a", "teacher|0|0|b|1"] and len(rows) == 8
    model = load_model(ModelRecipe(path="tiny-sd"), CPU, torch.float32)
    ids = ["teacher|7|1|a", "teacher|0|1|b|1"]
    noise = teacher_noise(ids, (4, 8, 8))
    cond = model.encode_prompts(["a red circle", "a blue square"])
    denoiser, config = model.denoiser(), model.scheduler_config
    times = denoiser.timesteps(3, config["timestep_spacing"], config["steps_offset"])
    with torch.no_grad():
        x = denoiser.sample(lambda x, t: model.call_unet(model.unet, x, t, cond), noise, times)
        pictures = (model.decode(x) / 2 + 0.5) * 255
    listed = {row["id"]: row["file_name"] for row in map(json.loads, table.read_text().splitlines())}
    for name, picture in zip(ids, pictures, strict=True):
        seen = np.asarray(Image.open(tmp_path / listed[name]), dtype=np.float32).transpose(2, 0, 1)
        assert np.abs(seen - picture.numpy()).mean() < 2
    with pytest.raises(UserError, match="--scheduler lcm is no ODE"):
        teacher_pairs(SampleSpec("tiny-sd", scheduler="lcm"), prompts, tmp_path / "other")


class TeacherRows(Rows):
    def __init__(self) -> None:
        super().__init__(kind="image")
        self.ids = [f"teacher|0|0|{i}" for i in range(len(self.ids))]


@pytest.mark.parametrize("regression", ["latent", "features"])
def test_regression_pulls_the_student_to_the_teachers_pictures(regression: str) -> None:
    method = make_method("dmd", {"guidance": 1.0, "regression": regression, "regression_weight": 0.5})
    trainer = make_trainer(method, rows=TeacherRows(), lr=3e-3)
    ctx, batch = trainer.ctx, batch_of(trainer)
    ctx.phase = "student"
    with torch.no_grad():
        sample = method.generate(ctx, batch)
        noise = teacher_noise(batch.ids, (4, 8, 8))
        batch.latents["image"] = method.call_student(ctx, noise, sample.t, sample.cond)[0]
        # DM is zero where fake = teacher: pure regression, zero where the student makes the pairs itself
        loss = method.loss(ctx, batch, method.phases[0])
        assert float(loss.metrics["regression"].abs().max()) < 1e-5
        first = method.loss(ctx, batch_of(trainer), method.phases[0])
    torch.testing.assert_close(first.values, 0.5 * first.metrics["regression"], atol=1e-4, rtol=1e-3)
    warm(trainer, 6)
    with torch.no_grad():
        ctx.phase = "student"
        later = method.loss(ctx, batch_of(trainer), method.phases[0])
    assert float(later.metrics["regression"].mean()) < float(first.metrics["regression"].mean())


def test_rows_that_are_no_teacher_pairs_are_refused() -> None:
    trainer = make_trainer(make_method("dmd", {}), rows=Rows(kind="image"))
    with pytest.raises(UserError, match="diffalign pairs teacher") as caught:
        trainer.method.loss(trainer.ctx, batch_of(trainer), trainer.method.phases[0])
    assert "\n" not in str(caught.value)


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_times_that_do_not_fall_or_lie_outside_are_refused() -> None:
    for times in ([499, 999], [999, 999], [-1], []):
        with pytest.raises(ValidationError):
            make_method("dmd2", {"timesteps": times})
    with pytest.raises(ValidationError, match="must not be above"):
        make_method("dmd2", {"time_range": [0.9, 0.1]})
    with pytest.raises(ValidationError, match="at most 1"):
        make_method("dmd", {"timesteps": [999, 499]})
    with pytest.raises(UserError, match="1000"):
        make_method("dmd2", {"timesteps": [1000]}).sampling(SD_SCHEDULE)
    record = make_method("dmd2", {}).sampling(SD_SCHEDULE)
    assert record.timesteps == (999, 749, 499, 249) and not record.guided and record.scheduler == "LCMScheduler"
    assert make_method("diff_instruct", {"start": "sigma", "timesteps": [625]}).sampling(
        SD_SCHEDULE
    ).scale == pytest.approx(0.928564, abs=1e-6)


def test_data_of_another_kind_are_refused_with_the_reason(tmp_path: Path) -> None:
    from diffalign.recipe import load_recipe
    from diffalign.setup import make_method_of, rows_for

    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    for name, options, reason in (
        ("dmd2", ["method.gan_weight=0.1"], "method.gan_weight=0 needs prompts alone"),
        ("dmd2", ["method.rollout=data"], "renoise and ddim need prompts alone"),
        ("f_distill", [], "learns from real captioned pictures"),
        ("dmd", [], "diffalign pairs teacher"),
    ):
        recipe = load_recipe(f"tiny/{name}", [f"data.path={tmp_path}/prompts.txt", *options])
        with pytest.raises(UserError, match=reason) as caught:
            rows_for(recipe, make_method_of(recipe))
        assert "\n" not in str(caught.value)


def test_one_fake_score_for_several_steps_is_noted() -> None:
    assert "step_fake" in make_method("dmd2", {}).notes()[0]
    assert not make_method("dmd2", {"step_fake": True}).notes() and not make_method("dmd2", {"timesteps": [9]}).notes()


def test_every_network_is_told_the_sizes_of_sampling() -> None:
    """Whatever crop the real picture of a row is, SDXL hears of a whole one of the latents' size."""
    pooled, sizes = (
        normal(2, 6),
        torch.tensor([[700.0, 900.0, 30.0, 0.0, 64.0, 96.0], [64.0, 64.0, 0.0, 0.0, 64.0, 96.0]]),
    )
    cond = Cond(normal(2, 5, 16), {"text_embeds": pooled})
    batch = Batch(("a", "b"), (0, 0), {}, {"prompt": cond}, {}, torch.ones(2), sizes={"image": sizes})
    told = make_method("dmd2", {}).condition(batch)
    assert told.added["time_ids"].tolist() == [[64, 96, 0, 0, 64, 96]] * 2
    assert torch.equal(told.added["text_embeds"], pooled) and torch.equal(told.embeds, cond.embeds)
    batch.cond["prompt"] = Cond(cond.embeds)  # SD1.5 takes none
    assert make_method("dmd2", {}).condition(batch).added == {}
