"""What a run has spent, and whether its budget lets it go on. The meter counts, a budget decides."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pennyweight.errors import Overspent, RecipeError
from pennyweight.meter.taken import Taken
from pennyweight.settings import Budget

_UNITS = {"hours": "{:,.4g} hours", "kwh": "{:,.4g} kWh", "usd": "USD {:,.4g}"}
_SPARE = 1.0  # seconds that ending takes besides


@dataclass(frozen=True, slots=True)
class Rates:
    """``usd_per_hour`` of a device, None where nobody knows; ``watts`` of a device where nothing counts, and whence."""

    usd_per_hour: float | None
    watts: float
    source: str


def spent(taken: Taken, rates: Rates, server: float | None) -> dict[str, Any]:
    """Device-hours, kWh and US dollars of what was metered; ``estimated`` is the share of the energy that no counter
    counted.

    Args:
        server: US dollars that a server asks for, None where its price is not known.
    """
    counted, uncounted = sum(taken.joules.values()) / 3.6e6, taken.uncounted / 3600 * rates.watts / 1000
    kwh, held = counted + uncounted, taken.device_seconds / 3600
    rented = None if rates.usd_per_hour is None else held * rates.usd_per_hour
    usd = None if rented is None or server is None else rented + server
    found = {"hours": taken.seconds / 3600, "device_hours": held, "kwh": kwh, "usd": usd}
    return found | {"estimated": uncounted / kwh if kwh else 1.0, "energy": rates.source}


class Allowance:
    """A budget and what has been spent of it, all tries together.

    Args:
        whole: gives all that was metered.
        server: what a server has asked for so far, in US dollars; None where its price is not known.

    Raises:
        RecipeError: a limit on money, of which nobody knows the price.
    """

    def __init__(
        self,
        budget: Budget,
        whole: Callable[[], Taken],
        rates: Rates,
        server: Callable[[], float | None] = lambda: 0.0,
    ):
        self._limits, self._whole, self.rates, self._server = budget.limits, whole, rates, server
        self._asked, self._longest = time.monotonic(), 0.0
        if "usd" in self._limits and self.spent()["usd"] is None:
            raise RecipeError(
                "budget.usd needs prices: set budget.usd_per_hour (of a device), and of a server teacher.usd_sent and "
                "teacher.usd_got (of a million tokens)"
            )

    def spent(self) -> dict[str, Any]:
        """So far."""
        return spent(self._whole(), self.rates, self._server())

    def fresh(self) -> None:
        """Work begins of which ``over`` is asked again and again: what lies between two times is what it may take."""
        self._asked, self._longest = time.monotonic(), 0.0

    def over(self) -> str | None:
        """Why the run must stop now, so that a limit is not passed before it is asked again; None: it may go on."""
        if not self._limits:
            return None
        now = time.monotonic()
        self._longest, self._asked = max(self._longest, now - self._asked), now
        found, ahead = self.spent(), (2 * self._longest + _SPARE) / 3600
        rate = {"hours": 1.0, "kwh": found["kwh"], "usd": found["usd"] or 0.0}
        for name, limit in self._limits.items():
            each = 1.0 if name == "hours" else rate[name] / max(found["hours"], 1e-9)
            if found[name] + each * ahead >= limit:
                said = _UNITS[name]
                return (
                    f"budget.{name}={limit:g} would be passed: {said.format(found[name])} of {said.format(limit)} are "
                    f"spent; raise budget.{name}, and the same command goes on from here"
                )
        return None

    def check(self) -> None:
        """Raise Overspent where the run must stop now."""
        if reason := self.over():
            raise Overspent(reason)


def check_forecast(budget: Budget, total: dict[str, Any] | None) -> str | None:
    """What is to be said of a budget that may not do.

    Raises:
        RecipeError: even the low end of the forecast is above it.
    """
    found = {"hours": "hours", "kwh": "kwh", "usd": "money"}
    for name, limit in budget.limits.items():
        ends = (total or {}).get(found[name])
        if ends is None:
            continue
        said = f"{_UNITS[name].format(ends['low'])} to {_UNITS[name].format(ends['high'])}"
        if ends["low"] > limit:
            raise RecipeError(
                f"the run is foretold to take {said}, more than budget.{name}={limit:g}; raise budget.{name}, or ask "
                "for less (pennyweight plan shows what each stage takes)"
            )
        if ends["middle"] > limit:
            return f"budget.{name}={limit:g} may not do: the run is foretold to take {said}"
    return None
