"""Chips and what an hour of them costs: every figure with its source and date, any of them another by the user's file.

``hardware.toml`` and ``prices.toml`` lie beside this file. A file of the user's own (``--catalogue``) has the same
tables, ``[chip.NAME]`` with figures and ``[[price]]``: its figures take the place of those of the same name, and its
prices for a chip that of all prices of this chip.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from pennyweight.errors import RecipeError

STALE = timedelta(days=90)
"""Older prices are said to be stale."""

PRECISIONS = ("fp4", "fp8", "int8", "bf16", "fp32")
_MEASURES = ("memory", "bandwidth", "interconnect", "power", "generation")
_NO_NAME = re.compile(r"nvidia|amd|huawei|geforce|instinct|tesla|gpu|oam|hgx|sxm[0-9]?|hbm[0-9]?e?|[0-9]+gb")
"""Of what a driver calls a chip, words that its name goes without."""

_UNKNOWN = "give your own in a file: --catalogue FILE.toml (docs/bill.md has the tables)"


@dataclass(frozen=True, slots=True)
class Figure:
    """A number with where it is from, and when that was so."""

    value: float
    source: str
    date: str


@dataclass(frozen=True, slots=True)
class Chip:
    """A device. ``figures``: dense TFLOP/s by precision, ``memory`` (GB), ``bandwidth`` and ``interconnect`` (GB/s),
    ``power`` (W), ``generation`` (GB/s of weights that a product with one vector reads: measured only)."""

    key: str
    name: str
    figures: Mapping[str, Figure]

    def __getitem__(self, figure: str) -> float:
        """A figure's value.

        Raises:
            RecipeError: it is not known of this chip.
        """
        if figure not in self.figures:
            what = f"{figure} TFLOP/s" if figure in PRECISIONS else figure
            raise RecipeError(f"the {what} of {self.key} is in no catalogue; {_UNKNOWN}")
        return self.figures[figure].value

    def peak(self, precision: str) -> tuple[float, str]:
        """FLOP/s of the fastest products that ``precision`` may have here, and their precision: what a chip has no
        tensor cores for is computed in the next wider one that it has.

        Raises:
            RecipeError: there is no such precision, or none that will do.
        """
        if precision not in PRECISIONS:
            raise RecipeError(f"precision {precision!r} is none of {', '.join(PRECISIONS)}; name one of them")
        wider = ["fp4", "fp8", "bf16", "fp32"] if precision != "int8" else ["int8", "bf16", "fp32"]
        for kind in wider[wider.index(precision) :]:
            if kind in self.figures:
                return 1e12 * self.figures[kind].value, kind
        raise RecipeError(f"the {precision} TFLOP/s of {self.key} are in no catalogue; {_UNKNOWN}")


@dataclass(frozen=True, slots=True)
class Price:
    """What one provider asked for a device and an hour, on a day. ``date``: as much of it as is known."""

    chip: str
    amount: float
    currency: str
    tier: str
    provider: str
    date: str
    source: str = ""

    @property
    def offered(self) -> bool:
        """Whether somebody rents it out at that, and nobody only reckoned with it."""
        return not self.tier.startswith("assumed")

    def stale(self, today: date) -> bool:
        """Whether it may be more than 90 days old: of a date that is a year or a month, the first day counts."""
        return today - _day(self.date) > STALE


@dataclass(frozen=True)
class Catalogue:
    """Chips by key, and prices."""

    chips: Mapping[str, Chip]
    prices: tuple[Price, ...]
    names: Mapping[str, str] = field(default_factory=dict)

    def chip(self, name: str) -> Chip:
        """The chip of that name.

        Raises:
            RecipeError: there is none.
        """
        key = self.names.get(name.lower(), name.lower())
        if key not in self.chips:
            known = ", ".join(self.chips)
            raise RecipeError(f"no chip is called {name!r}; known are {known}; of another {_UNKNOWN}")
        return self.chips[key]

    def called(self, name: str) -> Chip | None:
        """The chip that a driver calls so (``NVIDIA H100 80GB HBM3``), if it is known: by all words of its name, and by
        its memory where the name has it. A slice, a laptop's or another maker's variant is another chip."""
        words = re.findall(r"[a-z0-9.]+", name.partition(",")[0].lower())
        sizes = [float(found[1]) for w in words if (found := re.fullmatch(r"([0-9]+)gb", w))]
        said = "".join(w for w in words if not _NO_NAME.fullmatch(w))
        keys = {alias.replace("-", ""): key for alias, key in (*((k, k) for k in self.chips), *self.names.items())}
        found = keys.get(said)
        if not sizes or found is None:
            return self.chips[found] if found else None
        near = [keys.get(f"{said}{size:.0f}") for size in sizes] + [found]
        fits = (self.chips[k] for k in near if k and abs(self.chips[k]["memory"] / sizes[0] - 1) <= 0.1)
        return next(fits, None)

    def devices(self, asked: str) -> tuple[Chip, int]:
        """A chip and how many of them: ``h100`` is one, ``h100x8`` eight.

        Raises:
            RecipeError: there is no such chip, or not that many can be.
        """
        found = re.fullmatch(r"(.+?)x([0-9,_]+)", asked.strip().lower())
        if asked.lower() in self.chips or asked.lower() in self.names or found is None:
            return self.chip(asked), 1
        count = int(re.sub("[,_]", "", found[2]) or 0)
        if not 1 <= count <= 10_000_000:
            raise RecipeError(f"{asked!r} asks for {count:,} devices; give 1 to 10,000,000 of them, as in h100x8")
        return self.chip(found[1]), count

    def is_priced(self, chip: Chip, offered: bool = False) -> bool:
        """Whether a price of it is known; with ``offered`` one at which it can be had."""
        return any(p.chip == chip.key and (p.offered or not offered) for p in self.prices)

    def prices_of(self, chip: Chip) -> list[Price]:
        """Its prices, cheapest first; of different currencies those of the first.

        Raises:
            RecipeError: there is none.
        """
        found = [p for p in self.prices if p.chip == chip.key]
        if not found:
            raise RecipeError(f"no dated price of {chip.name} is known; {_UNKNOWN}, or --price 2.50")
        return sorted((p for p in found if p.currency == found[0].currency), key=lambda p: p.amount)


@dataclass(frozen=True, slots=True)
class PriceRange:
    """Money for a device and an hour: cheapest, median and dearest of the rows, with what is to be said of them."""

    low: float
    middle: float
    high: float
    currency: str
    reason: str
    stale: bool


def price_range(prices: list[Price], today: date) -> PriceRange:
    """The range of some prices of one currency; stale when the newest of them is."""
    amounts = [p.amount for p in prices]
    newest = max(prices, key=lambda p: _day(p.date))
    ends = (prices[0], prices[-1]) if len(prices) > 1 else prices[:1]
    said = " to ".join(f"{p.currency} {p.amount:,.2f} ({p.tier}, {p.provider}, {p.date})" for p in ends)
    return PriceRange(amounts[0], median(amounts), amounts[-1], prices[0].currency, said, newest.stale(today))


def own_price(amount: float, currency: str = "USD") -> PriceRange:
    """The range of a price that the user gives."""
    return PriceRange(amount, amount, amount, currency, f"{currency} {amount:,.2f}, as given", False)


def catalogue(own: str | None = None) -> Catalogue:
    """What ships with Pennyweight, with the user's file on top.

    Raises:
        RecipeError: that file cannot be read, or is not understood.
    """
    shipped = _shipped()
    if own is None:
        return shipped
    path = Path(own).expanduser()
    try:
        said = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"there is no {path}; --catalogue takes a TOML file with [chip.NAME] and [[price]]") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise RecipeError(f"{path} is not TOML ({e}); docs/bill.md shows what a catalogue looks like") from None
    if unknown := set(said) - {"chip", "price", "sources"}:
        raise RecipeError(f"{path} has {', '.join(sorted(unknown))}; a catalogue has chip, price and sources only")
    chips, names = dict(shipped.chips), dict(shipped.names)
    for key, table in _tables(said.get("chip", {}), str(path)).items():
        chip, also = _chip(key.lower(), table, said.get("sources", {}), str(path))
        if old := chips.get(chip.key):
            chip = replace(old, figures={**old.figures, **chip.figures})
        chips[chip.key] = chip
        names |= dict.fromkeys(also, chip.key)
    prices = [_price(row, chips | names, str(path)) for row in said.get("price", [])]
    priced = {p.chip for p in prices}
    return Catalogue(chips, (*(p for p in shipped.prices if p.chip not in priced), *prices), names)


@cache
def _shipped() -> Catalogue:
    here = Path(__file__)
    said = tomllib.loads(here.with_name("hardware.toml").read_text(encoding="utf-8"))
    sources = said.pop("sources")
    made = [_chip(key, table, sources, "hardware.toml") for key, table in said.items()]
    names = {name: chip.key for chip, also in made for name in also}
    chips = {chip.key: chip for chip, _ in made}
    rows = tomllib.loads(here.with_name("prices.toml").read_text(encoding="utf-8"))["price"]
    return Catalogue(chips, tuple(_price(row, chips, "prices.toml") for row in rows), names)


def _tables(said: Any, where: str) -> dict[str, dict[str, Any]]:
    if not isinstance(said, dict) or not all(isinstance(t, dict) for t in said.values()):
        raise RecipeError(f"{where} has chips that are no tables; write [chip.NAME] and its figures below")
    return said


def _chip(key: str, table: dict[str, Any], sources: Mapping[str, Any], where: str) -> tuple[Chip, list[str]]:
    figures = {}
    for name, said in table.items():
        if name in ("name", "also", "source", "date"):
            continue
        if name not in (*PRECISIONS, *_MEASURES):
            raise RecipeError(f"{where} says {name} of {key}, which is none of {', '.join((*PRECISIONS, *_MEASURES))}")
        figures[name] = _figure(said, table, sources, f"{where}, {key}, {name}")
    return Chip(key, str(table.get("name", key)), figures), [str(n).lower() for n in table.get("also", [])]


def _figure(said: Any, table: dict[str, Any], sources: Mapping[str, Any], where: str) -> Figure:
    """``[989.4, "E"]`` with E among the sources; or a bare number, of the table's own source and date."""
    if isinstance(said, list) and len(said) == 2 and said[1] in sources:
        value, of = said[0], sources[said[1]]
    else:
        value, of = said, {"what": table.get("source"), "date": table.get("date")}
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise RecipeError(f'{where} is {said!r}; write a number above 0, or [number, "letter of a source"]')
    if not of["what"] or not of["date"]:
        raise RecipeError(f"{where} has no source; add source and date to its table, so that it can be looked up")
    return Figure(float(value), str(of["what"]), str(of["date"]))


def _price(row: Any, chips: Mapping[str, Any], where: str) -> Price:
    needed = ("chip", "amount", "currency", "tier", "provider", "date")
    if not isinstance(row, dict) or (missing := [n for n in needed if n not in row]):
        raise RecipeError(
            f"{where} has a price without {', '.join(missing if isinstance(row, dict) else needed)}; add it"
        )
    if unknown := set(row) - {*needed, "source"}:
        raise RecipeError(
            f"{where} has a price with {', '.join(sorted(unknown))}; it has {', '.join(needed)} and source"
        )
    chip = chips.get(str(row["chip"]).lower())
    if chip is None:
        raise RecipeError(
            f"{where} has a price of {row['chip']!r}, which is no chip of the catalogue; correct its name"
        )
    amount = row["amount"]
    if isinstance(amount, bool) or not isinstance(amount, int | float) or amount <= 0:
        raise RecipeError(f"{where} has a price of {amount!r} for {row['chip']}; write a number above 0")
    price = Price(chip if isinstance(chip, str) else chip.key, float(amount), *(str(row[n]) for n in needed[2:]))
    try:
        _day(price.date)
    except ValueError:
        raise RecipeError(f"{where} dates a price {row['date']!r}; write 2026-05-20, 2026-05 or 2026") from None
    return replace(price, source=str(row.get("source", "")))


def _day(said: str) -> date:
    """The first day that ``2026``, ``2026-05`` or ``2026-05-20`` may mean."""
    parts = [int(p) for p in said.split("-")]
    return date(*[*parts, 1, 1][:3])
