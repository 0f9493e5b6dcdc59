"""Estimates with their 95 % intervals: proportions, means, pass@k, and means over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from pennyweight.records import Interval

_Z = 1.959963984540054
# Two-sided 97.5 % quantiles of Student's t for 1 to 15 degrees of freedom.
_T = [12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004]
_T += [2.262157, 2.228139, 2.200985, 2.178813, 2.160369, 2.144787, 2.131450]


def wilson(successes: int, trials: int) -> Interval:
    """A proportion with its score interval (Wilson, 1927)."""
    if trials == 0:
        return Interval(float("nan"), 0.0, 1.0, "no trials")
    p = successes / trials
    middle = (p + _Z**2 / (2 * trials)) / (1 + _Z**2 / trials)
    half = _Z / (1 + _Z**2 / trials) * math.sqrt(p * (1 - p) / trials + _Z**2 / (4 * trials**2))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return Interval(p, min(low, p), max(high, p), f"Wilson, {trials:,} trials")


def ratio(numerators: ArrayLike, denominators: ArrayLike, seed: int, resamples: int = 1000) -> Interval:
    """sum / sum over samples (nats per token, bits per byte) with a percentile bootstrap over samples."""
    n, d = np.asarray(numerators, float), np.asarray(denominators, float)
    if not len(n) or d.sum() <= 0:
        return Interval(float("nan"), float("nan"), float("nan"), "nothing measured")
    if len(n) == 1:
        return Interval(float(n[0] / d[0]), float("-inf"), float("inf"), "one sample: no interval")
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(n), (resamples, len(n)))
    values = n[picks].sum(1) / np.maximum(d[picks].sum(1), 1e-12)
    low, high = np.percentile(values, [2.5, 97.5])
    value = float(n.sum() / d.sum())
    return Interval(value, min(float(low), value), max(float(high), value), f"bootstrap over {len(n):,} samples")


def over_seeds(values: Sequence[float]) -> Interval:
    """Mean over seeds with Student's t interval: how far another seed would move it."""
    n = len(values)
    if n < 2:
        raise ValueError("an interval over seeds needs at least two seeds")
    mean = float(np.mean(values))
    half = _student_t(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, f"t interval over {n} seeds")


def calibration_error(bins: ArrayLike, seed: int, resamples: int = 1000) -> Interval:
    """Sum over bins of |confidence - hits| / tokens, with a percentile bootstrap over samples.

    Args:
        bins: (samples, bins, 3) sums of tokens, confidence and hits.
    """
    b = np.asarray(bins, float)
    flat = b.reshape(len(b), -1)

    def error(sums: np.ndarray) -> np.ndarray:
        count, confidence, hits = np.moveaxis(sums.reshape(-1, *b.shape[1:]), -1, 0)
        return np.abs(confidence - hits).sum(-1) / np.maximum(count.sum(-1), 1.0)

    value = float(error(flat.sum(0))[0])
    if len(b) < 2:
        return Interval(value, float("-inf"), float("inf"), "one sample: no interval")
    picks = np.random.default_rng(seed).multinomial(len(b), np.full(len(b), 1 / len(b)), resamples)
    low, high = np.percentile(error(picks @ flat), [2.5, 97.5])
    return Interval(value, min(float(low), value), max(float(high), value), f"bootstrap over {len(b):,} samples")


def _student_t(degrees: int) -> float:
    if degrees <= len(_T):
        return _T[degrees - 1]
    # Cornish-Fisher expansion around the normal quantile (Abramowitz and Stegun, 26.7.5); off by less than 1e-3 here.
    return _Z + (_Z**3 + _Z) / (4 * degrees) + (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / (96 * degrees**2)


def difference(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Mean of paired differences a - b over seeds.

    With one seed the bounds are not known; nor where all seeds differ by the same, as coarse metrics may by chance.
    """
    d = [x - y for x, y in zip(a, b, strict=True)]
    if len(d) >= 2 and max(d) - min(d) > 1e-12:
        return over_seeds(d)
    how = "one seed: no interval" if len(d) == 1 else "the same in all seeds: no interval"
    return Interval(d[0], float("-inf"), float("inf"), how)
