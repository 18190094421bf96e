"""SPO: the sheet's identities (online, 0.4, 1B, 1C, A.2, B, C.1, catalogue 6-15 and 19) and golden numbers."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from world import Rows, batch_of, make_trainer, rows_of, small_clip, stirred, warm, weights

from diffalign.context import Context
from diffalign.data.batch import Cond
from diffalign.data.source import Source
from diffalign.denoiser import Denoiser
from diffalign.errors import UserError
from diffalign.guards import Guards
from diffalign.methods.online.spo import SPO, SPOConfig, choose, survivors
from diffalign.recipe import GuardsRecipe, ValidateRecipe
from diffalign.rollouts import Rollouts
from diffalign.trainer import Trainer
from diffalign.validate import heldout_metrics

# online sheet, C.1: |a| / std of the 20 leading steps
WEIGHTS = [0.853, 0.814, 0.778, 0.745, 0.716, 0.689, 0.667, 0.649, 0.635, 0.626]
WEIGHTS += [0.623, 0.626, 0.636, 0.657, 0.693, 0.754, 0.868, 1.141, 5.431, 1.003]
ROOTS = [0.996, 0.993, 0.988, 0.982, 0.972, 0.958, 0.940, 0.917, 0.887, 0.851]
ROOTS += [0.809, 0.760, 0.704, 0.641, 0.573, 0.498, 0.417, 0.327, 0.222, 0.041]


class Judge:
    """A scorer that can be followed: the mean of the picture's first channel, times a factor."""

    def __init__(self, factor: float = 400.0) -> None:
        self.factor, self.times, self.seen = factor, Counter[int](), 0

    def __call__(self, images: Tensor, prompts: Any, t: Tensor | None = None) -> Tensor:
        assert t is not None and len(t) == len(images) == len(prompts)
        self.times.update(t.tolist())
        self.seen += len(images)
        return images[:, 0].mean((1, 2)) * self.factor


def make(judge: Judge | None = None, rows: int = 12, **settings: Any) -> Trainer:
    """SPO in few steps on 8 x 8 latents, decoded without a VAE."""
    few = {"steps": 5, "start_step": 1, "pool": 3, "threshold": -1.0}
    method = SPO(SPOConfig(**{"reward": f"spm={small_clip()}", **few, **settings}))
    trainer = make_trainer(method, rows=Rows(rows, kind="prompt"))
    trainer.ctx.decoder = lambda latents: latents[:, :3]
    if judge is not None:
        trainer.ctx.rewards = {"spm": judge}
    return trainer


def collected(trainer: Trainer, rows: tuple[int, ...] = (0, 1, 2)) -> Rollouts:
    with torch.no_grad():
        return trainer.method.collect(trainer.ctx, rows_of(trainer, rows))  # type: ignore[return-value]


def values_of(trainer: Trainer, batch: Any) -> Any:
    return trainer.method.loss(trainer.ctx, batch, trainer.method.phases[0])


def test_the_weights_of_steps_are_the_sheets() -> None:
    """C.1, and GradSPO's and equal weights as factors of the log-ratios."""
    denoiser = make_trainer(SPO(SPOConfig(reward=f"spm={small_clip()}"))).ctx.denoiser
    spo = {kind: SPO(SPOConfig(time_weight=kind)) for kind in ("none", "equal", "gradspo")}
    found = spo["none"].policy(denoiser).weights(denoiser)
    assert found.tolist() == pytest.approx(WEIGHTS, abs=6e-4)
    assert (found * spo["gradspo"].scales(denoiser)).tolist() == pytest.approx(ROOTS, abs=6e-4)
    assert (found * spo["equal"].scales(denoiser)).tolist() == pytest.approx([1.0] * 20, abs=1e-6)
    assert spo["none"].scales(denoiser).tolist() == [1.0] * 20
    assert spo["none"].trained_steps(denoiser) == list(range(4, 20)), "t <= 751 alone is trained"


@pytest.mark.parametrize(
    ("settings", "calls", "judged"),
    [
        ({"steps": 20, "start_step": 4, "pool": 4}, 65, {**dict.fromkeys(range(701, 0, -50), 4), 1: 4, 0: 4}),
        ({"steps": 20, "start_step": 4, "pool": 2, "segment": 4}, 35, dict.fromkeys((551, 351, 151, 0), 2)),
        ({"steps": 7, "start_step": 2, "pool": 2, "segment": 3}, 11, {430: 2, 0: 2}),
    ],
    ids=["sd15", "sdxl", "rest"],
)
def test_calls_and_verdicts_are_the_sheets(settings: dict[str, int], calls: int, judged: dict[int, int]) -> None:
    """F and B: U-Net passes under guidance a prompt, and at which times pictures are judged; 16 transitions of 20."""
    judge, sent = Judge(), []
    trainer = make(judge, **settings)
    inner = trainer.roles.forward

    def counting(unet: Any, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        sent.append(len(x))
        return inner(unet, x, t, cond)

    trainer.roles.forward = counting
    found = collected(trainer, (0, 1))
    assert sum(sent) == 2 * 2 * calls, "two prompts, two branches"
    if settings["steps"] == 20:
        assert judge.times == {t: 2 * n for t, n in judged.items()}
    transitions = settings["steps"] - settings["start_step"]
    assert len(found) == 2 * transitions and bool((found.weight == 1).all())
    assert set(found.ids) == {f"row-{i}@{k}" for i in (0, 1) for k in range(settings["start_step"], settings["steps"])}


def test_a_pair_is_the_best_and_the_worst_of_one_state() -> None:
    """Winner and loser by the judge; another judge's opposite exchanges them, and keeps the same pairs."""
    found, mirrored = (collected(make(Judge(factor))) for factor in (400.0, -400.0))
    assert torch.equal(found.latents["x_won"], mirrored.latents["x_lost"])
    assert torch.equal(found.latents["x_lost"], mirrored.latents["x_won"])
    assert torch.equal(found.latents["x_t"], mirrored.latents["x_t"]) and "lost_x_t" not in found.latents
    last = [i for i, name in enumerate(found.ids) if name.endswith("@4")]  # judged by where they ended
    gap = (found.latents["x_won"] - found.latents["x_lost"])[last, 0].mean((1, 2)) * 400
    torch.testing.assert_close(gap, found.columns["gap"][last], rtol=1e-4, atol=1e-3)
    assert float(gap.min()) > 0
    some = sorted(found.columns["gap"].tolist())
    middle = math.tanh(some[len(some) // 2] / 2 / 100)
    sharp, other = (collected(make(Judge(factor), threshold=middle)) for factor in (4.0, -4.0))
    assert 0 < float(sharp.weight.sum()) < len(sharp) and torch.equal(sharp.weight, other.weight)
    torch.testing.assert_close(sharp.weight, (sharp.columns["gap"] > 2 * math.atanh(middle)).float())


def test_segments_share_a_verdict_and_their_first_state() -> None:
    trainer = make(Judge(), steps=7, start_step=1, segment=3, pool=2)
    found = collected(trainer)
    step = {name: i for i, name in enumerate(found.ids)}
    for row in range(3):
        firsts, later = (step[f"row-{row}@{k}"] for k in (1, 4)), step[f"row-{row}@2"]
        for i in firsts:
            assert torch.equal(found.latents["x_t"][i], found.latents["lost_x_t"][i])
        assert not torch.equal(found.latents["x_t"][later], found.latents["lost_x_t"][later])
        gaps = [float(found.columns["gap"][step[f"row-{row}@{k}"]]) for k in range(1, 7)]
        assert len(set(gaps[:3])) == len(set(gaps[3:])) == 1 and gaps[0] != gaps[3]
        follows = found.latents["x_won"][step[f"row-{row}@1"]]
        assert torch.equal(found.latents["x_t"][later], follows), "the winner's steps follow one another"


def test_thresholds_are_gaps_and_equal_scores_are_no_pair() -> None:
    for threshold, gap in ((0.1, 0.2007), (0.3, 0.6190), (0.4, 0.8473), (0.6, 1.3863)):
        scores = torch.tensor([[20.0, 20 + gap + 2e-4, 20.05], [20.0, 20 + gap - 2e-4, 20.05]])
        won, lost, kept = choose(scores, threshold)
        assert won.tolist() == [1, 1] and lost.tolist() == [0, 0] and kept.tolist() == [1, 0], threshold
    same = torch.full((2, 4), 21.0)
    assert choose(same, 0.0)[2].tolist() == [0, 0] and choose(same, -0.1)[2].tolist() == [1, 1]
    assert choose(torch.tensor([[0.0, 30.0]]), 0.999)[2].tolist() == [1]


def test_survivors_are_random_and_know_no_score() -> None:
    trainer = make(Judge(), rows=400)
    prompts = rows_of(trainer, range(400))
    drawn = Counter(survivors(trainer.ctx, prompts, 3, 4))
    assert sum((count - 100) ** 2 / 100 for count in drawn.values()) < 16.3, "chi squared at 0.1 %"
    assert survivors(trainer.ctx, prompts, 3, 4) != survivors(trainer.ctx, prompts, 4, 4)
    found, mirrored = (collected(make(Judge(factor), threshold=0.999)) for factor in (0.0, 100.0))
    assert torch.equal(found.latents["x_t"], mirrored.latents["x_t"]), "the walk goes on the same, whoever wins"


@pytest.mark.parametrize("segment", [1, 2])
def test_at_the_start_the_loss_is_log_2(segment: int) -> None:
    trainer = make(Judge(), segment=segment)
    found = values_of(trainer, batch_of(trainer))
    torch.testing.assert_close(found.values, torch.full((4,), math.log(2)))
    for name in ("ratio_won", "ratio_lost"):
        torch.testing.assert_close(found.metrics[name], torch.ones(4))
    assert float(found.metrics["kl"].abs().max()) < 1e-10


class Shifted(Context):
    """A context whose student says the base's eps plus ``size`` times a field."""

    size = 0.0

    def model(self, role: str, x_t: Tensor, t: Tensor, cond: Any, guidance: float = 1.0, uncond: Any = None) -> Tensor:
        out = super().model("base", x_t, t, cond, guidance, uncond)
        return out + self.size * torch.linspace(-1, 1, out[0].numel()).view(out[0].shape) * (role == "student")


@pytest.mark.parametrize("kind", ["none", "gradspo"])
def test_the_margin_of_one_state_is_linear_in_eps(kind: str) -> None:
    """0.4 and 1C: margin = beta w_t sign(a) mean[(eps - eps_base) (z_w - z_l)], w_t = |a| / std or GradSPO's root."""
    trainer = make(Judge(), clip=None, time_weight=kind, beta=10.0)
    batch = batch_of(trainer)
    trainer.ctx.__class__ = Shifted
    margins = []
    for size in (0.5, 1.0, -1.5):
        trainer.ctx.size = size  # type: ignore[attr-defined]
        with torch.no_grad():
            margins.append(values_of(trainer, batch).metrics["logit"])
    torch.testing.assert_close(margins[1], 2 * margins[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(margins[2], -3 * margins[0], rtol=1e-3, atol=1e-5)
    policy, denoiser = trainer.method.policy(trainer.ctx.denoiser), trainer.ctx.denoiser  # type: ignore[attr-defined]
    k = [policy.times.index(int(t)) for t in batch.columns["t"]]
    std = policy.stds(denoiser)[k].view(-1, 1, 1, 1)
    z = (batch.latents["x_won"] - batch.latents["x_lost"]) / std
    field = torch.linspace(-1, 1, z[0].numel()).view(z[0].shape)
    weight = denoiser.sigma(batch.columns["t"]).flatten() if kind == "gradspo" else policy.weights(denoiser)[k]
    torch.testing.assert_close(margins[1], -10 * weight * (field * z).mean((1, 2, 3)), rtol=1e-3, atol=1e-5)


def test_swapped_members_mirror_the_margin_and_clipping_bounds_it() -> None:
    trainer = stirred(make(Judge(), clip=None))
    batch = batch_of(trainer)
    with torch.no_grad():
        there = values_of(trainer, batch)
        batch.latents |= {"x_won": batch.latents["x_lost"], "x_lost": batch.latents["x_won"]}
        back = values_of(trainer, batch)
    assert float(there.metrics["logit"].abs().min()) > 0
    torch.testing.assert_close(there.metrics["logit"], -back.metrics["logit"])
    torch.testing.assert_close(back.values - there.values, there.metrics["logit"], rtol=1e-3, atol=1e-5)
    tight = stirred(make(Judge(), clip=1e-6, beta=10.0))
    with torch.no_grad():
        assert float(values_of(tight, batch_of(tight)).metrics["logit"].abs().max()) <= 10 * 2.001e-6


def test_training_makes_winners_likelier() -> None:
    trainer = make(Judge(), beta=100.0, clip=None)
    batch = batch_of(trainer)
    for _ in range(3):
        trainer.roles.train_only(("student",))
        values_of(trainer, batch).values.mean().backward()
        trainer.optimizers["student"].step()
        trainer.optimizers["student"].zero_grad()
    with torch.no_grad():
        assert float(values_of(trainer, batch).metrics["logit"].mean()) > 0.01


def test_a_round_without_a_pair_goes_on_is_counted_and_warned_of() -> None:
    trainer = make(Judge(0.0), threshold=0.0, updates=2)
    before = weights(trainer)
    warm(trainer, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True)) and trainer.step == 2
    values = trainer.meter.read(trainer.reduce)
    assert values["rounds_empty"] == 1.0 and values["kept"] == 0.0 and values["idle"] == 1.0
    alarm, few = Guards(GuardsRecipe()).logged(values)
    assert (
        few.guard == "kept"
        and alarm.guard == "rounds"
        and alarm.policy == "warn"
        and "left nothing to learn" in alarm.text
    )
    trainer.ctx.rewards = {"spm": Judge()}
    warm(trainer, 1)
    assert not all(torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))
    assert trainer.meter.read(trainer.reduce)["rounds_empty"] == 0.0


def test_a_threshold_that_picks_next_to_none_or_all_is_told_of() -> None:
    """Sheet, appendix H: below 5 % and above 95 %; with a threshold below 0 all pairs are kept on purpose."""
    for share, said in ((0.04, "lower method.threshold"), (0.96, "raise it"), (0.06, ""), (0.94, "")):
        alarms = Guards(GuardsRecipe()).logged({"kept": share})
        assert [alarm.guard for alarm in alarms] == ["kept"] * bool(said) and all(said in a.text for a in alarms)
    assert "kept" not in collected(make(Judge())).metrics and "kept" in collected(make(Judge(), threshold=0.0)).metrics


def test_held_out_prompts_tell_the_best_step() -> None:
    trainer = make(Judge(), pool=2)
    heldout = Source(Rows(4, seed=9, kind="prompt"), range(4), 0, Cond(torch.zeros(1, 5, 16)))  # type: ignore[arg-type]
    found = heldout_metrics(trainer, heldout, ValidateRecipe(draws=1))
    assert found["loss"] == -found["reward"] != 0


def refused(denoiser: Denoiser, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        SPO(SPOConfig(**settings)).check(denoiser)
    return str(caught.value)


def test_what_leaves_nothing_to_learn_is_refused() -> None:
    denoiser = make(Judge()).ctx.denoiser
    with pytest.raises(ValidationError, match="a pool of one has no winner"):
        SPOConfig(pool=1)
    assert "leaves none of the 20 steps" in refused(denoiser, start_step=20)
    assert "eta" in refused(denoiser, eta=0.0)
    assert "no step" in refused(denoiser, timesteps=(999, 499), start_step=1)
    SPO(SPOConfig(timesteps=(999, 499), start_step=0)).check(denoiser)
    assert SPO(SPOConfig(beta=0.1)).notes() and not SPO(SPOConfig()).notes()
