"""Which known picture a run resembles, read from its curves; the thresholds are those of the guards too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .curves import LogRow, series

WINNER_WORSE = 0.01
SATURATED = 0.5
DIVERSITY_KEPT = 0.6
BRIGHTNESS_MOVED = 0.15
SATURATION_MOVED = 0.15
NORM_TIMES = 10.0


@dataclass(frozen=True)
class Health:
    """Which known picture a run resembles: healthy | collapsed | over-optimised | not learning | unclear."""

    verdict: str
    reason: str


def health(rows: Sequence[LogRow]) -> Health:
    """Read a preference run's curves as a person would, held-out numbers before those of training.

    collapsed: the winner's error rose above the base's by more than a twentieth of it.
    over-optimised: held-out accuracy fell by 0.1 from a best above 0.55, or half of the logits are saturated.
    not learning: held-out accuracy within 0.03 of one half at the end. healthy: above that, winners not worse.
    """
    held = any(row.get("kind") == "validate" and "accuracy" in row for row in rows)
    kind = "validate" if held else "train"
    accuracy = series(rows, "accuracy", kind)[1]
    if len(accuracy) < 2:
        return Health("unclear", "the log holds no preference curves, or too few points to tell")
    tail = max(1, len(accuracy) // 5)

    def end(key: str, where: str = kind) -> float | None:
        values = series(rows, key, where)[1]
        return sum(values[-tail:]) / len(values[-tail:]) if values else None

    where = "held-out" if held else "training"
    last = end("accuracy") or 0.0
    gain, error, saturated = end("chosen_gain"), end("chosen_error"), end("saturated", "train")
    if gain is not None and error and gain < -0.05 * (error + gain):
        return Health(
            "collapsed",
            f"the winner's {where} error is {-gain / (error + gain):.0%} above the base's: it unlearns its images",
        )
    if held and max(accuracy) > 0.55 and max(accuracy) - last > 0.1:
        return Health(
            "over-optimised",
            f"held-out accuracy fell from {max(accuracy):.2f} to {last:.2f}; an earlier checkpoint is better",
        )
    if saturated is not None and saturated > 0.5:
        return Health(
            "over-optimised",
            f"{saturated:.0%} of the logits are saturated; lower beta or the learning rate, or stop earlier",
        )
    if abs(last - 0.5) <= 0.03:
        return Health(
            "not learning",
            f"{where} accuracy is {last:.2f}: raise the learning rate, beta or the steps, or check the labels",
        )
    if last < 0.5:
        return Health(
            "not learning", f"{where} accuracy is {last:.2f}, below one half: are winners and losers swapped?"
        )
    extra = (
        ""
        if gain is None
        else f" and the winner's error {'fell' if gain >= 0 else 'stayed within 5 %'} against the base"
    )
    return Health("healthy", f"{where} accuracy is {last:.2f}{extra}")
