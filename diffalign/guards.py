"""Guards: a run watches its own numbers and, by policy, says so or stops (DESIGN 7)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median, stdev
from typing import Any

from .eval.health import (
    BRIGHTNESS_MOVED,
    DIVERSITY_KEPT,
    NORM_TIMES,
    SATURATED,
    SATURATION_MOVED,
    WINNER_WORSE,
)
from .recipe import GuardsRecipe

BEFORE = 5  # logged values that make a usual one
HACKED = 4.0  # deviations (chosen by us)
FEW = 0.05


@dataclass(frozen=True)
class Alarm:
    """A guard that fired: its name (a key of ``train.guards``), what it saw, and the policy."""

    guard: str
    text: str
    policy: str


class Guards:
    """Compares what is logged with the start of the same run.

    ``winner``: the winner's held-out error is more than 2 % above the base's. ``sigmoid``: more than 0.3 of the
    logits are beyond 5, where a won pair has no gradient left, and 0.15 more than at the start.
    ``pictures``: within a prompt the samples differ by less than half of the base's, or their mean brightness or
    saturation moved by more than 0.15. ``gradient``: the gradient norm is above 10 times its median so far.
    ``rounds``: a round of samples of an online method left nothing to learn. ``kept``: of the pairs that a threshold
    picks fewer than 5 % or more than 95 % are kept. ``hacking``: a scorer that only looks on
    (``method.guard``) is below its first five logged values by more than 4 of their deviations, while the reward is
    above its own. Each fires once a run. The thresholds are those by which the report reads the curves;
    ``eval/health.py`` says where they come from.

    Args:
        recipe: policies.
        rows: the log so far, when a run goes on from a checkpoint.
    """

    def __init__(self, recipe: GuardsRecipe, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self.recipe = recipe
        self.first: dict[str, Mapping[str, float]] = {}
        self.norms: dict[str, list[float]] = {}
        self.scores: list[tuple[float, float]] = []  # of the reward that is climbed, and of the one that looks on
        self.fired: set[str] = set()
        for row in rows:
            if row["kind"] == "guard":
                self.fired.add(row["guard"])
            else:
                self._remember(row["kind"], row)

    @property
    def may_stop(self) -> bool:
        """Whether any policy ends a run."""
        return "stop" in self.recipe.model_dump().values()

    def logged(self, values: Mapping[str, float]) -> list[Alarm]:
        """Alarms of a row of training numbers."""
        self.first.setdefault("train", dict(values))
        found: dict[str, str] = {}
        for name, norm in values.items():
            before = self.norms.get(name, [])
            if name.startswith("grad_norm/") and len(before) >= BEFORE and norm > NORM_TIMES * median(before):
                role = name.removeprefix("grad_norm/")
                found["gradient"] = f"the gradient norm of {role} is {norm:.3g}, usual is {median(before):.3g}"
        if values.get("rounds_empty", 0.0) > 0:
            share = f"{values['rounds_empty']:.0%} of the last rounds left nothing to learn"
            found["rounds"] = f"{share}: no pair was far enough apart, or all samples of a prompt scored alike"
        if not FEW <= (kept := values.get("kept", FEW)) <= 1 - FEW:
            how = "lower method.threshold" if kept < FEW else "method.threshold leaves out next to none; raise it"
            found["kept"] = f"{kept:.0%} of the pairs of the last rounds were far enough apart to be kept: {how}"
        found |= self._sigmoid(values) | self._hacking(values)
        self._remember("train", values)
        return self._alarms(found)

    def looked(self, values: Mapping[str, float]) -> list[Alarm]:
        """Alarms of held-out numbers and samples."""
        self.first.setdefault("validate", dict(values))
        found = self._sigmoid(values)
        error, gain = values.get("chosen_error"), values.get("chosen_gain")
        start = self.first["validate"].get("chosen_error")  # without a reference: the student's own at step 0
        rise = -gain if gain is not None else error - start if error is not None and start is not None else 0.0
        if error is not None and rise > WINNER_WORSE * (error - rise):
            above = f"the winner's held-out error is above the base's by {rise:.2e}"
            found["winner"] = f"{above}: the model may be unlearning its images"
        found |= self._pictures(values)
        self._remember("validate", values)
        return self._alarms(found)

    def _hacking(self, values: Mapping[str, float]) -> dict[str, str]:
        if len(self.scores) < BEFORE or not {"reward", "guard_score"} <= values.keys():
            return {}
        rewards, guards = (list(column) for column in zip(*self.scores[:BEFORE], strict=True))
        usual, fall = mean(guards), mean(guards) - values["guard_score"]
        if values["reward"] <= mean(rewards) or fall <= HACKED * stdev(guards):
            return {}
        return {
            "hacking": f"the reward rose to {values['reward']:.4g} and method.guard fell from {usual:.4g} to "
            f"{values['guard_score']:.4g}: the scorer is being hacked"
        }

    def _sigmoid(self, values: Mapping[str, float]) -> dict[str, str]:
        share = values.get("saturated", 0.0)
        start = self.first.get("validate", {}).get("saturated")
        if start is None:  # nothing held out: against the base no logit is saturated at first
            start = 0.0 if "chosen_gain" in values else self.first.get("train", {}).get("saturated", 0.0)
        if share <= max(SATURATED, start + SATURATED / 2):
            return {}
        return {"sigmoid": f"{share:.0%} of the logits are beyond 5: won pairs teach nothing, lost ones pull in full"}

    def _pictures(self, values: Mapping[str, float]) -> dict[str, str]:
        base, faults = self.first.get("validate", {}), []
        if {"diversity"} <= values.keys() & base.keys() and values["diversity"] < DIVERSITY_KEPT * base["diversity"]:
            faults.append(f"the samples' diversity fell from {base['diversity']:.3f} to {values['diversity']:.3f}")
        for name, most in (("brightness", BRIGHTNESS_MOVED), ("saturation", SATURATION_MOVED)):
            if {name} <= values.keys() & base.keys() and abs(values[name] - base[name]) > most:
                faults.append(f"the samples' mean {name} went from {base[name]:.2f} to {values[name]:.2f}")
        return {"pictures": "; ".join(faults)} if faults else {}

    def _remember(self, kind: str, values: Mapping[str, float]) -> None:
        self.first.setdefault(kind, dict(values))
        for name, norm in values.items():
            if name.startswith("grad_norm/"):
                self.norms.setdefault(name, []).append(norm)
        if kind == "train" and {"reward", "guard_score"} <= values.keys():
            self.scores.append((values["reward"], values["guard_score"]))

    def _alarms(self, found: Mapping[str, str]) -> list[Alarm]:
        policies = self.recipe.model_dump()
        alarms = [
            Alarm(guard, text, policies[guard])
            for guard, text in found.items()
            if policies[guard] != "off" and (guard not in self.fired or policies[guard] == "stop")
        ]
        self.fired |= {alarm.guard for alarm in alarms}
        return alarms


def advice(alarms: Sequence[Alarm]) -> str:
    """How to go on after a stop."""
    names = " and ".join(f"train.guards.{alarm.guard}" for alarm in alarms)
    return f"go on from there with {names}=warn, or start afresh in another output.dir with a lower train.lr"
