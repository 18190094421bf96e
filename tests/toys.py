"""Closed-form material for tests of the mathematics: schedules, seeded latents, the best network of Gaussian data."""

from __future__ import annotations

import torch
from tiny import SD_SCHEDULE
from torch import Tensor

from diffalign.denoiser import Denoiser

VP = ("epsilon", "v_prediction", "sample")
KINDS = (*VP, "flow")


def sd(prediction: str = "epsilon", **options: object) -> Denoiser:
    return Denoiser.from_config({**SD_SCHEDULE, **options}, prediction)


def make(prediction: str) -> Denoiser:
    return Denoiser.from_config({"shift": 3.0} if prediction == "flow" else SD_SCHEDULE, prediction)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def latents(n: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return normal(n, 4, 3, 5, seed=seed, dtype=dtype)


T4 = torch.tensor([20, 399, 749, 999])


class Gaussian:
    """Data N(0, s^2 I): the optimal network in any parametrisation, and the exact ODE map from the clean image."""

    def __init__(self, denoiser: Denoiser, s: float = 0.7) -> None:
        self.denoiser, self.s = denoiser, s
        self.times: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.times.append(t)
        alpha, sigma = (c[:, None, None, None] for c in self.denoiser._levels(t, x.device))
        eps = sigma / (alpha**2 * self.s**2 + sigma**2) * x
        return self.denoiser.from_eps(eps, x, t)
