"""A recipe's plan for people: a table for the terminal in 80 columns, and a page. Every range comes with its reason."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from pennyweight.report.graded import aligned, paragraph
from pennyweight.report.language import ENGLISH, Language
from pennyweight.report.markup import Html, document, element, facts, join, section, table
from pennyweight.report.plan_fits import fit_lines, fits_section
from pennyweight.report.serving import serving_lines, serving_section
from pennyweight.report.style import sheet
from pennyweight.report.wording import MISSING, count, parameters, plural, size

_TIMES = (("days", 24.0), ("hours", 1.0), ("min", 1 / 60), ("s", 1 / 3600))
"""Units of time, and how many hours one is."""

_WHAT = {
    "tokens": "tokens",
    "hours": "time",
    "kwh": "energy",
    "money": "money",
    "memory": "memory",
    "disk": "disk",
}

Plan = Mapping[str, Any]
Ends = Mapping[str, float]


def print_recipe_plan(found: Plan, spoken: Language = ENGLISH) -> None:
    """What was reckoned of a recipe, or of a chain, whose runs have a table each."""
    runs = list(found["runs"].values()) if "runs" in found else [found]
    for line in _lead(found):
        _say(spoken(line))
    for run in runs:
        print(f"\n{run['name']}" if len(runs) > 1 else "")
        head, *rows, (together, *sums) = _rows(run, short=True)
        print(*aligned([[*map(spoken, head)], *rows, [spoken(together), *sums]]), sep="\n")
    print()
    for line in fit_lines(found["fits"], span, lasts) if found.get("fits") else ():
        _say(spoken(line))
    if found.get("serving"):
        print(*serving_lines(found["serving"], span, spoken), "", sep="\n")
        _say(f"{spoken('serving')}: {spoken(found['serving']['reason'])}")
    for name, reason in _reasons(runs):
        _say(f"{spoken(name)}: {spoken(reason)}")
    for note in dict.fromkeys(n for run in runs for n in run["notes"]):
        _say(f"{spoken('note')}: {spoken(note)}")
    _say(spoken(runs[0]["scope"]))


def recipe_plan_page(found: Plan) -> str:
    """One self-contained HTML page of the same, each figure with its ends; the same plan gives the same text."""
    runs, said = list(found["runs"].values()) if "runs" in found else [found], _lead(found)
    body = [
        element(
            "header",
            element("h1", f"Pennyweight plan: {found['name']}"),
            *(element("p", line, class_="lead" if i == 0 else None) for i, line in enumerate(said)),
        ),
        element("main", *(_table(run, i) for i, run in enumerate(runs)), _fits(runs, found), _how(runs)),
    ]
    return document(f"{found['name']} – Pennyweight plan", said[0], sheet(), *body)


def span(ends: Ends | None, one: float = 1.0) -> str:
    """``1.2–19``; one number where both ends are the same, a dash where nothing is known."""
    if ends is None:
        return MISSING
    low, high = (_rounded(ends[end] / one) for end in ("low", "high"))
    return low if low == high else f"{low.replace('<0.01', '0')}–{high}"


def lasts(hours: Ends) -> str:
    """``2.6–39 min, 10 in the middle``."""
    unit, one = _unit(hours)
    return f"{span(hours, one)} {unit}, {_rounded(hours['middle'] / one)} in the middle"


def _unit(hours: Ends) -> tuple[str, float]:
    """The unit that suits a time, and how many hours it is."""
    return next(((u, one) for u, one in _TIMES if hours["middle"] >= (2 if u == "days" else 1) * one), _TIMES[-1])


def _lead(found: Plan) -> list[str]:
    """What it takes in all, in a sentence or two."""
    total, devices = found["total"], found["devices"]
    threads, chips = found["threads"], f"{count(devices)} x {found['on']}"
    where = f"this machine ({plural(threads, 'thread')})" if threads else chips
    kwh = total["kwh"]
    text = f"{found['name']} takes {lasts(total['hours'])}, on {where}, and {_energy(kwh)}"
    if "money" in total:
        text += (
            f"; it costs {found['currency']} {span(total['money'])}, {_rounded(total['money']['middle'])} in the middle"
        )
    lines = [text + "."]
    if total.get("memory"):
        disk = f" and {_sizes(total['disk'])} on disk" if total.get("disk") else ""
        lines.append(f"At its most it takes {_sizes(total['memory'])} of memory{disk}.")
    return lines


def _energy(kwh: Ends) -> str:
    if kwh["middle"] >= 1:
        return f"{span(kwh)} kWh"
    return f"{span(kwh, 1e-3)} Wh"


def _rows(run: Plan, short: bool) -> list[tuple[str, ...]]:
    """A line for each stage and one for all; ``short`` has those columns alone for which 80 characters do."""
    unit, one = _unit(run["total"]["hours"])
    money = "money" in run["total"]
    head = ["stage", "tokens", "FLOPs", "memory", *([] if short else ["disk"]), f"time, {unit}", "middle"]
    head += [] if short else ["Wh"]
    rows = [(*head, *([f"{run['currency']}"] if money else []))]
    for s in [*run["stages"], {"stage": "together", **run["total"]}]:
        cells = [s["stage"], _big(s["tokens"]["middle"]), _big(s["flops"]["middle"]), _middle(s.get("memory"))]
        cells += [] if short else [_sizes(s.get("disk"))]
        cells += [span(s["hours"], one), _rounded(s["hours"]["middle"] / one)]
        cells += [] if short else [span(s["kwh"], 1e-3)]
        rows.append((*cells, *([span(s.get("money"))] if money else [])))
    return rows


def _table(run: Plan, number: int) -> Html:
    head, *rows, last = _rows(run, short=False)
    does = [[r[0], s["does"], *r[1:]] for r, s in zip(rows, run["stages"], strict=True)]
    known = run["parameters"]
    of = [
        ("student", f"{parameters(known['student'])} parameters"),
        ("teacher", known["teacher"] and f"{parameters(known['teacher'])} parameters"),
    ]
    caption = "Tokens, FLOPs and memory in the middle; disk, time, energy and money from the low to the high end"
    return section(
        f"plan-{number}",
        "What each stage takes" if number == 0 else run["name"],
        facts([("recipe", run["name"]), ("method", run["method"]), *of]),
        table(caption, [head[0], "what it does", *head[1:]], does, [last[0], "", *last[1:]]),
    )


def _fits(runs: Sequence[Plan], found: Plan) -> Html | str:
    served = found.get("serving")
    return join(
        [
            fits_section(runs, found["fits"], span, lasts) if found.get("fits") else "",
            serving_section(served, span) if served and served["formats"] else "",
        ]
    )


def _how(runs: Sequence[Plan]) -> Html:
    pairs = [*_reasons(runs), *(("note", n) for n in dict.fromkeys(n for run in runs for n in run["notes"]))]
    return section("how", "Where the ranges are from", facts(pairs), element("p", runs[0]["scope"], class_="small"))


def _reasons(runs: Sequence[Plan]) -> list[tuple[str, str]]:
    """Each reason once, by what it is of."""
    found = dict.fromkeys((_WHAT[k], r) for run in runs for k, r in run["reasons"].items())
    return list(found)


def _say(text: str) -> None:
    width = min(shutil.get_terminal_size().columns, 120)
    print(paragraph(text, width))


def _rounded(value: float) -> str:
    """Two digits: more would say more than a plan knows."""
    x = float(f"{value:.2g}")
    return count(x) if x >= 10 or not x else f"{x:.2g}" if x >= 0.01 else "<0.01"


def _big(value: float) -> str:
    """``3.3 M``, ``1.8e13``; a dash for nothing."""
    if not value:
        return MISSING
    for letter, one in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if one <= value < 1e15:
            return f"{_rounded(value / one)}{letter}"
    return _rounded(value) if value < 1e3 else f"{value:.1e}".replace("e+", "e")


def _middle(ends: Ends | None) -> str:
    return size(ends["middle"]) if ends else MISSING


def _sizes(ends: Ends | None) -> str:
    if not ends:
        return MISSING
    low, high = size(ends["low"]), size(ends["high"])
    (least, _, unit), (_, _, other) = low.partition("\u00a0"), high.partition("\u00a0")
    return low if low == high else f"{least if unit == other else low}–{high}"
