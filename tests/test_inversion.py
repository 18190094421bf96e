"""DDIM chains and their inversion in both time conventions, against golden values, closed forms and diffusers."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMInverseScheduler
from tiny import SD_SCHEDULE, ddim_scheduler
from torch import Tensor
from toys import KINDS, Gaussian, latents, make, sd

from diffalign.denoiser import reached, stop_exactly
from diffalign.errors import UserError

# -- sampling and inversion --------------------------------------------------------------------------------------------


def test_sampler_agrees_with_a_diffusers_loop() -> None:
    denoiser, theirs = sd(), ddim_scheduler()
    theirs.set_timesteps(10)
    predict = lambda x, t: torch.tanh(x) * (t.view(-1, 1, 1, 1) / 1000)  # noqa: E731
    x = start = latents(dtype=torch.float32)
    for t in theirs.timesteps:
        x = theirs.step(predict(x, t.expand(4)), t, x).prev_sample
    trace: list[Tensor] = []
    found = denoiser.sample(predict, start, denoiser.timesteps(10), trace=trace)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)
    assert len(trace) == 10 and torch.equal(trace[-1], found)
    # a_final = a_0 there: with a_final = 1 the last level makes a difference
    to_one = sd(set_alpha_to_one=True)
    torch.testing.assert_close(to_one.sample(predict, start, to_one.timesteps(10), last=0), found)
    assert not torch.allclose(to_one.sample(predict, start, to_one.timesteps(10)), found, atol=1e-3)


def test_stochastic_sampler_uses_the_given_noise() -> None:
    denoiser = sd()
    noises = [latents(seed=10 + k) for k in range(5)]
    x, times = latents(), denoiser.timesteps(5)
    found = denoiser.sample(lambda x, t: x, x, times, eta=1.0, noises=noises, last=0)
    for k, (t, s) in enumerate([(801, 601), (601, 401), (401, 201), (201, 1), (1, 0)]):
        x = denoiser.ddim_step(x, x, t, s, 1.0, noises[k]).sample
    torch.testing.assert_close(found, x)


def test_inversion_grids() -> None:
    denoiser = sd()
    levels, told = denoiser.inversion_grid(10, "source")
    assert levels.tolist() == list(range(1, 1000, 100)) and told.tolist() == [-99, *range(1, 900, 100)]
    levels, told = denoiser.inversion_grid(10)
    assert levels.tolist() == told.tolist() == list(range(1, 1000, 100))
    levels, told = denoiser.inversion_grid(5, "source")
    assert told.tolist() == [-199, 1, 201, 401, 601] and levels.tolist() == [1, 201, 401, 601, 801]
    with pytest.raises(UserError, match="'sorce' is not known"):
        denoiser.inversion_grid(5, "sorce")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("n", "convention", "drawn", "level", "steps"),
    [
        (10, "source", [0, 2, 101, 102, 402, 802, 999], [1, 101, 101, 201, 501, 901, 901], [1, 2, 2, 3, 6, 10, 10]),
        (10, "target", [0, 2, 101, 102, 402, 802, 999], [-1, 1, 1, 101, 401, 801, 901], [0, 1, 1, 2, 5, 9, 10]),
        (5, "source", [0, 2, 402, 802], [1, 201, 601, 801], [1, 2, 4, 5]),
    ],
)
def test_compatible_stops(n: int, convention: str, drawn: list[int], level: list[int], steps: list[int]) -> None:
    levels, told = sd().inversion_grid(n, convention)  # type: ignore[arg-type]
    mask = told < torch.tensor(drawn)[:, None]
    assert reached(levels, mask).tolist() == level
    assert mask.sum(1).tolist() == steps


def test_constant_predictor_is_forward_noising() -> None:
    denoiser, x0, e = sd(), latents(), latents(seed=1)
    for convention in ("source", "target"):
        trace: list[Tensor] = []
        denoiser.invert(lambda x, t: e, x0, 10, convention, 1.0, trace=trace)  # type: ignore[arg-type]
        for level, x in zip(range(1, 1000, 100), trace, strict=True):
            assert (x - denoiser.add_noise(x0, e, level)).abs().max() < 5e-15
    # starting from a_0 instead, the implied noise is off
    x = denoiser.invert(lambda x, t: e, x0, torch.arange(1, 502, 100))
    implied = (x - denoiser.alpha(501) * x0) / denoiser.sigma(501)
    assert 0.02 < (implied - e).abs().max() < 0.15


@pytest.mark.parametrize("prediction", KINDS)
@pytest.mark.parametrize("convention", ["source", "target"])
def test_constant_noise_in_any_parametrisation(prediction: str, convention: str) -> None:
    """A network whose every prediction says the true noise at the told level of the current latent."""
    # an x0 network says nothing about the noise of a clean image: there the start is a_0
    denoiser = make("flow") if prediction == "flow" else sd(prediction, set_alpha_to_one=prediction != "sample")
    x0, e, levels = latents(), latents(seed=1), torch.tensor([101, 201, 501])
    x = denoiser.invert(lambda x, t: denoiser.from_eps(e, x, t), x0, levels, convention)  # type: ignore[arg-type]
    if prediction == "sample":
        x0 = (x0 - denoiser.sigma(-1).double() * e) / denoiser.alpha(-1).double()
    torch.testing.assert_close(x, denoiser.add_noise(x0, e, 501), rtol=1e-6, atol=1e-6)


ROUND_TRIP = [
    ("source", 0, (), -0.278, -0.0378),
    ("target", 0, (), -0.097, -0.0080),
    ("target", 1, (0, 1), -0.060, -0.0041),
    ("source", 1, (0, 1), -0.262, -0.0342),
]


def round_trip(n: int, convention: str, prediction: str = "epsilon", **options: object) -> float:
    denoiser = sd(prediction, set_alpha_to_one=True)
    net, x0 = Gaussian(denoiser), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    x = denoiser.invert(net, x0, n, convention, 1.0, **options)  # type: ignore[arg-type]
    return (denoiser.sample(net, x, denoiser.timesteps(n)) - x0).item()


@pytest.mark.parametrize(("convention", "renoise", "average", "ten", "hundred"), ROUND_TRIP)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_round_trip_on_gaussian_data(
    convention: str, renoise: int, average: tuple[int, ...], ten: float, hundred: float, prediction: str
) -> None:
    options = {"renoise": renoise, "average": average}
    assert round_trip(10, convention, prediction, **options) == pytest.approx(ten, abs=5.1e-4)
    assert round_trip(100, convention, prediction, **options) == pytest.approx(hundred, abs=5.1e-5)


def test_renoise_converges_to_the_exact_inverse() -> None:
    for k, value, tolerance in [(0, 0.0973, 5e-5), (1, 0.0220, 5e-5), (2, 0.00519, 5e-6), (5, 1.0e-4, 5e-6)]:
        assert abs(round_trip(10, "target", renoise=k)) == pytest.approx(value, abs=tolerance)
    assert abs(round_trip(10, "target", renoise=20)) == pytest.approx(1.7e-11, rel=0.05)
    assert abs(round_trip(10, "target", renoise=100)) < 5e-15
    # averaging only the last estimate is the last iterate
    assert round_trip(10, "target", renoise=2, average=(2,)) == pytest.approx(round_trip(10, "target", renoise=2))
    with pytest.raises(ValueError, match="among the estimates"):
        round_trip(10, "target", renoise=1, average=(2,))


def test_fine_inversion_follows_the_exact_flow() -> None:
    denoiser = sd(set_alpha_to_one=True)
    x = denoiser.invert(Gaussian(denoiser), torch.ones(1, 1, 1, 1, dtype=torch.float64), 1000, "target", 1.0)
    alpha, sigma = denoiser.alpha(999).item(), denoiser.sigma(999).item()
    assert x.item() == pytest.approx(math.sqrt(alpha**2 * 0.49 + sigma**2) / 0.7, rel=5e-3)


def test_inversion_agrees_with_diffusers() -> None:
    predict = lambda x, t: torch.tanh(x) * (t.view(-1, 1, 1, 1) / 1000)  # noqa: E731
    for to_one in (False, True):
        theirs = DDIMInverseScheduler(**{**SD_SCHEDULE, "clip_sample": False, "set_alpha_to_one": to_one})
        theirs.set_timesteps(10)
        x = x0 = latents(dtype=torch.float32)
        for t in theirs.timesteps:
            x = theirs.step(predict(x, t.expand(4)), int(t), x).prev_sample
        found = sd(set_alpha_to_one=to_one).invert(predict, x0, 10)
        torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)


def test_initial_alpha_is_the_signal_share_of_the_clean_image() -> None:
    a_0, x0, e = float(sd().alphas_cumprod[0]), latents(), latents(seed=1)
    for convention in ("source", "target"):
        by_config = sd().invert(lambda x, t: e, x0, 5, convention)  # type: ignore[arg-type]
        by_value = sd(set_alpha_to_one=True).invert(lambda x, t: e, x0, 5, convention, a_0)  # type: ignore[arg-type]
        torch.testing.assert_close(by_value, by_config, rtol=1e-12, atol=1e-12)


def test_times_told_to_the_network() -> None:
    denoiser, x0 = sd(), latents(1)
    for convention, expected in [("source", [-99, *range(1, 900, 100)]), ("target", [*range(1, 1000, 100)])]:
        net = Gaussian(denoiser)
        denoiser.invert(net, x0, 10, convention)  # type: ignore[arg-type]
        assert [int(t) for t in net.times] == expected
    net = Gaussian(denoiser)
    denoiser.invert(net, x0, torch.tensor([5, 10]), "source")
    assert [int(t) for t in net.times] == [-1, 5]


@pytest.mark.parametrize("convention", ["source", "target"])
@pytest.mark.parametrize("mode", ["stops", "exact", "holes"])
def test_ragged_inversion_is_a_loop_of_singles(convention: str, mode: str) -> None:
    denoiser, x0 = sd(), latents(5)
    net, drawn = Gaussian(denoiser), torch.tensor([0, 2, 402, 802, 999])
    levels, times = denoiser.inversion_grid(10, convention)  # type: ignore[arg-type]
    told: Tensor | None = times
    mask = times < drawn[:, None]
    if mode == "exact":
        levels, mask = stop_exactly(levels, drawn)
        told = None
        assert reached(levels, mask).tolist() == drawn.tolist()
    if mode == "holes":
        mask = torch.rand(5, 10, generator=torch.Generator().manual_seed(0)) < 0.5
        told = None
    noises = [latents(5, seed=20 + k) for k in range(levels.shape[-1])]
    options = {"renoise": 1, "average": (0, 1), "eta": 0.1}
    found = denoiser.invert(net, x0, levels, convention, mask=mask, times=told, noises=noises, **options)  # type: ignore[arg-type]
    for i in range(5):
        row = (levels if levels.ndim == 1 else levels[i])[mask[i]]
        alone = denoiser.invert(
            net,
            x0[i : i + 1],
            row,
            convention,  # type: ignore[arg-type]
            times=None if told is None else told[mask[i]],
            noises=[n[i : i + 1] for n, taken in zip(noises, mask[i], strict=True) if taken],
            **options,  # type: ignore[arg-type]
        )
        torch.testing.assert_close(found[i : i + 1], alone, rtol=1e-12, atol=1e-12)
    if not mask[0].any():
        assert torch.equal(found[0], x0[0])


def test_ragged_inversion_skips_steps_that_nobody_takes() -> None:
    net = Gaussian(sd())
    levels, times = sd().inversion_grid(10)
    sd().invert(net, latents(2), levels, mask=times < torch.tensor([[2], [102]]))
    assert [t[0].item() for t in net.times] == [1, 101]


def test_stop_exactly() -> None:
    levels, mask = stop_exactly(torch.tensor([1, 101, 201]), torch.tensor([0, 101, 150, 999]))
    taken = [row[m].tolist() for row, m in zip(levels, mask, strict=True)]
    assert taken == [[0], [1, 101], [1, 101, 150], [1, 101, 201, 999]]


def test_inversion_noise_is_a_share_of_the_ddim_noise() -> None:
    x0, ones = torch.zeros(1, 1, 1, 1), [torch.ones(1, 1, 1, 1)] * 10
    trace: list[Tensor] = []
    zero = lambda x, t: torch.zeros_like(x)  # noqa: E731
    sd().invert(zero, x0, 10, "source", eta=0.1, noises=ones, trace=trace)
    moved = {}
    for level, before, after in zip(range(1, 1000, 100), [x0, *trace], trace, strict=False):
        origin = level - 100 if level > 1 else -1
        moved[level] = (after - sd().alpha(level) / sd().alpha(origin) * before).item()
    for level, std in [(1, 0.0021), (101, 0.0041), (501, 0.053), (901, 0.078)]:
        assert moved[level] == pytest.approx(std, rel=0.03)
    with pytest.raises(ValueError, match="needs noises"):
        sd().invert(zero, x0, 10, eta=0.1)


def test_inversion_carries_no_gradient_and_sampling_does() -> None:
    denoiser, weight = sd(), torch.ones((), requires_grad=True)
    predict = lambda x, t: weight * x  # noqa: E731
    assert not denoiser.invert(predict, latents(), 4).requires_grad
    (grad,) = torch.autograd.grad(denoiser.sample(predict, latents(), denoiser.timesteps(4)).sum(), weight)
    assert grad.abs() > 0
