"""A recipe, reckoned before it runs: tokens, FLOPs, memory, disk, hours, energy and money of each stage, as ranges.

Arithmetic on shapes and settings, no torch, well under a second. Of a range the ends are what a stage takes when rows
are as short, and as long, as they may be, and the machine as fast, and as slow, as it may be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pennyweight.errors import ModelError, RecipeError
from pennyweight.meter.allowance import check_forecast
from pennyweight.meter.rates import WATTS, check_prices, price_of
from pennyweight.plan.assumed import read_or_assume
from pennyweight.plan.disk import SAID, beside, left_by
from pennyweight.plan.forecast import (
    AROUND,
    POWER,
    Published,
    Range,
    Run,
    ends_of,
    energy,
    fit,
    money,
    said_of,
)
from pennyweight.plan.hardware import Chip, PriceRange, catalogue
from pennyweight.plan.pace import Pace, flops_of, on_chips, on_this
from pennyweight.plan.passes import Ends, Pass, Subjects, Work
from pennyweight.plan.room import of_stage
from pennyweight.plan.shapes import Shapes
from pennyweight.plan.subjects import subjects_of
from pennyweight.plan.work import Rows, rows_of, works
from pennyweight.progress import say
from pennyweight.recipe import EndpointTeacher, Recipe

_SUMS = ("tokens", "flops", "hours", "kwh", "money", "disk")

SCOPE = (
    "counted: what this recipe runs, control arms and evaluations included, and energy of the devices only; not "
    "counted: how a given teacher or student was trained, trials, other recipes, failures, and the start of the process"
)


_NO_CHIP = "nothing is foretold, since {} is in no catalogue of chips, or not in this precision"


@dataclass(frozen=True)
class Foretold:
    """A run as it was reckoned (``found``), and what from: to reckon it again with what is known later."""

    found: dict[str, Any]
    recipe: Recipe
    of: Subjects
    rows: Rows
    pace: Pace

    @property
    def parts(self) -> tuple[Recipe, Subjects, Rows, Pace]:
        """As ``plan.seen.retold`` takes them."""
        return self.recipe, self.of, self.rows, self.pace


def pace_on(chip: Chip, devices: int, precision: str | None, rows: Sequence[Published], plain: str = "bf16") -> Pace:
    """Devices of the catalogue, by what published runs had of such; the ends are those of ``forecast.forecast``.

    Args:
        precision: of all passes, whatever the recipe says; None: each as the recipe has it.
        plain: what ``compute.dtype`` comes to.

    Raises:
        RecipeError: the chip has no peak of ``precision``, or of ``plain``.
    """
    found = fit(rows)
    usual = precision or plain
    chip.peak(usual)

    def run(p: Pass, flops: float, tokens: float) -> Run:
        what = precision or p.precision or usual
        return Run("", flops, tokens, chip, devices, what, p.experts, p.distilled, p.shapes.vocabulary)

    reason = said_of(Run("", 1.0, 1.0, chip, devices, usual), found)
    return on_chips(chip, devices, lambda *of: 3600 * found.hours(run(*of)), usual != "fp32", ends_of(rows), reason)


def reckon(recipe: Recipe, of: Subjects, rows: Rows, pace: Pace, price: PriceRange | None) -> dict[str, Any]:
    """Every stage, and all together. ``price`` is None where nobody knows one."""
    made = works(recipe, of, rows)
    stages = [_stage(work, recipe, of, pace, price) | _memory(work, recipe, of, pace) for work in made]
    known = [name for name in _SUMS if all(name in s for s in stages)]
    total: dict[str, Any] = {name: _added([s[name] for s in stages if s[name]]) for name in known}
    total["disk"] = _added([*filter(None, [total.get("disk")]), _ends(beside(recipe, of))])
    total["memory"] = max((s["memory"] for s in stages if s["memory"]), key=lambda m: m["high"], default=None)
    if pace.peak is not None:  # what the process takes was seen, which no formula knows better
        most = pace.grown(pace.peak, "before")
        total["memory"] = _ends((pace.peak, most, max(1.25 * pace.peak, 2 * most - pace.peak)))
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
        "notes": [*of.notes, *_alone_in(recipe, pace.devices), *_of_servers(made, recipe)],
        "peak": pace.peak_rate,
        "scope": SCOPE,
    }


def foretell(
    recipe: Recipe,
    hardware: str,
    devices: int,
    threads: int,
    autocast: bool,
    runs: Callable[[], Sequence[Published]],
    trial: Any = None,
    known_shapes: Mapping[str, Shapes] | None = None,
) -> Foretold | None:
    """A run on this very machine: ``hardware`` is what the driver calls its GPU, if it has one. No measurement is made,
    so that of a GPU of which the catalogue knows nothing there is no forecast.

    Args:
        devices: GPUs; or processes, which share the processor with ``threads`` each.
        runs: gives published ones, where there is a GPU of the catalogue.
        trial: ``plan.seen.Trial`` of the recipe, if a plan has tried it; of no use where there are several devices.
        known_shapes: of folders that are not there yet, by path.

    Raises:
        ModelError: the models cannot be read.
    """
    known = catalogue()
    chip = known.called(hardware)
    if chip is None and not hardware.startswith("cpu"):
        return None
    if trial and (devices > 1 or trial.on_cpu != (chip is None)):
        trial = None
    if chip is None:
        pace = on_this(trial and trial.chip, threads * devices, autocast)
    else:
        chip = replace(chip, figures={**chip.figures, **trial.chip.figures}) if trial else chip
        pace = pace_on(chip, devices, None, runs(), "bf16" if autocast else "fp32")
    vocabulary = trial and trial.seen.get("vocabulary")
    of, rows = subjects_of(recipe, known_shapes, read_or_assume, vocabulary), rows_of(recipe)
    if trial:
        rows, pace = trial.put(of, rows, pace)
    return Foretold(reckon(recipe, of, rows, pace, price_of(recipe.budget, hardware)), recipe, of, rows, pace)


def within_budget(recipe: Recipe, hardware: str, *where: Any) -> Foretold | None:
    """``foretell``, held against the recipe's budget; None where its models are not known before they are there, which
    is said where there is a budget, or its GPU or its precision is in no catalogue, which is said.

    Raises:
        RecipeError: even the low end is above the budget, or money is limited and a price is not known.
    """
    check_prices(recipe.budget, recipe.teacher, hardware)
    found, why = None, ""
    try:
        found, why = foretell(recipe, hardware, *where), _NO_CHIP.format(hardware.partition(",")[0])
    except ModelError as e:
        why = f"nothing can be foretold, since {e}"
    except RecipeError:  # the chip has not that precision
        why = _NO_CHIP.format(hardware.partition(",")[0])
    if warning := check_forecast(recipe.budget, found and found.found["total"], why="" if found else why):
        say(warning)
    return found


def together(name: str, runs: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Runs of a chain, one after another."""
    first, totals = next(iter(runs.values())), [run["total"] for run in runs.values()]
    total = {k: _added([t[k] for t in totals if t[k]]) for k in _SUMS if all(k in t for t in totals)}
    total["memory"] = max((t["memory"] for t in totals if t["memory"]), key=lambda m: m["high"], default=None)
    shared = {k: first[k] for k in ("on", "chip", "devices", "threads", "currency")}
    return {"name": name, **shared, "runs": dict(runs), "total": total}


def _alone_in(recipe: Recipe, devices: int) -> list[str]:
    """What is to be said of stages of which one device does all."""
    if devices == 1:
        return []
    said = [
        "sft and kd train on all devices, which label together, too; one of them does the other stages alone, "
        "and all are paid for meanwhile"
    ]
    if recipe.method.kind in ("grpo", "on_policy", "offline"):
        said.append(
            f"method {recipe.method.kind} runs in one process, so it is refused on {devices:,} devices: take one"
        )
    return said


def _of_servers(made: Sequence[Work], recipe: Recipe) -> list[str]:
    """What is to be said of stages in which a server is asked."""
    asked = [(w, _asked(w, recipe)) for w in made if any(w.sent) or any(w.got)]
    if not asked:
        return []
    if any(a is None for _, a in asked):
        price = "what it asks for is not known: set teacher.usd_sent and teacher.usd_got, of a million tokens"
    else:
        low, high = (sum(a[end] for _, a in asked if a) for end in (0, 2))
        price = f"it asks for USD {low:,.3g} to {high:,.3g} in all"
    return [f"a server's own time is not known, and not in the hours; {price}"]


def _stage(work: Work, recipe: Recipe, of: Subjects, pace: Pace, price: PriceRange | None) -> dict[str, Any]:
    at_work = pace if work.shared or work.stage == "targets" else replace(pace, devices=1)  # docs/processes.md
    hours = at_work.ends(work)
    out: dict[str, Any] = {"stage": work.stage, "does": work.does}
    sent: Any = tuple(a + b for a, b in zip(work.sent, work.got, strict=True))
    out["tokens"] = _ends(tuple(sum(p.tokens(i) for p in work.passes) + sent[i] for i in (0, 1, 2)))  # type: ignore[arg-type]
    out["flops"] = _ends(tuple(sum(flops_of(p, i) for p in work.passes) for i in (0, 1, 2)))  # type: ignore[arg-type]
    out["hours"] = _ends(hours)
    held = Range(*(pace.devices * h for h in hours), reason="")
    out["kwh"] = _ends(_energy(held, pace))
    trained = [p for p in work.passes if p.kind == "train"]  # by whose tokens a run counts
    out["flops_per_trained_token"] = sum(flops_of(p, 1) for p in work.passes) / max(
        1.0, sum(p.tokens(1) for p in trained)
    )
    asked = _asked(work, recipe)
    if asked is None or (price is None and not any(asked)):
        pass  # what nobody knows a price of has none, and is not taken to be free
    else:
        rented = money(held, price) if price else Range(0.0, 0.0, 0.0, "")
        out["money"] = _ends((rented.low + asked[0], rented.middle + asked[1], rented.high + asked[2]))
    disk = left_by(work, recipe, of)
    out["disk"] = _ends(disk) if any(disk) else None
    return out


def _ends(ends: Ends) -> dict[str, float]:
    return dict(zip(("low", "middle", "high"), map(float, ends), strict=True))


def _added(some: Sequence[dict[str, float]]) -> dict[str, float] | None:
    """Together: what makes one stage dearer makes the others so, and their ends add up."""
    return {end: sum(one[end] for one in some) for end in ("low", "middle", "high")} if some else None


def _energy(held: Range, pace: Pace) -> Ends:
    if pace.watts:
        return tuple(pace.watts / 1000 * h for h in (held.low, held.middle, held.high))  # type: ignore[return-value]
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


def _memory(work: Work, recipe: Recipe, of: Subjects, pace: Pace) -> dict[str, Any]:
    """What a device holds, and the parts of its high end."""
    if not work.passes:
        return {"memory": None}
    where = ("cpu" if pace.on_cpu else "cuda", pace.autocast, pace.devices)
    parts = [of_stage(work, recipe, of.teacher, *where, end) for end in (0, 1, 2)]
    a, b, c = (sum(p.values()) for p in parts)
    return {"memory": _ends((a, b, c)), "parts": {name: n for name, n in parts[2].items() if n}}


def _reasons(recipe: Recipe, rows: Rows, pace: Pace, price: PriceRange | None) -> dict[str, str]:
    if pace.watts:
        watts = f"{pace.watts:,.0f} W, which counters told while the recipe was tried here; {AROUND}"
    elif pace.on_cpu:
        watts = f"an estimate: {WATTS[0]:g} to {WATTS[2]:g} W for each of {pace.threads} busy threads"
    else:
        shares = f"{POWER[0]:.0%} to {POWER[2]:.0%} of {pace.chip['power']:,.0f} W"
        watts = f"{shares}; {AROUND}"
    out = {"tokens": rows.reason, "hours": pace.reason, "kwh": watts}
    if price is not None:
        out["money"] = f"{price.reason} for a device and an hour"
    else:
        out["money"] = "no price of this machine is known: give one with --price, or budget.usd_per_hour"
    out["memory"] = "rows of a mean batch, and of data.context at the high end; within 10 % for rows of a length"
    if pace.peak is not None:
        out["memory"] += "; in all by what the recipe took when it was tried here"
    out["disk"] = SAID
    return out
