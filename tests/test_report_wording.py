"""Numbers as people read them."""

from __future__ import annotations

import math
import random

import pytest

from pennyweight.report import wording as w


def _plain(text: str) -> str:
    return text.replace("\u00a0", " ").replace("\u2212", "-")


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (w.count(12000), "12,000"),
        (w.count(-1), "-1"),
        (w.plural(1, "sample"), "1 sample"),
        (w.plural(2000, "entry", "entries"), "2,000 entries"),
        (w.number(1234.5), "1,234"),
        (w.number(0.04321), "0.0432"),
        (w.number(2.5e-6), "2.5e-06"),
        (w.number(0), "0.00"),
        (w.parameters(853), "853"),
        (w.parameters(118528), "0.12 M"),
        (w.parameters(1.7e9), "1.70 B"),
        (w.size(999), "999 B"),
        (w.size(109300), "109 kB"),
        (w.size(3418000), "3.42 MB"),
        (w.size(16777216000), "16.8 GB"),
        (w.duration(4.21), "4.2 s"),
        (w.duration(59.97), "1 min 00 s"),
        (w.duration(192), "3 min 12 s"),
        (w.duration(3600 + 299), "1 h 04 min"),
        (w.part_of(1, 31), "1/31"),
        (w.part_of(118528, 853120), "1/7"),
        (w.part_of(1, 2.4), "1/2.4"),
        (w.part_of(83, 100), "83 %"),
        (w.part_of(2, 1), "2.0 times"),
        (w.share_of(1, 31, "its teacher"), "1/31 of its teacher"),
        (w.share_of(2, 1, "its teacher"), "2.0 times its teacher"),
        (w.share_of(1, None, "its teacher"), ""),
        (w.part_of(1, None), ""),
        (w.with_unit("percent", 0.9314), "93.1 %"),
        (w.with_unit("nats", 0.0432), "0.0432 nats per token"),
        (w.with_unit("bits", 1.432), "1.43 bits per byte"),
        (w.measured("percent", 0.06, signed=True), "+6.0"),
        (w.span("percent", {"mean": 0.9, "low": 0.871, "high": 0.921}), "87.1–92.1"),
        (w.span("nats", {"mean": -0.0178, "low": -0.0231, "high": 0.0125}, signed=True), "-0.0231 to +0.0125"),
        (w.span("percent", {"mean": 0.9, "low": None, "high": 0.921}), ""),
    ],
)
def test_examples(made: str, expected: str) -> None:
    assert _plain(made) == expected


@pytest.mark.parametrize("value", [None, float("nan"), math.inf, "12", True])
def test_what_is_no_number_is_a_dash(value: object) -> None:
    made = [w.count(value), w.number(value), w.parameters(value), w.size(value), w.duration(value)]
    assert made == [w.MISSING] * 5
    assert w.with_unit("percent", value) == w.MISSING


def test_numbers_read_back_to_within_their_digits() -> None:
    rng = random.Random()
    for _ in range(300):
        x = 10 ** rng.uniform(-4, 6) * rng.choice([1, -1])
        assert float(_plain(w.number(x)).replace(",", "")) == pytest.approx(x, rel=0.051)
        n = round(abs(x)) + 1
        unit, one = w.size_unit(n)
        digits, said = _plain(w.size(n)).split()
        assert said == unit and float(digits) * one == pytest.approx(n, rel=0.006)
