"""The bill in the report: foretold beside metered, what it comes to, and what is not in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pennyweight.report.markup import Html, element, facts, section, table
from pennyweight.report.view import View
from pennyweight.report.wording import MISSING, count, duration, finite, number, plural

NO_PRICE = "no price is known: budget.usd_per_hour (and a server's teacher.usd_sent and teacher.usd_got) set one"


def bill(view: View) -> Html | None:
    """Hours, energy and money of this run, each stage's forecast with its error; None where nothing was metered."""
    found: Mapping[str, Any] = view.summary.get("bill") or {}
    if not found.get("stages"):
        return None
    peak, priced = found.get("peak"), found["spent"]["usd"] is not None
    rows = [_row(r, peak, priced) for r in found["stages"]]
    blank = [MISSING, MISSING, *[MISSING] * priced]
    rows.append(["between stages", MISSING, duration(found["between"]), MISSING, *blank])
    if found["earlier"] >= 0.05:
        rows.append(["stages on earlier settings", MISSING, duration(found["earlier"]), MISSING, *blank])
    total, whole = found["foretold"], found["whole"]
    ends = total and {end: 3600 * h for end, h in total["hours"].items()}
    off = ends["middle"] / whole - 1 if ends and whole else None
    return section(
        "bill",
        "The bill",
        element("p", *(f"{said} " for said in bill_in_words(found))),
        table(
            "Forecast and meter of each stage, by the clock",
            ["stage", "foretold", "metered", "forecast beside it", "of the peak", "energy", *["USD"] * priced],
            rows,
            [*("all of it", _span(ends), duration(whole), _error(off), MISSING), *_sums(found, priced)],
        ),
        facts([*_pairs(found), ("scope", scope(view.summary))]),
    )


def _row(r: Mapping[str, Any], peak: float | None, priced: bool) -> list[str]:
    """A stage: its forecast and its meter, what share of the machine's FLOP/s its training had, energy and money."""
    share = f"{100 * r['flops_per_second'] / peak:.2g} %" if peak and r.get("flops_per_second") else MISSING
    cells = [r["stage"], _span(r["foretold"]), duration(r["metered"]), _error(r["error"]), share]
    cells.append(MISSING if r.get("kwh") is None else energy(r["kwh"]))
    return [*cells, *([MISSING if r.get("usd") is None else number(r["usd"])] if priced else [])]


def _sums(found: Mapping[str, Any], priced: bool) -> list[str]:
    return [energy(found["spent"]["kwh"]), *([number(found["spent"]["usd"])] if priced else [])]


def bill_in_words(found: Mapping[str, Any]) -> list[str]:
    """What the run took, and cost, in a sentence or two."""
    spent = found["spent"]
    said = [f"This run took {duration(found['whole'])} and {energy(spent['kwh'])}."]
    paid = f"It cost USD {number(spent['usd'])}{_priced(spent.get('price'))}." if spent["usd"] is not None else ""
    said.append(paid or f"Money: {NO_PRICE}.")
    if (asked := spent.get("answers") or {}).get("estimated"):
        said.append(
            f"Of {plural(asked['answers'], 'answer')} of a server {count(asked['estimated'])} came without a count of "
            "tokens, which is an estimate then: a fourth of their characters."
        )
    if each := found.get("per_point"):
        price = f", USD {number(each['usd'])}" if "usd" in each else ""
        gained = f"{number(each['points'])} points of accuracy gained on the untouched student"
        said.append(f"For each of the {gained}: {duration(each['seconds'])}, {energy(each['kwh'])}{price}.")
    return said


def _priced(price: Mapping[str, Any] | None) -> str:
    """At which price of a device, whose it is and of which day, and whether that is long ago."""
    if not price:
        return ""
    middle = f"{price['currency']} {number(price['middle'])}"
    old = "; the newest of these is more than 90 days old" if price["stale"] else ""
    return f", a device and hour at {middle} ({price['reason']}{old})"


def scope(summary: Mapping[str, Any]) -> str:
    """What is in the bill and what is not, plainly."""
    arms = [a for a in summary.get("arms") or {} if a != "base"]
    control = ", its control arm" if len(arms) > 1 else ""
    teacher = (summary.get("stages") or {}).get("teacher") or {}
    trained = "its teacher’s training in it" if teacher.get("tokens") else "its teacher’s own training not counted"
    return (
        f"all tries in this RUN folder{control}, low-bit copies and evaluations, {trained}; energy is that of the "
        f"devices only{_around(summary)}; trials in other folders and the start of the process are not counted"
    )


def _around(summary: Mapping[str, Any]) -> str:
    """What of the energy around the devices was counted, and what was not."""
    spent = (summary.get("bill") or {}).get("spent") or {}
    host = spent.get("host")
    if not host:
        return ", without what a building takes besides"
    if host["whole"]:
        return f", without their host’s processors, which took {energy(host['kwh'])} besides, and without the building"
    partly = f" (but for {energy(host['kwh'])} that was)" if host["kwh"] else ""
    return f": their host’s processors were not counted{partly}, nor what a building takes"


def _pairs(found: Mapping[str, Any]) -> list[tuple[str, Any]]:
    spent, again = found["spent"], found["again"]
    share = finite(spent["estimated"]) or 0.0
    counted = "by counters" if not share else f"{100 * share:.0f} % of it an estimate: {spent['energy']}"
    tries = f"{plural(again, 'stage was', 'stages were')} begun again after a stop or a failure" if again else None
    price = spent.get("price")
    priced = f"{price['reason']}{', which is more than 90 days ago' if price['stale'] else ''}" if price else None
    return [
        ("device-hours", number(spent["device_hours"])),
        ("price of a device and hour", priced),
        ("energy", counted),
        ("goodput", _goodput(found.get("goodput"), found["whole"])),
        ("forecast anew", _anew(found.get("anew"), found["whole"])),
        ("tries", tries),
    ]


def _goodput(found: Mapping[str, Any] | None, whole: float) -> str | None:
    """How much of the time was work that was kept, and where the rest went."""
    if not found or not whole:
        return None
    rest = max(0.0, whole - found["work"] - found["evaluation"] - found["lost"])
    parts = [f"{duration(found['evaluation'])} of evaluation", f"{duration(rest)} of opening, saving and waiting"]
    parts += (
        [f"{duration(found['lost'])} lost to stops, failures and earlier settings"] if found["lost"] >= 0.05 else []
    )
    return f"{100 * found['share']:.0f} % of the time was work that was kept; besides it {', '.join(parts)}"


def _anew(found: Sequence[Mapping[str, Any]] | None, whole: float) -> str | None:
    """What the run told of its length once its first student trained."""
    if not found or not whole:
        return None
    first = found[0]
    error = _error(first["whole_seconds"] / whole - 1)
    return f"{duration(first['whole_seconds'])} in all, told by the first steps of {first['stage']}; {error} beside it"


def _span(ends: Mapping[str, Any] | None) -> str:
    return f"{duration(ends['low'])} – {duration(ends['high'])}, middle {duration(ends['middle'])}" if ends else MISSING


def _error(error: Any) -> str:
    value = finite(error)
    return MISSING if value is None else f"{100 * value:+,.0f} %".replace("-", "\u2212")


def energy(kwh: float) -> str:
    """In the unit that suits it."""
    return f"{number(kwh)} kWh" if kwh >= 1 else f"{number(1000 * kwh)} Wh"
