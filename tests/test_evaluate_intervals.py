"""Intervals and estimators against values computed another way."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from pennyweight.evaluate.intervals import calibration_error, difference, over_seeds, ratio, wilson


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (10, 10), (1, 3), (87, 100), (987, 1000)])
def test_wilson_bounds_solve_the_score_equation(successes, trials):
    """Each bound b is a root of (p - b)^2 = z^2 b (1 - b) / n, which is how Wilson defined them."""
    found = wilson(successes, trials)
    p, z = successes / trials, 1.959963984540054
    assert found.mean == p and 0 <= found.low <= p <= found.high <= 1
    for b in (found.low, found.high):
        if b not in (0.0, 1.0, p):
            assert (p - b) ** 2 == pytest.approx(z * z * b * (1 - b) / trials, rel=1e-6)


def test_wilson_covers_as_often_as_it_says():
    chance, n, truth = random.Random(4), 60, 0.9
    hits = 0
    for _ in range(4000):
        found = wilson(sum(chance.random() < truth for _ in range(n)), n)
        hits += found.low <= truth <= found.high
    assert 0.93 < hits / 4000 < 0.975


def test_nothing_tried_is_no_number():
    assert math.isnan(wilson(0, 0).mean)


def test_a_ratio_is_of_sums_and_its_bootstrap_covers():
    """Bits per byte of a corpus is total over total, not a mean of ratios."""
    assert ratio([1, 9], [10, 10], 0).mean == 0.5
    rng = np.random.default_rng(3)
    hits = 0
    for trial in range(300):
        d = rng.integers(5, 40, 120).astype(float)
        n = d * 0.7 + rng.normal(0, 2, 120)
        found = ratio(n, d, trial, resamples=400)
        hits += found.low <= 0.7 <= found.high
    assert 0.90 < hits / 300 < 0.99
    assert ratio([1.0, 2.0], [3.0, 4.0], 5) == ratio([1.0, 2.0], [3.0, 4.0], 5)
    assert math.isnan(ratio([], [], 0).mean)
    alone = ratio([3.0], [2.0], 0)
    assert alone.mean == 1.5 and alone.low == -math.inf and alone.high == math.inf


def test_calibration_error_is_the_gap_of_the_sums_and_its_interval_holds_it():
    rng = np.random.default_rng(3)
    bins = np.zeros((80, 15, 3))
    for sample in bins:
        for _ in range(50):
            confidence = rng.uniform(0, 1)
            sample[min(14, int(confidence * 15))] += [1, confidence, rng.uniform() < confidence**2]
    count, confidence, hits = bins.sum(0).T
    found = calibration_error(bins, 0)
    assert found.mean == pytest.approx(sum(abs(c - h) for c, h in zip(confidence, hits, strict=True)) / count.sum())
    assert 0.1 < found.low < found.mean < found.high < 0.25
    assert calibration_error(bins[:1], 0).low == -math.inf


def test_over_seeds_is_students_interval():
    found = over_seeds([1.0, 2.0, 4.0])
    half = 4.302652729749464 * math.sqrt(((1 - 7 / 3) ** 2 + (2 - 7 / 3) ** 2 + (4 - 7 / 3) ** 2) / 2) / math.sqrt(3)
    assert (found.mean, found.high - found.mean) == pytest.approx((7 / 3, half))
    with pytest.raises(ValueError, match="at least two"):
        over_seeds([1.0])


def test_differences_are_paired():
    """A seed effect that both sides share cancels."""
    a, b = [1.0, 5.0, 9.0], [0.9, 4.91, 8.89]
    assert difference(a, b).low > 0
    alone = difference([1.0], [0.5])
    assert alone.mean == 0.5 and alone.low == -math.inf and alone.high == math.inf
    same = difference([0.72, 0.82, 0.62], [0.7, 0.8, 0.6])  # coarse metrics may agree by chance: that proves nothing
    assert same.mean == pytest.approx(0.02) and same.low == -math.inf


@pytest.mark.parametrize(("seeds", "t"), [(17, 2.119905), (21, 2.085963), (31, 2.042272)])
def test_students_quantiles_go_on_beyond_the_table(seeds, t):
    """Quantiles from the standard tables of Student's t."""
    values = [float(i % 5) for i in range(seeds)]
    found = over_seeds(values)
    assert (found.high - found.mean) / (np.std(values, ddof=1) / math.sqrt(seeds)) == pytest.approx(t, abs=1e-3)
