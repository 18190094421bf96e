"""What the numbers of ``diffalign bench methods`` say: gains with intervals, and who is seen to learn (DESIGN 9).

The unit of resampling is the prompt: the seeds of a method are averaged within one first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ..eval.stats import bootstrap, paired
from .judge import HELD_OUT, IN_LOOP, PRIMARY

SEEDS_ASKED, PROMPTS_ASKED = 3, 200
GUARD = 0.03  # what shapes and diversity of single objects may lose
Word = Literal["learning", "learning, at a cost", "not learning", "open", "control", "base", "failed", "not run", ""]
Kind = Literal["base", "control", "method"]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def text(self, form: str = "+.3f") -> str:
        """As ``+0.061 (+0.029, +0.094)``."""
        return f"{shown(self.value, form)} {self.span(form)}"

    def span(self, form: str = "+.3f") -> str:
        """As ``(+0.029, +0.094)``."""
        return f"({shown(self.low, form)}, {shown(self.high, form)})"


def shown(value: float, form: str) -> str:
    """A number as text; what rounds to nothing has no minus."""
    text = f"{value:{form}}"
    return text if any(c in text for c in "123456789") else text.replace("-", "+")


@dataclass
class Row:
    """One line of the table. ``gain``: share of held-out prompts all right, over the base, pooled over ``seeds``;
    ``by_seed`` the same for each. ``over_shuffled``: over shuffled labels. ``wins``: win rates against the base by
    judge. ``shapes`` and ``diversity``: changes of single objects, over the base. ``units``, ``seconds`` (of the
    training steps alone), ``cpu`` (processor seconds of the same) and ``peak_mb`` are means over seeds; ``per_step`` is
    what a step calls, by role. ``trained_on``: judges whose scores made the training data."""

    name: str
    kind: Kind
    group: str = ""
    method: str = ""
    note: str = ""
    seeds: list[int] = field(default_factory=list)
    right: float | None = None
    gain: Estimate | None = None
    by_seed: list[Estimate] = field(default_factory=list)
    over_shuffled: Estimate | None = None
    wins: dict[str, Estimate] = field(default_factory=dict)
    shapes: float | None = None
    diversity: float | None = None
    steps: int | None = None
    batch: int | None = None
    units: float | None = None
    per_step: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: float | None = None
    cpu: float | None = None
    peak_mb: float | None = None
    sampling: str = ""
    failed: dict[int, str] = field(default_factory=dict)
    trained_on: tuple[str, ...] = ()
    verdict: Word = ""
    why: str = ""


def decide(
    gains: Sequence[float],
    over_base: Estimate,
    over_shuffled: Estimate | None,
    shapes: float,
    diversity: float,
    prompts: int = PROMPTS_ASKED,
    controls: int = SEEDS_ASKED,
    labels: bool = True,
) -> tuple[Word, str]:
    """(verdict, reason) of a preference or online method.

    Learning: every seed gains, and the pooled interval lies above the base and above shuffled labels. At a cost: it
    learns, and shapes or diversity of single objects fell by more than 0.03. Open: too few seeds or prompts, or too few
    seeds of the control (``controls``) to compare with, so that the rule cannot be put. Without ``labels`` to shuffle,
    as where a scorer judges the model's own samples, the base alone is compared with."""
    if not labels:
        over_shuffled, controls = None, SEEDS_ASKED
    against: list[str] = []
    if min(gains) <= 0:
        against.append(f"{sum(g <= 0 for g in gains)} of {len(gains)} seeds do not gain")
    if over_base.low <= 0:
        against.append("the interval holds the base" if over_base.high >= 0 else "worse than the base")
    if over_shuffled is not None and over_shuffled.low <= 0:
        holds = "the interval holds shuffled labels" if over_shuffled.high >= 0 else "worse than shuffled labels"
        against.append(holds)
    if against:
        return "not learning", "; ".join(against)
    if labels and over_shuffled is None:
        return "open", "shuffled labels were not run"
    found = ((len(gains), SEEDS_ASKED, "seeds"), (controls, SEEDS_ASKED, "seeds with shuffled labels beside them"))
    for count, asked, what in (*found, (prompts, PROMPTS_ASKED, "prompts")):
        if count < asked:
            return "open", f"{count} of {asked} {what}"
    lost = [f"{name} {v:+.3f}" for name, v in (("shapes", shapes), ("diversity", diversity)) if v < -GUARD]
    return ("learning, at a cost", ", ".join(lost)) if lost else ("learning", "")


def fill(
    row: Row,
    found: Sequence[Mapping[str, Any]],
    base: Mapping[str, Any] | None,
    shuffled: Sequence[Mapping[str, Any]] = (),
) -> Row:
    """The row with the numbers of ``found``, its results by seed, beside the base's result and the control's."""
    if not found:
        if not row.verdict:
            row.verdict = "failed" if row.failed else "not run"
            row.why = "; ".join(dict.fromkeys(row.failed.values()))
        return row
    found = sorted(found, key=lambda r: r["seed"])
    judged = [r["judged"] for r in found]
    row.right = float(np.mean([j["scores"][PRIMARY] for j in judged]))
    row.sampling = f"{judged[0]['steps']} steps, guidance {judged[0]['guidance']:g}"
    if row.kind == "base":
        row.verdict, row.shapes, row.diversity = "base", judged[0]["shapes"], judged[0]["diversity"]
        return row
    row.seeds = [r["seed"] for r in found]
    row.steps, row.batch, row.per_step = found[0]["steps"], found[0]["batch"], found[0]["per_step"]
    row.units, row.seconds, row.cpu, row.peak_mb = (
        float(np.mean([r[name] for r in found])) for name in ("units", "seconds", "cpu", "peak_mb")
    )
    if base is None:
        row.verdict, row.why = "open", "the base was not judged"
        return row
    ground = base["judged"]
    row.shapes = float(np.mean([j["shapes"] for j in judged])) - ground["shapes"]
    row.diversity = float(np.mean([j["diversity"] for j in judged])) - ground["diversity"]
    for name in (PRIMARY, IN_LOOP, *HELD_OUT):
        result = paired(by_prompt(judged, name), [[v] * len(judged) for v in ground["scores"][name]])
        row.wins[name] = Estimate(result.win_rate, result.win_interval.low, result.win_interval.high)
        if name == PRIMARY:
            row.gain = Estimate(result.gain, result.gain_interval.low, result.gain_interval.high)
    right = np.array(ground["scores"][PRIMARY])
    row.by_seed = [mean(np.array(j["scores"][PRIMARY]) - right) for j in judged]
    others = {r["seed"]: r["judged"] for r in shuffled}
    both = [(j, others[r["seed"]]) for r, j in zip(found, judged, strict=True) if r["seed"] in others]
    if both and row.name != "shuffled":
        gaps = [np.array(a["scores"][PRIMARY]) - np.array(b["scores"][PRIMARY]) for a, b in both]
        row.over_shuffled = mean(np.mean(gaps, 0))
    assert row.gain is not None
    if row.kind == "control":
        row.verdict = "control"
    elif row.group in ("preference", "online"):
        gains = [estimate.value for estimate in row.by_seed]
        labels = row.group == "preference" or bool(row.trained_on)  # Diffusion-DRO takes pairs' chosen pictures
        row.verdict, row.why = decide(
            gains, row.gain, row.over_shuffled, row.shapes, row.diversity, len(right), len(both), labels
        )
    else:
        row.why = "the rule is for preference and online methods"
    if row.failed:
        row.why = "; ".join([row.why, *(f"seed {seed} failed: {why}" for seed, why in row.failed.items())]).lstrip("; ")
    return row


def by_prompt(judged: Sequence[Mapping[str, Any]], scorer: str) -> list[list[float]]:
    """[prompt][seed]."""
    return [list(values) for values in zip(*(j["scores"][scorer] for j in judged), strict=True)]


def mean(values: np.ndarray) -> Estimate:
    """Of one value a prompt (N,), with its bootstrap interval."""
    interval = bootstrap(values)
    return Estimate(float(values.mean()), interval.low, interval.high)
