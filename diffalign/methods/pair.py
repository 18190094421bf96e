"""PairMethod: what every method on (chosen, rejected) pairs shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from ..data.batch import Cond
from .base import Loss, Method, MethodConfig, Phase

if TYPE_CHECKING:
    from ..context import Context
    from ..data.batch import Batch


class PairConfig(MethodConfig):
    """Settings that every pair method has."""

    error_space: Literal["network", "epsilon"] = Field(
        "network", description="where errors are measured: the network's own prediction, or rescaled to noise error"
    )
    safeguard: float | None = Field(
        None, ge=0, le=1, description="mu of Diffusion-SDPO: scales the loser's gradient so the winner's error holds"
    )
    safeguard_scope: Literal["pair", "batch"] = Field(
        "pair", description="one factor a pair, or one a micro-batch as the authors of Diffusion-SDPO do"
    )


P = TypeVar("P", bound=PairConfig)


@dataclass
class Noised:
    """Stacked noisy latents of B pairs: rows [0:B] chosen, [B:2B] rejected. ``base``: the base's errors (2B,) on just
    these inputs, where they are cached (``data.reference_errors``)."""

    x_t: Tensor
    t: Tensor
    target: Tensor
    cond: Cond
    base: Tensor | None = None


def pair_curves(errors: PairErrors, logits: Tensor) -> dict[str, Tensor]:
    """Curves (B,) of pairs that an objective scored by ``logits`` (B,), each without gradient."""
    logits = logits.detach()
    curves = {
        "chosen_error": errors.chosen,
        "rejected_error": errors.rejected,
        "margin": -errors.delta(),
        "accuracy": (logits > 0).float() + 0.5 * (logits == 0).float(),
        "logit": logits,
        "logit_abs": logits.abs(),
        "saturated": (logits.abs() > 5).float(),
    }
    if errors.base_chosen is not None and errors.base_rejected is not None:
        curves["chosen_gain"] = errors.base_chosen - errors.chosen
        curves["rejected_gain"] = errors.rejected - errors.base_rejected
    return {name: curve.detach() for name, curve in curves.items()}


@dataclass
class PairErrors:
    """Per-sample errors (B,) in fp32; the base's are None where there is no reference. ``columns``: the batch's."""

    chosen: Tensor
    rejected: Tensor
    base_chosen: Tensor | None
    base_rejected: Tensor | None
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    def delta(self) -> Tensor:
        """(m_w - m_l) - (r_w - r_l), or m_w - m_l without a reference."""
        delta = self.chosen - self.rejected
        if self.base_chosen is None or self.base_rejected is None:
            return delta
        return delta - (self.base_chosen - self.base_rejected)


def loser_scale(chosen: Tensor, rejected: Tensor, mu: float, scope: str = "pair") -> Tensor:
    """Diffusion-SDPO's factor on the gradient of the loser's error.

    With the output-space residuals g_w, g_l (B, C, h, w): clip((1 - mu) |g_w|^2 / (g_w . g_l), 0, 1) where
    g_w . g_l > 0, else 1. The first-order change of the winner's error is then never upwards. Returns (B,);
    ``scope="batch"`` is the authors' single factor for the whole batch.
    """
    g_w, g_l = chosen.detach().float().flatten(1), rejected.detach().float().flatten(1)
    norm, dot = g_w.square().sum(1), (g_w * g_l).sum(1)
    if scope == "batch":
        norm, dot = norm.sum().expand_as(norm), dot.sum().expand_as(dot)
    safe = torch.where(dot > 0, dot, torch.ones_like(dot))
    return torch.where(dot > 0, ((1 - mu) * norm / safe).clamp(0, 1), torch.ones_like(dot))


class PairMethod(Method[P], Generic[P]):
    """One student call of 2B and one base call of 2B a batch (none where ``needs.reference`` is False).

    Hooks: ``noise`` (what the networks see and regress on), ``weight`` (per pair), ``objective``.
    """

    def noise(self, ctx: Context, batch: Batch) -> Noised:
        """Forward noising with one (t, noise) a pair, shared by both members."""
        t, noise = self.draw(ctx, batch)
        x0 = torch.cat([batch.latents["chosen"], batch.latents["rejected"]])
        t, noise = t.repeat(2), noise.repeat(2, 1, 1, 1)
        denoiser = ctx.denoiser
        return Noised(denoiser.add_noise(x0, noise, t), t, denoiser.target(x0, noise, t), self.pair_cond(batch))

    def draw(self, ctx: Context, batch: Batch) -> tuple[Tensor, Tensor]:
        """(t (B,), noise) of each pair: every time of the schedule alike."""
        return ctx.draw(batch)

    def pair_cond(self, batch: Batch) -> Cond:
        """Conditioning of the stacked pair (2B): each picture's own sizes, and the loser's own prompt if it has one."""
        return Cond.cat([batch.condition("chosen"), batch.condition("rejected")])

    def weight(self, ctx: Context, batch: Batch) -> Tensor:
        """Weight of each pair (B,)."""
        return batch.weight

    def objective(self, errors: PairErrors) -> tuple[Tensor, Tensor]:
        """(loss (B,), implicit preference logit (B,))."""
        raise TypeError(f"{type(self).__name__} defines no objective")

    def scale(self, ctx: Context, t: Tensor) -> Tensor | float:
        """What the network's own errors are multiplied by; offline sheet 0.12 makes those of v, x0 or flow ones of the
        noise."""
        return ctx.denoiser.eps_error_scale(t) if self.config.error_space == "epsilon" else 1.0

    def residual(self, ctx: Context, role: str, noised: Noised) -> Tensor:
        """Prediction minus target (2B, C, h, w) of a role, in fp32."""
        return ctx.model(role, noised.x_t, noised.t, noised.cond) - noised.target.float()

    def errors(self, ctx: Context, noised: Noised) -> PairErrors:
        """Student's (with gradient) and base's errors, measured where ``error_space`` says."""
        student = self.residual(ctx, "student", noised)
        if not self.needs.reference:
            return self.compare(ctx, noised.t, student, None)
        base = self.base_errors(ctx, noised) if noised.base is None else noised.base
        return self.compare(ctx, noised.t, student, base)

    def compare(self, ctx: Context, t: Tensor, student: Tensor, base: Tensor | None) -> PairErrors:
        """Errors from the student's residual (2B, C, h, w) and the base's errors (2B,) at times t (2B,)."""
        scale = self.scale(ctx, t)
        chosen, rejected = (student.square().mean((1, 2, 3)) * scale).chunk(2)
        if self.config.safeguard is not None:
            winner, loser = student.chunk(2)
            factor = loser_scale(winner, loser, self.config.safeguard, self.config.safeguard_scope)
            rejected = factor * rejected + (1 - factor) * rejected.detach()
        if base is None:
            return PairErrors(chosen, rejected, None, None)
        base_chosen, base_rejected = (base * scale).chunk(2)
        return PairErrors(chosen, rejected, base_chosen, base_rejected)

    def base_errors(self, ctx: Context, noised: Noised) -> Tensor:
        """The base's errors (2B,) in the network's own units."""
        with torch.no_grad():
            return ctx.error("base", noised.x_t, noised.t, noised.cond, noised.target)

    def measure(self, ctx: Context, batch: Batch) -> PairErrors:
        """The errors of a batch at its noisy latents; the base's from the cache where they are."""
        noised = self.noise(ctx, batch)
        if "base_chosen" in batch.columns:
            noised.base = torch.cat([batch.columns["base_chosen"], batch.columns["base_rejected"]])
        return self.errors(ctx, noised)

    def loss(self, ctx: Context, batch: Batch, phase: Phase) -> Loss:
        """Values and curves of one micro-batch."""
        errors = replace(self.measure(ctx, batch), columns=batch.columns)
        values, logits = self.objective(errors)
        return Loss(values, self.weight(ctx, batch), pair_curves(errors, logits))
