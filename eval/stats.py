"""Paired statistics over prompts: win rates, intervals, exact tests. numpy and scipy only.

The unit of resampling is the prompt (``spec/evaluators.md`` 13). With d_ik = a_ik - b_ik for prompt i and seed k:
d_i = mean_k d_ik, and w_i = mean_k of 1, 1/2, 0 for a win, a tie, a loss of A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

DRAWS = 10_000
RATING_DRAWS = 2_000
SEED = 20_240_229
LEVEL = 0.95
CHUNK = 4_000_000  # drawn indices held at once


@dataclass(frozen=True)
class Interval:
    """A confidence interval and how it was found: bca | percentile | wilson | clopper-pearson."""

    low: float
    high: float
    kind: str

    def excludes(self, value: float) -> bool:
        return not self.low <= value <= self.high


def per_prompt(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """(d, w), each (n,): the mean gain and the share of wins of A for every prompt; ties count one half.

    ``a[i]`` and ``b[i]`` are the scores of prompt i for the same seeds in the same order."""
    gaps = [np.asarray(x, np.float64) - np.asarray(y, np.float64) for x, y in zip(a, b, strict=True)]
    gains = np.array([g.mean() for g in gaps])
    wins = np.array([((g > 0) + 0.5 * (g == 0)).mean() for g in gaps])
    return gains, wins


def bootstrap_means(values: np.ndarray, draws: int, seed: int, strata: Sequence[object] | None = None) -> np.ndarray:
    """Means of ``draws`` resamples of ``values`` (n,), drawn with replacement inside each stratum. (draws,)

    The indices depend on n, the strata and the seed alone, so intervals of (A, B) and (B, A) mirror each other."""
    rng = np.random.default_rng(seed)
    values = np.asarray(values, np.float64)
    groups = [np.arange(len(values))] if strata is None else _groups(strata)
    totals = np.zeros(draws)
    for group in groups:
        step = max(1, CHUNK // len(group))
        for start in range(0, draws, step):
            stop = min(draws, start + step)
            picks = rng.integers(len(group), size=(stop - start, len(group)))
            totals[start:stop] += values[group][picks].sum(1)
    return totals / len(values)


def bootstrap(
    values: np.ndarray,
    level: float = LEVEL,
    draws: int = DRAWS,
    seed: int = SEED,
    strata: Sequence[object] | None = None,
    kind: Literal["bca", "percentile"] = "bca",
) -> Interval:
    """Interval of the mean of ``values`` (n,), one value a prompt (Efron and Tibshirani 1993, ch. 14 for BCa).

    BCa falls back to the percentile interval where it is undefined: a constant sample, or n = 1."""
    values = np.asarray(values, np.float64)
    means = bootstrap_means(values, draws, seed, strata)
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if kind == "bca" and len(values) > 1 and np.ptp(values) > 0:
        from scipy.special import ndtr, ndtri

        centre = values.mean()
        # Resampled means that equal the estimate differ from it by rounding: they are ties, not smaller ones.
        near = np.abs(means - centre) <= 1e-12 * max(1.0, np.abs(values).max())
        below = np.mean((means < centre) & ~near) + 0.5 * np.mean(near)
        z0 = ndtri(np.clip(below, 0.5 / draws, 1 - 0.5 / draws))
        gaps = _jackknife_gaps(values, strata)
        spread = (gaps**2).sum()
        skew = (gaps**3).sum() / (6 * spread**1.5) if spread > 0 else 0.0
        z = z0 + ndtri(tails)
        tails = ndtr(z0 + z / (1 - skew * z))
    else:
        kind = "percentile"
    low, high = np.quantile(means, tails)
    return Interval(float(low), float(high), kind)


def wilson(wins: float, n: int, level: float = LEVEL) -> Interval:
    """Wilson's score interval of a share (Wilson 1927)."""
    from scipy.special import ndtri

    z = float(ndtri((1 + level) / 2))
    share = wins / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = 0.0 if wins <= 0 else max(0.0, float(middle - half))
    high = 1.0 if wins >= n else min(1.0, float(middle + half))
    return Interval(low, high, "wilson")


def clopper_pearson(wins: int, n: int, level: float = LEVEL) -> Interval:
    """The exact interval of a share (Clopper and Pearson 1934)."""
    from scipy.special import betaincinv

    tail = (1 - level) / 2
    low = 0.0 if wins == 0 else float(betaincinv(wins, n - wins + 1, tail))
    high = 1.0 if wins == n else float(betaincinv(wins + 1, n - wins, 1 - tail))
    return Interval(low, high, "clopper-pearson")


def win_rate_interval(
    wins: np.ndarray, level: float = LEVEL, draws: int = DRAWS, seed: int = SEED, strata: Sequence[object] | None = None
) -> Interval:
    """The interval of the mean of w_i (n,): Wilson when every prompt is a plain win or loss (one seed, no ties), or
    when all w_i are equal (a bootstrap would have no width); else the bootstrap over prompts (BCa)."""
    wins = np.asarray(wins, np.float64)
    if np.isin(wins, (0.0, 1.0)).all() or np.ptp(wins) == 0:
        return wilson(float(wins.sum()), len(wins), level)
    return bootstrap(wins, level, draws, seed, strata)


def sign_test(wins: int, decided: int) -> float:
    """Exact two-sided sign test: p of ``wins`` out of ``decided`` prompts without ties."""
    # Whole numbers: scipy's binomial tail is off in the ninth digit at n = 500.
    term = total = 1  # binomial coefficients (decided over j), summed for j = 0 .. the smaller count
    for j in range(min(wins, decided - wins)):
        term = term * (decided - j) // (j + 1)
        total += term
    return min(1.0, 2 * total / 2**decided)


def sign_flip_test(gains: np.ndarray, draws: int = DRAWS, seed: int = SEED) -> float:
    """Two-sided permutation test of mean(d_i) = 0 by flipping signs: exact up to 20 prompts, else by random flips."""
    gains = np.asarray(gains, np.float64)
    n = len(gains)
    observed = abs(gains.sum()) - 1e-12 * max(np.abs(gains).sum(), 1e-300)
    if n <= 20:
        sums = np.zeros(1)
        for gain in gains:  # all 2^n signed sums, doubled one prompt at a time
            sums = np.concatenate([sums + gain, sums - gain])
        return float(np.mean(np.abs(sums) >= observed))
    rng = np.random.default_rng(seed)
    hits = 0
    step = max(1, CHUNK // n)
    for start in range(0, draws, step):
        signs = rng.integers(2, size=(min(step, draws - start), n), dtype=np.int8) * 2 - 1
        hits += int((np.abs(signs @ gains) >= observed).sum())
    return (1 + hits) / (draws + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of a family of p values, in their order (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


@dataclass(frozen=True)
class Paired:
    """A against B over n prompts. ``effect`` is d_z = gain / sd(d_i), None when all d_i are equal."""

    prompts: int
    pairs: int
    mean_a: float
    mean_b: float
    median_a: float
    median_b: float
    gain: float
    gain_interval: Interval
    effect: float | None
    win_rate: float
    win_interval: Interval
    won: int
    lost: int
    tied: int
    sign_p: float
    flip_p: float

    def mirrored(self) -> Paired:
        """B against A."""
        gain, win = self.gain_interval, self.win_interval
        return replace(
            self,
            mean_a=self.mean_b,
            mean_b=self.mean_a,
            median_a=self.median_b,
            median_b=self.median_a,
            gain=-self.gain,
            gain_interval=Interval(-gain.high, -gain.low, gain.kind),
            effect=None if self.effect is None else -self.effect,
            win_rate=1 - self.win_rate,
            win_interval=Interval(1 - win.high, 1 - win.low, win.kind),
            won=self.lost,
            lost=self.won,
        )


@dataclass(frozen=True)
class Mean:
    """A mean over prompts with its bootstrap interval, and how many prompts had a score."""

    value: float
    interval: Interval
    prompts: int

    @staticmethod
    def of(values: np.ndarray, level: float = LEVEL, draws: int = DRAWS, seed: int = SEED) -> Mean:
        """Of one value a prompt, (n,)."""
        return Mean(float(np.mean(values)), bootstrap(values, level, draws, seed), len(values))


def bradley_terry(wins: np.ndarray, prior: float = 0.0, rounds: int = 2000) -> np.ndarray:
    """Strengths (..., m) from ``wins`` (..., m, m), wins of i over j; ties count one half on both sides.

    Bradley and Terry 1952, by Hunter's MM iterations (2004): on the scale of chess ratings (400 log10), with mean 0.
    ``prior`` half-wins each way for every pair keep a model finite that wins or loses everything."""
    wins = np.asarray(wins, np.float64)
    m = wins.shape[-1]
    wins = (wins + prior) * (1 - np.eye(m))
    games, won = wins + np.swapaxes(wins, -1, -2), wins.sum(-1)
    strength = np.ones(wins.shape[:-1])
    for _ in range(rounds):
        sums = strength[..., :, None] + strength[..., None, :]
        new = won / np.maximum((games / sums).sum(-1), 1e-300)
        new /= np.exp(np.log(np.maximum(new, 1e-300)).mean(-1, keepdims=True))
        change = np.abs(new - strength).max()
        strength = new
        if change < 1e-10:
            break
    return 400 * np.log10(np.maximum(strength, 1e-300))


def ratings(
    wins: np.ndarray, level: float = LEVEL, draws: int = RATING_DRAWS, seed: int = SEED
) -> list[tuple[float, Interval]]:
    """Bradley-Terry ratings from ``wins`` (n, m, m), the share of seeds of prompt n that i wins over j; percentile
    intervals by resampling prompts, all pairs of a prompt together. Half a win each way is added to every pair."""
    n, m = wins.shape[:2]
    centre = bradley_terry(wins.sum(0), prior=0.5)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
    drawn = bradley_terry((counts @ wins.reshape(n, -1)).reshape(draws, m, m), prior=0.5)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return [(float(centre[i]), Interval(float(low[i]), float(high[i]), "percentile")) for i in range(m)]


def paired(
    a: Sequence[Sequence[float]],
    b: Sequence[Sequence[float]],
    level: float = LEVEL,
    draws: int = DRAWS,
    seed: int = SEED,
    strata: Sequence[object] | None = None,
) -> Paired:
    """Everything section 13 asks for. ``a[i][k]`` is the score of prompt i and seed k under A, ``b`` likewise.

    Means are means over prompts of the mean over seeds. Raises ValueError when there is no prompt."""
    if len(a) == 0:
        raise ValueError("no prompt to compare")
    gains, wins = per_prompt(a, b)
    means_a, means_b = (np.array([np.mean(x) for x in side]) for side in (a, b))
    won, lost = int((gains > 0).sum()), int((gains < 0).sum())
    spread = float(gains.std(ddof=1)) if len(gains) > 1 else 0.0
    gain = float(gains.mean())
    return Paired(
        prompts=len(gains),
        pairs=sum(len(x) for x in a),
        mean_a=float(means_a.mean()),
        mean_b=float(means_b.mean()),
        median_a=float(np.median(np.concatenate([np.asarray(x) for x in a]))),
        median_b=float(np.median(np.concatenate([np.asarray(x) for x in b]))),
        gain=gain,
        gain_interval=bootstrap(gains, level, draws, seed, strata),
        effect=gain / spread if spread > 0 else None,
        win_rate=float(wins.mean()),
        win_interval=win_rate_interval(wins, level, draws, seed, strata),
        won=won,
        lost=lost,
        tied=len(gains) - won - lost,
        sign_p=sign_test(won, won + lost),
        flip_p=sign_flip_test(gains, draws, seed),
    )


def _groups(strata: Sequence[object]) -> list[np.ndarray]:
    members: dict[object, list[int]] = {}
    for i, stratum in enumerate(strata):
        members.setdefault(stratum, []).append(i)
    return [np.array(m) for m in members.values()]


def _jackknife_gaps(values: np.ndarray, strata: Sequence[object] | None) -> np.ndarray:
    """theta-bar minus theta without i, for a (stratified) mean; closed form. (n,)"""
    if strata is None:
        return (values - values.mean()) / (len(values) - 1)
    gaps = np.zeros(len(values))
    for group in _groups(strata):
        if len(group) > 1:
            gaps[group] = (values[group] - values[group].mean()) / (len(group) - 1) * len(group) / len(values)
    return gaps
