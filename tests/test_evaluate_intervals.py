"""Intervals and estimators against values computed another way."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from pennyweight.evaluate.intervals import difference, over_seeds, pass_at_k, ratio, wilson


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


@pytest.mark.parametrize(
    ("correct", "samples", "k"), [(0, 5, 2), (1, 5, 2), (3, 5, 2), (5, 5, 3), (2, 4, 4), (4, 6, 1)]
)
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(correct, samples, k):
    right = [i < correct for i in range(samples)]
    subsets = list(itertools.combinations(right, k))
    assert pass_at_k(correct, samples, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


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


def test_over_seeds_is_students_interval():
    found = over_seeds([1.0, 2.0, 4.0])
    half = 4.302652729749464 * math.sqrt(((1 - 7 / 3) ** 2 + (2 - 7 / 3) ** 2 + (4 - 7 / 3) ** 2) / 2) / math.sqrt(3)
    assert (found.mean, found.high - found.mean) == pytest.approx((7 / 3, half))
    with pytest.raises(ValueError, match="at least two"):
        over_seeds([1.0])


def test_differences_are_paired():
    """A seed effect that both sides share cancels."""
    a, b = [1.0, 5.0, 9.0], [0.9, 4.9, 8.9]
    assert difference(a, b).low > 0
    alone = difference([1.0], [0.5])
    assert alone.mean == 0.5 and alone.low == -math.inf and alone.high == math.inf
