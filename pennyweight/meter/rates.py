"""What a device-second of a run is worth: money by a price, energy where nothing counts it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import date
from typing import Any

from pennyweight.meter.allowance import Allowance, Rates
from pennyweight.plan.hardware import catalogue, price_range
from pennyweight.settings import Budget

WATTS = (2.0, 5.0, 8.0)
"""Of a busy hardware thread with its part of the board, low, middle and high: an estimate. Power limits of data sheets
over their threads are 2.2 W (EPYC 7763, 280 W of 128), 3.3 W (Ryzen 9 5950X, 105 W of 32) and 2.3 W (Core i7-12700H,
45 W of 20); memory and power supply come on top."""

_OF_LIMIT, _UNKNOWN_GPU = 0.91, 400.0  # of a GPU's power limit (Olmo 3: 89 and 93 %); W of one that is not known


def rates_of(budget: Budget, hardware: str, gpu: bool, threads: int) -> Rates:
    """Of the machine that a run is on. ``hardware``: what the driver calls its GPU, if there is one (``gpu``)."""
    known = catalogue()
    chip = known.called(hardware) if gpu else None
    price = budget.usd_per_hour
    if price is None and chip is not None and known.is_priced(chip):
        price = price_range(known.prices_of(chip), date.today()).middle
    if not gpu:
        watts = WATTS[1] * threads
        return Rates(price, watts, f"{WATTS[1]:g} W for each of {threads} threads, without a counter")
    if chip is None:
        return Rates(price, _UNKNOWN_GPU, f"{_UNKNOWN_GPU:g} W, since this GPU is in no catalogue and counts nothing")
    watts = _OF_LIMIT * chip["power"]
    return Rates(price, watts, f"{_OF_LIMIT:.0%} of the {chip.name}'s {chip['power']:g} W, without a counter")


def asked_of(teacher: Any, usage: Mapping[str, int]) -> float | None:
    """US dollars that a server asks for its answers so far; None where its price, or what it counted, is not known."""
    if not usage.get("answers"):
        return 0.0
    tokens = (usage["prompt_tokens"], usage["completion_tokens"])
    prices = (getattr(teacher, "usd_sent", None), getattr(teacher, "usd_got", None))
    if None in prices or not any(tokens):
        return None
    return sum(t * p for t, p in zip(tokens, prices, strict=True)) / 1e6  # type: ignore[operator]


def allowance_of(
    budget: Budget, teacher: Any, meter: Any, hardware: str, threads: int, usage: Callable[[], Mapping[str, int]]
) -> Allowance:
    """A run's budget, and what ``meter`` says that it has spent of it. ``usage``: what its server counts."""
    rates = rates_of(budget, hardware, meter.on == "gpu", threads)
    return Allowance(budget, meter.whole, rates, lambda: asked_of(teacher, usage()))
