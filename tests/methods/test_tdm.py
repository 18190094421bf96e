"""TDM: its noise from the segment's end, weights and targets, and the bias of its fake score (sheet 6 and 27)."""

from __future__ import annotations

import pytest
import torch
from gauss import DENOISER, Net, Student, World, level
from pydantic import ValidationError
from tiny import SD_SCHEDULE
from torch import Tensor
from world import batch_of, make_trainer, warm

from diffalign.errors import UserError
from diffalign.methods import make_method
from diffalign.methods.distillation.tdm import TDM, importance, match, segment_noise
from diffalign.methods.score_distill import Sample

TIMES = (899, 674, 449, 224)
MIDS = (675, 450, 225, 0)


def tdm(**options: object) -> TDM:
    return make_method("tdm", {"guidance": 1.0, **options})  # type: ignore[return-value]


class Critic(Net):
    """The best fake score there can be, given what the student makes now: of x0 at x_t, or the score of x_t.

    Everything is linear in the step's input, so that x0 and x_t are jointly Gaussian."""

    def __init__(self, student: Student, target: str) -> None:
        super().__init__()
        self.source, self.target = (student,), target

    @torch.no_grad()
    def states(self) -> list[tuple[Tensor, Tensor]]:
        """Mean and variance of each step's input."""
        found = [(torch.zeros(()), torch.ones(()))]
        for k, after in enumerate(TIMES[1:]):
            p, q = self.jump(k, after)
            mean, var = found[-1]
            found.append((p * mean + q, p**2 * var))
        return found

    @torch.no_grad()
    def jump(self, k: int, after: int) -> tuple[Tensor, Tensor]:
        """Slope and shift of the DDIM jump from step k's input to a time."""
        (student,) = self.source
        (alpha, sigma), (to_a, to_s) = (map(torch.squeeze, level(t)) for t in (TIMES[k], after))
        a, b = student.a[k], student.b[k]
        return to_a * a + to_s * (1 - alpha * a) / sigma, to_a * b - to_s * alpha * b / sigma

    def x0(self, x: Tensor, t: Tensor, flag: Tensor, step: Tensor) -> Tensor:
        (student,) = self.source
        alpha, sigma = level(t)
        inside = torch.tensor([[float(mid <= time < top) for mid, top in zip(MIDS, TIMES, strict=True)] for time in t])
        index = torch.where(step.sum(1) > 0, step.argmax(1), inside.argmax(1))
        rows, states = [], self.states()
        for row, k in enumerate(index.tolist()):
            mean, var = states[k]
            p, q = self.jump(k, MIDS[k])
            ratio, beta = segment_noise(DENOISER, t[row : row + 1], torch.tensor([MIDS[k]]))
            there, spread = ratio * (p * mean + q), ratio**2 * p**2 * var + beta**2
            if self.target == "x0":
                slope = student.a[k].detach() * ratio * p * var / spread
                rows.append(student.a[k].detach() * mean + student.b[k].detach() + slope * (x[row] - there))
            else:
                eps = sigma[row] * (x[row] - there) / spread
                rows.append((x[row] - sigma[row] * eps) / alpha[row])
        return torch.cat([r.reshape(1, *x.shape[1:]) for r in rows])


def world(method: TDM, target: str, **options: object) -> World:
    """A Gaussian world whose fake score is the best of its kind."""
    made = World(method, **{"rows": 8, "init": "teacher", **options})  # type: ignore[arg-type]
    made.fake = Critic(made.student, target)
    made.roles.networks["fake"] = made.fake
    made.roles._parameters["fake"] = {}
    return made


# ---- parts -----------------------------------------------------------------------------------------------------------


def test_noise_from_a_segments_end_gives_the_schedules_own_level() -> None:
    t, mid = torch.tensor([650, 449, 300, 675]), torch.tensor([450, 225, 0, 675])
    ratio, beta = segment_noise(DENOISER, t, mid)
    torch.testing.assert_close((ratio * DENOISER.sigma(mid)) ** 2 + beta**2, DENOISER.sigma(t) ** 2)
    torch.testing.assert_close(ratio * DENOISER.alpha(mid), DENOISER.alpha(t))
    assert ratio[3] == 1 and beta[3] == 0, "at the end itself nothing is added"


def test_importance_and_matching() -> None:
    torch.manual_seed(0)
    d, e = torch.randn(4, 2, 3, 3, dtype=torch.float64), torch.randn(4, 2, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(importance(e.flip(3), e), torch.ones(4, dtype=torch.float64))
    expected = torch.exp(-0.5 * (d**2).mean((1, 2, 3))) / torch.exp(-0.5 * (e**2).mean((1, 2, 3)))
    torch.testing.assert_close(importance(d, e), expected)
    # were the student's noise the new one, x_t would hold (A sigma_mid + beta) / sigma_t of it: more than its share
    t, mid = torch.tensor([600]), torch.tensor([450])
    ratio, beta = (c.double() for c in segment_noise(DENOISER, t, mid))
    mixed = (ratio * DENOISER.sigma(mid) * e + beta * e) / DENOISER.sigma(t)
    assert float((ratio * DENOISER.sigma(mid) + beta) / DENOISER.sigma(t)) > 1
    assert bool((importance(mixed, e) < 1).all())
    one = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(match(d, one, "huber", 1e4) * 2e4, match(d, one, "mse"), rtol=1e-4, atol=0)
    assert match(0 * d, one, "huber").abs().max() == 0
    d.requires_grad_()
    match(d, 2 * one, "huber").sum().backward()
    torch.testing.assert_close(d.grad, d.detach().sign() / (2 * 18), rtol=1e-2, atol=1e-4)
    d.grad = None
    match(d, 2 * one, "mse").sum().backward()
    torch.testing.assert_close(d.grad, 2 * d.detach() / (2 * 18))


def test_what_the_scores_see() -> None:
    """x_t holds the mixed noise beside x0; times stay in the step's own segment, and clear of its end for the score."""
    for options in ({}, {"segments": "full"}, {"target": "score"}):
        method = tdm(**options)
        trainer = warm(make_trainer(method, lr=0.05), 1)
        ctx, seen = trainer.ctx, set()
        for visit in range(6):
            batch = trainer.source.load(list(range(12)), [visit] * 12)
            with torch.no_grad():
                sample = method.generate(ctx, batch)
                window = method.time_window(ctx, sample)
                found = method.diffused(ctx, batch, sample, window)
            clear = 20 if options.get("target") else 0
            for k, (low, high), t in zip(sample.steps, window, found.t.tolist(), strict=True):
                assert low == max(20, MIDS[k] + clear) and low <= t <= high
                assert high == (TIMES[k] - 11 if not options.get("segments") else 889)  # full: T - 10, not counted
                seen.add(k)
            again = ctx.denoiser.add_noise(sample.x, found.mixed, found.t)
            torch.testing.assert_close(again, found.x_t, rtol=1e-4, atol=1e-3)
            assert sample.t.tolist() == [TIMES[k] for k in sample.steps]
        assert seen == {0, 1, 2, 3}


def test_one_step_is_distribution_matching_from_x0(monkeypatch: pytest.MonkeyPatch) -> None:
    """K = 1: the segment ends at time 0, whose noise is .029: the direction is DMD's, twice (no half)."""
    method = tdm(timesteps=[899], loss="mse")
    trainer = warm(make_trainer(method, lr=0.05), 2)
    ctx, batch = trainer.ctx, batch_of(trainer)
    ctx.phase = "student"
    trainer.roles.train_only(("student",))
    sample = method.generate(ctx, batch)
    sample.x.retain_grad()
    method.student_loss(ctx, batch, sample).values.sum().backward()
    with torch.no_grad():
        found = method.diffused(ctx, batch, sample, method.time_window(ctx, sample))
        fixed = Sample(sample.x.detach(), sample.x_in, sample.t, sample.steps, sample.output, sample.cond)
        # the base's direction, at TDM's own x_t
        monkeypatch.setattr(method, "noised", lambda *args: (found.x_t, found.t))
        direction, _ = method.direction(ctx, batch, fixed)
    torch.testing.assert_close(sample.x.grad * 256, 2 * direction, rtol=1e-3, atol=1e-5)
    assert bool((method.ends(sample) == 0).all())
    closeness = found.x_t - ctx.denoiser.add_noise(sample.x.detach(), found.noise, found.t)
    eps = ctx.denoiser.to_eps(sample.output, sample.x_in, sample.t).detach()
    assert closeness.abs().max() < 0.03 * (eps.abs().max() + found.noise.abs().max())


def test_equal_scores_move_nothing_and_guidance_starts_alone() -> None:
    for guidance in (1.0, 4.5):
        method = tdm(guidance=guidance, loss="mse", normalise="none")
        trainer = make_trainer(method)  # student, fake score and teacher are one network still
        ctx, batch = trainer.ctx, batch_of(trainer)
        ctx.phase = "student"
        sample = method.generate(ctx, batch)
        value = method.student_loss(ctx, batch, sample).values.detach()
        found = method.diffused(ctx, batch, sample, method.time_window(ctx, sample))
        with torch.no_grad():
            c, u = ctx.branches("base", found.x_t, found.t, sample.cond)
            d = ctx.denoiser.to_x0(c, found.x_t, found.t) - ctx.denoiser.to_x0(u, found.x_t, found.t)
        expected = ((guidance - 1) * d).square().mean((1, 2, 3))
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-9)


def test_the_critics_targets() -> None:
    """x0 by min(SNR, 5) and importance, or (sigma / beta) noise in units where it has variance 1."""
    for options in ({}, {"importance": False}, {"target": "score"}):
        method = tdm(**options)
        trainer = warm(make_trainer(method, lr=0.05), 2)
        ctx, batch = trainer.ctx, batch_of(trainer)
        ctx.phase = "critic"
        with torch.no_grad():
            loss = method.loss(ctx, batch, method.phases[0]).values
            sample = method.generate(ctx, batch)
            found = method.diffused(ctx, batch, sample, method.critic_window(ctx, sample))
            output = ctx.model("fake", found.x_t, found.t, sample.cond)
            _, beta = segment_noise(ctx.denoiser, found.t, method.ends(sample))
            x0 = ctx.denoiser.to_x0(output, found.x_t, found.t)
            sigma = ctx.denoiser.sigma(found.t)
            if options.get("target"):
                expected = ((output - sigma / beta * found.noise) * beta / sigma).square().mean((1, 2, 3))
            else:
                expected = (x0 - sample.x).square().mean((1, 2, 3)) * ctx.denoiser.snr(found.t).clamp_max(5)
                expected = expected * (importance(found.mixed, found.noise) if not options else 1)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


def test_record_and_refusals() -> None:
    record = tdm().sampling(SD_SCHEDULE)
    assert record.timesteps == TIMES and record.deterministic and record.scheduler == "DPMSolverMultistepScheduler"
    for times in ([899, 880], [40], [449, 674]):
        with pytest.raises(ValidationError):
            tdm(timesteps=times)
    with pytest.raises(ValidationError):
        tdm(rollout="renoise")
    assert [phase.name for phase in tdm().phases] == ["critic", "student"]
    tdm().check(DENOISER)
    for name in ("time_range", "critic_range"):
        with pytest.raises(UserError, match=rf"{name} \(500 to 980\) leaves no time .* time 449"):
            tdm(**{name: (0.5, 0.98)}).check(DENOISER)


# ---- where it ends ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_separate_segments_end_beside_the_teachers_law() -> None:
    """Sheet 6.8: x0 as target, scores asked within each step's own segment: the last sample is N(1.479, .718)."""
    method = tdm(target="x0", segments="separate", normalise="none", loss="mse")
    found = [values[-1] for values in world(method, "x0", rows=8).descend(400, lr=0.3).reached()]
    assert found == pytest.approx([1.479, 0.718], abs=0.03)


def test_the_unbiased_target_puts_every_state_on_the_teachers_marginal() -> None:
    """Means and stds at 674, 449, 224 and of the sample, with exact fake scores; theirs is off in between (6.8)."""
    golden = {
        "x0": ((0.299, 0.731, 1.157), (0.988, 0.943, 0.862), (1.497, 0.702)),
        "score": ((0.474, 0.885, 1.268), (0.974, 0.907, 0.796), (1.499, 0.689)),
    }
    for target, (means, stds, last) in golden.items():
        method = tdm(target=target, segments="full", step_fake=True, normalise="none", loss="mse")
        made = world(method, target, rows=6).descend(250, lr=0.3)
        states = made.fake.states()
        assert [float(mean) for mean, _ in states[1:]] == pytest.approx(means, abs=0.03), target
        assert [float(var) ** 0.5 for _, var in states[1:]] == pytest.approx(stds, abs=0.03), target
        found = [values[-1] for values in made.reached()]
        assert found == pytest.approx(last, abs=0.03), target
