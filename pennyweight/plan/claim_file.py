"""A published claim of what a model cost, as a TOML file says it: parts, totals, and what is in them and what is not.

``docs/bill.md`` has the fields; ``claims/`` beside this file holds those that ship with Pennyweight.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pennyweight.errors import RecipeError

SCOPE = {
    "final run": "the run that the released weights came from",
    "context extension": "training on longer rows afterwards",
    "post-training": "instruction tuning and reinforcement learning",
    "teacher labelling": "a teacher's answers or logits",
    "trials": "failed runs, tuning and ablations",
    "base model": "the training of the model that it began from",
    "teacher training": "the training of its teachers",
    "restarts": "what was lost to failures and done again",
    "evaluation": "evaluation beside and after the run",
    "data": "collecting, cleaning and buying data",
    "idle hardware": "devices that were held and did not work",
    "energy": "power and cooling, where the price of an hour does not hold them",
    "hardware": "buying the hardware, where it is not rented",
    "salaries": "people",
    "serving": "use of the model afterwards",
}
"""What a cost may be of: the words of a claim's ``covers`` and ``leaves_out``."""

MONEY = {
    "rental value": "device-hours times the price of renting one, whether they were rented or not",
    "paid": "what was paid",
    "capital": "what the hardware was bought for, whatever else it does",
}
"""What a sum of money may be: the words of ``money_is``."""

KINDS = ("training", "forward", "other")
"""What a part does: forward and backward, forward only (labelling), or what has no FLOPs that can be counted."""

_TEXT, _NUMBER = "text", "number"
_TEXTS = ("name", "kind", "reading", "model", "chip", "precision", "source")
_NUMBERS = ("active", "parameters", "mtp", "tokens", "length", "devices", "hours", "device_hours", "hours_per_trillion")
_PART: dict[str, str] = dict.fromkeys(map(str, _TEXTS), _TEXT) | dict.fromkeys(
    map(str, (*_NUMBERS, "price", "money", "mwh", "share")), _NUMBER
)
_PART |= {"config": "table"}
_TOTAL = {"device_hours": _NUMBER, "money": _NUMBER, "mwh": _NUMBER, "source": _TEXT}
_RATIO = {"of": _TEXT, "to": _TEXT, "says": _NUMBER, "source": _TEXT}


@dataclass(frozen=True, slots=True)
class Part:
    """One line of a claim, with what it says of itself.

    Attributes:
        reading: which of several things the same figure may mean; parts of one name are such readings, and count once.
        model, config, active: a released model's name, the settings of a config.json, or parameters that a token meets,
            of so many ``parameters`` in all.
        hours, device_hours: by the clock; times devices.
        hours_per_trillion: device-hours for 10^12 tokens.
        price: of a device for an hour.
        share: of the peak that the devices are said to have reached, 0 to 1.
    """

    name: str
    kind: str = "training"
    reading: str = ""
    model: str = ""
    config: Mapping[str, Any] | None = None
    active: float | None = None
    parameters: float | None = None
    mtp: int = 0
    tokens: float | None = None
    length: int | None = None
    chip: str = ""
    precision: str = "bf16"
    devices: int | None = None
    hours: float | None = None
    device_hours: float | None = None
    hours_per_trillion: float | None = None
    price: float | None = None
    money: float | None = None
    mwh: float | None = None
    share: float | None = None
    source: str = ""

    @property
    def title(self) -> str:
        return f"{self.name}, if {self.reading}" if self.reading else self.name

    @property
    def used(self) -> float | None:
        """Device-hours: as it says, else devices x hours, else a rate x tokens."""
        if self.device_hours:
            return self.device_hours
        if self.devices and self.hours:
            return self.devices * self.hours
        rate, tokens = self.hours_per_trillion, self.tokens
        return rate * tokens / 1e12 if rate and tokens else None

    @property
    def cost(self) -> float | None:
        """Money: as it says, else its device-hours at its price."""
        return self.money or (self.used * self.price if self.used and self.price else None)


@dataclass(frozen=True, slots=True)
class Claim:
    """All of a claim. ``totals``: device_hours, money and mwh of its parts together, where it says them; ``ratios``:
    how many times the device-hours of one part are those of another."""

    name: str
    statement: str
    parts: tuple[Part, ...]
    totals: Mapping[str, Any] = field(default_factory=dict)
    ratios: tuple[Mapping[str, Any], ...] = ()
    covers: tuple[str, ...] = ()
    leaves_out: tuple[str, ...] = ()
    currency: str = "USD"
    money_is: str = ""
    notes: tuple[str, ...] = ()


def shipped() -> dict[str, Path]:
    """Claims that ship with Pennyweight, by name."""
    return {path.stem: path for path in sorted(Path(__file__).with_name("claims").glob("*.toml"))}


def read_claim(asked: str) -> Claim:
    """The claim of a file, or of a shipped one's name.

    Raises:
        RecipeError: there is none, or it cannot be understood; says where.
    """
    path = Path(asked).expanduser()
    if not path.is_file() and asked in shipped():
        path = shipped()[asked]
    try:
        said = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise RecipeError(
            f"there is no claim {asked}; give a TOML file (docs/bill.md), or one of {', '.join(shipped())}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise RecipeError(f"{path} is not TOML ({e}); docs/bill.md shows what a claim looks like") from None
    return claim_of(said, str(path))


def claim_of(said: Mapping[str, Any], where: str) -> Claim:
    """The same of a table that was read from ``where``.

    Raises:
        RecipeError: it cannot be understood.
    """
    known = {"name", "statement", "currency", "money_is", "covers", "leaves_out", "notes", "total", "part", "ratio"}
    _none_else(said, known, where)
    parts = said.get("part")
    if not isinstance(parts, list) or not parts:
        raise RecipeError(f"{where} has no [[part]]; write one for each thing whose cost is claimed")
    made = tuple(_part(row, f"{where}, part {i + 1}") for i, row in enumerate(parts))
    ratios = tuple(_checked(row, _RATIO, f"{where}, ratio") for row in said.get("ratio", []))
    names = list(dict.fromkeys(p.name for p in made))
    for row in ratios:
        if set(_RATIO) - {"source"} - set(row) or not {row["of"], row["to"]} <= set(names):
            raise RecipeError(
                f"{where} has a ratio without of, to and says; of and to are names of parts: {', '.join(names)}"
            )
    return Claim(
        name=_text(said, "name", where),
        statement=_text(said, "statement", where),
        parts=made,
        totals=_checked(said.get("total", {}), _TOTAL, f"{where}, total"),
        ratios=ratios,
        covers=_words(said, "covers", SCOPE, where),
        leaves_out=_words(said, "leaves_out", SCOPE, where),
        currency=str(said.get("currency", "USD")),
        money_is=(*_words(said, "money_is", MONEY, where), "")[0],
        notes=tuple(str(n) for n in said.get("notes", [])),
    )


def _part(row: Any, where: str) -> Part:
    said: dict[str, Any] = _checked(row, _PART, where)
    name = _text(said, "name", where)
    where = f"{where} ({name})"
    if said.get("kind", "training") not in KINDS:
        raise RecipeError(f"{where} is of kind {said['kind']!r}; write {', '.join(KINDS)}")
    for count in ("mtp", "length", "devices"):
        if count in said and not float(said[count]).is_integer():
            raise RecipeError(f"{where} has {count}={said[count]!r}; write a whole number")
    if sum(k in said for k in ("model", "config", "active")) > 1:
        raise RecipeError(f"{where} names its model more than once; give one of model, config and active")
    whole: dict[str, Any] = {k: int(said[k]) for k in ("mtp", "length", "devices") if k in said}
    return Part(**{**said, **whole})


def _checked(row: Any, fields: Mapping[str, str], where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise RecipeError(f"{where} is no table; write its fields below a heading, as docs/bill.md has it")
    _none_else(row, set(fields), where)
    for name, value in row.items():
        if fields[name] == _TEXT and not isinstance(value, str):
            raise RecipeError(f"{where} has {name}={value!r}; write a text in quotes")
        if fields[name] == "table" and not isinstance(value, dict):
            raise RecipeError(f"{where} has {name}={value!r}; write the settings of a config.json as a table")
        wrong = isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e30
        if fields[name] == _NUMBER and (wrong or (value == 0 and name != "mtp")):
            raise RecipeError(
                f"{where} has {name}={value!r}; write a number above 0, without a unit: 14.8e12, 2_664_000"
            )
    return dict(row)


def _none_else(said: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(set(said) - known):
        raise RecipeError(f"{where} has {', '.join(unknown)}; what it may have is {', '.join(sorted(known))}")


def _text(said: Mapping[str, Any], name: str, where: str) -> str:
    found = said.get(name)
    if not isinstance(found, str) or not found.strip():
        raise RecipeError(f'{where} has no {name}; add {name} = "..."')
    return found


def _words(said: Mapping[str, Any], name: str, vocabulary: Mapping[str, str], where: str) -> tuple[str, ...]:
    found = said.get(name, [])
    words = (found,) if isinstance(found, str) else tuple(found) if isinstance(found, list) else (found,)
    if unknown := [str(w) for w in words if w not in vocabulary]:
        raise RecipeError(f"{where} has {name}={', '.join(unknown)}; the words are {', '.join(vocabulary)}")
    return words
