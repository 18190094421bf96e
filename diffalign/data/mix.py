"""From the scores of several scorers to one number a picture, and from numbers to preferences. Plain numpy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, pairwise
from typing import Literal

import numpy as np

from ..errors import UserError, nearest

Policy = Literal["best-worst", "adjacent", "all"]


def parse_weights(text: str, names: Sequence[str]) -> dict[str, float]:
    """``"a=1,b=0.5"`` as the weight of each scorer; those that are not named weigh 1.

    Raises UserError for an unknown scorer, or a weight that is no positive number."""
    weights = dict.fromkeys(names, 1.0)
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = part.partition("=")
        if name not in weights:
            raise UserError(f"--weights names no scorer of this run: '{name}'{nearest(name, names)}")
        try:
            weights[name] = float(number)
        except ValueError:
            weights[name] = math.nan
        if not (math.isfinite(weights[name]) and weights[name] > 0):
            raise UserError(f"--weights {part}: a weight is a positive number, as in {name}=0.5")
    return weights


def mix_scores(scores: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """One score a picture, of the shape of each scorer's: a single scorer's as it is; of several the weighted mean of
    the standardised ones (mean 0 and standard deviation 1 over all pictures). NaN where a scorer has none."""
    if len(scores) == 1:
        (only,) = scores.values()
        return only
    total = np.zeros_like(next(iter(scores.values())), dtype=np.float64)
    for name, values in scores.items():
        spread = float(np.nanstd(values))
        total += weights[name] * (values - np.nanmean(values)) / (spread if spread > 0 else 1.0)
    mixed: np.ndarray = total / sum(weights[name] for name in scores)
    return mixed


def win_rates(scores: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """phi (k,) in [0, 1] of k pictures of one prompt from the scores (S, k) of S scorers: the share of duels with the
    other pictures that each wins, a draw counting half, averaged over scorers by weight.

    With equal weights this is Syn-Pic's wins / (S (k - 1)) of RankDPO (arXiv 2410.18013)."""
    k = scores.shape[1]
    ahead = (scores[:, :, None] > scores[:, None, :]).sum(2)
    level = (scores[:, :, None] == scores[:, None, :]).sum(2) - 1  # a picture draws with itself
    wins = (ahead + 0.5 * level) / (k - 1)
    share = np.asarray(weights, np.float64)
    phi: np.ndarray = (share[:, None] * wins).sum(0) / share.sum()
    return phi


def ranking(phi: np.ndarray) -> list[int]:
    """Positions (k) best first; equal ones in the order in which they came."""
    return np.argsort(-phi, kind="stable").tolist()


def choose_pairs(order: Sequence[int], policy: Policy) -> Iterator[tuple[int, int]]:
    """(better, worse) positions of a ranking: its ends, its neighbours, or every two."""
    if policy == "best-worst":
        yield order[0], order[-1]
    elif policy == "adjacent":
        yield from pairwise(order)
    else:
        yield from combinations(order, 2)
