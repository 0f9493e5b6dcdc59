"""What a device-second of a run is worth: money by a price, energy where nothing counts it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from pennyweight.errors import Overspent, RecipeError
from pennyweight.meter.allowance import Allowance, Rates, Wider, spent, stopped_at
from pennyweight.meter.meter import METER, last_lines, longest_of, whole_of
from pennyweight.plan.hardware import PriceRange, catalogue, own_price, price_range
from pennyweight.recipe import EndpointTeacher, SeveralTeachers
from pennyweight.settings import Budget
from pennyweight.teacher.paid import Paid, answers_of

WATTS = (2.0, 5.0, 8.0)
"""Of a busy hardware thread with its part of the board, low, middle and high: an estimate. Power limits of data sheets
over their threads are 2.2 W (EPYC 7763, 280 W of 128), 3.3 W (Ryzen 9 5950X, 105 W of 32) and 2.3 W (Core i7-12700H,
45 W of 20); memory and power supply come on top."""

_OF_LIMIT, _UNKNOWN_GPU = 0.91, 400.0  # of a GPU's power limit (Olmo 3: 89 and 93 %); W of one that is not known


def price_of(budget: Budget, hardware: str) -> PriceRange | None:
    """Of a device and an hour: the recipe's own, or the catalogue's of the GPU that its driver calls ``hardware``."""
    if budget.usd_per_hour is not None:
        return own_price(budget.usd_per_hour)
    known = catalogue()
    chip = known.called(hardware)
    return price_range(known.prices_of(chip), date.today()) if chip is not None and known.is_priced(chip) else None


def rates_of(budget: Budget, hardware: str, gpu: bool, threads: int, processes: int = 1) -> Rates:
    """Of the machine that a run is on. ``hardware``: what the driver calls its GPU, if there is one (``gpu``);
    ``threads``: of each of its ``processes``, where they share a machine's processor."""
    price = price_of(budget, hardware)
    usd, whence = (None, None) if price is None else (price.middle, asdict(price))
    if not gpu:
        each = f"each of {threads} threads" + (f" of {processes} processes" if processes > 1 else "")
        return Rates(usd, WATTS[1] * threads * processes, f"{WATTS[1]:g} W for {each}, without a counter", whence)
    chip = catalogue().called(hardware)
    if chip is None:
        said = f"{_UNKNOWN_GPU:g} W, since this GPU is in no catalogue and counts nothing"
        return Rates(usd, _UNKNOWN_GPU, said, whence)
    watts = _OF_LIMIT * chip["power"]
    said = f"{_OF_LIMIT:.0%} of the {chip.name}'s {chip['power']:g} W, without a counter"
    return Rates(usd, watts, said, whence)


def servers_of(teacher: Any) -> dict[str, Any]:
    """A recipe's teachers behind servers, by their member's name, which is empty of one teacher alone."""
    every = teacher.members if isinstance(teacher, SeveralTeachers) else {"": teacher}
    return {name: t for name, t in every.items() if isinstance(t, EndpointTeacher)}


def asked_of(teacher: Any, usages: Mapping[str, Mapping[str, int]]) -> float | None:
    """US dollars that servers ask for their answers so far; None where the recipe does not say what one of them asks.

    Args:
        usages: what was counted of each, by its member's name; nothing of one that has not been asked.
    """
    total = 0.0
    for name, t in servers_of(teacher).items():
        if t.usd_sent is None or t.usd_got is None:
            return None
        used = usages.get(name) or {}
        total += (t.usd_sent * used.get("prompt_tokens", 0) + t.usd_got * used.get("completion_tokens", 0)) / 1e6
    return total


def check_prices(budget: Budget, teacher: Any, hardware: str, own: Budget | None = None) -> None:
    """Raise RecipeError where ``budget`` limits money and a price that it takes is not known, all of them named.

    Args:
        own: the budget with the price of a device, where that is not ``budget`` itself.
    """
    if "usd" not in budget.limits:
        return
    missing = ["budget.usd_per_hour (of a device and an hour)"] if price_of(own or budget, hardware) is None else []
    for name, t in servers_of(teacher).items():
        place = f"teacher.members.{name}" if name else "teacher"
        missing += [
            f"{place}.{key} (of a million tokens)" for key in ("usd_sent", "usd_got") if getattr(t, key) is None
        ]
    if missing:
        raise RecipeError(
            f"budget.usd={budget.usd:g} needs prices that nothing says here; set {', '.join(missing)}, or leave "
            "budget.usd out"
        )


def allowance_of(
    recipe: Any,
    meter: Any,
    hardware: str,
    threads: int,
    processes: int,
    usages: Callable[[], Mapping[str, Mapping[str, int]]],
    wider: Wider | None = None,
) -> Allowance:
    """A run's budget, and what ``meter`` says that it has spent of it. ``usages``: what its servers count."""
    rates = rates_of(recipe.budget, hardware, meter.on == "gpu", threads, processes)
    server = lambda: asked_of(recipe.teacher, usages())  # noqa: E731
    return Allowance(recipe.budget, meter.whole, rates, server, meter.longest, wider)


def check_stopped(folders: Iterable[Path], budget: Budget) -> None:
    """Raise Overspent where one of a chain's runs was stopped at the chain's budget, and that has not been raised."""
    notes = longest_of(line for folder in folders for line in last_lines(folder / METER))
    if reason := stopped_at(notes, budget):
        raise Overspent(reason)


def spent_in(folder: Path, recipe: Any, hardware: str, threads: int, processes: int) -> dict[str, Any]:
    """What the run in a folder has spent so far, which is nothing where there is none: of another stage of a chain."""
    lines = list(last_lines(folder / METER))
    on = lines[-1]["on"] if lines else "cpu"
    rates = rates_of(recipe.budget, hardware, on == "gpu", threads, processes)
    usages = {name: Paid(folder / answers_of(name)).usage for name in servers_of(recipe.teacher)}
    return spent(whole_of(lines), rates, asked_of(recipe.teacher, usages))
