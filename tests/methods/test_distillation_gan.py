"""The GAN beside score distillation, and f-distill, which reads the ratio of densities from it (sheet 3, 7, 27)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from gauss import World
from torch import Tensor, nn
from torch.nn.functional import softplus
from world import Rows, batch_of, make_trainer, warm, weights

from diffalign.keyed import normal as keyed_normal
from diffalign.methods import make_method
from diffalign.methods.adversarial import Head, gan_critic_loss, gan_student_loss, r1_penalty
from diffalign.methods.base import Loss
from diffalign.methods.distillation.f_distill import WEIGHTS, f_weight, ratio_of
from diffalign.roles import Roles
from diffalign.trainer import Trainer


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step_mean(loss: Loss) -> float:
    """What the trainer minimises."""
    return float((loss.values * loss.weights).sum() / loss.weights.sum())


# ---- the GAN --------------------------------------------------------------------------------------------------------


def test_a_head_that_knows_nothing() -> None:
    """Logits 0: 1.386294 for the critic, .693147 for the student, and no gradient of the features."""
    head, features = Head(32, 8), normal(3, 32, 8, 8).requires_grad_()
    logits = head(features)
    assert logits.shape == (3,) and not bool(logits.any())
    assert gan_critic_loss(logits, logits)[0].item() == pytest.approx(1.386294, abs=1e-6)
    assert gan_student_loss(logits)[0].item() == pytest.approx(0.693147, abs=1e-6)
    gan_student_loss(logits).sum().backward()
    assert not bool(features.grad.any()) and bool(head.last.weight.grad.any())


@pytest.mark.parametrize(("channels", "side", "strides"), [(1280, 8, 1), (1280, 32, 3), (96, 4, 0), (32, 2, 0)])
def test_a_head_fits_every_middle_block(channels: int, side: int, strides: int) -> None:
    """DMD2's: SD1.5 8 -> 4 -> 1, SDXL 32 -> 16 -> 8 -> 4 -> 1; narrow buckets are padded."""
    with torch.device("meta"):
        head = Head(channels, side, None if channels < 1000 else 64)
        convolutions = [m for m in head.modules() if isinstance(m, nn.Conv2d)]
        assert len(convolutions) == strides + 2
        for shape in ((side, side), (max(1, side // 2), side * 2)):
            assert head(torch.empty(2, channels, *shape)).shape == (2,)


def test_the_gan_tells_real_from_made_and_leads_the_student() -> None:
    """Real pictures are bright, the student's are not: after some critic steps the head says so, and the student's GAN
    gradient points to the bright side."""
    method = make_method("dmd2", {"timesteps": [399], "gan_weight": 1.0, "gan_times": 1, "gan_critic_weight": 1.0})
    rows = Rows(kind="image")
    rows.chosen = 0.1 * rows.chosen + 2
    trainer = make_trainer(method, rows=rows, lr=5e-3)
    ctx, batch = trainer.ctx, batch_of(trainer)
    for visit in range(8):
        trainer.update(trainer.slots[1], [trainer.source.load([0, 1, 2, 3], [visit] * 4)])
    ctx.phase = "student"
    trainer.roles.train_only(("student",))
    sample = method.generate(ctx, batch)
    logits = [method.judge(ctx, batch, x, sample.cond) for x in (batch.latents["image"], sample.x)]
    assert bool((logits[0] > logits[1]).all())
    (slope,) = torch.autograd.grad(method.student_term(ctx, batch, sample).sum(), sample.x)
    assert float((slope * (batch.latents["image"] - sample.x).detach()).sum()) < 0


def knowing(trainer: Trainer, seed: int = 0) -> Trainer:
    """With a head that says something."""
    for name, weight in trainer.roles.modules["head"].last.named_parameters():
        weight.data.copy_(0.5 * keyed_normal(tuple(weight.shape), "head", name, seed))
    return trainer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gan_draws": "shared", "gan_features": "base", "gan_times": 300},
        {"gan_times": 1, "gan_r1": 50.0, "gan_r1_noise": 0.2},
    ],
    ids=["own", "shared, base", "clean, r1"],
)
def test_the_gans_terms_beside_the_scores(options: dict[str, Any]) -> None:
    """Both phases' losses less those without a GAN, by hand: who is real, times, noise, features, weights, R1."""
    shared = {"timesteps": [999], "guidance": 3.0, "gan_width": 8}
    method = make_method("dmd2", {**shared, "gan_weight": 0.3, "gan_critic_weight": 0.2, **options})
    plain, config = make_method("dmd2", shared), method.config
    trainer = knowing(make_trainer(method))
    with torch.no_grad():  # the fake score is no longer the base
        for parameter in trainer.roles.parameters("fake"):
            parameter.add_(0.1)
    ctx, batch, head = trainer.ctx, batch_of(trainer), trainer.roles.modules["head"]
    cond = batch.cond["prompt"]

    def says(x: Tensor, tag: str, near: bool = False) -> Tensor:
        t = torch.tensor([int(rng.integers(config.gan_times)) for rng in ctx.rng(f"{tag}-time", batch)])
        x_t = x if config.gan_times == 1 else ctx.denoiser.add_noise(x, ctx.draw(batch, tag)[1], t)
        x_t = x_t + 0.2 * ctx.draw(batch, "gan-r1")[1] if near else x_t
        return head(ctx.features(config.gan_features, x_t, t, cond))

    with torch.no_grad():
        for number, phase in enumerate(method.phases):
            ctx.phase, ctx.repeat = phase.name, 0
            x, real = method.generate(ctx, batch).x, batch.latents["image"]
            found = method.loss(ctx, batch, phase).values - plain.loss(ctx, batch, plain.phases[number]).values
            if phase.name == "student":
                expected = 0.3 * softplus(-says(x, "gan"))
            else:
                tag = "gan" if config.gan_draws == "shared" else "gan-real"
                expected = softplus(says(x, "gan")) + softplus(-says(real, tag))
                if config.gan_r1:
                    expected = expected + 50 * (says(real, tag, near=True) - says(real, tag)) ** 2
                expected = 0.2 * expected
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_r1_is_the_squared_slope_of_the_head() -> None:
    """Of a linear head the penalty over the noise's variance is |w|^2 in the mean; of a constant one 0."""
    w, x = normal(64), normal(4096, 64, seed=1)
    near = x + 0.1 * normal(4096, 64, seed=2)
    assert float(r1_penalty(x @ w, near @ w).mean()) / 0.01 == pytest.approx(float(w.square().sum()), rel=0.1)
    assert not bool(r1_penalty(torch.ones(3), torch.ones(3)).any())


def test_a_gan_needs_pictures_and_the_others_none() -> None:
    kinds = {
        ("dmd2", None): "prompt",
        ("dmd2", ("gan_weight", 0.1)): "image",
        ("dmd2", ("rollout", "data")): "image",
        ("decoupled_dmd", None): "prompt",
        ("f_distill", ("gan_weight", 0.0)): "image",
        ("diff_instruct", None): "prompt",
        ("dmd", None): "image",
        ("dmd", ("regression_weight", 0.0)): "prompt",
    }
    for (name, option), kind in kinds.items():
        assert make_method(name, dict([option] if option else [])).needs.batch == kind, (name, option)


# ---- f-distill ------------------------------------------------------------------------------------------------------


def test_weights_of_the_divergences() -> None:
    one = torch.ones(1)
    expected = {"rkl": 1, "kl": 1, "js": 0.5, "softened_rkl": 0.5, "neyman": 1, "hellinger": 1, "jeffreys": 2}
    assert {name: f_weight(name, one).item() for name in WEIGHTS} == expected
    rho = torch.tensor([0.1, 0.7, 1.0, 3.0, 20.0], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(f_weight("js", rho) + f_weight("softened_rkl", rho), torch.ones_like(rho))
    generators = {  # f of D_f = E_fake[f(p_real / p_fake)]; h is rho^2 f'' up to a factor
        "rkl": lambda r: -r.log(),
        "kl": lambda r: r * r.log(),
        "js": lambda r: r * r.log() - (1 + r) * ((1 + r) / 2).log(),
        "softened_rkl": lambda r: (1 + r) * (1 + 1 / r).log(),
        "neyman": lambda r: (1 - r) ** 2 / r,
        "hellinger": lambda r: (1 - r.sqrt()) ** 2,
        "jeffreys": lambda r: (r - 1) * r.log(),
    }
    assert generators.keys() == WEIGHTS.keys()
    for name, f in generators.items():
        (slope,) = torch.autograd.grad(f(rho).sum(), rho, create_graph=True)
        (curve,) = torch.autograd.grad(slope.sum(), rho)
        h, ours = (rho**2 * curve).detach(), f_weight(name, rho).detach()
        torch.testing.assert_close(ours / ours[2], h / h[2])
    assert ratio_of(torch.tensor([100.0, -100.0, 0.0])).tolist() == pytest.approx([20, 0.1, 1])


def test_constant_ratios_are_dmd2() -> None:
    """After the mean is divided out, and with the head at zero; the GAN's weight is not touched by it."""
    shared = {"timesteps": [999, 499], "gan_weight": 0.2, "gan_width": 8, "guidance": 3.0, "gan_features": "base"}
    theirs = make_method("dmd2", shared)
    trainer = make_trainer(theirs)
    trainer.ctx.phase = "student"
    batch = batch_of(trainer)
    with torch.no_grad():
        expected = step_mean(theirs.loss(trainer.ctx, batch, theirs.phases[0]))
        for divergence in WEIGHTS:
            ours = make_method("f_distill", {**shared, "divergence": divergence})
            found = step_mean(ours.loss(trainer.ctx, batch, ours.phases[0]))
            assert found == pytest.approx(expected, rel=1e-5), divergence


def test_a_real_ratio_weighs_the_samples() -> None:
    """Weights follow h; without the mean they scale the values; in bins every ratio is divided by its bin's mean."""
    options = {"timesteps": [999], "gan_weight": 0.0, "gan_width": 8, "divergence": "kl"}
    found = {}
    for key, more in {"step": {}, "none": {"mean": "none"}, "bins": {"ratio_bins": 1}}.items():
        trainer = make_trainer(make_method("f_distill", {**options, **more}))
        with torch.no_grad():
            trainer.roles.modules["head"].last.weight.copy_(0.5 * keyed_normal((1, 8, 1, 1), "head"))
        trainer.ctx.phase = "student"
        batch = batch_of(trainer)
        trainer.ctx.stats = trainer.method.remember({}, trainer.statistics([batch]))
        found[key] = trainer.method.loss(trainer.ctx, batch, trainer.method.phases[0])
        assert trainer.method.couples == ("batch" if key == "bins" else "none")
    ratio = found["step"].metrics["ratio"]
    assert float(ratio.std()) > 1e-3
    torch.testing.assert_close(found["step"].weights, ratio)
    torch.testing.assert_close(found["none"].values, ratio * found["step"].values)
    torch.testing.assert_close(found["bins"].metrics["ratio"], ratio / (ratio.mean() + 1e-6))
    assert "is DMD2" in make_method("f_distill", {"ratio_bins": 10}).notes()[-1]


def test_the_gans_term_is_not_weighed_by_the_ratio() -> None:
    """What it adds to a step's sum is its own, once as it is and once as at a ratio of 1: h(1) each."""
    shared = {"timesteps": [999], "gan_width": 8, "divergence": "jeffreys"}
    for mean, weight in (("none", 1.0), ("step", 2.0)):
        sums = []
        for gan in (0.3, 0.0):
            method = make_method("f_distill", {**shared, "mean": mean, "gan_weight": gan})
            trainer = knowing(make_trainer(method))
            trainer.ctx.phase, batch = "student", batch_of(trainer)
            with torch.no_grad():
                loss = method.loss(trainer.ctx, batch, method.phases[0])
            sums.append(loss.values * loss.weights)
            if gan:
                term = method.student_term(trainer.ctx, batch, method.generate(trainer.ctx, batch)).detach()
                assert float(loss.metrics["f_weight"].std()) > 1e-3
        torch.testing.assert_close(sums[0] - sums[1], weight * term, rtol=1e-3, atol=1e-5)


def test_a_bins_mean_is_remembered() -> None:
    """bin <- rate bin + (1 - rate) mean of the step, from 1; bins without a sample keep theirs; saved with the run."""
    method = make_method("f_distill", {"ratio_bins": 3, "ratio_memory": 0.75})
    one = method.remember({}, {"ratio": torch.tensor([[8.0, 0.0, 3.0], [2.0, 0.0, 1.0]])})
    torch.testing.assert_close(one["bins"], torch.tensor([0.75 + 1.0, 1.0, 0.75 + 0.75]))
    two = method.remember(one, {"ratio": torch.tensor([[0.0, 1.0, 0.0], [0.0, 2.0, 0.0]])})
    torch.testing.assert_close(two["bins"], torch.tensor([1.75, 0.75 + 0.125, 1.5]))
    assert method.remember(two, {}) == {}  # the critic has no ratios
    options = {"timesteps": [999], "critic_steps": 1, "gan_width": 8, "ratio_bins": 2, "ratio_memory": 0.5}
    straight = warm(knowing(make_trainer(make_method("f_distill", options))), 2)
    first = warm(knowing(make_trainer(make_method("f_distill", options))), 1)
    second = make_trainer(make_method("f_distill", options))
    second.load(copy.deepcopy(first.state()))
    warm(second, 1)
    assert all(map(torch.equal, weights(straight), weights(second)))
    bins = straight.memory["student"]["bins"]
    assert torch.equal(bins, second.memory["student"]["bins"]) and float((bins - 1).abs().min()) > 1e-4


def test_the_ratio_is_that_of_the_point_where_the_scores_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head, the fake score and the teacher see one noisy sample; its own logit is the ratio's."""
    method = make_method("f_distill", {"timesteps": [999], "guidance": 2.0, "gan_weight": 0.0, "gan_width": 4})
    made = World(method, "learned")
    made.roles.modules["head"] = Slope()
    seen: list[Tensor] = []
    call = Roles.__call__
    monkeypatch.setattr(Roles, "__call__", lambda self, role, x, *rest: seen.append(x) or call(self, role, x, *rest))
    found = made.loss()
    assert len(seen) == 4  # student, head, fake score, teacher
    assert torch.equal(seen[1], seen[2]) and torch.equal(torch.cat([seen[1], seen[1]]), seen[3])
    torch.testing.assert_close(found.metrics["ratio"], seen[1].mean((1, 2, 3)).exp().clamp(0.1, 20))


class Slope(nn.Module):
    """A discriminator that likes large numbers: a ratio that differs from sample to sample."""

    def forward(self, features: Tensor) -> Tensor:
        return features.mean((1, 2, 3))


def test_any_positive_weight_has_the_same_fixed_point() -> None:
    world = World(make_method("f_distill", {"timesteps": [999], "guidance": 1.0, "gan_weight": 0.0, "gan_width": 4}))
    world.roles.modules["head"] = Slope()
    (mean,), (std,) = world.descend(120, lr=0.3).reached()
    assert mean == pytest.approx(1.5, abs=1e-2) and std == pytest.approx(0.7, abs=1e-2)
