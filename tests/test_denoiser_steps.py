"""DDIM steps, the flow SDE and their log-densities against golden values, the DDPM posterior and diffusers."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler
from tiny import SD_SCHEDULE, ddim_scheduler
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from toys import KINDS, T4, VP, latents, make, normal, sd

from diffalign.denoiser import Denoiser, flow_sde_step, log_prob

# -- DDIM step and its log-density -------------------------------------------------------------------------------------

SIGMA_W = [  # t, p, sigma_t, w_t at eta = 1
    *[(951, 901, 0.6444, 0.364), (851, 801, 0.6029, 0.303), (751, 701, 0.5576, 0.256), (651, 601, 0.5087, 0.223)],
    *[(551, 501, 0.4565, 0.202), (501, 451, 0.4293, 0.196), (451, 401, 0.4016, 0.194), (351, 301, 0.3442, 0.202)],
    *[(251, 201, 0.2836, 0.240), (151, 101, 0.2144, 0.376), (101, 51, 0.1673, 0.651), (51, 1, 0.0406, 14.75)],
    *[(1, 0, 0.0206, 0.503), (999, 949, 0.6630, 0.398), (499, 449, 0.4282, 0.196), (99, 49, 0.1649, 0.674)],
    *[(49, 0, 0.0289, 28.73), (981, 961, 0.4545, 0.131), (501, 481, 0.2948, 0.071), (101, 81, 0.1428, 0.163)],
    *[(61, 41, 0.1194, 0.287), (41, 21, 0.0999, 0.517), (21, 1, 0.0395, 5.36)],
]


def slope(denoiser: Denoiser, t: int | Tensor, p: int | Tensor, eta: float = 1.0) -> tuple[Tensor, Tensor]:
    """d mean / d eps_hat and std of a step, by two evaluations of the linear map."""
    n = 1 if isinstance(t, int) else len(t)
    zero = torch.zeros(n, 1, 1, 1, dtype=torch.float64)
    mean0, std = denoiser.transition(zero, zero, t, p, eta)
    mean1, _ = denoiser.transition(zero + 1, zero, t, p, eta)
    return (mean1 - mean0).flatten(), std.flatten()


def test_step_std_and_weight_table() -> None:
    t, p, sigma, w = (torch.tensor(column) for column in zip(*SIGMA_W, strict=True))
    a, std = slope(sd(), t, p)
    assert (a < 0).all()
    torch.testing.assert_close(std.float(), sigma, rtol=0, atol=6e-5)
    torch.testing.assert_close((a**2 / (2 * std**2)).float(), w, rtol=5e-4, atol=6e-4)


def test_pair_margin_weight_table() -> None:
    ratio = [0.853, 0.814, 0.778, 0.745, 0.716, 0.689, 0.667, 0.649, 0.635, 0.626]
    ratio += [0.623, 0.626, 0.636, 0.657, 0.693, 0.754, 0.868, 1.141, 5.431, 1.003]
    t = sd().timesteps(20)
    a, std = slope(sd(), t, (t - 50).clamp(min=0))
    torch.testing.assert_close((a.abs() / std).float(), torch.tensor(ratio), rtol=0, atol=6e-4)


def test_eta_one_is_the_ddpm_posterior() -> None:
    denoiser = sd()
    t, s = torch.tensor([999, 501, 101, 51]), torch.tensor([949, 451, 51, 1])
    x0, noise = latents(), latents(seed=1)
    x = denoiser.add_noise(x0, noise, t)
    mean, std = denoiser.transition(noise, x, t, s, eta=1.0)
    bars = denoiser.alphas_cumprod
    a_t, a_s = bars[t].view(-1, 1, 1, 1), bars[s].view(-1, 1, 1, 1)
    beta = 1 - a_t / a_s  # Bayes for x_s given x_t and x0, with one merged step
    expected = (a_s.sqrt() * beta * x0 + (a_t / a_s).sqrt() * (1 - a_s) * x) / (1 - a_t)
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(std, ((1 - a_s) / (1 - a_t) * beta).sqrt(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", VP)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("to_one", [False, True])
def test_step_agrees_with_ddim_scheduler(prediction: str, eta: float, to_one: bool) -> None:
    theirs = ddim_scheduler(prediction_type=prediction, set_alpha_to_one=to_one)
    theirs.set_timesteps(20)
    denoiser = sd(prediction, set_alpha_to_one=to_one)
    theirs.alphas_cumprod = denoiser.alphas_cumprod  # theirs are fp32 and lose digits in 1 - a_t / a_s
    theirs.final_alpha_cumprod = torch.ones(()) if to_one else denoiser.alphas_cumprod[0]
    x, output, noise = (latents(seed=i) for i in range(3))
    for t in (951, 501, 51, 1):
        expected = theirs.step(output, t, x, eta=eta, variance_noise=noise if eta else None).prev_sample
        found = denoiser.ddim_step(output, x, t, t - 50, eta, noise).sample
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", VP)
def test_eta_one_agrees_with_ddpm_scheduler(prediction: str) -> None:
    rest = {k: v for k, v in SD_SCHEDULE.items() if k != "set_alpha_to_one"}
    theirs = DDPMScheduler(**{**rest, "prediction_type": prediction, "clip_sample": False})
    theirs.set_timesteps(20)
    theirs.alphas_cumprod = sd().alphas_cumprod
    x, output = latents(), latents(seed=1)
    for t in (951, 501, 51):
        draw = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype)
        expected = theirs.step(output, t, x, generator=torch.Generator().manual_seed(5)).prev_sample
        found = sd(prediction).ddim_step(output, x, t, t - 50, 1.0, draw).sample
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", KINDS)
def test_perfect_prediction_moves_along_the_path(prediction: str) -> None:
    denoiser, t = make(prediction), torch.tensor([999, 500, 100, 20])
    x0, noise = latents(), latents(seed=1)
    x = denoiser.add_noise(x0, noise, t)
    s = torch.tensor([900, 0, 99, -1])
    step = denoiser.ddim_step(denoiser.target(x0, noise, t), x, t, s)
    torch.testing.assert_close(step.sample, denoiser.add_noise(x0, noise, s))
    assert (step.std == 0).all()


def test_parametrisations_agree_on_a_step() -> None:
    x, eps, t, s = latents(), latents(seed=1), T4, torch.tensor([-1, 349, 700, 998])
    means = [sd(p).transition(sd(p).from_eps(eps, x, t), x, t, s, eta=0.7)[0] for p in VP]
    torch.testing.assert_close(means[1], means[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(means[2], means[0], rtol=1e-9, atol=1e-9)


def test_terminal_step_clamped_to_zero_has_a_density() -> None:
    denoiser = sd(set_alpha_to_one=True)
    x, eps, noise = latents(), latents(seed=1), latents(seed=2)
    final = denoiser.ddim_step(eps, x, 1, 1 - 50, 1.0, noise)
    assert (final.std == 0).all()
    with pytest.raises(ValueError, match="deterministic"):
        denoiser.log_prob(final.sample, final.mean, final.std)
    clamped = denoiser.ddim_step(eps, x, 1, max(1 - 50, 0), 1.0, noise)
    assert clamped.std.item() == pytest.approx(0.0206, abs=5e-5)
    assert denoiser.log_prob(clamped.sample, clamped.mean, clamped.std).isfinite().all()


def test_steps_are_finite_without_fp64() -> None:
    denoiser = Denoiser.from_config(SD_SCHEDULE, "v_prediction", zero_terminal_snr=True)
    denoiser._tables[torch.device("cpu")] = denoiser._table.float()  # as on devices that have no fp64
    s = torch.arange(-1, 989)
    x = normal(len(s), 1, 1, 1, dtype=torch.float32)
    for t in range(989, 1000):
        mean, std = denoiser.transition(x, x, t, s, eta=1.0)
        assert mean.isfinite().all() and std.isfinite().all()


def test_noise_is_asked_for() -> None:
    with pytest.raises(ValueError, match="needs noise"):
        sd().ddim_step(latents(), latents(), 501, 451, eta=1.0)


def test_log_prob_is_the_mean_gaussian_density_with_a_detached_target() -> None:
    denoiser, x = sd(), latents()
    eps = latents(seed=1).requires_grad_()
    t = torch.tensor([951, 501, 101, 51])
    step = denoiser.ddim_step(eps, x, t, t - 50, 1.0, latents(seed=2))
    found = denoiser.log_prob(step.sample, step.mean, step.std)
    expected = Normal(step.mean, step.std).log_prob(step.sample).flatten(1).mean(1)
    assert found.shape == (4,)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    # d l / d eps = (x_p - mean) / std^2 * slope / D: nothing through the sample, which would cancel it
    (grad,) = torch.autograd.grad(found.sum(), eps)
    a, _ = slope(denoiser, t, t - 50)
    wanted = (step.sample - step.mean) / step.std**2 * a.view(-1, 1, 1, 1) / x[0].numel()
    torch.testing.assert_close(grad, wanted.detach(), rtol=1e-8, atol=1e-10)
    assert grad.abs().max() > 1e-3


def test_perturbed_noise_costs_the_weight() -> None:
    """A perturbation d of eps_hat moves the KL of a step by w_t mean(d^2)."""
    x, eps, d = latents(), latents(seed=1), latents(seed=2)
    mean, std = sd().transition(eps, x, 501, 451, 1.0)
    other, _ = sd().transition(eps + d, x, 501, 451, 1.0)
    kl = kl_divergence(Normal(mean, std), Normal(other, std)).flatten(1).mean(1)
    torch.testing.assert_close(kl, 0.196 * (d**2).flatten(1).mean(1), rtol=3e-3, atol=0)


# -- flow SDE ----------------------------------------------------------------------------------------------------------

FLOW_S = [1, 0.9643, 0.9231, 0.875, 0.8182, 0.75, 0.6667, 0.5625, 0.4286, 0.25, 0]
FLOW_STD = [0.700, 0.738, 0.532, 0.442, 0.388, 0.350, 0.320, 0.291, 0.256, 0.202]
FLOW_VARIANCE = [1.007, 0.992, 0.899, 0.800, 0.703, 0.613, 0.541, 0.507, 0.558, 0.801]
EULER_VARIANCE = [0.930, 0.855, 0.776, 0.694, 0.610, 0.532, 0.467, 0.437, 0.482, 0.694]


def flow_levels() -> Tensor:
    denoiser = Denoiser.from_config({"shift": 3.0}, "flow")
    s = denoiser.sigma(denoiser.timesteps(10, "trailing")).flatten()
    return torch.cat([s, s.new_zeros(1)]).double()


@pytest.mark.parametrize(("level", "variances"), [(0.7, FLOW_VARIANCE), (0.0, EULER_VARIANCE)])
def test_flow_sde_on_gaussian_data(level: float, variances: list[float]) -> None:
    levels, one = flow_levels(), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(levels.float(), torch.tensor(FLOW_S), rtol=0, atol=6e-5)
    variance = 1.0
    for k in range(10):
        s, s_next = levels[k : k + 1], levels[k + 1 : k + 2]
        # the exact velocity of N(0, 1) data is linear: v = (2 s - 1) / (s^2 + (1-s)^2) x
        v = (2 * s - 1) / (s**2 + (1 - s) ** 2) * one
        step = flow_sde_step(v, one, s, s_next, level, one)
        torch.testing.assert_close(step.sample, step.mean + step.std)
        if level:
            assert step.std.item() == pytest.approx(FLOW_STD[k], abs=6e-4)
        variance = step.mean.item() ** 2 * variance + step.std.item() ** 2
        assert variance == pytest.approx(variances[k], abs=1.1e-3)


def test_flow_sde_identities() -> None:
    x, v, noise = latents(), latents(seed=1), latents(seed=2)
    one, near = torch.ones(4, dtype=torch.float64), torch.full((4,), 0.93, dtype=torch.float64)
    first = flow_sde_step(v, x, one, near, 0.7, noise)
    torch.testing.assert_close(first.std, torch.full_like(first.std, 0.7))
    torch.testing.assert_close(first.mean, x * (1 - 0.49 / 2) + v * -0.07)
    euler = flow_sde_step(v, x, near, near - 0.1, 0.0, noise)
    torch.testing.assert_close(euler.sample, x - 0.1 * v)
    with pytest.raises(ValueError, match="deterministic"):
        log_prob(euler.sample, euler.mean, euler.std)
    # KL of two policies: (|D|/2) (g (1-s)/(2 s) + 1/g)^2 mean (v - v')^2
    s, other = near, latents(seed=3)
    a, b = (flow_sde_step(u, x, s, s - 0.1, 0.7, noise) for u in (v, other))
    g = 0.7 * math.sqrt(0.93 / 0.07)
    expected = 0.05 * (g * 0.07 / (2 * 0.93) + 1 / g) ** 2 * ((v - other) ** 2).flatten(1).mean(1)
    kl = kl_divergence(Normal(a.mean, a.std), Normal(b.mean, b.std)).flatten(1).mean(1)
    torch.testing.assert_close(kl, expected)
