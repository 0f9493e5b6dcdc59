"""A recipe, reckoned before it runs: tokens, FLOPs, memory, disk, hours, energy and money of each stage, as ranges.

Arithmetic on shapes and settings, no torch, well under a second. Of a range the ends are what a stage takes when rows
are as short, and as long, as they may be, and the machine as fast, and as slow, as it may be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pennyweight.errors import ModelError
from pennyweight.meter.allowance import check_forecast
from pennyweight.meter.rates import WATTS, check_prices, price_of
from pennyweight.plan.assumed import read_or_assume
from pennyweight.plan.forecast import AROUND, FEW, POWER, Published, Range, Run, energy, fit, gain_of, money, ratios
from pennyweight.plan.hardware import Chip, PriceRange, catalogue
from pennyweight.plan.pace import Pace, flops_of, on_chips, on_this
from pennyweight.plan.passes import Ends, Subjects, Work
from pennyweight.plan.room import taken
from pennyweight.plan.shapes import Shapes
from pennyweight.plan.subjects import subjects_of
from pennyweight.plan.work import Rows, rows_of, works
from pennyweight.progress import say
from pennyweight.recipe import EndpointTeacher, Recipe, TrainedTeacher

_SUMS = ("tokens", "flops", "hours", "kwh", "money", "disk")
_CHECKPOINTS = 2  # that are there at once while one is written

SCOPE = (
    "counted: what this recipe runs, control arms and evaluations included, and energy of the devices only; not "
    "counted: how a given teacher or student was trained, trials, other recipes, failures, and the start of the process"
)


def pace_on(chip: Chip, devices: int, precision: str, rows: Sequence[Published]) -> Pace:
    """Devices of the catalogue, by what published runs had of such; the ends are those of ``forecast.forecast``."""
    spread, found = ratios(rows), fit(rows)
    skip = max(1, int(0.05 * (len(spread) + 1))) - 1
    share = found.shares["few" if devices <= FEW else "dense, new"]
    gain = gain_of(Run("", 1.0, 1.0, chip, devices, precision))
    return on_chips(chip, devices, share, gain, (spread[skip], spread[-1 - skip]))


def reckon(recipe: Recipe, of: Subjects, rows: Rows, pace: Pace, price: PriceRange | None) -> dict[str, Any]:
    """Every stage, and all together. ``price`` is None where nobody knows one."""
    stages = [_stage(work, recipe, pace, price) for work in works(recipe, of, rows)]
    known = [name for name in _SUMS if all(name in s for s in stages)]
    total: dict[str, Any] = {name: _added([s[name] for s in stages if s[name]]) for name in known}
    total["memory"] = max((s["memory"] for s in stages if s["memory"]), key=lambda m: m["high"], default=None)
    return {
        "name": recipe.name,
        "method": recipe.method.kind,
        "on": pace.chip.name,
        "chip": pace.chip.key,
        "devices": pace.devices,
        "threads": pace.threads,
        "parameters": {"teacher": of.teacher.parameters if of.teacher else None, "student": of.student.parameters},
        "rows": {"train": rows.train, "held_out": rows.held_out, "length": _ends(rows.length)},
        "stages": stages,
        "total": total,
        "currency": price.currency if price else "USD" if "money" in total else None,
        "reasons": _reasons(recipe, rows, pace, price),
        "notes": list(of.notes),
        "scope": SCOPE,
    }


def foretell(
    recipe: Recipe,
    hardware: str,
    devices: int,
    threads: int,
    autocast: bool,
    rows: Callable[[], Sequence[Published]],
    known_shapes: Mapping[str, Shapes] | None = None,
) -> dict[str, Any]:
    """A run on this very machine: ``hardware`` is what the driver calls its GPU, if it has one. No measurement is made.

    Args:
        devices: GPUs; or processes, which share the processor with ``threads`` each.
        rows: gives published runs, where there is a GPU of the catalogue.
        known_shapes: of folders that are not there yet, by path.

    Raises:
        ModelError: the models cannot be read.
    """
    known = catalogue()
    chip = known.called(hardware)
    pace = on_this(None, threads * devices, autocast) if chip is None else pace_on(chip, devices, "bf16", rows())
    of = subjects_of(recipe, known_shapes, read_or_assume)
    return reckon(recipe, of, rows_of(recipe), pace, price_of(recipe.budget, hardware))


def within_budget(recipe: Recipe, hardware: str, *where: Any) -> dict[str, Any] | None:
    """``foretell``, held against the recipe's budget; None where its models are not known before they are there, which
    is said where there is a budget.

    Raises:
        RecipeError: even the low end is above the budget, or money is limited and a price is not known.
    """
    check_prices(recipe.budget, recipe.teacher, hardware)
    found, why = None, ""
    try:
        found = foretell(recipe, hardware, *where)
    except ModelError as e:
        why = f"nothing can be foretold, since {e}"
    if warning := check_forecast(recipe.budget, found and found["total"], why=why):
        say(warning)
    return found


def together(name: str, runs: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Runs of a chain, one after another."""
    first, totals = next(iter(runs.values())), [run["total"] for run in runs.values()]
    total = {k: _added([t[k] for t in totals if t[k]]) for k in _SUMS if all(k in t for t in totals)}
    total["memory"] = max((t["memory"] for t in totals if t["memory"]), key=lambda m: m["high"], default=None)
    shared = {k: first[k] for k in ("on", "chip", "devices", "threads", "currency")}
    return {"name": name, **shared, "runs": dict(runs), "total": total}


def _stage(work: Work, recipe: Recipe, pace: Pace, price: PriceRange | None) -> dict[str, Any]:
    hours = pace.ends(work)
    out: dict[str, Any] = {"stage": work.stage, "does": work.does}
    sent: Any = tuple(a + b for a, b in zip(work.sent, work.got, strict=True))
    out["tokens"] = _ends(tuple(sum(p.tokens(i) for p in work.passes) + sent[i] for i in (0, 1, 2)))  # type: ignore[arg-type]
    out["flops"] = _ends(tuple(sum(flops_of(p, i) for p in work.passes) for i in (0, 1, 2)))  # type: ignore[arg-type]
    out["hours"] = _ends(hours)
    held = Range(*(pace.devices * h for h in hours), reason="")
    out["kwh"] = _ends(_energy(held, pace))
    asked = _asked(work, recipe)
    if asked is None or (price is None and not any(asked)):
        pass  # what nobody knows a price of has none, and is not taken to be free
    else:
        rented = money(held, price) if price else Range(0.0, 0.0, 0.0, "")
        out["money"] = _ends((rented.low + asked[0], rented.middle + asked[1], rented.high + asked[2]))
    out["disk"] = _ends(_disk(work, recipe)) if any(_disk(work, recipe)) else None
    out["memory"] = _memory(work, recipe, pace)
    return out


def _ends(ends: Ends) -> dict[str, float]:
    return dict(zip(("low", "middle", "high"), map(float, ends), strict=True))


def _added(some: Sequence[dict[str, float]]) -> dict[str, float] | None:
    """Together: what makes one stage dearer makes the others so, and their ends add up."""
    return {end: sum(one[end] for one in some) for end in ("low", "middle", "high")} if some else None


def _energy(held: Range, pace: Pace) -> Ends:
    if pace.on_cpu:
        low, middle, high = (w * pace.threads / 1000 for w in WATTS)
        return low * held.low, middle * held.middle, high * held.high
    found = energy(held, pace.chip)
    return found.low, found.middle, found.high


def _asked(work: Work, recipe: Recipe) -> Ends | None:
    """What a server asks for; None where it asks for something and nobody says how much."""
    t = recipe.teacher
    if not any(work.sent) and not any(work.got):
        return 0.0, 0.0, 0.0
    if not isinstance(t, EndpointTeacher) or t.usd_sent is None or t.usd_got is None:
        return None
    a, b, c = ((t.usd_sent * s + t.usd_got * g) / 1e6 for s, g in zip(work.sent, work.got, strict=True))
    return a, b, c


def _disk(work: Work, recipe: Recipe) -> Ends:
    """Bytes that the stage leaves, and at its high end those of checkpoints while it trains."""
    trained = max((p.shapes.parameters for p in work.passes if p.kind == "train"), default=0)
    low, middle, high = work.bytes
    return low, middle, high + 12.0 * _CHECKPOINTS * trained


def _memory(work: Work, recipe: Recipe, pace: Pace) -> dict[str, float] | None:
    if not work.passes:
        return None
    t, own = recipe.teacher, work.stage == "teacher"
    s = t.schedule if own and isinstance(t, TrainedTeacher) else recipe.train
    context = t.context if own and isinstance(t, TrainedTeacher) else recipe.data.context
    device = "cpu" if pace.on_cpu else "cuda"
    a, b, c = (taken(work.passes, s, context, pace.autocast, device, end) for end in (0, 1, 2))
    return _ends((a, b, c))


def _reasons(recipe: Recipe, rows: Rows, pace: Pace, price: PriceRange | None) -> dict[str, str]:
    if pace.on_cpu:
        watts = f"an estimate: {WATTS[0]:g} to {WATTS[2]:g} W for each of {pace.threads} busy threads"
    else:
        shares = f"{POWER[0]:.0%} to {POWER[2]:.0%} of {pace.chip['power']:,.0f} W"
        watts = f"{shares}; {AROUND}"
    out = {"tokens": rows.reason, "hours": pace.reason, "kwh": watts}
    if price is not None:
        out["money"] = f"{price.reason} for a device and an hour"
    elif not isinstance(recipe.teacher, EndpointTeacher):
        out["money"] = "no price of this machine is known: give one with --price, or budget.usd_per_hour"
    out["memory"] = "rows of a mean batch, and of data.context at the high end; within 10 % for rows of a length"
    out["disk"] = "targets, models and, at the high end, checkpoints while there are any"
    return out
