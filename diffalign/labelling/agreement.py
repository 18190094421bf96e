"""How far labellers agree: raw share, Cohen's kappa of two, Krippendorff's alpha of any number.

The categories are ``first``, ``second`` and ``tie``; which picture of a pair is the first one is arbitrary but the same
for everybody. Pairs that only one labelled say nothing and are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations


@dataclass(frozen=True)
class Agreement:
    """Of ``pairs`` that two or more labelled: the ``share`` of equal verdicts and ``alpha``; ``kappas`` of every two
    labellers: (one, other, pairs in common, share, kappa). None where a number is not defined."""

    pairs: int
    share: float | None
    alpha: float | None
    kappas: tuple[tuple[str, str, int, float, float | None], ...]


def agreement(verdicts: Mapping[str, Mapping[str, str]]) -> Agreement:
    """All three of ``verdicts[pair][labeller]``."""
    shared = [list(each.values()) for each in verdicts.values() if len(each) > 1]
    names = sorted({name for each in verdicts.values() for name in each})
    kappas = []
    for one, other in combinations(names, 2):
        both = [(each[one], each[other]) for each in verdicts.values() if one in each and other in each]
        if both:
            first, second = zip(*both, strict=True)
            kappas.append((one, other, len(both), _equal(both), cohen_kappa(first, second)))
    return Agreement(len(shared), raw_agreement(shared), krippendorff_alpha(shared), tuple(kappas))


def raw_agreement(units: Sequence[Sequence[str]]) -> float | None:
    """Mean over units of the share of equal pairs among their verdicts, in [0, 1]; None without a unit of two."""
    shares = [_equal(list(combinations(unit, 2))) for unit in units if len(unit) > 1]
    return sum(shares) / len(shares) if shares else None


def cohen_kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """(p_o - p_e) / (1 - p_e) of two raters' verdicts on the same units (Cohen 1960), at most 1; p_e from each
    rater's own shares. None where both always say the same one thing, or without units."""
    n = len(first)
    if not n:
        return None
    one, other = Counter(first), Counter(second)
    chance = sum(one[name] * other[name] for name in one) / n**2
    return None if chance == 1 else (_equal(list(zip(first, second, strict=True))) - chance) / (1 - chance)


def krippendorff_alpha(units: Sequence[Sequence[str]]) -> float | None:
    """1 - D_o / D_e for nominal categories, any number of raters, verdicts missing anywhere (Krippendorff 2011,
    "Computing Krippendorff's Alpha-Reliability"), at most 1. A unit is the verdicts on it.

    None where no unit has two verdicts, or all are of one category: nothing could have differed."""
    counts: Counter[str] = Counter()
    observed = 0.0  # ordered pairs of unequal verdicts within a unit of m, each by 1 / (m - 1)
    for unit in units:
        if len(unit) > 1:
            mine = Counter(unit)
            counts += mine
            observed += (len(unit) ** 2 - sum(n * n for n in mine.values())) / (len(unit) - 1)
    total = counts.total()
    unequal = total**2 - sum(n * n for n in counts.values())
    return 1 - (total - 1) * observed / unequal if unequal else None


def _equal(both: Sequence[tuple[str, str]]) -> float:
    return sum(a == b for a, b in both) / len(both)
