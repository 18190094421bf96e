"""The schedule, conversions and time grids against golden values (derived in fp64), closed forms and diffusers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from tiny import SD_SCHEDULE, ddim_scheduler
from toys import KINDS, T4, Gaussian, latents, make, sd

from diffalign.denoiser import Denoiser, guide
from diffalign.errors import UserError

# -- schedule ----------------------------------------------------------------------------------------------------------


def test_alphas_cumprod_of_sd() -> None:
    table = {0: 0.999150, 1: 0.998296, 101: 0.892981, 201: 0.752143, 301: 0.588819, 401: 0.422882, 500: 0.276333}
    table |= {501: 0.274999, 601: 0.159816, 701: 0.081917, 801: 0.036547, 901: 0.014005, 999: 0.004660}
    bars = sd().alphas_cumprod
    assert bars.dtype == torch.float64 and bars.shape == (1000,)
    for t, value in table.items():
        assert bars[t].item() == pytest.approx(value, abs=5.1e-7), t


def test_half_inverse_signal_share() -> None:
    """Inversion-DPO's weight 1 / (2 a_t): seven digits, more than the table of a_t itself."""
    t, weight = [0, 12, 480, 720, 948], [0.5004254, 0.5057454, 1.6463930, 7.0369362, 59.2836374]
    assert (0.5 / sd().alphas_cumprod[t]).tolist() == pytest.approx(weight, abs=6e-8)


def test_alpha_sigma_snr_table() -> None:
    rows = [
        (0, 0.999575, 0.029155, 0.02917, 1175.5),
        (20, 0.990613, 0.136695, 0.13799, 52.517),
        (249, 0.821847, 0.569708, 0.69320, 2.0810),
        (399, 0.652753, 0.757571, 1.16058, 0.74242),
        (499, 0.526944, 0.849900, 1.61289, 0.38441),
        (625, 0.371173, 0.928564, 2.50170, 0.15978),
        (749, 0.237957, 0.971276, 4.08173, 0.060022),
        (980, 0.076445, 0.997074, 13.0431, 0.0058781),
        (999, 0.068265, 0.997667, 14.6146, 0.0046819),
    ]
    denoiser, t = sd(), torch.tensor([row[0] for row in rows])
    assert denoiser.alpha(t).shape == (9, 1, 1, 1) and denoiser.alpha(t).dtype == torch.float32
    found = torch.stack([denoiser.alpha(t).flatten(), denoiser.sigma(t).flatten()], 1)
    found = torch.cat([found, found[:, 1:] / found[:, :1], denoiser.snr(t)[:, None]], 1)
    expected = torch.tensor([row[1:] for row in rows])
    torch.testing.assert_close(found[:, [0, 1, 3]], expected[:, [0, 1, 3]], rtol=6e-5, atol=5e-7)
    torch.testing.assert_close(found[:, 2], expected[:, 2], rtol=2e-5, atol=5e-6)
    assert denoiser.alpha(749).item() == pytest.approx(0.237957, abs=1e-6)


CONFIGS = [
    SD_SCHEDULE,
    {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": np.linspace(0.001, 0.02, 100).tolist(), "num_train_timesteps": 100},
    {**SD_SCHEDULE, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {**SD_SCHEDULE, "set_alpha_to_one": True},
]


@pytest.mark.parametrize("config", CONFIGS, ids=["scaled", "linear", "cosine", "trained", "zero-snr", "to-one"])
def test_schedule_agrees_with_diffusers(config: dict[str, object]) -> None:
    theirs, ours = DDIMScheduler(**config), Denoiser.from_config(config)
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=2e-5, atol=1e-7)
    final = theirs.final_alpha_cumprod
    torch.testing.assert_close(ours.alpha(-1).squeeze() ** 2, final, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.alpha(-99), ours.alpha(-1))
    assert Denoiser.from_config(theirs.config).prediction == theirs.config.prediction_type


def test_final_level_follows_each_schedulers_default() -> None:
    rest = {k: v for k, v in SD_SCHEDULE.items() if k != "set_alpha_to_one"}
    assert Denoiser.from_config({**rest, "_class_name": "DDIMScheduler"}).alpha(-1).item() == 1
    pndm = Denoiser.from_config({**rest, "_class_name": "PNDMScheduler"})
    assert pndm.alpha(-1).item() == pndm.alpha(0).item() < 1


def test_zero_terminal_snr() -> None:
    denoiser = Denoiser.from_config(SD_SCHEDULE, "v_prediction", zero_terminal_snr=True)
    assert denoiser.alphas_cumprod[-1] == 0 and denoiser.snr(999).item() == 0
    assert denoiser.alphas_cumprod[0].item() == pytest.approx(sd().alphas_cumprod[0].item(), abs=1e-12)
    with pytest.raises(UserError, match="zero terminal SNR"):
        Denoiser.from_config(SD_SCHEDULE, "epsilon", zero_terminal_snr=True)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample", "flow"])
def test_no_division_by_alpha_where_it_is_zero(prediction: str) -> None:
    denoiser = Denoiser.from_config(SD_SCHEDULE, prediction, zero_terminal_snr=True)
    x0, noise = latents(dtype=torch.float32), latents(seed=1, dtype=torch.float32)
    x = denoiser.add_noise(x0, noise, 999)
    torch.testing.assert_close(x, noise)
    output = denoiser.target(x0, noise, 999).requires_grad_()
    torch.testing.assert_close(denoiser.target_from_xt(x0, x, 999), output)
    torch.testing.assert_close(denoiser.to_x0(output, x, 999), x0)
    torch.testing.assert_close(denoiser.to_eps(output, x, 999), noise)
    for eta in (0.0, 1.0):
        step = denoiser.ddim_step(output, x, 999, 949, eta, noise)
        assert step.sample.isfinite().all() and step.std.isfinite().all()
        (grad,) = torch.autograd.grad(step.mean.sum(), output)
        assert grad.isfinite().all() and grad.abs().sum() > 0
    assert denoiser.invert(lambda x, t: output, x0, torch.tensor([501, 999])).isfinite().all()


@pytest.mark.parametrize(
    ("config", "prediction", "words"),
    [
        ({"beta_schedule": "scaled_lineer"}, None, "did you mean 'scaled_linear'"),
        ({"trained_betas": [0.1, 0.2]}, None, "num_train_timesteps 1000"),
        ({}, "v_predictions", "did you mean 'v_prediction'"),
    ],
)
def test_bad_configs_are_refused(config: dict[str, object], prediction: str | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Denoiser.from_config(config, prediction)


# -- conversions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conversions_in_every_direction(prediction: str, dtype: torch.dtype) -> None:
    denoiser = make(prediction)
    t = T4 if prediction != "flow" else torch.tensor([20, 399, 749, 998])  # at 999 flow holds no signal
    x0, noise = latents(dtype=dtype), latents(seed=1, dtype=dtype)
    x = denoiser.add_noise(x0, noise, t)
    alpha, sigma = denoiser.alpha(t).to(dtype), denoiser.sigma(t).to(dtype)
    torch.testing.assert_close(x, alpha * x0 + sigma * noise, rtol=1e-6, atol=1e-6)
    v = noise - x0 if prediction == "flow" else alpha * noise - sigma * x0
    expected = {"epsilon": noise, "v_prediction": v, "sample": x0, "flow": v}[prediction]
    output = denoiser.target(x0, noise, t)
    tolerance = {"rtol": 2e-4, "atol": 2e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(denoiser.target_from_xt(x0, x, t), output, **tolerance)
    torch.testing.assert_close(denoiser.from_x0(x0, x, t), output, **tolerance)
    torch.testing.assert_close(denoiser.from_eps(noise, x, t), output, **tolerance)
    torch.testing.assert_close(denoiser.to_x0(output, x, t), x0, **tolerance)
    torch.testing.assert_close(denoiser.to_eps(output, x, t), noise, **tolerance)
    torch.testing.assert_close(denoiser.to_v(output, x, t), v, rtol=2e-5, atol=2e-5 if dtype == torch.float32 else 1e-6)


@pytest.mark.parametrize("prediction", KINDS)
def test_low_precision_is_raised_to_fp32(prediction: str) -> None:
    denoiser, x0 = make(prediction), latents(dtype=torch.bfloat16)
    noise = latents(seed=1, dtype=torch.bfloat16)
    x = denoiser.add_noise(x0, noise, T4)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, denoiser.add_noise(x0.float(), noise.float(), T4))
    out = noise.to(torch.bfloat16)
    for convert in (denoiser.to_x0, denoiser.to_eps, denoiser.to_v, denoiser.target_from_xt):
        torch.testing.assert_close(convert(out, x0, T4 - 1), convert(out.float(), x0.float(), T4 - 1))
    assert denoiser.target(x0, noise, T4).dtype == torch.float32


def test_network_that_returns_its_input() -> None:
    denoiser, z = sd(), latents(dtype=torch.float32)
    torch.testing.assert_close(denoiser.to_x0(z, z, 999), 0.03417 * z, rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(denoiser.to_x0(z, z, 399), 0.37139 * z, rtol=2e-5, atol=1e-6)
    assert denoiser.to_x0(z, denoiser.sigma(625) * z, 625).abs().max() == 0


def test_v_target_agrees_with_diffusers() -> None:
    x0, noise, theirs = latents(dtype=torch.float32), latents(seed=1, dtype=torch.float32), ddim_scheduler()
    torch.testing.assert_close(sd("v_prediction").target(x0, noise, T4), theirs.get_velocity(x0, noise, T4))
    torch.testing.assert_close(sd().add_noise(x0, noise, T4), theirs.add_noise(x0, noise, T4))


def test_flow_levels_agree_with_diffusers() -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = Denoiser.from_config(theirs.config)
    assert ours.prediction == "flow"
    t = torch.arange(1000)
    torch.testing.assert_close(ours.sigma(t).flatten(), theirs.sigmas[:1000].flip(0), rtol=1e-6, atol=1e-6)
    assert ours.sigma(-1).item() == 0 and ours.alpha(999).item() == 0
    plain = Denoiser.from_config({}, "flow")
    assert plain.sigma(499).item() == pytest.approx(0.5) and plain.sigma(0).item() == pytest.approx(0.001)


@pytest.mark.parametrize("prediction", KINDS)
def test_error_scale_between_parametrisations(prediction: str) -> None:
    denoiser, t = make(prediction), torch.tensor([20, 399, 749, 998])
    x, a, b = latents(), latents(seed=1), latents(seed=2)
    own = ((a - b) ** 2).flatten(1).mean(1)
    eps = ((denoiser.to_eps(a, x, t) - denoiser.to_eps(b, x, t)) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(denoiser.eps_error_scale(t).double() * own, eps, rtol=1e-5, atol=0)


def test_error_scale_golden() -> None:
    v = Denoiser.from_config({"trained_betas": [0.7], "num_train_timesteps": 1}, "v_prediction")
    assert 1 / v.eps_error_scale(0).item() == pytest.approx(3.3333, abs=1e-4)  # err_v / err_eps at a = .3
    assert Denoiser.from_config({}, "flow").eps_error_scale(399).item() == pytest.approx(0.36)  # s = .4
    sds = sd("v_prediction")
    assert 1 / sds.eps_error_scale(999).item() == pytest.approx(214.6, abs=0.05)
    assert 1 / sds.eps_error_scale(0).item() == pytest.approx(1.0009, abs=1e-4)


def test_guidance_convention() -> None:
    c, u = latents(), latents(seed=1)
    assert torch.equal(guide(c, u, 0), u)
    torch.testing.assert_close(guide(c, u, 1), c)
    torch.testing.assert_close(guide(c, u, 7.5), c + 6.5 * (c - u))
    denoiser, x = sd("v_prediction"), latents(seed=2)
    in_v = denoiser.to_x0(guide(c, u, 4), x, T4)
    torch.testing.assert_close(in_v, guide(denoiser.to_x0(c, x, T4), denoiser.to_x0(u, x, T4), 4))


# -- time grids --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 7, 10, 20, 50, 64, 999])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_agree_with_diffusers(n: int, spacing: str) -> None:
    theirs = ddim_scheduler(timestep_spacing=spacing)
    theirs.set_timesteps(n)
    ours = sd().timesteps(n, spacing)
    assert ours.dtype == torch.int64 and ours.tolist() == theirs.timesteps.tolist()


def test_timesteps_golden() -> None:
    denoiser = sd()
    assert denoiser.timesteps(20).tolist() == list(range(951, 0, -50))
    assert denoiser.timesteps(4, "trailing").tolist() == [999, 749, 499, 249]
    assert denoiser.timesteps(1000).tolist() == list(range(999, -1, -1))  # no room for the offset
    for n in (0, 1001):
        with pytest.raises(UserError, match="between 1 and 1000"):
            denoiser.timesteps(n)
    with pytest.raises(UserError, match="did you mean 'leading'"):
        denoiser.timesteps(4, "leadin")


# -- batches, randomness -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", KINDS)
def test_batch_is_a_loop_of_singles(prediction: str) -> None:
    denoiser = make(prediction)
    t, s = torch.tensor([20, 399, 749, 998]), torch.tensor([-1, 299, 0, 501])
    x, a, noise = (latents(seed=i, dtype=torch.float32) for i in range(3))
    whole = denoiser.ddim_step(a, x, t, s, 0.5, noise)
    forms = (denoiser.to_x0, denoiser.to_eps, denoiser.to_v, denoiser.from_eps, denoiser.target_from_xt)
    for i in range(4):
        one = slice(i, i + 1)
        alone = denoiser.ddim_step(a[one], x[one], int(t[i]), int(s[i]), 0.5, noise[one])
        assert torch.equal(whole.sample[one], alone.sample) and torch.equal(whole.std[one], alone.std)
        assert torch.equal(denoiser.add_noise(x, noise, t)[one], denoiser.add_noise(x[one], noise[one], int(t[i])))
        assert torch.equal(denoiser.target(x, noise, t)[one], denoiser.target(x[one], noise[one], int(t[i])))
        for form in forms:
            assert torch.equal(form(a, x, t)[one], form(a[one], x[one], int(t[i])))


def test_no_global_randomness() -> None:
    torch.manual_seed(3)
    np.random.seed(3)
    before, np_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    denoiser, x = sd(), latents()
    net = Gaussian(denoiser)
    denoiser.sample(net, x, denoiser.timesteps(3), 1.0, [x] * 3)
    denoiser.invert(net, x, 3, eta=0.1, noises=[x] * 3, renoise=1)
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], np_before)
