"""Which known picture a run resembles, read from its curves and samples alone; its thresholds are the guards' too.

Measured on the tiny world with recipe tiny/dpo and train.steps=150 (lr 2e-3; 64 held-out pairs x 4 draws, 8 prompts x
2 samples). Columns: rise of the winner's held-out error over the base's, held-out accuracy, samples'
diversity as a share of the base's, largest move of mean brightness or saturation, saturated logits, what it is:

    beta 500          +0.4 %   0.67   1.02   0.00    1 %   healthy
    beta 660          +0.3 %   0.62   1.02   0.00    2 %   healthy (what --suggest-beta names)
    beta 6600         -0.0 %   0.57   1.00   0.00   13 %   unclear: held-out loss 1.26, a coin has 0.69
    beta 66          +17.9 %   0.75   0.94   0.01    1 %   over-optimised
    beta 5           +80.8 %   0.76   0.74   0.21    0 %   over-optimised: objects vanish, grounds turn black
    beta 50000        +0.0 %   0.49   1.00   0.00   52 %   not learning
    shuffled labels   +1.2 %   0.54   0.74   0.03    0 %   not learning (mean margin below 0)
    lr 1e-6           -0.0 %   0.54   1.00   0.00    0 %   not learning (nothing moved), 50 steps
    lr 0.02           x 30     0.43   0.82   0.10   18 %   collapsed (colours at step 50: 0.31)
    lr 0.1            x 31     0.44   0.62   0.56   46 %   collapsed, 50 steps
    lr 0.1, no warmup x 41     0.44   0.11   0.27   81 %   collapsed: all white, 8 steps of 8

A held-out loss above a coin's is no verdict by itself: tiny/sdxl-dpo ends at 1.00 (accuracy 0.73, winner +1.1 %), and
the oracle finds its samples better than the base's by 4.8 points.

Thresholds lie between the healthy runs and the others, by a factor where there is room. They are a reading of curves,
not a law: a good run on other data may look otherwise, and only a comparison of samples with the base's (``diffalign
eval``) says whether pictures became better.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import log, sqrt
from typing import Literal

from scipy.special import stdtrit

from .curves import LogRow, alarms, series

WINNER_WORSE = 0.02  # the guard speaks: the winner's error is this share above the base's
WINNER_LOST = 0.05  # the report judges
WINNER_GONE = 1.0  # it no longer knows its images
SATURATED = 0.3  # share of logits beyond 5
DIVERSITY_KEPT = 0.5  # of the base's
BRIGHTNESS_MOVED = 0.15
SATURATION_MOVED = 0.15
NORM_TIMES = 10.0  # a gradient norm over its median so far
FALLEN = 0.1  # accuracy, below its best
SURE = 0.2  # held-out loss, above log 2
DRAWS = 256  # held-out (pair, draw) where the log does not say how many
STILL = 0.002  # change of the errors, as a share of them
WEAK = 0.02  # mean |logit|
CLIMB = 5  # least points of a reward's curve that a line is laid through (chosen by us)
SUGGESTED = ("dpo", "dcpo", "pso")  # methods that `train --suggest-beta` takes

Verdict = Literal["healthy", "collapsed", "over-optimised", "not learning", "unclear"]


State = Literal["good", "bad", "open"]


@dataclass(frozen=True)
class Finding:
    """One measure as a person would read it. ``state``: good, bad, or open where it says little."""

    name: str
    start: float | None
    end: float
    state: State
    words: str


@dataclass(frozen=True)
class Health:
    """Which known picture a run resembles, why, what to change next, and every measure that was looked at."""

    verdict: Verdict
    reason: str
    advice: str = ""
    findings: Sequence[Finding] = field(default_factory=list)


@dataclass(frozen=True)
class Readings:
    """What the rules look at; None where the log does not hold it. ``damage``: rise of the winner's error over the
    base's (or over its own at step 0), as a share. ``moved``: the larger change of the two errors, as a share.
    ``margin``: its growth."""

    held: bool
    accuracy: float | None
    accuracy_start: float
    accuracy_best: float
    best_step: int | None
    damage: float | None
    moved: float | None
    logit: float | None
    saturated: float | None
    saturated_start: float
    margin: float | None
    loss: float | None
    loss_start: float | None
    pictures: dict[str, tuple[float, float]]
    points: int
    draws: float = DRAWS

    @property
    def gained(self) -> float:
        """Accuracy above where it started."""
        return (self.accuracy or 0.0) - self.accuracy_start

    @property
    def noise(self) -> float:
        """A standard error of held-out accuracy; draws of one pair are counted as if they were pairs of their own."""
        return max(0.01, 0.5 / self.draws**0.5)

    @property
    def full(self) -> bool:
        """Whether too many logits are saturated, and more than at the start."""
        return self.saturated is not None and self.saturated > max(SATURATED, self.saturated_start + SATURATED / 2)

    @property
    def sure(self) -> bool:
        """Whether a loss that starts at log 2 (that of a coin) ends well above it on held-out pairs."""
        start, end = self.loss_start, self.loss
        return start is not None and end is not None and abs(start - log(2)) < 0.01 and end > start + SURE

    @property
    def diversity(self) -> float | None:
        """Diversity as a share of the base's."""
        if "diversity" not in self.pictures or self.pictures["diversity"][0] <= 0:
            return None
        start, end = self.pictures["diversity"]
        return end / start

    @property
    def drift(self) -> float:
        """Largest move of brightness or saturation, in units of its threshold."""
        limits = {"brightness": BRIGHTNESS_MOVED, "saturation": SATURATION_MOVED}
        moves = [abs(end - start) / limits[name] for name, (start, end) in self.pictures.items() if name in limits]
        return max(moves, default=0.0)


def health(rows: Sequence[LogRow], method: Mapping[str, object] | None = None) -> Health:
    """Read a run's curves as a person would, held-out numbers before those of training. ``method``: the recipe's name
    and settings of it, which decide what the advice may name; a beta is presumed where they are not known.

    A method that samples while it trains is read by its reward: pairs of its own fresh samples are even at any time, so
    that their accuracy says nothing. A few-step student's losses compare networks that move together, and are no
    verdict; its pictures are those of few steps at the start, so that their colours may move.

    collapsed: samples of a prompt became alike, or the winner's error doubled or their colours drifted while the
    preference was not learnt, or the reward did not rise.
    over-optimised: the preference was learnt, at the price of the winner's error, the samples' colours, held-out
    accuracy, or with most logits saturated. not learning: held-out accuracy stayed within its noise, or nothing moved.
    healthy: accuracy rose, winners hold, samples hold. unclear: anything between, or too little to tell."""
    found = read(rows)
    names = {key for row in rows for key in row}
    if "reward" in names:
        climb = climbed(rows)
        seen = [_climb_finding(climb)] if climb else []
        return Health(*_judge_climb(found, climb, rows), [*seen, *_findings(found, {"accuracy"})])
    if any(name.startswith("student/") for name in names):
        return Health(*_judge_student(found), _findings(found, {"brightness", "saturation"}))
    verdict, reason, advice = _judge(found, method or {"beta": None})
    return Health(verdict, reason, advice, _findings(found))


@dataclass(frozen=True)
class Climb:
    """The line of least squares through a reward's curve of ``points``: its ends, and the standard error of its rise.
    ``held``: of the same prompts and noise at every look, and not of each round's own."""

    start: float
    end: float
    error: float
    points: int
    held: bool = False

    @property
    def rise(self) -> float:
        """Of the line, from the first point to the last."""
        return self.end - self.start

    @property
    def sure(self) -> float:
        """How large a rise is beyond chance (two-sided, 5 %), by Student's t."""
        return float(stdtrit(self.points - 2, 0.975)) * self.error


def climbed(rows: Sequence[LogRow]) -> Climb | None:
    """The reward over the run, held out where enough looks were taken; None where there are too few points."""
    steps, values = series(rows, "reward", "validate")
    held = len(values) >= CLIMB
    if not held:
        steps, values = series(rows, "reward")
    if len(values) < CLIMB or steps[0] == steps[-1]:
        return None
    count, middle, mean = len(values), sum(steps) / len(steps), sum(values) / len(values)
    spread = sum((x - middle) ** 2 for x in steps)
    slope = sum((x - middle) * (y - mean) for x, y in zip(steps, values, strict=True)) / spread
    rest = sum((y - mean - slope * (x - middle)) ** 2 for x, y in zip(steps, values, strict=True))
    error = sqrt(rest / (count - 2) / spread) * (steps[-1] - steps[0])
    low, high = (mean + slope * (step - middle) for step in (steps[0], steps[-1]))
    return Climb(low, high, error, count, held)


def read(rows: Sequence[LogRow]) -> Readings:
    """The numbers behind a verdict: means over the last fifth of the curve (at least its last point)."""
    held = any(row.get("kind") == "validate" and "accuracy" in row for row in rows)
    held = held or any(row.get("kind") == "validate" and "chosen_error" in row for row in rows)
    kind = "validate" if held else "train"

    def end(key: str, where: str = kind) -> float | None:
        values = series(rows, key, where)[1]
        tail = max(1, len(values) // 5)
        return sum(values[-tail:]) / tail if values else None

    def start(key: str, where: str = kind) -> float | None:
        steps, values = series(rows, key, where)
        return values[0] if values and steps[0] == 0 else None

    steps, curve = series(rows, "accuracy", kind)
    best = max(range(len(curve)), key=curve.__getitem__, default=None)
    error, first, gain = end("chosen_error"), start("chosen_error"), end("chosen_gain")
    base = first if first is not None else error + gain if error is not None and gain is not None else None
    damage = error / base - 1 if error is not None and base else None
    lost = end("rejected_gain")
    moved = None if damage is None else abs(damage)
    if moved is not None and lost is not None and base:
        moved = max(moved, abs(lost) / base)
    begin = start("accuracy")
    return Readings(
        held,
        end("accuracy"),
        0.5 if begin is None else begin,
        curve[best] if best is not None else 0.0,
        int(steps[best]) if best is not None else None,
        damage,
        moved,
        end("logit_abs"),
        end("saturated"),
        start("saturated") or 0.0,
        None if (margin := end("margin")) is None else margin - (start("margin") or 0.0),
        end("loss") if held else None,
        start("loss") if held else None,
        {
            name: (first_value, last_value)
            for name in ("diversity", "brightness", "saturation")
            if (first_value := start(name, "validate")) is not None
            and (last_value := end(name, "validate")) is not None
        },
        max(len(curve), len(series(rows, "chosen_error", kind)[1])),
        end("held_out", "validate") or DRAWS,
    )


def _judge(r: Readings, method: Mapping[str, object]) -> tuple[Verdict, str, str]:
    """The picture, why, and what to do next."""
    where = "held-out" if r.held else "training"
    lower = "lower train.lr, or take the best checkpoint (output.weights=best)"
    loose = r.logit is not None and r.logit < 1 and r.accuracy is not None
    beta, probed = "beta" in method, " (`--suggest-beta` names one)" if method.get("name") in SUGGESTED else ""
    tie = f"raise method.beta{probed} or lower train.lr" if loose and beta else "lower train.lr"
    ease = f"lower method.beta{probed}" if beta else "lower train.lr"
    if r.diversity is not None and r.diversity < DIVERSITY_KEPT:
        return "collapsed", f"samples of one prompt became alike: {r.diversity:.0%} of the base's diversity", tie
    if r.points < 2:
        return "unclear", "the log holds no preference curves, or too few points to tell", ""
    hurt = r.damage is not None and r.damage > WINNER_LOST
    rise = r.damage or 0.0
    worse = f"the winner's {where} error is {f'{rise:.0%} above' if rise < 2 else f'{1 + rise:.0f} times'} the base's"
    colours = ", ".join(
        f"{name} {a:.2f} to {b:.2f}" for name, (a, b) in r.pictures.items() if name != "diversity" and a != b
    )
    if r.accuracy is None:
        return _judge_plain(r, hurt, worse, where, lower)
    said = f"{where} accuracy {r.accuracy:.2f}"
    if rise > WINNER_GONE and r.gained < 2 * r.noise:
        return "collapsed", f"{worse} while {said} is no better than at the start: it unlearns its images", tie
    if r.drift > 1 and r.gained < 2 * r.noise:
        return "collapsed", f"the samples' colours drifted ({colours}) and {said} says that nothing was learnt", tie
    if hurt and r.gained < 2 * r.noise:
        return "not learning", f"{said} is no better than at the start, and {worse}: images are lost for nothing", tie
    if hurt:
        size = f", and at a mean |logit| of {r.logit:.2g} the sigmoid never held it back" if loose else ""
        return (
            "over-optimised",
            f"the preference is won ({said}), but {worse}{size}",
            f"{tie}; or stop at an earlier checkpoint",
        )
    if r.held and r.accuracy_best - r.accuracy_start > 2 * r.noise and r.accuracy_best - r.accuracy > FALLEN:
        text = f"{said}, fallen from {r.accuracy_best:.2f} at step {r.best_step}: it learns its training pairs by heart"
        return (
            "over-optimised",
            text,
            "stop earlier, use more pairs, or " + ("raise method.beta" if beta else "lower train.lr"),
        )
    if r.full:
        text = f"{r.saturated:.0%} of the logits are saturated: won pairs teach nothing, lost ones pull with full force"
        if r.gained >= 2 * r.noise:
            return "over-optimised", text, f"{ease} or stop earlier"
        return "not learning", f"{said}, and {text}", ease
    if r.drift > 1:
        return "over-optimised", f"the preference is won ({said}), but the samples' colours drifted ({colours})", tie
    if (r.moved is not None and r.moved < STILL) and (r.logit is None or r.logit < WEAK):
        text = f"the errors moved by {r.moved:.2%} of themselves: the student hardly left the base"
        return "not learning", text, "raise train.lr or train.steps"
    if r.gained < -2 * r.noise:
        return "not learning", f"{said}, below the start: are winners and losers swapped?", "look at the labels"
    if r.gained < r.noise:
        text = f"{said}, {r.accuracy_start:.2f} at the start: the student moves, held-out pairs do not follow"
        return "not learning", text, "check the labels (`pairs check`), use more pairs, or train longer"
    if r.gained < 2 * r.noise and r.margin is not None and r.margin <= 0:
        text = f"{said} is within its noise of the start, and the mean margin did not grow"
        return "not learning", text, "check the labels (`pairs check`), use more pairs, or train longer"
    if r.gained < 2 * r.noise:
        return "unclear", f"{said} is above the start by less than its noise", "train longer, or hold more pairs out"
    if r.sure:
        text = f"{said}, but the held-out loss is {r.loss:.2f}, above the {r.loss_start:.2f} of a coin"
        return (
            "unclear",
            f"{text}: the logits are surer than the labels bear, which need not harm the samples",
            "compare samples with the base's (`diffalign eval`)"
            + (f"; method.beta may be too high{probed}" if beta else ""),
        )
    price = "" if r.damage is None else f", and the winner's error {_change(r.damage)}"
    return "healthy", f"{said}{price}", "compare samples with the base's: `diffalign eval`"


def _judge_climb(r: Readings, climb: Climb | None, rows: Sequence[LogRow]) -> tuple[Verdict, str, str]:
    """A method that samples while it trains: by its reward, its guard and the samples."""
    softer = "lower train.lr, tie it closer to the base, or take an earlier checkpoint"
    more = "train longer, or with more prompts a step (train.batch)"
    if r.diversity is not None and r.diversity < DIVERSITY_KEPT:
        return "collapsed", f"samples of one prompt became alike: {r.diversity:.0%} of the base's diversity", softer
    if climb is None:
        few = f"the log holds fewer than {CLIMB} points of the reward, too few to lay a line through"
        return (
            ("collapsed", "the samples' colours drifted from the base's", softer)
            if r.drift > 1
            else ("unclear", few, more)
        )
    where = "held-out reward" if climb.held else "reward"
    ends = f"the {where} went from {climb.start:.4g} to {climb.end:.4g}"
    said = f"{ends}, {climb.rise:+.3g} with an error of {climb.error:.2g}"
    hacked = [alarm.text for alarm in alarms(rows) if alarm.guard == "hacking"]
    if hacked:
        return "over-optimised", hacked[0], softer
    if r.drift > 1:
        rose = climb.rise > climb.sure
        return (
            "over-optimised" if rose else "collapsed",
            f"the samples' colours drifted from the base's; {said}",
            softer,
        )
    if climb.rise < -climb.sure:
        return "not learning", f"{said}: it falls", "lower train.lr, and look at what the scorer is given"
    if climb.rise <= climb.sure:
        chance = "which may be chance" if climb.held else "which may be chance: rounds of other prompts differ by more"
        return "unclear", f"{said}, {chance}", more
    looks = series(rows, "reward", "validate")[1]
    if not climb.held and len(looks) > 1 and looks[-1] < looks[0]:
        text = f"{said}, but on held-out prompts from {looks[0]:.4g} to {looks[-1]:.4g}"
        return "unclear", text, "look more often (validate.every), at more of them (validate.pairs)"
    return "healthy", said, "compare samples with the base's, by another judge than the reward: `diffalign eval`"


def _climb_finding(climb: Climb) -> Finding:
    state: State = "open" if abs(climb.rise) <= climb.sure else "good" if climb.rise > 0 else "bad"
    words = f"the line through its curve; error {climb.error:.2g}, beyond chance from {climb.sure:.2g} on"
    return Finding("held-out reward" if climb.held else "reward", climb.start, climb.end, state, words)


def _judge_student(r: Readings) -> tuple[Verdict, str, str]:
    """A few-step student: by the diversity of its samples alone."""
    if r.diversity is not None and r.diversity < DIVERSITY_KEPT:
        alike = f"samples of one prompt became alike: {r.diversity:.0%} of the diversity at the start"
        return "collapsed", alike, "lower train.lr or method.guidance, or give the fake score more steps"
    told = "a student's losses compare networks that move together, and do not say how good it is"
    return "unclear", told, "compare its samples with the teacher's: `diffalign eval`"


def _judge_plain(r: Readings, hurt: bool, worse: str, where: str, lower: str) -> tuple[Verdict, str, str]:
    """Methods without a preference logit: the winner's error and the samples alone."""
    if r.damage is None:
        return "unclear", "the log holds no curves that these rules read", ""
    if hurt or r.drift > 1:
        return "collapsed", worse if hurt else "the samples' colours drifted from the base's", lower
    if r.damage < -STILL:
        return "healthy", f"the {where} error {_change(r.damage)}", "compare samples with the base's: `diffalign eval`"
    if abs(r.damage) <= STILL:
        return "not learning", f"the {where} error {_change(r.damage)}", "raise train.lr or train.steps"
    return "unclear", f"the {where} error {_change(r.damage)}", lower


def _change(damage: float) -> str:
    return f"{'rose' if damage > 0 else 'fell'} by {abs(damage):.1%}"


def _findings(r: Readings, silent: Collection[str] = ()) -> list[Finding]:
    """Every measure in words, for the report's table. ``silent``: those that are no sign of anything here."""
    found: list[Finding] = []
    state: State
    if r.accuracy is not None and "accuracy" not in silent:
        state = "good" if r.gained >= 2 * r.noise else "bad" if r.gained < r.noise else "open"
        words = f"best {r.accuracy_best:.2f} at step {r.best_step}"
        found.append(Finding("accuracy", r.accuracy_start, r.accuracy, state, words))
    if r.damage is not None:
        state = "bad" if r.damage > WINNER_LOST else "open" if r.damage > WINNER_WORSE else "good"
        found.append(Finding("winner's error, change", 0.0, r.damage, state, f"bad above +{WINNER_LOST:.0%}"))
    if r.logit is not None:
        words = "below 1 the tie to the base is loose; 1 to 3 is where the sigmoid works"
        found.append(Finding("mean |logit|", None, r.logit, "open", words))
    if r.saturated is not None:
        words, state = f"beyond 5; bad above {SATURATED:.0%}", "bad" if r.full else "good"
        found.append(Finding("saturated logits", r.saturated_start, r.saturated, state, words))
    if r.loss is not None and r.loss_start is not None:
        words = f"0.69 is a coin's; doubtful above {log(2) + SURE:.2f} where it starts there"
        found.append(Finding("held-out loss", r.loss_start, r.loss, "open" if r.sure else "good", words))
    limits = {"brightness": BRIGHTNESS_MOVED, "saturation": SATURATION_MOVED}
    for name, (start, end) in r.pictures.items():
        if name in silent:
            continue
        if name == "diversity":
            bad = end < DIVERSITY_KEPT * start
            words = f"between samples of one prompt; bad below {DIVERSITY_KEPT:.0%} of the base's"
        else:
            bad = abs(end - start) > limits[name]
            words = f"of the samples; bad when it moves by more than {limits[name]:g}"
        found.append(Finding(name, start, end, "bad" if bad else "good", words))
    return found
