"""What a run has spent, and whether its budget lets it go on. The meter counts, a budget decides.

A limit is asked for again and again, and a run stops where what comes before the next time could pass it. What that
may take is known from what it took: the longest unit of a stage's work, the longest time in it that was no such work
(opening models, writing them) and the longest writing of a checkpoint, all kept in the RUN folder with the meter, so
that a later try looks as far ahead before its first step as an earlier one did after its last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pennyweight.errors import Overspent, RecipeError
from pennyweight.meter.taken import Taken, clock
from pennyweight.settings import Budget

_UNITS = {"hours": "{:,.4g} hours", "kwh": "{:,.4g} kWh", "usd": "USD {:,.4g}"}
_SPARE = 1.0  # seconds that ending takes besides
_OFTEN = 0.1  # seconds in which the meter is not read again
_BESIDES, _SAVING = "{}, besides", "{}, saving"  # of a stage, beside the units of its work
_CHAINS = "the chain's "
_STOPS = frozenset(f"stopped at {whose}budget.{name}" for whose in ("", _CHAINS) for name in _UNITS)
_FAMILIES = ("evaluate", "start")  # stages that do the same to several models


@dataclass(frozen=True, slots=True)
class Rates:
    """``usd_per_hour`` of a device, None where nobody knows; ``watts`` of a device where nothing counts, and whence.

    ``price`` says where the price is from: its range and currency, who asked it when, and whether it is stale.
    """

    usd_per_hour: float | None
    watts: float
    source: str
    price: dict[str, Any] | None = None


def spent(taken: Taken, rates: Rates, server: float | None) -> dict[str, Any]:
    """Device-hours, kWh and US dollars of what was metered. Energy is that of the devices which did the work, and of
    nothing around them; ``estimated`` is the share of it that no counter counted.

    ``host`` is, of work on GPUs, what their host's processors took besides, and whether all of that was counted.

    Args:
        server: US dollars that a server asks for, None where its price is not known.
    """
    counted, uncounted = sum(taken.joules.values()) / 3.6e6, taken.uncounted / 3600 * rates.watts / 1000
    kwh, held = counted + uncounted, taken.device_seconds / 3600
    rented = None if rates.usd_per_hour is None else held * rates.usd_per_hour
    usd = None if rented is None or server is None else rented + server
    found = {"hours": taken.seconds / 3600, "device_hours": held, "kwh": kwh, "usd": usd}
    found |= {"estimated": uncounted / kwh if kwh else 1.0, "energy": rates.source, "price": rates.price}
    on_gpus = taken.host or taken.hostless
    return found | {"host": {"kwh": taken.host / 3.6e6, "whole": not taken.hostless} if on_gpus else None}


@dataclass(frozen=True)
class Wider:
    """A budget that a run is only a part of, a chain's, and what the other parts have ``spent`` of it."""

    budget: Budget
    spent: dict[str, float]


class Allowance:
    """A budget and what has been spent of it, all tries together.

    Args:
        whole: gives all that was metered.
        server: what a server has asked for so far, in US dollars; None where its price is not known.
        longest: what earlier tries found out about the time that things take, and where what is found out goes.
        wider: a budget above this one.

    Raises:
        RecipeError: a limit on money, of which nobody knows the price.
    """

    def __init__(
        self,
        budget: Budget,
        whole: Callable[[], Taken],
        rates: Rates,
        server: Callable[[], float | None] = lambda: 0.0,
        longest: dict[str, float] | None = None,
        wider: Wider | None = None,
    ):
        self._whole, self.rates, self._server = whole, rates, server
        self._limits = [(f"budget.{name}", name, limit, 0.0) for name, limit in budget.limits.items()]
        for name, limit in wider.budget.limits.items() if wider else ():
            self._limits.append((f"{_CHAINS}budget.{name}", name, limit, wider.spent[name]))  # type: ignore[union-attr]
        self._longest = {} if longest is None else longest
        self._stage, self._opening, self._said = "", True, None
        self._asked = self._called = clock()
        self._read: float | None = None
        if any(name == "usd" for _, name, _, _ in self._limits) and self.spent()["usd"] is None:
            raise RecipeError(
                "budget.usd needs prices: set budget.usd_per_hour (of a device), and of a server teacher.usd_sent and "
                "teacher.usd_got (of a million tokens)"
            )

    def spent(self) -> dict[str, Any]:
        """So far."""
        return spent(self._whole(), self.rates, self._server())

    def begin(self, stage: str) -> None:
        """A stage is to be made. Raise Overspent where what it takes to open it, and its first unit, could be too
        much."""
        self._lap(True)
        self._stage, self._opening = stage, True
        self._check(self._known(_BESIDES, True) + self._ahead())

    def fresh(self) -> None:
        """Work of the stage begins, of which ``over`` is asked again and again. Raise Overspent as ``check`` does."""
        self._lap(True)
        self._opening = True
        self._check(self._ahead())

    def over(self) -> str | None:
        """Why the run must stop now, so that a limit is not passed before it is asked again; None: it may go on."""
        self._called = now = clock()
        if self._read is None or now - self._read >= _OFTEN:
            self._lap(self._opening)  # what comes before the first unit is finished is more than a unit
            self._opening = False
            self._said, self._read = self._reason(self._ahead()) if self._limits else None, now
        return self._said

    def check(self) -> None:
        """Raise Overspent where the run must stop now."""
        if reason := self.over():
            raise Overspent(reason)

    def saved(self) -> None:
        """What came since ``over`` was asked last was the writing of a checkpoint, or nothing."""
        self._note(_SAVING, clock() - self._called)

    def _check(self, ahead: float) -> None:
        self._read = None
        if self._limits and (reason := self._reason(ahead)):
            raise Overspent(reason)

    def _lap(self, besides: bool) -> None:
        """Keep what the time since this was last called was: a unit of the stage's work, or something besides."""
        now = clock()
        self._note(_BESIDES if besides else "{}", now - self._asked)
        self._asked = now

    def _note(self, kind: str, seconds: float) -> None:
        key = kind.format(self._stage)
        if seconds > self._longest.get(key, 0.0):
            self._longest[key] = seconds

    def _known(self, kind: str, anywhere: bool = False) -> float:
        """The longest of its kind in this stage; where there was none yet, in stages that do the same to others, or
        ``anywhere``."""
        if (own := self._longest.get(kind.format(self._stage))) is not None:
            return own
        first, end = self._stage.partition("-")[0], kind.format("")
        family = f"{first if first in _FAMILIES else self._stage.rpartition('-')[0]}-"
        known = [(k.removesuffix(end), v) for k, v in self._longest.items() if k.endswith(end) and k not in _STOPS]
        alike = [v for name, v in known if "," not in name and (anywhere or name.startswith(family))]
        return max(alike, default=0.0)

    def _ahead(self) -> float:
        """Seconds that may pass before it is asked again, with those that ending takes: the next unit may take twice
        what the longest took. Before any was finished, opening tells what it may take."""
        unit = self._known("{}") or (self._longest.get(_BESIDES.format(self._stage), 0.0) if not self._opening else 0.0)
        return 2 * unit + self._known(_SAVING, True) + _SPARE

    def _reason(self, ahead: float) -> str | None:
        found = self.spent()
        for label, name, limit, others in self._limits:
            here = found[name] or 0.0
            each = 1.0 if name == "hours" else here / max(found["hours"], 1e-9)
            key = f"stopped at {label}"
            if here + others + each * ahead / 3600 >= limit or self._longest.get(key, 0.0) >= limit:
                self._longest[key] = max(limit, self._longest.get(key, 0.0))
                said = _UNITS[name]
                return (
                    f"{label}={limit:g} would be passed: {said.format(here + others)} of {said.format(limit)} are "
                    f"spent; raise {label.removeprefix(_CHAINS)}, and the same command goes on from here"
                )
        return None


def stopped_at(longest: dict[str, float], budget: Budget) -> str | None:
    """Why a chain may not go on, of whose runs ``longest`` is known: one was stopped at a budget as large as this."""
    for name, limit in budget.limits.items():
        if longest.get(f"stopped at {_CHAINS}budget.{name}", 0.0) >= limit:
            return (
                f"{_CHAINS}budget.{name}={limit:g} is spent, all its stages together; raise budget.{name}, and the "
                "same command goes on from here"
            )
    return None


def check_forecast(budget: Budget, total: dict[str, Any] | None, whose: str = "the run", why: str = "") -> str | None:
    """What is to be said of a budget that may not do, or that there is no forecast to hold it against.

    Args:
        total: hours, kWh and money, each with its ends; None where nothing could be foretold, ``why`` says why.

    Raises:
        RecipeError: even the low end of the forecast is above it.
    """
    found, unknown, short = {"hours": "hours", "kwh": "kwh", "usd": "money"}, [], []
    for name, limit in budget.limits.items():
        ends = (total or {}).get(found[name])
        if ends is None:
            unknown.append(f"budget.{name}={limit:g}")
            continue
        said = f"{_UNITS[name].format(ends['low'])} to {_UNITS[name].format(ends['high'])}"
        if ends["low"] > limit:
            raise RecipeError(
                f"{whose} is foretold to take {said}, more than budget.{name}={limit:g}; raise budget.{name}, or ask "
                "for less (pennyweight plan shows what each stage takes)"
            )
        if ends["middle"] > limit:
            short.append(f"budget.{name}={limit:g} may not do: {whose} is foretold to take {said}")
    if unknown:
        reason = why or "a price that it takes is not known"
        short.append(f"{', '.join(unknown)} of {whose} is held against no forecast, and kept to all the same: {reason}")
    return "; ".join(short) or None
