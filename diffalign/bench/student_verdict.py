"""What the numbers of few-step students say: their share of the teacher's score at each step count, and who learns.

The score is of single objects: the share of pictures that the oracle finds all right. The unit of resampling is the
prompt: pictures and seeds of one are averaged first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from .judge import PRIMARY
from .verdict import SEEDS_ASKED, Estimate, Word, mean

BARS = {1: 0.5, 2: 0.85}  # by steps: the share of the teacher's score that is asked
DIVERSITY = 0.8  # the share of the teacher's diversity, at each of these steps
SINGLES_ASKED = 24  # prompts
NEAR = 1e-9  # equal to a bar is enough, whatever the last digit says
# rows that align a student, and the row whose student of the same seed that is
ALIGNED_FROM = dict.fromkeys(("pso", "pso_online", "pso_pictures"), "dmd2")
# students whose earlier calls end a piece of a path and not a picture: the bars are for all their steps alone
WHOLE = ("tdm", "phased_dmd", "pcm", "tscd")
UNJUDGED = {"distillation_dpo": "it aligns while it distils: there is no student from which it starts, to gain over"}
Found = Mapping[str, Any]  # a job's result


@dataclass
class StepRow:
    """A model at a number of steps, means over ``seeds``. ``score``: see the module; ``share`` and
    ``diversity_share``: of the teacher's; ``by_seed``: scores; ``over_ddim``: the score's gain over plain DDIM of the
    same steps; ``held``: share of held-out prompts all right. ``cpu`` (processor seconds of training) and ``peak_mb``
    are of one training for all its steps; ``ms``: processor milliseconds to draw a picture. ``data``: what its data
    cost besides."""

    name: str
    kind: Literal["teacher", "ddim", "student"]
    steps: int
    times: list[int] | None = None
    seeds: list[int] = field(default_factory=list)
    score: float = 0.0
    share: float | None = None
    by_seed: list[float] = field(default_factory=list)
    over_ddim: Estimate | None = None
    shapes: float = 0.0
    diversity: float = 0.0
    diversity_share: float | None = None
    held: float = 0.0
    cpu: float | None = None
    peak_mb: float | None = None
    ms: float = 0.0
    data: str = ""
    verdict: Word = ""
    why: str = ""


def decide_student(
    shares: Mapping[int, Sequence[tuple[float, float]]], prompts: int = SINGLES_ASKED
) -> tuple[Word, str]:
    """(verdict, reason) of a student from its ``shares``: by steps, for each seed its shares of the teacher's score and
    diversity.

    Learning: every seed reaches the bars at each of its step counts that has one (1 and 2). Open: too few seeds or
    prompts. Not judged: no such step count."""
    judged = {steps: found for steps, found in sorted(shares.items()) if steps in BARS and found}
    if not judged:
        return "", f"the rule is for {' and '.join(map(str, BARS))} steps, and it has none of these"
    missed = []
    for steps, found in judged.items():
        for i, what, bar in ((0, "score", BARS[steps]), (1, "diversity", DIVERSITY)):
            below = [pair[i] for pair in found if pair[i] < bar - NEAR]
            if below:
                at = f"{steps} step{'s' * (steps > 1)}"
                seeds = f"{len(below)} of {len(found)} seeds" if len(found) > 1 else "the seed"
                missed.append(f"{at}: {seeds} below {bar:.0%} of the teacher's {what} (least {min(below):.1%})")
    if missed:
        return "not learning", "; ".join(missed)
    for count, asked, name in (
        (min(map(len, judged.values())), SEEDS_ASKED, "seeds"),
        (prompts, SINGLES_ASKED, "single-object prompts"),
    ):
        if count < asked:
            return "open", f"{count} of {asked} {name}"
    return "learning", ""


def decide_aligned(gains: Sequence[float], pooled: Estimate) -> tuple[Word, str]:
    """(verdict, reason) of an alignment from its gains over its own starting students in held-out prompts all right,
    by seed, and pooled with the interval over prompts.

    Learning: every seed gains, and the interval lies above nothing gained. Open: too few seeds."""
    against = []
    if min(gains) <= 0:
        against.append(f"{sum(g <= 0 for g in gains)} of {len(gains)} seeds do not gain over their student")
    if pooled.low <= 0:
        against.append(
            "the interval holds the student it started from"
            if pooled.high >= 0
            else "worse than the student it started from"
        )
    said = f"held-out, over its student: {pooled.text()}"
    if against:
        return "not learning", "; ".join([*against, said])
    if len(gains) < SEEDS_ASKED:
        return "open", f"{len(gains)} of {SEEDS_ASKED} seeds; {said}"
    return "learning", said


def reference_row(found: Found, kind: Literal["teacher", "ddim"], teacher: Found | None) -> StepRow:
    """A row of the teacher, or of plain DDIM."""
    level = found["levels"][0]
    row = StepRow(found["name"].partition("-")[0].replace("ddim", "DDIM"), kind, level["steps"], level["times"])
    return _filled(row, [level], teacher)


def student_rows(
    name: str, found: Sequence[Found], teacher: Found | None, ddim: Mapping[int, Found], data: str = ""
) -> list[StepRow]:
    """The rows of a student, one a step count, from its results by seed; without a verdict yet."""
    found = sorted(found, key=lambda r: r["seed"])
    if not found:
        return []
    rows = []
    for place, first in enumerate(found[0]["levels"]):
        levels = [r["levels"][place] for r in found]
        row = StepRow(name, "student", first["steps"], first["times"], [r["seed"] for r in found], data=data)
        row.cpu, row.peak_mb = (float(np.mean([r[key] for r in found])) for key in ("cpu", "peak_mb"))
        if first["steps"] in ddim:
            beside = np.array(ddim[first["steps"]]["levels"][0]["single"])
            row.over_ddim = mean(np.mean([level["single"] for level in levels], 0) - beside)
        rows.append(_filled(row, levels, teacher))
    return rows


def judge_student(
    method: str,
    rows: Sequence[StepRow],
    found: Sequence[Found],
    teacher: Found | None,
    ddim: Mapping[int, Found],
    starts: Sequence[Found] = (),
) -> tuple[Word, str]:
    """(verdict, reason) for ``rows`` of a method: by its bars (those of all its steps alone, where it is in ``WHOLE``),
    or, where it aligns a student, by what it gains over ``starts``, the results of the students that it started from.
    Both are set in the rows."""
    verdict, why = _judged(method, found, teacher, starts)
    if verdict == "learning" and method not in ALIGNED_FROM:
        for steps in sorted(BARS.keys() & ddim.keys() & {row.steps for row in rows}):
            share = _share(ddim[steps]["levels"][0], teacher)
            if share is not None and share[0] >= BARS[steps]:
                plain = f"plain DDIM reaches the bar of {steps} step{'s' * (steps > 1)} as well"
                why = "; ".join(filter(None, (why, plain)))
    for row in rows:
        row.verdict, row.why = verdict, why
    return verdict, why


def _judged(method: str, found: Sequence[Found], teacher: Found | None, starts: Sequence[Found]) -> tuple[Word, str]:
    if method in UNJUDGED:
        return "", UNJUDGED[method]
    if method in ALIGNED_FROM:
        before = {r["seed"]: r["judged"]["scores"][PRIMARY] for r in starts}
        pairs = [(r["judged"]["scores"][PRIMARY], before[r["seed"]]) for r in found if r["seed"] in before]
        if not pairs:
            return "", f"the results of {ALIGNED_FROM[method]} that it started from are not there"
        gaps = [np.subtract(now, then) for now, then in pairs]
        return decide_aligned([float(gap.mean()) for gap in gaps], mean(np.mean(gaps, 0)))
    if teacher is None:
        return "open", "the teacher was not judged"
    shares: dict[int, list[tuple[float, float]]] = {}
    for result in found:
        for level in result["levels"][-1:] if method in WHOLE else result["levels"]:
            share = _share(level, teacher)
            if share is None:
                return "open", "the teacher has nothing right, which shares cannot be of"
            shares.setdefault(level["steps"], []).append(share)
    return decide_student(shares, len(teacher["levels"][0]["single"]))


def _share(level: Found, teacher: Found | None) -> tuple[float, float] | None:
    """Of the teacher's score and diversity."""
    if teacher is None:
        return None
    ground = teacher["levels"][0]
    score = float(np.mean(ground["single"]))
    if not score or not ground["diversity"]:
        return None
    return float(np.mean(level["single"])) / score, level["diversity"] / ground["diversity"]


def _filled(row: StepRow, levels: Sequence[Found], teacher: Found | None) -> StepRow:
    row.by_seed = [float(np.mean(level["single"])) for level in levels]
    row.score, row.held = float(np.mean(row.by_seed)), float(np.mean([level["held"] for level in levels]))
    row.shapes, row.diversity, row.ms = (
        float(np.mean([level[key] for level in levels])) for key in ("shapes", "diversity", "ms")
    )
    shares = [share for level in levels if (share := _share(level, teacher))]
    if shares:
        row.share, row.diversity_share = (float(np.mean([share[i] for share in shares])) for i in (0, 1))
    return row
