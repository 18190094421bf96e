"""Segments (PCM, TSCD): edges, landings, the GAN on them, stages that go on from one another (sheet 10 and 27)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gauss import DENOISER
from pydantic import ValidationError
from test_consistency import Exact, world
from tiny import SD_SCHEDULE
from torch import Tensor
from world import batch_of, make_trainer, stirred

from diffalign import load_recipe, run, train
from diffalign.errors import UserError
from diffalign.facts import recorded
from diffalign.methods import make_method
from diffalign.methods.consistency import make_grid
from diffalign.methods.segmented import Segmented, hinge_critic_loss
from diffalign.roles import Roles

PLAIN = {"guidance": [1.0, 1.0], "gan_weight": 0.0, "loss": "mse"}


def pcm(**options: Any) -> Segmented[Any]:
    return make_method("pcm", {**PLAIN, **options})  # type: ignore[return-value]


def tscd(**options: Any) -> Segmented[Any]:
    return make_method("tscd", {"guidance": [1.0, 1.0], **options})  # type: ignore[return-value]


# ---- edges ----------------------------------------------------------------------------------------------------------


def test_edges_are_the_times_of_trailing_steps() -> None:
    listed = {n: tscd(segments=n).edges(SD_SCHEDULE) for n in (1, 2, 4, 8)}
    assert listed[1] == (999,) and listed[2] == (999, 499) and listed[4] == (999, 749, 499, 249)
    assert listed[8] == (999, 874, 749, 624, 499, 374, 249, 124)
    for n in (2, 4, 8):
        assert set(listed[n // 2]) < set(listed[n]), "a stage's edges are edges of the one before"
        assert listed[n] == tuple(DENOISER.timesteps(n, "trailing").tolist())


@pytest.mark.parametrize(("solver", "segments"), [(50, 4), (40, 4), (50, 8), (50, 1), (50, 50)])
def test_no_step_of_the_solver_crosses_an_edge(solver: int, segments: int) -> None:
    grid = make_grid(1000, solver, segments)
    tops = [1000 * (j + 1) // segments - 1 for j in range(segments)]
    assert set(tops) <= set(grid.times) and set(range(1000 // solver - 1, 1000, 1000 // solver)) <= set(grid.times)
    for t, before, end, top in zip(grid.times, grid.before, grid.ends, grid.tops, strict=True):
        assert end <= before < t <= top and top in tops and end in (0, *tops)
        assert top - end in (1000 // segments, 1000 // segments - 1), "the lowest segment ends at time 0"
    assert (grid.ends == grid.before) == (segments == 50)


def test_segments_must_divide_the_schedule() -> None:
    with pytest.raises(UserError, match=r"segments 3 does not divide the schedule's 1000 times; .* 2, 4"):
        pcm(segments=3).check(DENOISER)
    pcm(segments=8).check(DENOISER)
    with pytest.raises(ValidationError, match="must fall"):
        tscd(timesteps=[499, 999])


# ---- landings -------------------------------------------------------------------------------------------------------


def test_at_its_edge_a_jump_is_no_jump() -> None:
    made = world(pcm())
    point = made.method.point(made.ctx, made.batch(0))
    output = torch.randn(point.x_t.shape)
    landed = made.method.reach(made.ctx, output, point.x_t, point.end, point)
    torch.testing.assert_close(landed, point.x_t, rtol=1e-4, atol=1e-4)


def test_one_segment_is_lcm_but_for_where_it_lands() -> None:
    """The same points and the same targets' inputs; DDIM to the cleanest level in the place of LCM's boundary."""
    whole, theirs = world(pcm(segments=1)), world(make_method("lcm", {"guidance": [1.0, 1.0]}))
    whole.ctx.phase = theirs.ctx.phase = "student"
    a, b = (made.method.point(made.ctx, made.batch(0)) for made in (whole, theirs))
    assert torch.equal(a.x_t, b.x_t) and torch.equal(a.before, b.before) and torch.equal(a.end, b.end)
    assert torch.equal(whole.method.solve(whole.ctx, a), theirs.method.solve(theirs.ctx, b))
    output = torch.randn(a.x_t.shape)
    x0, eps = (f(output, a.x_t, a.t) for f in (DENOISER.to_x0, DENOISER.to_eps))
    torch.testing.assert_close(whole.method.reach(whole.ctx, output, a.x_t, a.t, a), DENOISER.add_noise(x0, eps, 0))


def test_as_many_segments_as_steps_is_a_step_of_the_teacher() -> None:
    made = world(tscd(segments=50, guidance=[2.0, 4.0]), m_u=0.5)
    made.ctx.phase = "student"
    point = made.method.point(made.ctx, made.batch(0))
    steps = made.method.solve(made.ctx, point)
    torch.testing.assert_close(made.method.target(made.ctx, point), steps, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("segments", [1, 4])
def test_the_exact_map_has_no_loss_but_the_solvers(segments: int) -> None:
    method = pcm(segments=segments, solver_steps=250)
    exact = float(world(method, Exact(method), rows=16).loss().metrics["consistency_error"].mean())
    far = float(world(method, rows=16).loss().metrics["consistency_error"].mean())
    assert exact < 1e-6 and far > 20 * exact


def test_the_learned_jumps_follow_the_teacher() -> None:
    """Drawn as recorded, from edge to edge, the student is where the teacher's own steps are."""
    made = world(pcm(segments=2, solver_steps=4), rows=20)
    made.descend(500, lr=1.0)
    x = torch.linspace(-1, 1, 256).reshape(1, 1, 16, 16)
    cond = made.batch(0).cond["prompt"].take([0])
    with torch.no_grad():
        drawn = DENOISER.sample(lambda x, t: made.student(x, t, cond), x, torch.tensor([999, 499]), last=0)
        chain = DENOISER.sample(lambda x, t: made.teacher(x, t, cond), x, torch.tensor([999, 749, 499, 249]), last=0)
    torch.testing.assert_close(drawn, chain, rtol=0, atol=0.02)


# ---- the GAN --------------------------------------------------------------------------------------------------------


def test_hinge() -> None:
    zero, far = torch.zeros(2), torch.full((2,), 5.0)
    assert hinge_critic_loss(zero, zero).tolist() == [2.0, 2.0] and not bool(hinge_critic_loss(far, -far).any())
    assert hinge_critic_loss(-far, far).tolist() == [12.0, 12.0]


def test_the_head_sees_landings_noised_within_their_segment() -> None:
    """At the schedule's own level of a time between the segment's end and its top."""
    trainer = make_trainer(pcm(gan_weight=0.1, gan_width=8))
    method, ctx = trainer.method, trainer.ctx
    ctx.phase, batch = "critic", batch_of(trainer, range(12))
    point = method.point(ctx, batch)
    x_t, t = method.shown(ctx, batch, torch.ones_like(point.x_t), point)
    for at, (end, top) in zip(t.tolist(), point.spans, strict=True):
        assert end <= at <= top
    alpha, end = DENOISER.alpha(t), point.end
    noise = ctx.draw(batch, "gan")[1]
    ratio = alpha / DENOISER.alpha(end)
    spread = (DENOISER.sigma(t) ** 2 - (ratio * DENOISER.sigma(end)) ** 2).sqrt()
    torch.testing.assert_close(x_t, ratio + spread * noise, rtol=1e-4, atol=1e-4)


def test_the_gan_begins_as_nothing_and_then_moves_the_student() -> None:
    """A head of zeros: 2 for the critic and no pull; real is the target's landing, fake the student's."""
    trainer = make_trainer(pcm(gan_weight=0.5, gan_width=8))
    method, ctx, batch = trainer.method, trainer.ctx, batch_of(trainer)
    student, critic = method.phases
    trainer.roles.train_only(("student",))
    ctx.phase = "critic"
    assert method.loss(ctx, batch, critic).values.tolist() == pytest.approx([2.0] * 4)
    ctx.phase = "student"
    found = method.loss(ctx, batch, student)
    assert not bool(found.metrics["gan"].any())
    torch.nn.init.normal_(ctx.roles.modules["head"].last.weight, std=0.1)
    moved = method.loss(ctx, batch, student)
    torch.testing.assert_close(moved.values - found.values, moved.metrics["gan"], rtol=1e-3, atol=1e-5)
    _, point, reached, _ = method.consistency(ctx, batch)
    torch.testing.assert_close(moved.metrics["gan"], -0.5 * method.judge(ctx, batch, reached, point))
    moved.metrics["gan"].sum().backward()
    assert any(bool(p.grad is not None and p.grad.any()) for p in trainer.roles.parameters("student"))
    assert all(p.grad is None for p in trainer.roles.parameters("head"))
    ctx.phase = "critic"
    seen = method.loss(ctx, batch, critic).metrics
    with torch.no_grad():
        point = method.point(ctx, batch)
        for name, landed in (("gan_real", method.target(ctx, point)), ("gan_fake", method.predict(ctx, point)[0])):
            torch.testing.assert_close(seen[name], method.judge(ctx, batch, landed, point))
    assert float((seen["gan_real"] - seen["gan_fake"]).abs().max()) > 1e-6


# ---- records and stages ---------------------------------------------------------------------------------------------


def test_what_is_recorded() -> None:
    four = pcm().sampling(SD_SCHEDULE)
    assert four is not None and four.deterministic and four.timesteps == (999, 749, 499, 249) and four.guidance == 1
    eight, one = tscd().sampling(SD_SCHEDULE), tscd(segments=1, timesteps=[800]).sampling(SD_SCHEDULE)
    assert eight is not None and one is not None
    assert eight.deterministic and eight.steps == 8
    assert not one.deterministic and one.timesteps == (800,), "one segment: a consistency model"


def test_human_feedback_is_on_the_students_x0() -> None:
    """Beside the distance: minus the score, or what it lacks to the margin; its gradient is the student's."""
    options = {"segments": 8, "guidance": [1.0, 1.0], "reward": "tiny-pickscore", "reward_weight": 0.5}
    trainer = stirred(make_trainer(tscd(**options)))
    ctx, batch, phase = trainer.ctx, batch_of(trainer), trainer.method.phases[0]
    ctx.phase, decode = "student", ctx.decoder
    trainer.roles.train_only(("student",))
    seen: list[Tensor] = []

    def decoder(latents: Tensor) -> Tensor:
        assert decode is not None
        seen.append(latents)
        return decode(latents)

    ctx.decoder = decoder
    found = trainer.method.loss(ctx, batch, phase)
    plain, point, reached, _ = trainer.method.consistency(ctx, batch)  # type: ignore[attr-defined]
    score = found.metrics["reward/tiny-pickscore"]
    torch.testing.assert_close(found.values, plain.values - 0.5 * score)
    # the jump to the segment's end is DDIM's, of that x0
    alpha, sigma, to_a, to_s = (c(t).double() for t in (point.t, point.end) for c in (DENOISER.alpha, DENOISER.sigma))
    expected = to_a * seen[0] + to_s * (point.x_t - alpha * seen[0]) / sigma
    torch.testing.assert_close(expected.float(), reached, rtol=1e-4, atol=1e-4)
    assert float((seen[0] - reached).detach().abs().max()) > 0.1, "an end with noise is no picture"
    score.sum().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in trainer.roles.parameters("student"))
    lowest, highest = score.detach().min().item(), score.detach().max().item()
    for margin, most in ((lowest - 1, 0.0), (highest + 1, None)):
        method = tscd(**options, reward_margin=margin)
        values = method.loss(ctx, batch, phase).values
        lacks = torch.zeros(4) if most == 0.0 else margin - score
        torch.testing.assert_close(values, plain.values + 0.5 * lacks)
    assert tscd(**options).notes() and not tscd().notes()
    assert not tscd().needs.reward and not tscd().needs.decode and tscd(**options).rewards() == "tiny-pickscore"


def test_hypersds_later_stages_go_on_from_one_another(tmp_path: Path) -> None:
    """Feedback, then score distillation from its LoRA: one LoRA, recorded for one step and for two."""
    small = ["train.steps=1", "train.batch=1", "validate.images=1", "validate.per_prompt=1", "model.lora.rank=4"]
    small += ["output.trackers=[]", "data.max_pairs=2", "train.lr=1e-2", "model.lora.targets=attention"]
    begun: dict[str, list[Tensor]] = {}
    first = train(load_recipe("tiny/hypersd-feedback", [*small, f"output.dir={tmp_path / 'a'}"]), progress=False)
    assert any(row["kind"] == "train" and "reward/tiny-pickscore" in row for row in first.log)

    def watch(session: run.Session) -> None:
        roles = session.trainer.roles
        begun.update({role: [p.detach().clone() for p in roles.parameters(role)] for role in roles.names})

    options = [*small, "method.critic_steps=1", f"model.start={tmp_path / 'a'}", f"output.dir={tmp_path / 'b'}"]
    second = run.train(load_recipe("tiny/hypersd-dmd", options), progress=False, watch=watch)
    assert any(bool(p.any()) for p in begun["student"][1::2]), "it begins as the feedback's LoRA"
    assert not any(bool(p.any()) for p in begun["fake"][1::2]), "the fake score begins as the base"
    record = recorded(str(second.model))
    assert record is not None and record.times(1) == (999,) and record.times(2) == (999, 499)
    eight = [load_recipe(f"{family}/hypersd-dmd").method.model_dump() for family in ("sd15", "sdxl")]
    for options in eight:
        made = make_method("dmd2", {k: v for k, v in options.items() if k != "name"}).sampling(SD_SCHEDULE)
        assert made is not None
        for steps in (1, 2, 4, 8):
            assert made.times(steps) == tscd(segments=steps).edges(SD_SCHEDULE)


@pytest.mark.slow
def test_a_stage_goes_on_from_the_last_ones_run(tmp_path: Path) -> None:
    """Its student, and the average that gives targets, begin where that ended; the teacher stays the base."""
    small = ["train.steps=2", "train.batch=2", "train.warmup=0", "validate.images=1", "model.lora.rank=4"]
    small += ["output.trackers=[]", "data.max_pairs=8", "train.lr=1e-2"]
    first = train(load_recipe("tiny/tscd", [*small, "method.segments=4", f"output.dir={tmp_path / 'a'}"]))
    begun: dict[str, Any] = {}
    kept = Segmented.loss

    def watch(self: Segmented[Any], ctx: Any, batch: Any, phase: Any) -> Any:
        roles: Roles = ctx.roles
        begun.setdefault("roles", {r: [p.detach().clone() for p in roles.parameters(r)] for r in roles.names})
        return kept(self, ctx, batch, phase)

    options = ["method.segments=2", "method.target_ema=0.9", f"model.start={tmp_path / 'a'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Segmented, "loss", watch)
        second = train(load_recipe("tiny/tscd", [*small, *options, f"output.dir={tmp_path / 'b'}"]))
    student, target = begun["roles"]["student"], begun["roles"]["target"]
    assert all(map(torch.equal, student, target)) and any(bool(p.any()) for p in student[1::2])
    assert first.step == second.step == 2
