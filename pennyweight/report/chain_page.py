"""What the stages of a chain made -> one HTML page that needs nothing but itself, with a link to each stage's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pennyweight.records import METRICS
from pennyweight.report.charts import Mark, intervals
from pennyweight.report.markup import Html, document, element, facts, figure, section, table
from pennyweight.report.run_bill import energy
from pennyweight.report.style import sheet
from pennyweight.report.wording import (
    MISSING,
    count,
    duration,
    finite,
    measured,
    number,
    parameters,
    plural,
    share_of,
    size,
    span,
    with_unit,
)

Stage = Mapping[str, Any]
_TOKENS = ("tokens_trained", "tokens_generated")


def render_chain(summary: Mapping[str, Any]) -> str:
    """The report of a chain as one self-contained page; the same summary gives the same text."""
    said = chain_headline(summary)
    done = finished(summary)
    metric = leading(done)
    compared = compared_on(done, metric) if metric else None
    body = [
        element(
            "header",
            element("h1", f"Pennyweight report: {summary['name']}, a chain of {plural(len(summary['stages']), 'run')}"),
            element("p", said, class_="lead"),
            element("p", compared, class_="verdict") if compared else None,
            _notice(summary),
        ),
        element("main", _quality(summary, done, metric), _costs(summary, done), _provenance(done)),
        element("footer", element("p", f"Pennyweight {summary['version']}")),
    ]
    return document(f"{summary['name']} – Pennyweight report", said, sheet(), *body)


def finished(summary: Mapping[str, Any]) -> dict[str, Stage]:
    """The stages that have been run to their end, in their order."""
    return {name: s for name, s in summary["stages"].items() if s["state"] == "finished"}


def leading(done: Mapping[str, Stage]) -> str | None:
    """What the stages are told by: accuracy, or else bits per byte; None where neither was measured."""
    known = [m for m in ("accuracy", "bits_per_byte") if any(_mean(s, m) is not None for s in done.values())]
    return known[0] if known else None


def chain_headline(summary: Mapping[str, Any]) -> str:
    """What came of the chain, in one plain sentence with its numbers."""
    done = finished(summary)
    metric = leading(done)
    if metric is None:
        return f"{_so_far(summary)}; nothing has been measured yet."
    told = {name: s for name, s in done.items() if _mean(s, metric) is not None}
    unit = METRICS[metric].unit
    if len(told) == 1:
        ((first, begin),) = told.items()
        does = "answers {} of the held-out problems right" if metric == "accuracy" else "needs {} of text"
        return f"{_so_far(summary)}: after {first} the student {does.format(with_unit(unit, _mean(begin, metric)))}."
    (first, begin), *_, (last, end) = told.items()
    name = "The share of held-out problems answered right" if metric == "accuracy" else "What the student needs of text"
    was, now = (with_unit(unit, _mean(s, metric)) for s in (begin, end))
    smaller = share_of(end["params"], begin["params"], f"the size of {first}’s")
    sized = f"; the student of {last} is {smaller}" if smaller and end["params"] != begin["params"] else ""
    return f"{name} went from {was} after {first} to {now} after {last}{sized}."


def _so_far(summary: Mapping[str, Any]) -> str:
    ready, whole = len(finished(summary)), len(summary["stages"])
    return f"{plural(whole, 'stage')} run" if ready == whole else f"{ready} of {plural(whole, 'stage')} run so far"


def columns(done: Mapping[str, Stage]) -> list[tuple[str, str, str]]:
    """What the stages are shown side by side by: (``before`` or ``metrics``, metric, heading), as far as measured. Bits
    per byte only where some have no accuracy, as each stage has held-out texts of its own."""
    known = [
        ("before", "accuracy", "before, %"),
        ("metrics", "accuracy", "accuracy, %"),
        ("metrics", "pass_at_k", "pass@k, %"),
        ("metrics", "accuracy_harder", "harder, %"),
    ]
    if not done or not all("accuracy" in s["metrics"] for s in done.values()):
        known.append(("metrics", "bits_per_byte", "bits/byte"))
    return [(side, m, heading) for side, m, heading in known if any(m in s.get(side, ()) for s in done.values())]


def compared_on(done: Mapping[str, Stage], metric: str) -> str | None:
    """Whether the last stage is better than the first, worse or a draw, in a sentence; that it cannot be told where
    they were not asked the same problems; None where there are no two."""
    told = {name: s for name, s in done.items() if _mean(s, metric) is not None}
    if len(told) < 2:
        return None
    (first, begin), *_, (last, end) = told.items()
    if metric == "accuracy" and begin.get("measured_on") != end.get("measured_on"):
        return f"{first} and {last} were not asked the same problems, so their numbers cannot be set side by side."
    a, b = begin["metrics"][metric], end["metrics"][metric]
    ends = [finite(x.get(k)) for x in (a, b) for k in ("low", "high")]
    if None in ends:
        return None
    asked = f" on the same {plural(end['measured_on']['problems'], 'problem')}" if metric == "accuracy" else ""
    if a["low"] <= b["high"] and b["low"] <= a["high"]:
        return f"{last} is a draw with {first}{asked}: their 95 % intervals overlap."
    better = (b["mean"] > a["mean"]) == METRICS[metric].higher_is_better
    return f"{last} is {'better' if better else 'worse'} than {first}{asked}: their 95 % intervals do not overlap."


def _mean(stage: Stage, metric: str) -> float | None:
    return finite((stage["metrics"].get(metric) or {}).get("mean"))


def to_be_run(summary: Mapping[str, Any]) -> str | None:
    """Which stages are not what the chain as it is now would make, in a sentence; None where all are."""
    missing = [f"{name} ({s['state']})" for name, s in summary["stages"].items() if s["state"] != "finished"]
    for name, s in finished(summary).items():
        if s["outdated"]:
            missing.append(f"{name} (began from {', '.join(s['outdated'])} of an earlier run)")
    return f"To be run: {', '.join(missing)}. Start the chain again to go on." if missing else None


def _notice(summary: Mapping[str, Any]) -> Html | None:
    told = to_be_run(summary)
    if told is None:
        return None
    return element("p", element("strong", "This chain is not finished. "), told, class_="notice", role="note")


def _quality(summary: Mapping[str, Any], done: Mapping[str, Stage], metric: str | None) -> Html:
    """The picture of each stage's student with its interval, and every stage's numbers."""
    return section("quality", "How good is each stage?", _picture(done, metric) if metric else None, _stages(summary))


def _picture(done: Mapping[str, Stage], metric: str) -> Html:
    info = METRICS[metric]
    percent = info.unit == "percent"
    scale, sign = (100.0, "\u00a0%") if percent else (1.0, "")
    marks = []
    for name, stage in done.items():
        if (mean := _mean(stage, metric)) is not None:
            found = stage["metrics"][metric]
            low, high = (None if (v := finite(found.get(k))) is None else scale * v for k in ("low", "high"))
            marks.append(Mark("student", name, scale * mean, measured(info.unit, mean) + sign, low, high))
    notes = [f"Dots are measured values, lines their 95 % intervals; further {_better(metric)} is better."]
    if percent:
        alike = len({str(s["measured_on"]) for s in done.values() if _mean(s, metric) is not None}) == 1
        notes.append("All stages were asked the same problems." if alike else "Not all stages were asked the same.")
    listed = [f"{m.label} {m.text}" for m in marks]
    said = f"{info.label} by stage. {'; '.join(listed)}."
    axis, bounds = (f"{info.label}, %", (0.0, 100.0)) if percent else (info.label, None)
    chart = intervals(f"chain-{metric}".replace("_", "-"), marks, axis, said, bounds=bounds)
    name = "Accuracy" if metric == "accuracy" else "Bits per byte"
    return figure(f"{name} – {', '.join(listed)}", chart, " ".join(notes))


def _better(metric: str) -> str:
    return "right" if METRICS[metric].higher_is_better else "left"


def _stages(summary: Mapping[str, Any]) -> Html:
    """Every stage in a row: linked to its own report, with what it made."""
    shown = columns(finished(summary))
    rows = []
    for name, s in summary["stages"].items():
        if s["state"] != "finished":
            rows.append([element("span", name, element("small", s["state"])), *[MISSING] * (2 + len(shown))])
            continue
        begins = element("small", f"from {', '.join(s['needs'])}") if s["needs"] else None
        cells = (_cell(s.get(side, {}), metric) for side, metric, _ in shown)
        linked = element("span", element("a", name, href=s["report"]), begins)
        rows.append([linked, s["method"], parameters(s["params"]), *cells])
    headings = ["stage", "method", "parameters", *(heading for *_, heading in shown)]
    return table("Stages in their order, with 95 % intervals below each value", headings, rows)


def _costs(summary: Mapping[str, Any], done: Mapping[str, Stage]) -> Html | None:
    if not done:
        return None
    row = lambda name, s: [name, duration(s["seconds"]), *(_amount(s[k]) for k in _TOKENS), _memory(s)]  # noqa: E731
    return section(
        "cost",
        "What did each stage take?",
        table(
            "Time, tokens and peak memory of each stage",
            ["stage", "time", "tokens trained", "tokens generated", "peak memory"],
            [row(name, s) for name, s in done.items()],
            row("all stages", summary),
        ),
        element("p", said) if (said := chain_bill(summary)) else None,
        element(
            "p",
            "Tokens trained are those of all arms and seeds of a stage, of a teacher that it trains, and of low-bit "
            "copies; tokens generated are what its students wrote to learn from.",
            class_="small",
        ),
    )


def chain_bill(summary: Mapping[str, Any]) -> str | None:
    """What the finished stages came to, all their tries together, beside what was foretold, in a few sentences."""
    found: Mapping[str, Any] = summary.get("bill") or {}
    if found.get("seconds") is None:
        return None
    foretold = found["foretold"] or {}
    hours, kwh, money = (foretold.get(name) for name in ("hours", "kwh", "money"))
    seconds = hours and {end: 3600 * h for end, h in hours.items()}
    parts = [f"{duration(found['seconds'])}{_told(seconds, duration)}"]
    if found["kwh"] is not None:
        parts.append(f"{energy(found['kwh'])} (devices only){_told(kwh, energy)}")
    if found["usd"] is not None:
        parts.append(f"USD {number(found['usd'])}{_told(money, lambda usd: f'USD {number(usd)}')}")
    limits = [BUDGETED[name].format(number(limit)) for name, limit in (found.get("budget") or {}).items()]
    budget = f" The budget of the chain: {', '.join(limits)}." if limits else ""
    return f"All finished stages together, with all their tries, took {'; '.join(parts)}.{budget}"


BUDGETED = {"hours": "{} hours", "kwh": "{} kWh", "usd": "USD {}"}


def _told(ends: Mapping[str, float] | None, say: Callable[[float], str]) -> str:
    return f", foretold {say(ends['low'])} – {say(ends['high'])}" if ends else ""


def _cell(measures: Mapping[str, Any], metric: str) -> Any:
    found, unit = measures.get(metric), METRICS[metric].unit
    if not found:
        return MISSING
    between = span(unit, found)
    return element("span", measured(unit, found["mean"]), element("small", between) if between else None)


def _amount(tokens: Any) -> str:
    return count(tokens) if tokens else MISSING


def _memory(stage: Stage) -> Html:
    device = finite(stage.get("peak_device_memory_bytes"))
    below = element("small", f"{size(device)} on the device") if device is not None else None
    return element("span", size(stage.get("peak_memory_bytes")), below)


def _provenance(done: Mapping[str, Stage]) -> Html:
    return section(
        "provenance",
        "How can it be checked?",
        element(
            "p",
            "Each stage is an ordinary run in a folder of its own, with a report, a recipe and a ledger; ",
            element("code", "pennyweight ledger verify RUN"),
            " derives all hashes of all of them again.",
        ),
        facts((f"Ledger of {name}", element("code", s["ledger"])) for name, s in done.items()),
    )
