"""SFT, Diffusion-DPO and MaPO: values worked by hand (offline sheet, sections 1-3 and 18) and their identities."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from world import batch_of, make_trainer, warm

from diffalign.methods import make_method
from diffalign.methods.pair import loser_scale
from diffalign.methods.preference.dpo import dpo_loss
from diffalign.methods.preference.mapo import likelihood_score, mapo_loss


def t64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


V1 = (t64(0.100), t64(0.120), t64(0.101), t64(0.119))


def test_dpo_golden_values() -> None:
    loss, u = dpo_loss(*V1, beta=5000)
    assert u.item() == pytest.approx(5.0, abs=1e-9) and loss.item() == pytest.approx(0.0067153485, abs=1e-9)
    m_w, m_l, r_w, r_l = V1
    loss, u = dpo_loss(r_w, r_l, m_w, m_l, beta=5000)
    assert u.item() == pytest.approx(-5.0, abs=1e-9) and loss.item() == pytest.approx(5.0067153485, abs=1e-9)
    loss, u = dpo_loss(m_w, m_l, m_w, m_l, beta=5000)
    assert u.item() == 0 and loss.item() == pytest.approx(math.log(2), abs=1e-9)


def test_dpo_identities() -> None:
    torch.manual_seed(0)
    m_w, m_l, r_w, r_l = (torch.rand(64, dtype=torch.float64) * 0.01 for _ in range(4))
    there, u = dpo_loss(m_w, m_l, r_w, r_l, 2000)
    back, _ = dpo_loss(m_l, m_w, r_l, r_w, 2000)
    torch.testing.assert_close(torch.exp(-there) + torch.exp(-back), torch.ones_like(there))  # (b)
    torch.testing.assert_close(dpo_loss(m_w + 0.3, m_l + 0.3, r_w, r_l, 2000)[0], there)  # (c)
    torch.testing.assert_close(dpo_loss(2 * m_w, 2 * m_l, 2 * r_w, 2 * r_l, 1000)[0], there)  # (f)
    hf = torch.nn.functional.softplus(1000 * ((m_w - m_l) - (r_w - r_l)))  # (h): diffusers' SD script at beta/2
    torch.testing.assert_close(hf, there)
    m_w.requires_grad_(), m_l.requires_grad_()
    dpo_loss(m_w, m_l, r_w, r_l, 2000)[0].sum().backward()
    torch.testing.assert_close(m_w.grad, 1000 * torch.sigmoid(-u))  # (g)
    torch.testing.assert_close(m_l.grad, -1000 * torch.sigmoid(-u))


def test_dpo_other_losses() -> None:
    loss, _ = dpo_loss(*V1, beta=100, loss="hinge")  # u = 0.1
    assert loss.item() == pytest.approx(0.9)
    assert dpo_loss(*V1, beta=5000, loss="hinge")[0].item() == 0
    m_w, m_l, r_w, r_l = V1
    gain = -((m_w - m_l) - (r_w - r_l))  # 0.002
    loss, _ = dpo_loss(*V1, beta=100, loss="ipo")
    # what diffusers' script intends, at its beta' = beta/2, is four times ours
    assert 4 * loss.item() == pytest.approx(((gain - 1 / (2 * 50)) ** 2).item())
    at_minimum = dpo_loss(m_w, m_l, m_w, m_l + 1 / 100, beta=100, loss="ipo")
    assert at_minimum[1].item() == pytest.approx(-0.5) and at_minimum[0].item() == pytest.approx(1e-4)
    best = dpo_loss(m_w, m_l + 1 / 100, m_w, m_l, beta=100, loss="ipo")
    assert best[1].item() == pytest.approx(0.5) and best[0].item() == pytest.approx(0, abs=1e-15)
    smooth, _ = dpo_loss(*V1, beta=5000, label_smoothing=0.1)
    assert smooth.item() == pytest.approx(0.9 * math.log1p(math.exp(-5)) + 0.1 * math.log1p(math.exp(5)))


def test_label_smoothing_is_refused_where_it_means_nothing() -> None:
    with pytest.raises(ValidationError, match="label_smoothing goes with loss=sigmoid"):
        make_method("dpo", {"loss": "ipo", "label_smoothing": 0.1})


def test_dpo_starts_at_log_two_with_the_analytic_gradient() -> None:
    trainer = make_trainer(make_method("dpo", {"beta": 300.0}))
    trainer.roles.train_only(("student",))
    batch = batch_of(trainer)
    loss = trainer.method.loss(trainer.ctx, batch, trainer.method.phases[0])
    torch.testing.assert_close(loss.values, torch.full((4,), math.log(2)), rtol=0, atol=1e-5)
    assert loss.metrics["accuracy"].tolist() == [0.5] * 4  # ties count one half
    loss.values.sum().backward()
    dpo = [p.grad.clone() for p in trainer.roles.parameters("student")]
    for p in trainer.roles.parameters("student"):
        p.grad = None
    errors = trainer.method.errors(trainer.ctx, trainer.method.noise(trainer.ctx, batch))
    (300.0 / 4 * (errors.chosen - errors.rejected)).sum().backward()  # (beta/4)(grad m_w - grad m_l)
    for a, p in zip(dpo, trainer.roles.parameters("student"), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-6)


def test_equal_latents_give_no_preference() -> None:
    trainer = warm(make_trainer(make_method("dpo", {})))
    batch = batch_of(trainer)
    batch.latents["rejected"] = batch.latents["chosen"].clone()
    with torch.no_grad():
        loss = trainer.method.loss(trainer.ctx, batch, trainer.method.phases[0])
    assert float(loss.metrics["logit"].abs().max()) < 1e-2 * 5000 * 1e-4


def test_mapo_golden_values() -> None:
    pairs = {
        (0.1, 0.1): 0.1693147181,
        (0.1, 0.101): 0.1577774809,
        (0.1, 0.11): 0.1082276139,
        (0.2, 0.1): 2.6375130176,
        (0.3, 0.35): 0.3000007331,
    }
    for (winner, loser), expected in pairs.items():
        assert mapo_loss(t64(winner), t64(loser))[0].item() == pytest.approx(expected, abs=1e-9)
    scores = {0.1: 0.97520832, 0.2: 0.95083319, 1.0: 0.77074704, 0.3: 0.92687430, 0.0: 1.0}
    for m, expected in scores.items():
        assert likelihood_score(t64(m)).item() == pytest.approx(expected, abs=1e-8)


def test_mapo_gradients_and_limits() -> None:
    m_w, m_l = t64(0.1).requires_grad_(), t64(0.1).requires_grad_()
    mapo_loss(m_w, m_l)[0].sum().backward()
    assert m_w.grad.item() == pytest.approx(13.291684, abs=1e-4)
    assert m_l.grad.item() == pytest.approx(-12.291684, abs=1e-4)
    zero = torch.zeros(1, requires_grad=True)
    likelihood_score(zero).backward()
    assert zero.grad.item() == pytest.approx(-0.25)  # s'(0) = -c/2, no NaN
    large = torch.tensor([1000.0], requires_grad=True)
    likelihood_score(large).backward()
    assert large.grad.item() == 0  # no overflow, no NaN
    small = torch.tensor([1.9e-4, 2.1e-4])  # both sides of the switch to the series
    torch.testing.assert_close(likelihood_score(small), likelihood_score(small.double()).float())
    assert mapo_loss(t64(0.2), t64(0.1), beta=0.0)[0].item() == pytest.approx(0.2)  # (e): SFT


def test_mapo_without_margin_is_sft_on_the_winner() -> None:
    mapo, sft = make_trainer(make_method("mapo", {"beta": 0.0})), make_trainer(make_method("sft", {}))
    with torch.no_grad():
        a = mapo.method.loss(mapo.ctx, batch_of(mapo), mapo.method.phases[0])
        b = sft.method.loss(sft.ctx, batch_of(sft), sft.method.phases[0])
    torch.testing.assert_close(a.values, b.values, rtol=1e-5, atol=1e-6)


def test_sft_sees_winners_only() -> None:
    trainer = warm(make_trainer(make_method("sft", {})))
    assert set(batch_of(trainer).latents) == {"image"}
    torch.testing.assert_close(batch_of(trainer).latents["image"], trainer.source.cache.chosen[:4])


def test_safeguard_identities() -> None:
    torch.manual_seed(0)
    g = torch.randn(3, 4, 2, 2)
    torch.testing.assert_close(loser_scale(g, g, 0.9), torch.full((3,), 0.1))  # equal residuals: 1 - mu
    assert loser_scale(g, -g, 0.9).tolist() == [1.0] * 3  # opposed gradients
    a, b = torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)
    a[0, 0], b[0, 1] = 1.0, 1.0
    assert loser_scale(a, b, 0.9).item() == 1.0  # orthogonal
    assert loser_scale(g, g, 1.0).tolist() == [0.0] * 3  # SFT-like
    h = torch.randn(3, 4, 2, 2)
    both = loser_scale(g, h, 0.5, "batch")
    assert both.unique().numel() == 1


def test_safeguard_changes_the_gradient_not_the_value() -> None:
    plain, guarded = (make_trainer(make_method("dpo", o)) for o in ({}, {"safeguard": 1.0}))
    grads, values = [], []
    for trainer in (plain, guarded):
        trainer.roles.train_only(("student",))
        loss = trainer.method.loss(trainer.ctx, batch_of(trainer), trainer.method.phases[0])
        loss.values.sum().backward()
        values.append(loss.values.detach())
        grads.append(torch.cat([p.grad.flatten() for p in trainer.roles.parameters("student")]))
    torch.testing.assert_close(values[0], values[1])
    assert float((grads[0] - grads[1]).norm() / grads[0].norm()) > 0.1


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_errors_in_noise_space(kind: str) -> None:
    from tiny import SD_SCHEDULE

    from diffalign.denoiser import Denoiser

    network = make_trainer(make_method("dpo", {}))
    noise = make_trainer(make_method("dpo", {"error_space": "epsilon"}))
    for trainer in (network, noise):
        trainer.ctx.denoiser = Denoiser.from_config(SD_SCHEDULE, prediction=kind)
    with torch.no_grad():
        there = network.method.errors(network.ctx, network.method.noise(network.ctx, batch_of(network)))
        back = noise.method.errors(noise.ctx, noise.method.noise(noise.ctx, batch_of(noise)))
    t, _ = network.ctx.draw(batch_of(network))
    a = network.ctx.denoiser.alphas_cumprod[t].float()
    factor = a if kind == "v_prediction" else a / (1 - a)
    torch.testing.assert_close(back.chosen, there.chosen * factor, rtol=1e-4, atol=1e-7)
