"""``train --suggest-beta``: how large the sigmoid's argument will be, from a short probe, before a run is paid for.

At the start student and base are one network: Delta = (m_w - m_l) - (r_w - r_l) is 0 for every pair, and nothing about
the base alone says how large it will get. But for Diffusion-DPO and its kin, whose logit is u = -(beta/2) Delta (times
a constant) at forward-noised pairs:

* while |u| is small the gradient is beta/4 (grad m_w - grad m_l), and Adam, Adafactor and clipping by norm divide its
  length out again: the first steps are the same for every beta;
* what beta decides is where the sigmoid starts to hold the student: at |Delta| of about 2/beta.

So the probe trains a student in memory on the linear part of the loss alone (-u/2: the same first gradient, no tie to
the base) and watches the held-out winners. Untied, their error first holds and then rises: the margin goes on growing
because the losers get worse still. Where the winners' error stands 2 % above the base's (the guard's threshold) lies
the edge, and the errors' differences there are the scale that beta has to meet: the suggestion makes the mean of |u| at
the edge equal to 1, where a won pair's gradient has fallen to about half, so that the tie takes hold before the damage.
A hundredth of it lets the student run far past the edge; a hundred times it puts differences of a hundredth of the
edge's, which are noise, on the flat part of the sigmoid.

The learning rate is the recipe's at its peak, after ``WARM`` steps of warm-up. Where the edge is not reached in
``PATIENT`` steps it doubles every ``EVERY`` steps: the differences at the edge depend little on how fast it is reached,
and a run that never comes near it is not hurt by a beta that would hold it there. (Own derivation, measured on the tiny
world only.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import UserError
from .eval.health import WINNER_WORSE
from .methods.base import Method
from .methods.pair import PairErrors, PairMethod
from .recipe import Recipe
from .setup import Parts, build, make_method_of

if TYPE_CHECKING:
    from rich.console import Console

WARM, PATIENT, LONGEST, EVERY = 16, 48, 96, 8
PHASE = "probe"  # keys the draws of the probe's pairs
# what the probe measures with: a method with one of its own (inversions, lists, users) is not what it would see
SHARED = ("noise", "errors", "measure", "loss")
DRAWS = 4
FACTORS = (0.01, 0.1, 1 / 3, 1.0, 3.0, 10.0, 100.0)


@dataclass(frozen=True)
class Look:
    """The probe's pairs at a step: ``damage`` is the rise of the winner's error over the base's, as a share of it."""

    step: int
    lr: float
    damage: float
    delta: float


@dataclass(frozen=True)
class Scale:
    """What |u| would be at the edge with this beta."""

    beta: float
    mean: float
    median: float
    nine_in_ten: float
    saturated: float


@dataclass(frozen=True)
class BetaAdvice:
    """The suggestion and what it rests on. ``base_gap``: median |r_w - r_l| of the base on the probe's pairs."""

    method: str
    suggested: float
    recipe: float
    pairs: int
    base_error: float
    base_gap: float
    edge: float
    reached: bool
    looks: list[Look]
    scales: list[Scale]

    def json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def render(self, console: Console) -> None:
        """For a person."""
        from rich.table import Table

        console.print(
            f"base: mean error {self.base_error:.4g}, median difference within a pair {self.base_gap:.3g} "
            f"({self.pairs} held-out pairs x {DRAWS} draws)"
        )
        for look in self.looks:
            console.print(
                f"probe step {look.step:>3} at lr {look.lr:.3g}: winner's error {look.damage:+.2%}, "
                f"mean |Delta| {look.delta:.3g}"
            )
        where = (
            f"where winners are {WINNER_WORSE:.0%} worse" if self.reached else "at the probe's end, edge not reached"
        )
        table = Table("beta", "mean |u|", "median", "nine in ten below", "beyond 5", "", title=f"size of u {where}")
        for scale in self.scales:
            note = "suggested" if scale.beta == self.suggested else "the recipe's" if scale.beta == self.recipe else ""
            numbers = (f"{n:.3g}" for n in (scale.beta, scale.mean, scale.median, scale.nine_in_ten))
            table.add_row(*numbers, f"{scale.saturated:.1%}", note)
        console.print(table)
        console.print(f"suggested: method.beta={self.suggested:g} (the recipe has {self.recipe:g})")


def suggest_beta(recipe: Recipe, say: Callable[[str], None] = lambda text: None) -> BetaAdvice:
    """Probe a recipe's model, pairs, optimiser and learning rate; writes nothing but the shared latent cache.

    Raises UserError for methods whose beta does not scale a preference logit, or that come to their errors in a way of
    their own, and under a launcher."""
    method = make_method_of(recipe)
    reason = refusal(method)
    if reason:
        raise UserError(f"--suggest-beta: method '{recipe.method.name}' {reason}")
    assert isinstance(method, PairMethod)
    beta = float(getattr(method.config, "beta", 0.0))
    parts = build(_probing(recipe), say)
    if parts.accelerator.num_processes > 1:
        raise UserError("--suggest-beta runs in one process; start it without a launcher")
    if parts.trainer.recipe.batch > len(parts.trainer.source):
        say("fewer pairs than train.batch: the probe sees each of them several times a step")
    probe = Probe(parts, _untied(method))
    try:
        looks, delta = probe.run(say)
    finally:
        parts.trainer.close()
    edge = float(delta.abs().mean())
    if not edge > 0:
        raise UserError("--suggest-beta: the probe moved nothing; raise train.lr")
    unit = float(_logits(method, probe.at(delta), 1.0).abs().mean())
    suggested = float(f"{1 / unit:.2g}")
    betas = sorted({beta, *(float(f"{suggested * factor:.2g}") for factor in FACTORS)})
    return BetaAdvice(
        recipe.method.name,
        suggested,
        beta,
        len(probe.rows),
        float(probe.base.mean()),
        float((probe.base[0] - probe.base[1]).abs().median()),
        edge,
        looks[-1].damage >= WINNER_WORSE,
        looks,
        [_scale(b, _logits(method, probe.at(delta), b).abs()) for b in betas],
    )


def refusal(method: Method[Any]) -> str:
    """Why the probe says nothing of a method, or of these settings of it; "" where it does."""
    if isinstance(method, PairMethod) and method.needs.reference and hasattr(method.config, "beta"):
        if any(getattr(type(method), hook) is not getattr(PairMethod, hook) for hook in SHARED):
            return (
                "has its own way to its errors, and the probe noises pairs as Diffusion-DPO does; set method.beta by "
                "the paper, and watch logit_abs in the log"
            )
        if _scales(method):
            return ""
    return "has no beta that scales a preference logit"


class Probe:
    """An untied student in memory, and the held-out pairs it is looked at with."""

    def __init__(self, parts: Parts, method: PairMethod[Any]) -> None:
        self.parts, self.trainer, self.method = parts, parts.trainer, method
        self.trainer.method = method
        self.source = parts.heldout or parts.trainer.source
        self.rows = self.source.indices[: max(64, parts.recipe.validate_.pairs)].tolist()
        self.base = torch.zeros(0)
        self.base = self.errors("base")

    def errors(self, role: str) -> Tensor:
        """Errors (2, pairs x draws) of the winners and losers, under fixed draws, where the method measures them."""
        ctx, micro, found = self.trainer.ctx, self.trainer.micro, []
        before, ctx.phase = ctx.phase, PHASE
        with torch.no_grad():
            for draw in range(DRAWS):
                for rows, visits in self.source.cut(self.rows, [draw] * len(self.rows), micro):
                    batch = self.source.load(rows, visits).to(ctx.device)
                    batch.columns = {}  # cached reference errors belong to the draws of training
                    noised = self.method.noise(ctx, batch)
                    if role == "base":
                        errors = self.method.base_errors(ctx, noised) * self.method.scale(ctx, noised.t)
                        found.append(torch.stack(errors.chunk(2)))
                    else:
                        noised = replace(noised, base=torch.zeros(2 * len(batch), device=ctx.device))
                        student = self.method.errors(ctx, noised)
                        found.append(torch.stack([student.chosen, student.rejected]))
        ctx.phase = before
        return torch.cat(found, 1).cpu()

    def look(self) -> tuple[Look, Tensor]:
        """Where the student stands, and Delta of each sample."""
        moved = self.errors("student") - self.base
        damage, delta = float(moved[0].mean() / self.base[0].mean()), moved[0] - moved[1]
        return Look(self.trainer.step, self.trainer.recipe.lr, damage, float(delta.abs().mean())), delta

    def run(self, say: Callable[[str], None]) -> tuple[list[Look], Tensor]:
        """Train to the edge; the looks, and Delta of each sample brought to the edge between the last two of them."""
        looks: list[Look] = []
        last, delta = Look(0, 0.0, 0.0, 0.0), torch.zeros(0)
        while self.trainer.step < LONGEST:
            last = looks[-1] if looks else last
            for _ in range(EVERY):
                self.trainer.train_step()
            look, delta = self.look()
            looks.append(look)
            say(f"probe step {look.step}: winner's error {look.damage:+.2%}")
            if look.damage >= WINNER_WORSE:
                break
            if look.step >= PATIENT:
                self.trainer.recipe.lr *= 2
        here = looks[-1]
        if here.damage < WINNER_WORSE:
            return looks, delta
        share = (WINNER_WORSE - max(0.0, last.damage)) / (here.damage - max(0.0, last.damage))
        return looks, delta * ((last.delta + share * (here.delta - last.delta)) / here.delta)

    def at(self, delta: Tensor) -> PairErrors:
        """Errors with this Delta, all of it in the winners."""
        return PairErrors(self.base[0] + delta, self.base[1], self.base[0], self.base[1])


def _probing(recipe: Recipe) -> Recipe:
    """The recipe at its peak learning rate from the first step on."""
    found = recipe.model_copy(deep=True)
    train = found.train
    train.lr = train.role_lr.get("student", train.lr)
    train.role_lr, train.schedule, train.warmup, train.ema = {}, "constant", WARM, None
    found.data.reference_errors = None
    return found


def _untied(method: PairMethod[Any]) -> PairMethod[Any]:
    """The same method with the linear part of its loss: softplus(-u) = log 2 - u/2 + ..."""

    class Untied(type(method)):  # type: ignore[misc]
        def objective(self, errors: PairErrors) -> tuple[Tensor, Tensor]:
            _, logits = super().objective(errors)
            return -logits / 2, logits

    return Untied(method.config)


def _logits(method: PairMethod[Any], errors: PairErrors, beta: float) -> Tensor:
    return type(method)(method.config.model_copy(update={"beta": beta})).objective(errors)[1]


def _scales(method: PairMethod[Any]) -> bool:
    """Whether the logit grows in proportion to beta."""
    one = torch.ones(1)
    errors = PairErrors(0.1 * one, 0.2 * one, 0.11 * one, 0.19 * one)
    low, high = (_logits(method, errors, beta) for beta in (1.0, 10.0))
    return bool(torch.isclose(high, 10 * low).all() and (low != 0).all())


def _scale(beta: float, u: Tensor) -> Scale:
    return Scale(beta, float(u.mean()), float(u.median()), float(u.quantile(0.9)), float((u > 5).float().mean()))
