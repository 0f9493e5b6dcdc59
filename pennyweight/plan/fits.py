"""Does a recipe fit the memory of its devices, what would make it fit, and on which chips is it cheapest? No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from pennyweight.plan.hardware import Catalogue, Chip, price_range
from pennyweight.plan.passes import Subjects
from pennyweight.plan.room import of_stage
from pennyweight.plan.work import Rows, works
from pennyweight.recipe import Recipe, SampledTargets
from pennyweight.settings import Lora

FULL = 0.9
"""Of a device's memory, what may be planned with: the rest goes to its context and to pieces that lie between."""

_COUNTS = (1, 2, 4, 8, 16, 32, 64)  # devices that are tried of a chip
_ROWS = (None, 64, 16, 4, 1)  # of a micro-batch
_LOW = {"gradient_checkpointing": True, "weights": "bfloat16"}
_SMALLER: tuple[dict[str, Any], ...] = (
    {},
    {"gradient_checkpointing": True},
    {**_LOW, "moments": "bfloat16"},
    {**_LOW, "moments": "fp8"},
    {"gradient_checkpointing": True, "lora": Lora(rank=16)},
    {**_LOW, "lora": Lora(rank=16, base="int4")},
)
"""Settings of ``train``, each with less memory than those before, most of them for more time."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A recipe with what its plan is made from. ``name``: its stage of a chain, or empty."""

    name: str
    recipe: Recipe
    of: Subjects
    rows: Rows


Reckoned = Callable[[Sequence[Planned], Chip, int], Mapping[str, Any]]
"""Recipes, a chip and how many -> hours and money of all, as a plan has them"""


def fits(
    plans: Sequence[Planned], known: Catalogue, chip: Chip, devices: int, autocast: bool, today: date, again: Reckoned
) -> dict[str, Any]:
    """What takes most on these devices, whether that fits, and if not by which settings; and on which chips it would,
    the cheapest first: as it is or, where none holds that, ``by`` settings with which some do. Of a processor whose
    memory nobody knows, only the last."""
    out: dict[str, Any] = {"memory": None, "most": None, "fits": None, "settings": None, "left": None}
    if "memory" in chip.figures:
        there, device = 1e9 * chip["memory"], "cpu" if chip.key == "this" else "cuda"
        most, stage = max(_takes(plans, device, autocast, devices))
        out |= {"memory": there, "most": most, "stage": stage, "fits": most <= FULL * there}
        if not out["fits"]:
            out |= _cure(plans, there, device, autocast, devices)
    for change in ({}, {"micro_batch": 1}, {**_LOW, "moments": "bfloat16", "micro_batch": 1}):
        small = [_with(p, change, False, False) for p in plans] if change else plans
        rows = _where(small, known, autocast, today, again)
        if any(row["devices"] for row in rows):
            break
    cheapest = rows[0] if rows and "money" in rows[0] else None
    return out | {"cheapest": cheapest, "chips": rows, "by": _all_said(change)}


def _cure(plans: Sequence[Planned], there: float, *where: Any) -> dict[str, Any]:
    """``settings`` by which all fits, or what is ``left`` that does not fit by any of those that are tried."""
    dense = any(p.recipe.targets.kind == "dense" and p.recipe.method.kind == "kd" for p in plans)
    taught = any(p.recipe.quantize.formats and p.recipe.quantize.recover for p in plans)
    left = None
    for kept in (False, True) if dense else (False,):
        for untaught in (False, True) if taught else (False,):
            for change in _changes(plans, where[-1]):
                stages = _takes([_with(p, change, kept, untaught) for p in plans], *where)
                most = max(stages)
                if most[0] <= FULL * there:
                    more = ["targets.kind=sampled"] * kept + ["quantize.recover=0"] * untaught
                    return {"settings": [*_all_said(change), *more]}
                left = min(left or most, most)
    return {"left": left and {"stage": left[1], "bytes": left[0]}}


def _changes(plans: Sequence[Planned], devices: int) -> Iterator[dict[str, Any]]:
    """Settings of ``train`` that all recipes may have, with ever smaller micro-batches."""
    rows = max(p.recipe.train.micro_batch or p.recipe.train.batch for p in plans)
    for change in _SMALLER:
        for micro in _ROWS if all(_can(p.recipe, change, devices) for p in plans) else ():
            if micro is None or micro < rows:
                yield change | ({"micro_batch": micro} if micro else {})


def _takes(plans: Sequence[Planned], device: str, autocast: bool, devices: int) -> Iterator[tuple[float, str]]:
    """Bytes of each stage at its high end, and its name."""
    for p in plans:
        for work in works(p.recipe, p.of, p.rows):
            if work.passes:
                parts = of_stage(work, p.recipe, p.of.teacher, device, autocast, devices)
                yield sum(parts.values()), f"{p.name}: {work.stage}" if p.name else work.stage


def _good(plans: Sequence[Planned], there: float, device: str, autocast: bool, devices: int) -> bool:
    return all(n <= FULL * there for n, _ in _takes(plans, device, autocast, devices))


def _can(recipe: Recipe, change: Mapping[str, Any], devices: int) -> bool:
    """Whether the recipe may be trained so."""
    if "lora" in change and (recipe.student.kind == "shape" or recipe.train.precision != "full"):
        return False
    return devices == 1 or change.get("moments") != "fp8"


def _with(p: Planned, change: Mapping[str, Any], kept: bool, untaught: bool) -> Planned:
    update: dict[str, Any] = {"train": p.recipe.train.model_copy(update=dict(change))}
    if kept and p.recipe.targets.kind == "dense":
        update["targets"] = SampledTargets()
    if untaught:
        update["quantize"] = p.recipe.quantize.model_copy(update={"recover": 0.0})
    return Planned(p.name, p.recipe.model_copy(update=update), p.of, p.rows)


def _all_said(change: Mapping[str, Any]) -> list[str]:
    return [said for name, value in change.items() for said in _said(name, value)]


def _said(name: str, value: Any) -> list[str]:
    """As the command line takes it."""
    if isinstance(value, Lora):
        return [f"train.lora.rank={value.rank}"] + ([f"train.lora.base={value.base}"] if value.base != "full" else [])
    return [f"train.{name}={str(value).lower()}"]


def _where(
    plans: Sequence[Planned], known: Catalogue, autocast: bool, today: date, again: Reckoned
) -> list[dict[str, Any]]:
    """Every chip of the catalogue: as few of it as hold all, or None; and what it takes there where somebody rents it
    out. The cheapest first."""
    rows = []
    for chip in known.chips.values():
        if "memory" not in chip.figures:
            continue
        counts = (n for n in _COUNTS if _good(plans, 1e9 * chip["memory"], "cuda", autocast, n))
        row: dict[str, Any] = {"chip": chip.name, "key": chip.key, "memory": 1e9 * chip["memory"]}
        row["devices"] = count = next(counts, None)
        if count and known.is_priced(chip, offered=True) and (total := again(plans, chip, count)).get("money"):
            price = price_range(known.prices_of(chip), today)
            row["price"] = {"low": price.low, "middle": price.middle, "high": price.high}
            row |= {"currency": price.currency, "hours": total["hours"], "money": total["money"]}
        rows.append(row)
    return sorted(rows, key=_order)


def _order(row: Mapping[str, Any]) -> tuple[float, float, str]:
    money = row["money"]["middle"] if "money" in row else math.inf
    return money, row["devices"] or math.inf, row["key"]
