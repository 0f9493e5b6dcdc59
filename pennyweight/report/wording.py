"""Numbers as people read them: thousands separators, as many digits as mean something, and the unit beside them."""

from __future__ import annotations

import math
from typing import Any

_SPACE = "\u00a0"  # between a number and its unit, so that a line never breaks there
_MINUS = "\u2212"

MISSING = "–"
"""What stands where nothing was measured."""


def finite(value: Any) -> float | None:
    """``value`` as a float, or None where it is no finite number (null, NaN, infinity, text, a truth value)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def count(value: Any) -> str:
    """``12,000``; a dash for what is not a number."""
    number = finite(value)
    return MISSING if number is None else f"{number:,.0f}".replace("-", _MINUS)


def plural(value: Any, one: str, many: str | None = None) -> str:
    """``1 sample``, ``12,000 samples``."""
    return f"{count(value)}{_SPACE}{one if finite(value) == 1 else many or one + 's'}"


def number(value: Any, like: float | None = None, signed: bool = False) -> str:
    """Two to four significant digits; ``like`` lends its decimals (bounds are written as their mean)."""
    x = finite(value)
    if x is None:
        return MISSING
    size = abs(x if like is None else like)
    sign = "+" if signed else ""
    if x and 0 < size < 1e-4:
        return f"{x:{sign}.1e}".replace("-", _MINUS)
    limits = ((100, 0), (10, 1), (1, 2), (0.1, 3), (0.01, 4))
    decimals = next((d for limit, d in limits if size >= limit), 5 if size else 2)
    return f"{x:{sign},.{decimals}f}".replace("-", _MINUS)


def measured(unit: str, value: Any, like: float | None = None, signed: bool = False) -> str:
    """A metric's value without its unit: fractions as percent with one decimal, nats and bits by their size."""
    x = finite(value)
    if x is None:
        return MISSING
    if unit != "percent":
        return number(x, like, signed)
    return f"{100 * x:{'+' if signed else ''}.1f}".replace("-", _MINUS)


def with_unit(unit: str, value: Any) -> str:
    """A metric's value as prose has it: ``93.1 %``, ``0.0432 nats per token``, ``1.43 bits per byte``."""
    text = measured(unit, value)
    if text == MISSING:
        return text
    return text + _SPACE + {"percent": "%", "nats": "nats per token", "bits": "bits per byte"}.get(unit, unit)


def span(unit: str, interval: dict[str, Any], signed: bool = False) -> str:
    """``91.8–94.2``, or ``−1.2 to +0.4`` where a sign is about; empty where a bound is not known.

    Written in the decimals of the mean.
    """
    low, high, mean = (finite(interval.get(k)) for k in ("low", "high", "mean"))
    if low is None or high is None:
        return ""
    between = " to " if signed or low < 0 else "–"
    return f"{measured(unit, low, mean, signed)}{between}{measured(unit, high, mean, signed)}"


def parameters(value: Any) -> str:
    """``0.12 M``, ``1.7 B``; plain below ten thousand."""
    x = finite(value)
    if x is None:
        return MISSING
    if x < 1e4:
        return count(x)
    letter, one = ("B", 1e9) if x >= 1e9 else ("M", 1e6)
    scaled = x / one
    return f"{scaled:,.{0 if scaled >= 100 else 1 if scaled >= 10 else 2}f}{_SPACE}{letter}"


def size_unit(largest: Any) -> tuple[str, float]:
    """The decimal unit that suits ``largest`` bytes, and how many bytes it is."""
    x = finite(largest) or 0.0
    return next(((u, one) for u, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if x >= one), ("B", 1.0))


def size(value: Any) -> str:
    """Bytes with a decimal unit: ``1.05 MB`` is 1,050,000 bytes."""
    x = finite(value)
    if x is None:
        return MISSING
    unit, one = size_unit(x)
    scaled = x / one
    return f"{scaled:,.{0 if scaled >= 100 or unit == 'B' else 1 if scaled >= 10 else 2}f}{_SPACE}{unit}"


def duration(value: Any) -> str:
    """``4.2 s``, ``3 min 12 s``, ``1 h 05 min``."""
    seconds = finite(value)
    if seconds is None:
        return MISSING
    if seconds < 59.95:
        return f"{seconds:.{1 if seconds >= 0.1 or not seconds else 3}f}{_SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{_SPACE}min{_SPACE}{rest:02d}{_SPACE}s"
    return f"{minutes // 60:,}{_SPACE}h{_SPACE}{minutes % 60:02d}{_SPACE}min"


def part_of(part: Any, whole: Any) -> str:
    """How small ``part`` is beside ``whole``: ``1/31``, ``1/2.4``, ``83 %``, ``2.0 times``; empty if unknown."""
    a, b = finite(part), finite(whole)
    if not a or not b or a < 0 or b < 0:
        return ""
    times = b / a
    if times < 0.995:
        return f"{a / b:,.1f}{_SPACE}times"
    if times < 1.95:
        return f"{100 * a / b:.0f}{_SPACE}%"
    return f"1/{times:,.0f}" if times >= 4.95 or abs(times - round(times)) < 0.05 else f"1/{times:.1f}"


def share_of(part: Any, whole: Any, name: str) -> str:
    """``part_of`` with what it is a part of: ``1/31 of NAME``, ``2.0 times NAME``; empty if unknown."""
    share = part_of(part, whole)
    return share and f"{share} {'' if share.endswith('times') else 'of '}{name}"
