"""Diffusion-DRO and DiffusionNFT: identities of the online sheet (4, 8, D 29 to 32, 42, 43), and what --plan counts."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from test_online import LIKELIHOOD, method, trainer_of
from tiny import SD_SCHEDULE
from torch import Tensor
from world import Rows, make_trainer, rows_of, warm

from diffalign.data.batch import Cond
from diffalign.data.source import Source
from diffalign.denoiser import Denoiser
from diffalign.errors import UserError
from diffalign.methods import make_method
from diffalign.methods.online.dro import dro_loss
from diffalign.methods.online.nft import nft_loss, optimality
from diffalign.recipe import ValidateRecipe
from diffalign.rollouts.cost import META, round_cost
from diffalign.trainer import Trainer
from diffalign.validate import heldout_metrics

SD = Denoiser.from_config(SD_SCHEDULE)
TREE = {"steps": 5, "depth": 2, "branch": 2, "updates": 2, "epochs": 2}

# ---- Diffusion-DRO ---------------------------------------------------------------------------------------------------


def test_the_hinge() -> None:
    e, p, re, rp = torch.rand(4, 9, dtype=torch.float64)
    loss, gap = dro_loss(e, p, re, rp, 0.1)
    torch.testing.assert_close(gap, (e - re) - (p - rp))
    torch.testing.assert_close(dro_loss(p, e, rp, re, 0.1)[1], -gap)  # exchanged
    assert torch.equal(loss, torch.relu(gap + 0.1))
    same, none = dro_loss(re, rp, re, rp, 1e-3)  # student = base, whoever sampled
    assert torch.equal(none, torch.zeros_like(none)) and torch.equal(same, torch.full_like(same, 1e-3))
    assert float(dro_loss(e, p, re, rp, -100.0)[0].max()) == 0


def items(trainer: Trainer) -> Any:
    with torch.no_grad():
        found = trainer.method.collect(trainer.ctx, rows_of(trainer))
    return found.take(range(len(found)))


def gradients(trainer: Trainer, values: Tensor) -> Tensor:
    trainer.roles.train_only(("student",))
    found = torch.autograd.grad(values.sum(), trainer.roles.parameters("student"), retain_graph=True)
    return torch.cat([g.flatten() for g in found])


def test_negatives_have_no_gradient_in_a_rounds_first_update_and_one_afterwards() -> None:
    """The released default is one update a round: there negatives are a gate only; it is announced."""
    dro = make_method("dro", {"steps": 3, "updates": 2, "kept": 3, "margin": 10.0})
    trainer = warm(make_trainer(dro, lr=1e-2), 2)
    batch = items(trainer)
    trainer.roles.train_only(("student",))
    expert, policy = dro.errors(trainer.ctx, "student", batch)  # type: ignore[attr-defined]
    assert float(policy.detach().max()) < 1e-10 and float(gradients(trainer, policy).abs().max()) < 1e-5
    loss = dro.loss(trainer.ctx, batch, dro.phases[0])
    torch.testing.assert_close(gradients(trainer, loss.values), gradients(trainer, expert), rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        for parameter in trainer.roles.parameters("student"):
            parameter.add_(0.02 * torch.randn_like(parameter))
    _, policy = dro.errors(trainer.ctx, "student", batch)  # type: ignore[attr-defined]
    assert float(gradients(trainer, policy).abs().max()) > 1e-4
    assert (
        not dro.notes() and "fine-tuning on the pictures with a gate" in make_method("dro", {"updates": 1}).notes()[0]
    )
    fresh = make_trainer(make_method("dro", {"steps": 3, "kept": 3, "updates": 3}))
    start = fresh.method.loss(fresh.ctx, items(fresh), fresh.method.phases[0])
    torch.testing.assert_close(start.values, torch.full_like(start.values, 1e-3), rtol=0, atol=1e-6)


def test_states_are_at_stratified_times_of_their_own() -> None:
    dro = make_method("dro", {"steps": 20, "kept": 20})
    trainer = make_trainer(dro)
    times = items(trainer).columns["t"].view(20, 4).T
    for row in times.tolist():
        shift = row[-1]
        assert row == [*range(950 + shift, shift - 1, -50)] and 0 <= shift < 50
    assert len({row[-1] for row in times.tolist()}) > 1


def test_held_out_pictures_tell_a_loss() -> None:
    """At the start the margin; no scorer looks on, so that nothing else would be said of them."""
    trainer = make_trainer(make_method("dro", {"steps": 3, "kept": 3, "updates": 3}))
    heldout = Source(Rows(4, seed=9, kind="image"), range(4), 0, Cond(torch.zeros(1, 5, 16)))  # type: ignore[arg-type]
    found = heldout_metrics(trainer, heldout, ValidateRecipe(draws=1))
    assert found["loss"] == pytest.approx(1e-3, abs=1e-6) and found["active"] == 1 and "expert_gain" in found


# ---- DiffusionNFT ----------------------------------------------------------------------------------------------------


def test_on_policy_the_gradient_is_the_advantages() -> None:
    """(2 r - 1) times that of the normalised error, for any beta; 0 at r = 1/2 (identities 42, 43)."""
    torch.manual_seed(0)
    old, x0 = torch.randn(2, 5, 4, 4, 4, dtype=torch.float64)
    good = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    off = old.clone().requires_grad_()
    plain = ((off - x0).square() / (old - x0).abs().mean((1, 2, 3), keepdim=True)).mean((1, 2, 3))
    (expected,) = torch.autograd.grad(plain.sum(), off)
    for beta in (0.1, 1.0, 2.0):
        student = old.clone().requires_grad_()
        values, towards, away = nft_loss(student, old, x0, good, beta, 5.0)
        torch.testing.assert_close(towards, away)
        torch.testing.assert_close(values * beta / 5, plain)
        (gradient,) = torch.autograd.grad(values.sum(), student)
        torch.testing.assert_close(gradient, 5 * (2 * good - 1)[:, None, None, None] * expected)
    student = torch.randn_like(old)
    _, towards, away = nft_loss(student, old, x0, good, 1.0, 1.0)
    for found, belief in ((towards, student), (away, 2 * old - student)):
        off = belief - x0
        torch.testing.assert_close(found, (off.square() / off.abs().mean((1, 2, 3), keepdim=True)).mean((1, 2, 3)))
    assert optimality(torch.tensor([-9.0, -5.0, 0.0, 2.5, 5.0]), 5.0).tolist() == [0, 0, 0.5, 0.75, 1]


def test_the_samples_are_noised_at_the_samplers_times() -> None:
    trainer = trainer_of("nft", share=1.0, steps=4, members=2)
    batch = items(trainer)
    assert sorted(set(batch.columns["t"].tolist())) == [251, 501, 751], "all but the last"
    noise = (batch.latents["x_t"] - SD.alpha(batch.columns["t"]) * batch.latents["x0"]) / SD.sigma(batch.columns["t"])
    assert abs(float(noise.mean())) < 0.05 and abs(float(noise.std()) - 1) < 0.05
    assert len({round(float(n), 4) for n in noise[:, 0, 0, 0]}) == len(batch), "every item has noise of its own"
    make_method("nft", {"eta": 0.0}).check(SD)  # no likelihood is needed


def test_how_far_the_base_is_can_be_watched_without_a_leash() -> None:
    """The curve is there with kl=0, and the loss is the one without it; unwatched, the base is not even asked for."""
    trainer = warm(trainer_of("nft", kl=0.0), 2)
    batch = items(trainer)
    found = trainer.method.loss(trainer.ctx, batch, trainer.method.phases[0])
    alone = method("nft", kl=0.0, watch=False)
    assert trainer.method.needs.reference and not alone.needs.reference
    values = alone.loss(trainer.ctx, batch, alone.phases[0])
    assert "base_distance" not in values.metrics and torch.equal(values.values, found.values)
    said = [
        trainer.ctx.model(role, batch.latents["x_t"], batch.columns["t"], batch.cond["prompt"])
        for role in ("student", "base")
    ]
    far = (said[0] - said[1]).detach().square().mean((1, 2, 3))
    assert float(far.min()) > 0
    torch.testing.assert_close(found.metrics["base_distance"], far, rtol=1e-3, atol=1e-8)


def test_one_noise_without_any_later_is_refused() -> None:
    with pytest.raises(UserError, match="all samples of a prompt the same"):
        method("nft", shared_noise=True).check(SD)


# ---- what a round costs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*LIKELIHOOD, "nft", "dro", "tree_rpo"])
def test_the_counted_cost_is_what_a_step_spends(name: str) -> None:
    made = (
        make_method("dro", {"steps": 3, "kept": 3, "updates": 3})
        if name == "dro"
        else method(name, guidance=3.0, share=1.0, **TREE if name == "tree_rpo" else {})
    )
    trainer = make_trainer(made)
    trainer.ctx.decoder = None if name == "dro" else lambda latents: latents
    spent: Counter[str] = Counter()
    roles = trainer.roles
    roles.unet.register_forward_pre_hook(lambda module, args: spent.update({roles.current: len(args[0])}))
    judged: list[int] = []

    def judge(images: Tensor, prompts: Any, t: Any = None) -> Tensor:
        judged.append(len(images))
        return images.mean((1, 2, 3))

    trainer.ctx.rewards = {"tiny-pickscore": judge}
    drawn = trainer.source.share(0, 4, 0, 1)[0]
    trainer.train_step()
    batch = trainer.source.load(drawn, [0] * len(drawn))
    batch.latents = {n: x.to(META) for n, x in batch.latents.items()} or {"": torch.empty(4, 4, 8, 8, device=META)}
    batch.cond["prompt"].embeds = batch.cond["prompt"].embeds.to(META)
    batch.weight, batch.columns = batch.weight.to(META), {}
    cost = round_cost(made, made.phases[0], SD, batch, trainer.ctx.uncond, ["tiny-pickscore"])
    total = Counter(cost.sampled) + Counter(cost.trained)
    assert total["student"] == spent["student"]
    # the KL is looked at in a round's first update, whose share of the items is only about 1 / updates
    assert abs(total["base"] - spent["base"]) <= (8 if name == "tree_rpo" else 0)
    assert cost.decodes == sum(judged) == cost.scores.get("tiny-pickscore", 0)
    assert f"{cost.items:,} items" in cost.summary() and cost.bytes > 0
