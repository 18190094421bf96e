"""The noise schedule and every conversion: eps / v / x0 / flow, DDIM step with its log-density, inversion, guidance.

A :class:`Denoiser` knows the forward path x_t = alpha_t x0 + sigma_t noise of a model and what the model's network
predicts. It holds no weights, draws no random number and knows no device: tables are fp64 on the CPU and follow the
latents. Latents are (B, C, H, W); a time is an int or an integer tensor (B,) of table indices 0 (almost clean) to T-1
(noise); any negative time stands for the final level, past index 0. Arithmetic is fp32, or fp64 where the latents are.

Sources: DDIM (arXiv 2010.02502), v-prediction (2202.00512), zero terminal SNR and spacings (2305.08891), rectified flow
(2209.03003), ReNoise (2403.14602), Flow-GRPO's SDE step (2505.05470).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .errors import UserError, nearest

Times = int | Tensor
Predict = Callable[[Tensor, Tensor], Tensor]  # (x (B,C,H,W), time (B,)) -> the network's output (B,C,H,W)
Convention = Literal["target", "source"]
PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")


@dataclass(frozen=True)
class Step:
    """One transition: what was reached (B,C,H,W), its mean (B,C,H,W) and standard deviation (B,1,1,1)."""

    sample: Tensor
    mean: Tensor
    std: Tensor


def guide(cond: Tensor, uncond: Tensor, w: float | Tensor) -> Tensor:
    """Classifier-free guidance ``uncond + w (cond - uncond)``: w = 1 is conditional only, w = 0 unconditional.

    (LCM and others count an extra weight w' = w - 1.) The same in eps, v and x0 when both share x_t and t.
    """
    return uncond + w * (cond - uncond)


def log_prob(sample: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Gaussian log-density of ``sample``, averaged (not summed) over all but the batch: (B,).

    ``sample`` is detached; gradients flow through ``mean`` (and ``std``). A deterministic step (std 0) has no density:
    ValueError on the CPU, nan on other devices, where asking would make them wait.
    """
    if std.device.type == "cpu" and not bool((std > 0).all()):
        raise ValueError("a deterministic step (std 0) has no log-density: sample with eta > 0")
    z = (sample.detach().to(mean.dtype) - mean) / std
    return (-0.5 * z**2 - torch.log(std) - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)


def flow_sde_step(v: Tensor, x: Tensor, s: Tensor, s_next: Tensor, level: float, noise: Tensor) -> Step:
    """One step of Flow-GRPO's SDE from noise level ``s`` to the cleaner ``s_next`` (both (B,), in [0, 1]).

    ``v`` = noise - x0 is the predicted velocity at ``x`` = (1-s) x0 + s noise; ``level`` scales the noise (0: Euler).
    """
    x = _raised(x)
    s, s_next, v = _spread(s, x), _spread(s_next, x), v.to(x.dtype)
    delta = s_next - s
    # at s = 1 the rate is infinite: the schedule's second level takes its place, so that std = level there
    g2 = level**2 * s / (1 - torch.where(s >= 1, s_next, s))
    mean = x * (1 + g2 * delta / (2 * s)) + v * (1 + g2 * (1 - s) / (2 * s)) * delta
    std = torch.sqrt(-g2 * delta)
    return Step(mean + std * noise.to(x.dtype), mean, std)


def rescale_to_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """The schedule shifted and scaled so that the last level holds no signal and the first stays (arXiv 2305.08891)."""
    root = alphas_cumprod.sqrt()
    first, last = root[0].clone(), root[-1].clone()
    return ((root - last) * (first / (first - last))) ** 2


def _alphas_cumprod(config: Mapping[str, Any], steps: int) -> Tensor:
    """(T,) fp64 table of the variance-preserving schedule that a diffusers scheduler config describes."""
    start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    kind, given = str(config.get("beta_schedule", "linear")), config.get("trained_betas")
    if given is not None:
        betas = torch.as_tensor(given, dtype=torch.float64)
    elif kind == "linear":
        betas = torch.linspace(start, end, steps, dtype=torch.float64)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    elif kind == "squaredcos_cap_v2":
        grid = torch.arange(steps + 1, dtype=torch.float64) / steps
        signal = torch.cos((grid + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - signal[1:] / signal[:-1]).clamp(max=0.999)
    else:
        options = ("linear", "scaled_linear", "squaredcos_cap_v2")
        raise UserError(f"the scheduler config has beta_schedule '{kind}'{nearest(kind, options)}")
    if betas.shape != (steps,):
        raise UserError(f"the scheduler config has {betas.numel()} trained_betas but num_train_timesteps {steps}")
    return torch.cumprod(1 - betas, 0)


class Denoiser:
    """The path x_t = alpha_t x0 + sigma_t noise and the network's parametrisation. See the module's text for shapes.

    ``prediction`` is 'epsilon', 'v_prediction' (v = alpha noise - sigma x0), 'sample' (x0) or 'flow' (alpha = 1 - s,
    sigma = s, v = noise - x0). ``alphas`` and ``sigmas`` are fp64 (T+1,): the levels 0..T-1 and, last, the final one,
    which every negative time means.
    """

    def __init__(self, alphas: Tensor, sigmas: Tensor, prediction: str) -> None:
        if prediction not in PREDICTIONS:
            raise UserError(f"prediction type '{prediction}' is not known{nearest(prediction, PREDICTIONS)}")
        if prediction == "epsilon" and not bool((alphas > 0).all()):
            raise UserError(
                "a noise schedule with zero terminal SNR cannot go with an epsilon network, whose output tells nothing"
                " there: use a v_prediction model, or turn the rescaling off"
            )
        self.prediction = prediction
        self.num_timesteps = len(alphas) - 1
        self._table = torch.stack([alphas, sigmas]).double()
        self._tables: dict[torch.device, Tensor] = {}

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], prediction: str | None = None, zero_terminal_snr: bool = False
    ) -> Denoiser:
        """From a diffusers scheduler config (``scheduler.config``, or ``scheduler_config.json`` as a dict).

        Read: the betas, ``prediction_type``, ``rescale_betas_zero_snr``, ``set_alpha_to_one`` (the final level: 1 or
        the table's first), ``shift`` of flow models. x0 is never clipped: ``clip_sample`` is for pixels.
        Raises UserError for what is not known.
        """
        name = str(config.get("_class_name", ""))
        steps = int(config.get("num_train_timesteps", 1000))
        # the config of a scheduler object has no class name, and that of a flow scheduler no prediction type
        is_flow = name.startswith("FlowMatch") or ("shift" in config and "prediction_type" not in config)
        given = str(prediction or ("flow" if is_flow else config.get("prediction_type", "epsilon")))
        given = "flow" if given == "flow_prediction" else given
        if given == "flow":
            s = torch.arange(1, steps + 1, dtype=torch.float64) / steps
            shift = float(config.get("shift") or config.get("flow_shift") or 1.0)
            s = shift * s / (1 + (shift - 1) * s)
            s = torch.cat([s, s.new_zeros(1)])
            return cls(1 - s, s, given)
        bars = _alphas_cumprod(config, steps)
        if zero_terminal_snr or config.get("rescale_betas_zero_snr"):
            bars = rescale_to_zero_terminal_snr(bars)
        to_one = config.get("set_alpha_to_one", name != "PNDMScheduler")  # diffusers' own defaults
        bars = torch.cat([bars, torch.ones_like(bars[:1]) if to_one else bars[:1]])
        return cls(bars.sqrt(), (1 - bars).sqrt(), given)

    # -- levels ------------------------------------------------------------------------------------------------------

    @property
    def alphas_cumprod(self) -> Tensor:
        """(T,) fp64 signal share alpha^2 / (alpha^2 + sigma^2); for eps and v models simply alpha^2."""
        alpha2, sigma2 = self._table[:, :-1] ** 2
        return alpha2 / (alpha2 + sigma2)

    def _levels(self, t: Times, device: torch.device) -> tuple[Tensor, Tensor]:
        """alpha and sigma at ``t``, each (B,), fp64 (fp32 on devices without fp64)."""
        if device not in self._tables:
            table = self._table.float() if device.type == "mps" else self._table
            self._tables[device] = table.to(device)
        alpha, sigma = self._tables[device]
        # an int is filled in on the device: copying it there would wait
        index = t.to(device).reshape(-1) if isinstance(t, Tensor) else torch.full((1,), t, device=device)
        index = index.clamp(min=-1)
        return alpha[index], sigma[index]

    def _at(self, t: Times, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x`` raised to fp32 at least, and alpha, sigma at ``t`` as (B,1,1,1) of its dtype."""
        x = _raised(x)
        alpha, sigma = (_spread(level, x) for level in self._levels(t, x.device))
        return x, alpha, sigma

    def alpha(self, t: Times) -> Tensor:
        """Signal coefficient, fp32 (B,1,1,1), on the device of ``t``."""
        return self._levels(t, _device(t))[0].float().reshape(-1, 1, 1, 1)

    def sigma(self, t: Times) -> Tensor:
        """Noise coefficient, fp32 (B,1,1,1), on the device of ``t``."""
        return self._levels(t, _device(t))[1].float().reshape(-1, 1, 1, 1)

    def snr(self, t: Times) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2, fp32 (B,); 0 at zero terminal SNR."""
        alpha, sigma = self._levels(t, _device(t))
        return ((alpha / sigma) ** 2).float()

    def eps_error_scale(self, t: Times) -> Tensor:
        """What a squared error of the network's own prediction is multiplied by to be one of eps at the same x_t: (B,).

        1 for eps, alpha^2 for v, (1-s)^2 for flow, SNR for x0.
        """
        if self.prediction == "sample":
            return self.snr(t)
        alpha = self._levels(t, _device(t))[0].float()
        return torch.ones_like(alpha) if self.prediction == "epsilon" else alpha**2

    def timesteps(self, n: int, spacing: str = "leading", offset: int = 1) -> Tensor:
        """``n`` descending times, int64 (n,), as diffusers spaces them; ``offset`` (steps_offset) acts on 'leading'."""
        last = self.num_timesteps - 1
        if not 1 <= n <= self.num_timesteps:
            raise UserError(f"the number of sampling steps must be between 1 and {self.num_timesteps}, not {n}")
        if spacing == "leading":
            stride = self.num_timesteps // n
            # n = T leaves no room for the offset
            grid = np.arange(n - 1, -1, -1.0) * stride + min(offset, last - (n - 1) * stride)
        elif spacing == "trailing":
            # the slice guards against one point too many from rounding in arange
            grid = np.round(np.arange(self.num_timesteps, 0, -self.num_timesteps / n))[:n] - 1
        elif spacing == "linspace":
            grid = np.linspace(0, last, n).round()[::-1]
        else:
            known = ("leading", "trailing", "linspace")
            raise UserError(f"timestep spacing '{spacing}' is not known{nearest(spacing, known)}")
        return torch.from_numpy(grid.astype(np.int64))

    # -- forward path and conversions ----------------------------------------------------------------------------------

    def add_noise(self, x0: Tensor, noise: Tensor, t: Times) -> Tensor:
        """x_t = alpha_t x0 + sigma_t noise."""
        x0, alpha, sigma = self._at(t, x0)
        return alpha * x0 + sigma * noise.to(x0.dtype)

    def target(self, x0: Tensor, noise: Tensor, t: Times) -> Tensor:
        """What the network regresses on when x_t was made of ``x0`` and ``noise``."""
        x0, alpha, sigma = self._at(t, x0)
        noise = noise.to(x0.dtype)
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return x0
        return noise - x0 if self.prediction == "flow" else alpha * noise - sigma * x0

    def target_from_xt(self, x0: Tensor, x_t: Tensor, t: Times) -> Tensor:
        """The network's own prediction that says x0 at ``x_t``. Divides by sigma, never by alpha."""
        x, alpha, sigma = self._at(t, x_t)
        x0 = x0.to(x.dtype)
        if self.prediction == "epsilon":
            return (x - alpha * x0) / sigma
        if self.prediction == "sample":
            return x0
        return (x - x0) / sigma if self.prediction == "flow" else (alpha * x - x0) / sigma

    from_x0 = target_from_xt

    def from_eps(self, eps: Tensor, x_t: Tensor, t: Times) -> Tensor:
        """The network's own prediction that says ``eps`` at ``x_t``. Divides by alpha, except for eps itself."""
        x, alpha, sigma = self._at(t, x_t)
        eps = eps.to(x.dtype)
        if self.prediction == "epsilon":
            return eps
        if self.prediction == "sample":
            return (x - sigma * eps) / alpha
        return (eps - x) / alpha if self.prediction == "flow" else (eps - sigma * x) / alpha

    def to_x0(self, output: Tensor, x_t: Tensor, t: Times) -> Tensor:
        """The clean latent that the network's ``output`` at ``x_t`` says. Divides by alpha for eps only."""
        x, alpha, sigma = self._at(t, x_t)
        return self._x0(output, x, alpha, sigma)

    def to_eps(self, output: Tensor, x_t: Tensor, t: Times) -> Tensor:
        """The noise that the network's ``output`` at ``x_t`` says. Divides by sigma for x0 only."""
        x, alpha, sigma = self._at(t, x_t)
        return self._eps(output, x, alpha, sigma)

    def to_v(self, output: Tensor, x_t: Tensor, t: Times) -> Tensor:
        """The velocity of this path: alpha eps - sigma x0, and eps - x0 for flow."""
        x, alpha, sigma = self._at(t, x_t)
        output = output.to(x.dtype)
        if self.prediction == "epsilon":
            return (output - sigma * x) / alpha
        return (alpha * x - output) / sigma if self.prediction == "sample" else output

    def _x0(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        output = output.to(x.dtype)
        if self.prediction == "epsilon":
            return (x - sigma * output) / alpha
        if self.prediction == "sample":
            return output
        return x - sigma * output if self.prediction == "flow" else alpha * x - sigma * output

    def _eps(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        output = output.to(x.dtype)
        if self.prediction == "epsilon":
            return output
        if self.prediction == "sample":
            return (x - alpha * output) / sigma
        return x + alpha * output if self.prediction == "flow" else sigma * x + alpha * output

    # -- sampling ------------------------------------------------------------------------------------------------------

    def transition(self, output: Tensor, x_t: Tensor, t: Times, s: Times, eta: float = 0.0) -> tuple[Tensor, Tensor]:
        """Mean (B,C,H,W) and std (B,1,1,1) of the DDIM step from ``t`` to the level ``s`` (cleaner where eta > 0).

        var = eta^2 (sigma_s / sigma_t)^2 (sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2); eta = 1 is the DDPM posterior.
        """
        x, noisy, clean = _raised(x_t), self._levels(t, x_t.device), self._levels(s, x_t.device)
        alpha, sigma = (_spread(c, x) for c in noisy)
        var = _ddim_variance(noisy, clean, eta)
        # clamped: at eta = 1 rounding makes it -1e-8 on devices without fp64
        direction = (clean[1] ** 2 - var).clamp(min=0).sqrt()
        x0, eps = self._x0(output, x, alpha, sigma), self._eps(output, x, alpha, sigma)
        return _spread(clean[0], x) * x0 + _spread(direction, x) * eps, _spread(var.sqrt(), x)

    def ddim_step(
        self, output: Tensor, x_t: Tensor, t: Times, s: Times, eta: float = 0.0, noise: Tensor | None = None
    ) -> Step:
        """One DDIM step from ``t`` to ``s``; each may differ per sample.

        A negative ``s`` is the final level, as in diffusers. With ``set_alpha_to_one`` that step has std 0: for
        log-probabilities pass 0 instead (``s = max(t - T // n, 0)``). Raises ValueError if eta > 0 and no ``noise``.
        """
        if eta and noise is None:
            raise ValueError("ddim_step with eta > 0 needs noise; transition() gives mean and std alone")
        mean, std = self.transition(output, x_t, t, s, eta)
        sample = mean if noise is None else mean + std * noise.to(mean.dtype)
        return Step(sample, mean, std)

    def log_prob(self, sample: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """See :func:`log_prob`."""
        return log_prob(sample, mean, std)

    def sample(
        self,
        predict: Predict,
        noise: Tensor,
        timesteps: Tensor,
        eta: float = 0.0,
        noises: Sequence[Tensor] | None = None,
        last: int = -1,
        trace: list[Tensor] | None = None,
    ) -> Tensor:
        """The DDIM chain through ``timesteps`` (K,), from ``noise`` at the first to the level ``last`` (B,C,H,W).

        ``noises`` holds K draws, for eta > 0. ``trace`` receives the latents after each step. Gradients flow.
        """
        x = noise
        levels = [int(t) for t in timesteps] + [last]
        for k, (t, s) in enumerate(pairwise(levels)):
            time = torch.full((len(x),), t, device=x.device)
            x = self.ddim_step(predict(x, time), x, time, s, eta, None if noises is None else noises[k]).sample
            if trace is not None:
                trace.append(x)
        return x

    # -- inversion -----------------------------------------------------------------------------------------------------

    def inversion_grid(
        self, n: int, convention: Convention = "target", spacing: str = "leading", offset: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Levels entered (ascending) and the times told to the network, int64 (n,) each.

        'target' (diffusers >= 0.22, prompt-to-prompt, Inversion-DPO): told the level entered. 'source' (diffusers
        <= 0.21.4, hence InPO and SmPO): told the level left, first 1 - T//n, a negative number.
        """
        levels = self.timesteps(n, spacing, offset).flip(0)
        if convention == "target":
            return levels, levels
        _known_convention(convention)
        before = levels[:1] - self.num_timesteps // n
        return levels, torch.cat([before, levels[:-1]])

    @torch.no_grad()
    def invert(
        self,
        predict: Predict,
        x0: Tensor,
        levels: int | Tensor,
        convention: Convention = "target",
        initial_alpha: float | None = None,
        *,
        times: Tensor | None = None,
        mask: Tensor | None = None,
        renoise: int = 0,
        average: Sequence[int] = (),
        eta: float = 0.0,
        noises: Sequence[Tensor] | None = None,
        trace: list[Tensor] | None = None,
    ) -> Tensor:
        """DDIM run backwards, from the clean ``x0`` up through ``levels``; returns the last latents, without gradient.

        ``levels``: a number of steps (the whole :meth:`inversion_grid`), or ascending times (K,) or (B,K). ``times``
        told to the network default to the ``convention``: the level entered, or the level left (-1 at the start).
        ``mask`` (B,K) bool: which steps a sample takes, so that samples stop at levels of their own (see
        :func:`reached`); kept on the CPU it lets steps that nobody takes be skipped. ``initial_alpha`` is the
        alphas_cumprod that x0 itself counts as (None: the config's final level).

        ``renoise`` = K repeats each step K times with the noise estimated at the point just reached; ``average`` picks
        the estimates (0..K) whose mean makes the move, default the last. It helps with 'target' only: its fixed point
        is then the exact inverse of a sampling step. ``eta`` adds that share of the DDIM noise between the two levels
        (InPO), with ``noises`` of K draws. An output is turned into eps at the level that the network was told, so
        that eps, v and x0 forms of one network invert alike (diffusers' 'target' uses the level left: same for eps).
        """
        x = _raised(x0)
        if isinstance(levels, int):
            levels, told = self.inversion_grid(levels, convention)
            times = told if times is None else times
        _known_convention(convention)
        if eta and noises is None:
            raise ValueError("invert with eta > 0 needs noises")
        if any(not 0 <= k <= renoise for k in average):
            raise ValueError(f"average {tuple(average)} must pick among the estimates 0..{renoise}")
        levels = levels.expand(len(x), -1)
        left = _levels_left(levels, mask)
        if times is None:
            times = levels if convention == "target" else left
        mask = torch.ones(len(x), levels.shape[1], dtype=torch.bool) if mask is None else mask
        idle = ~mask.any(0) if mask.device.type == "cpu" else torch.zeros(levels.shape[1], dtype=torch.bool)
        on_device = [a.expand(len(x), -1).to(x.device, non_blocking=True) for a in (left, levels, times, mask)]
        for k in range(levels.shape[1]):
            if idle[k]:
                continue
            origin, goal, time, taken = (a[:, k] for a in on_device)
            source, target = self._start(origin, x, initial_alpha), self._start(goal, x, initial_alpha)
            a_told, s_told = (_spread(c, x) for c in self._start(time, x, initial_alpha))
            (a0, s0), (a1, s1) = ([_spread(c, x) for c in pair] for pair in (source, target))

            y, estimates = x, []
            for _ in range(renoise + 1):
                estimates.append(self._eps(predict(y, time), y, a_told, s_told))
                y = a1 * ((x - s0 * estimates[-1]) / a0) + s1 * estimates[-1]
            if average:
                eps = torch.stack([estimates[i] for i in average]).mean(0)
                y = a1 * ((x - s0 * eps) / a0) + s1 * eps
            if noises is not None:
                y = y + _spread(_ddim_variance(target, source, eta).sqrt(), x) * noises[k].to(x.dtype)
            x = torch.where(_spread(taken, x, torch.bool), y, x)
            if trace is not None:
                trace.append(x)
        return x

    def _start(self, t: Tensor, x: Tensor, initial_alpha: float | None) -> tuple[Tensor, Tensor]:
        """Levels at ``t``, where a negative time means ``initial_alpha``, if given."""
        alpha, sigma = self._levels(t, x.device)
        if initial_alpha is None:
            return alpha, sigma
        clean = t < 0
        return alpha.masked_fill(clean, initial_alpha**0.5), sigma.masked_fill(clean, (1 - initial_alpha) ** 0.5)


def reached(levels: Tensor, mask: Tensor) -> Tensor:
    """The level at which each sample of a masked inversion stops, (B,): ``levels`` (K,) or (B,K), ``mask`` (B,K).

    -1 where no step is taken. InPO's rule for drawn times t* (B,) on a grid is ``mask = times < t_star[:, None]``.
    """
    return levels.expand_as(mask).masked_fill(~mask, -1).amax(1)


def stop_exactly(levels: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """Levels (B,K+1) and mask of an inversion through the grid ``levels`` (K,) that ends at ``stop`` (B,) itself."""
    top = torch.maximum(stop, levels[-1])[:, None]
    steps = torch.cat([levels.expand(len(stop), -1), top], 1).minimum(stop[:, None])
    before = torch.cat([torch.full_like(top, -1), steps[:, :-1]], 1)
    return steps, before < stop[:, None]


def _levels_left(levels: Tensor, mask: Tensor | None) -> Tensor:
    """The level (B,K) at which each step starts: that of the last step taken before it, -1 at first."""
    taken = levels if mask is None else levels.masked_fill(~mask.to(levels.device), -1)
    return torch.cat([torch.full_like(levels[:, :1], -1), taken.cummax(1).values[:, :-1]], 1)


def _ddim_variance(noisy: tuple[Tensor, Tensor], clean: tuple[Tensor, Tensor], eta: float) -> Tensor:
    """eta^2 times the variance of x_clean given x_noisy and x0, from (alpha, sigma) of both: (B,)."""
    if not eta:
        return torch.zeros_like(clean[1])
    (a_t, s_t), (a_s, s_s) = noisy, clean
    return eta**2 * (s_s / s_t) ** 2 * (s_t**2 - (a_t / a_s * s_s) ** 2)


def _raised(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _spread(values: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(B,) as (B,1,1,1) beside ``x``, in its dtype unless another is given."""
    return values.to(dtype or x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def _device(t: Times) -> torch.device:
    return t.device if isinstance(t, Tensor) else torch.device("cpu")


def _known_convention(name: str) -> None:
    if name not in ("target", "source"):
        raise UserError(f"inversion convention '{name}' is not known{nearest(name, ('target', 'source'))}")
