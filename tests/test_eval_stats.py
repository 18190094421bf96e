"""Test vectors of spec/evaluators.md 13, identities 29-34 of its section 16, and agreement with scipy."""

from __future__ import annotations

import numpy as np
import pytest

from diffalign.eval import stats


def test_vectors_of_the_sheet() -> None:
    assert stats.sign_test(275, 500) == pytest.approx(0.0283261602, abs=1e-9)  # in whole numbers: ...6077
    assert stats.sign_test(60, 100) == pytest.approx(0.0568879336, abs=1e-9)
    for wins, n, low, high in [
        (275, 500, 0.5061772, 0.5930603),
        (60, 100, 0.5020026, 0.6905987),
        (0, 10, 0, 0.2775328),
        (10, 10, 0.7224672, 1),
    ]:
        interval = stats.wilson(wins, n)
        assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-8)
    exact = stats.clopper_pearson(275, 500)
    assert (exact.low, exact.high) == pytest.approx((0.5052069, 0.5941986), abs=5e-8)


def test_against_scipy() -> None:
    from scipy import stats as reference

    for wins, n in [(0, 7), (3, 7), (7, 7), (41, 60), (120, 200)]:
        test = reference.binomtest(wins, n)
        assert stats.sign_test(wins, n) == pytest.approx(test.pvalue, rel=1e-12)
        for method, ours in (("wilson", stats.wilson), ("exact", stats.clopper_pearson)):
            theirs = test.proportion_ci(0.95, method)
            mine = ours(wins, n)
            assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    rng = np.random.default_rng(3)
    gains = rng.exponential(size=80) - 0.7
    theirs = reference.bootstrap((gains,), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(1))
    mine = stats.bootstrap(gains, draws=20_000)
    assert (mine.low, mine.high) == pytest.approx(theirs.confidence_interval, abs=0.012)
    skewed = np.random.default_rng(2).lognormal(0, 1.5, 10)  # bias and acceleration both matter here
    theirs = reference.bootstrap((skewed,), np.mean, n_resamples=100_000, method="BCa", rng=np.random.default_rng(1))
    mine = stats.bootstrap(skewed, draws=100_000)
    assert (mine.low, mine.high) == pytest.approx(theirs.confidence_interval, abs=0.04 * skewed.std() / 10**0.5)
    small = gains[:12]
    exact = reference.permutation_test((small,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert stats.sign_flip_test(small) == pytest.approx(exact.pvalue, rel=1e-12)
    # the random flips of a larger sample stand for the exact test
    rough = reference.ttest_1samp(gains, 0).pvalue
    assert stats.sign_flip_test(gains) == pytest.approx(rough, abs=0.05)


def sides(n: int = 60, seeds: int = 2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    b = rng.normal(20, 1, (n, seeds))
    a = b + rng.normal(0.15, 0.5, (n, seeds))
    a[:7, 0] = b[:7, 0]  # some ties
    return a, b


def test_swapping_the_sides_mirrors_everything() -> None:
    a, b = sides()
    there, back = stats.paired(a, b), stats.paired(b, a)
    assert there.win_rate + back.win_rate == 1
    assert there.win_interval.kind == "bca"
    assert there.win_interval.low == pytest.approx(1 - back.win_interval.high, abs=1e-12)
    assert there.win_interval.high == pytest.approx(1 - back.win_interval.low, abs=1e-12)
    assert there.gain == -back.gain
    assert there.gain_interval.low == pytest.approx(-back.gain_interval.high, abs=1e-12)
    assert (there.won, there.lost, there.tied) == (back.lost, back.won, back.tied)
    assert there.sign_p == back.sign_p and there.flip_p == back.flip_p


def test_sign_test_is_symmetric_and_even_is_one() -> None:
    assert all(stats.sign_test(k, 9) == stats.sign_test(9 - k, 9) for k in range(10))
    assert stats.sign_test(5, 10) == 1 and stats.sign_test(0, 0) == 1


def test_what_both_sides_share_cancels() -> None:
    a, b = sides()
    shift = np.random.default_rng(9).integers(-8, 9, (len(a), 1)) * 0.5
    plain, moved = stats.paired(a, b), stats.paired(a + shift, b + shift)
    assert moved.win_rate == plain.win_rate and moved.sign_p == plain.sign_p
    assert moved.gain == pytest.approx(plain.gain, abs=1e-12)
    assert moved.gain_interval.low == pytest.approx(plain.gain_interval.low, abs=1e-9)


def test_win_rate_does_not_see_monotone_transforms() -> None:
    a, b = sides()
    plain, bent = stats.paired(a, b), stats.paired(np.exp(a / 7), np.exp(b / 7))
    assert bent.win_rate == plain.win_rate and bent.win_interval == plain.win_interval


def test_equal_sides() -> None:
    _, b = sides()
    same = stats.paired(b, b)
    assert (same.win_rate, same.gain, same.sign_p, same.flip_p, same.tied) == (0.5, 0, 1, 1, len(b))
    assert same.effect is None
    assert (same.gain_interval.low, same.gain_interval.high) == (0, 0)
    assert same.win_interval.kind == "wilson" and same.win_interval.low < 0.5 < same.win_interval.high


def test_interval_kind_and_degenerate_samples() -> None:
    assert stats.win_rate_interval(np.array([1.0, 0, 1, 1])).kind == "wilson"
    assert stats.win_rate_interval(np.array([1.0, 0.5, 1, 0])).kind == "bca"
    everything = stats.win_rate_interval(np.ones(10))
    assert (everything.low, everything.high) == pytest.approx((0.7224672, 1), abs=5e-8)
    one = stats.paired([[1.0]], [[0.0]])
    assert one.win_rate == 1 and one.gain == 1
    with pytest.raises(ValueError, match="no prompt"):
        stats.paired([], [])


def test_bootstrap_covers_and_strata_narrow_it() -> None:
    rng = np.random.default_rng(0)
    hits = {"bca": 0, "percentile": 0}
    for trial in range(200):
        sample = rng.exponential(size=40)
        for kind in ("bca", "percentile"):
            hits[kind] += not stats.bootstrap(sample, draws=1000, seed=trial, kind=kind).excludes(1.0)  # type: ignore[arg-type]
    assert 0.89 <= hits["bca"] / 200 <= 0.99
    groups = np.repeat([0, 1], 50)
    values = groups * 4.0 + rng.normal(0, 0.2, 100)
    inside, pooled = stats.bootstrap(values, strata=list(groups)), stats.bootstrap(values)
    assert (inside.high - inside.low) < 0.2 * (pooled.high - pooled.low)
    assert inside.low < values.mean() < inside.high


def test_bootstrap_draws_do_not_depend_on_memory_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(17.0)
    whole = stats.bootstrap_means(values, 300, 0)
    monkeypatch.setattr(stats, "CHUNK", 17 * 7)
    assert np.array_equal(whole, stats.bootstrap_means(values, 300, 0))


def test_holm() -> None:
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0] and stats.holm([]) == []
