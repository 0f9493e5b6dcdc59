"""The bill of a finished run: what was foretold beside what was metered, stage by stage, and what that bought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pennyweight.meter.taken import Taken
from pennyweight.records import ROUNDED

Stages = Mapping[str, Mapping[str, Any]]


def bill(
    foretold: Mapping[str, Any] | None,
    stages: Stages,
    taken: Mapping[tuple[str, str], Taken],
    whole: Taken,
    spent: Mapping[str, Any],
    between: str,
    rates: Any = None,
) -> dict[str, Any]:
    """What a run took. Seconds of its stages, of what is between them and of stages on earlier inputs make the whole.

    Args:
        foretold: ``plan.reckon``'s, or None where nothing could be.
        stages: of the run, with ``metered``, ``seconds`` and ``tokens``.
        taken: all that was metered, by stage and inputs; ``between`` is the name of what is between stages.
        whole: the same together, by the meter's own clock.
        spent: what that comes to.
        rates: ``allowance.Rates``, by which each stage has its energy and the rent of its devices.
    """
    of_stage = {name: _seconds(s) for name, s in stages.items()}
    groups: dict[str, list[str]] = {}
    for name in stages:
        groups.setdefault(_line_of(name), []).append(name)
    known = {s["stage"]: s for s in foretold["stages"]} if foretold else {}
    rows = [_row(line, names, stages, of_stage, known.get(line)) for line, names in groups.items()]
    for row in rows if rates else ():
        row |= _paid([stages[n].get("metered") or {} for n in groups[row["stage"]]], rates)
    now, aside = sum(of_stage.values()), sum(t.seconds for (stage, _), t in taken.items() if stage == between)
    earlier = max(0.0, sum(t.seconds for t in taken.values()) - now - aside)
    return {
        "stages": rows,
        "between": round(aside, 3),
        "earlier": round(earlier, 3),
        "whole": round(whole.seconds, 3),
        "goodput": _goodput(stages, of_stage, whole.seconds, earlier),
        "again": sum(max(0, (s.get("metered") or {}).get("stretches", 1) - 1) for s in stages.values()),
        "spent": {k: round(v, 9) if isinstance(v, float) else v for k, v in spent.items()},
        "currency": "USD",
        "foretold": foretold and {k: foretold["total"][k] for k in ("hours", "kwh", "money") if k in foretold["total"]},
        "reasons": foretold["reasons"] if foretold else {},
        "peak": foretold.get("peak") if foretold else None,
    }


def _goodput(stages: Stages, of_stage: Mapping[str, float], whole: float, earlier: float) -> dict[str, float]:
    """Seconds by what they were good for: ``work`` that was kept (steps, labels, texts, copies), ``evaluation``, and
    ``lost`` to stops and failures; the rest is opening, saving and what is between stages. ``share`` is the first's."""
    measured = [n for n in stages if n.startswith("evaluate-")]
    work = {n: min(float(stages[n].get("seconds") or 0.0), of_stage[n]) for n in stages if n not in measured}
    tried_again = [n for n in work if (stages[n].get("metered") or {}).get("stretches", 1) > 1]
    lost = sum(of_stage[n] - work[n] for n in tried_again) + earlier
    evaluation = sum(of_stage[n] for n in measured)
    found = {"work": sum(work.values()), "evaluation": evaluation, "lost": lost}
    return {k: round(v, 3) for k, v in found.items()} | {"share": round(found["work"] / whole, 4) if whole else 0.0}


def per_point(spent: Mapping[str, Any], before: float | None, after: float | None) -> dict[str, float] | None:
    """Seconds, kWh and dollars for each point (a hundredth) of accuracy gained; None where none was."""
    if before is None or after is None or after - before < 1e-9:
        return None
    points = 100 * (after - before)
    found = {"points": points, "seconds": 3600 * spent["hours"] / points, "kwh": spent["kwh"] / points}
    return found | ({"usd": spent["usd"] / points} if spent["usd"] is not None else {})


def _line_of(stage: str) -> str:
    """The line of a plan that a run's stage belongs to."""
    if stage.startswith("evaluate-"):
        return "evaluate teacher" if stage == "evaluate-teacher" else "evaluate students"
    if stage == "student" or stage.startswith("start-"):
        return "opening and copying"
    return stage.removesuffix(ROUNDED)


def _seconds(stage: Mapping[str, Any]) -> float:
    metered = stage.get("metered") or {}
    return float(metered.get("seconds") or stage.get("seconds") or 0.0)  # of folders older than the meter


def _paid(metered: Sequence[Mapping[str, Any]], rates: Any) -> dict[str, float | None]:
    """kWh of stages, and US dollars for the devices that they held; what a server asks for is in the whole only."""
    joules = sum(sum(m.get("joules", {}).values()) + m.get("uncounted", 0.0) * rates.watts for m in metered)
    held = sum(m.get("device_seconds", 0.0) for m in metered) / 3600
    return {"kwh": joules / 3.6e6, "usd": None if rates.usd_per_hour is None else held * rates.usd_per_hour}


def _row(
    line: str, names: list[str], stages: Stages, of_stage: Mapping[str, float], plan: Mapping[str, Any] | None
) -> dict[str, Any]:
    seconds, tokens = sum(of_stage[n] for n in names), sum(stages[n].get("tokens") or 0 for n in names)
    ends = {end: round(3600 * h, 3) for end, h in plan["hours"].items()} if plan else None
    row: dict[str, Any] = {"stage": line, "metered": round(seconds, 3), "tokens": tokens, "foretold": ends}
    row["error"] = round(ends["middle"] / seconds - 1, 4) if ends and seconds > 0 else None
    if plan is not None and tokens and "trains" in plan["does"] and "flops_per_trained_token" in plan:
        row["flops"] = plan["flops_per_trained_token"] * tokens
        row["flops_per_second"] = row["flops"] / seconds if seconds > 0 else None
    return row
