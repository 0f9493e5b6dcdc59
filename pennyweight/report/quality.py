"""The part of the report that says how good the student is, beside its teacher and the other arms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pennyweight.records import METRICS
from pennyweight.report.charts import Mark, intervals
from pennyweight.report.markup import Html, element, figure, join, section, table
from pennyweight.report.view import LEADING, Model, View
from pennyweight.report.wording import MISSING, finite, measured, span, with_unit

_BESIDE = {"draw": "a draw with", "better": "better than", "worse": "worse than"}
_PLAIN = {"kl_to_teacher": "distance to the teacher", "kl_from_teacher": "distance from the teacher"}
_UNIT = {"percent": "%", "nats": "nats per token", "bits": "bits"}


def how_good(view: View) -> Html:
    """Charts of the plainest metrics, the verdict on the control arm, and every number with its interval."""
    charted = [m for m in LEADING if view.student and sum(x.interval(m) is not None for x in view.models) >= 2][:2]
    everything = _everything(view)
    if not charted and everything is None:
        return section("quality", "How good is it?", element("p", "Nothing has been measured yet."))
    return section(
        "quality",
        "How good is it?",
        element("p", _who_is_who(view), class_="small"),
        *(_chart(view, metric) for metric in charted),
        _gap(view),
        everything,
    )


def verdict(view: View, metric: str) -> str | None:
    """One sentence: is the student better than the control arm on ``metric``, worse, or is it a draw?"""
    found = (view.summary.get("gap_recovered") or {}).get(metric)
    if not found or view.student is None or view.control is None or metric not in METRICS:
        return None
    return (
        f"On {plain(metric)} it is {_BESIDE[outcome(view, found)]} its control, the same student trained on the text "
        f"of the same samples alone: {_margin(metric, found)}."
    )


def plain(metric: str) -> str:
    """A metric's name as a sentence has it: in plain words, or its label without the brackets at its end."""
    return _PLAIN.get(metric, METRICS[metric].label.partition(" (")[0])


def outcome(view: View, found: Mapping[str, Any]) -> str:
    """``better``, ``worse`` or ``draw``, from the student's side."""
    said = str(found.get("verdict", "draw"))
    if said == "draw":
        return "draw"
    return "better" if said == f"{view.method} better" else "worse"


def _margin(metric: str, found: Mapping[str, Any]) -> str:
    """The difference with its interval, and what that interval says."""
    unit = METRICS[metric].unit
    difference = found.get("difference") or {}
    if finite(difference.get("mean")) is None:
        return "no difference was measured"
    name = {"percent": "percentage points"}.get(unit, _UNIT[unit])
    text = f"the difference is {measured(unit, difference['mean'], signed=True)} {name}"
    bounds = span(unit, difference, signed=True)
    if bounds:
        holds = ", which includes zero" if found.get("verdict") == "draw" else ""
        return f"{text} (95 % interval {bounds}{holds})"
    apart = "overlap" if found.get("verdict") == "draw" else "do not overlap"
    return f"{text}; one seed has no interval of it: the arms' own 95 % intervals {apart}, but another seed may differ"


def _who_is_who(view: View) -> Html:
    """The names used in charts and tables, explained once."""
    control = view.control
    seeds = len((view.student.facts.get("seeds") if view.student else None) or [])
    each = " of each arm" if control else " of the student"
    return join(
        [
            f"{control.label} is the same student trained on the text of the same samples alone, without what the "
            "teacher handed over. "
            if control
            else None,
            "Before training is the student as it started. " if view.find("base") else None,
            f"{seeds} seeds{each} were trained; its numbers are means over them. " if seeds > 1 else None,
            f"One seed{each} was trained. " if seeds == 1 else None,
            _about_teacher(view.teacher) if view.teacher else None,
        ]
    )


def _about_teacher(teacher: Model) -> str | None:
    """What the teacher is that the others are measured against, where that does not go without saying."""
    several, measured = teacher.facts.get("members"), bool(teacher.facts.get("metrics"))
    if not measured and not teacher.facts.get("params"):
        who = "one of them" if several else "it"
        return f"The teacher was not measured: {who} is behind a server, which shows too little of it. "
    if not several:
        return None
    if not measured:
        return "The teachers were not measured: records have one each, and an evaluation text has none. "
    if teacher.facts.get("mixed"):
        return "The teacher is the mixture: at each token, the weighted mean of its members’ distributions. "
    return "The teacher of a held-out sample is the one that its record has; all are measured as one. "


def _chart(view: View, metric: str) -> Html:
    """Each model's value with its interval, under the finding."""
    info = METRICS[metric]
    every = [_mark(m, i, info.unit) for m in view.models if (i := m.interval(metric)) is not None]
    shown = _without_far_start(every)
    teacher = next((m.value for m in shown if m.role == "teacher"), None)
    side = "right" if info.higher_is_better else "left"
    notes = [
        f"Dots are measured values, lines their 95 % intervals; further {side} is better.",
        "A KL divergence of 0 would be the same model." if metric == "kl_to_teacher" else "",
        "The dashed line is the teacher." if teacher is not None else "",
        *(f"{m.label}: {m.text}, too far off to be drawn." for m in every if m not in shown),
    ]
    return figure(
        _finding(view, metric),
        intervals(
            f"quality-{metric}".replace("_", "-"),
            shown,
            info.label if info.unit == "bits" else f"{info.label}, {_UNIT[info.unit]}",
            f"{info.label} with 95 % intervals. " + "; ".join(f"{m.label} {m.text}" for m in every) + ".",
            reference=teacher,
            bounds=(0.0, 100.0) if info.unit == "percent" else None,
        ),
        " ".join(n for n in notes if n),
    )


def _without_far_start(marks: list[Mark]) -> list[Mark]:
    """The marks, less the untrained student where it would squeeze all others together."""
    rest = [m for m in marks if m.role != "base"]
    if len(rest) < 2 or len(rest) == len(marks):
        return marks
    spread, whole = ([e for m in group for e in (m.value, m.low, m.high) if e is not None] for group in (rest, marks))
    return rest if max(spread) - min(spread) < 0.5 * (max(whole) - min(whole)) else marks


def _mark(model: Model, interval: dict[str, Any], unit: str) -> Mark:
    scale = 100.0 if unit == "percent" else 1.0
    low, high = finite(interval.get("low")), finite(interval.get("high"))
    return Mark(
        role=model.role,
        label=model.label,
        value=scale * interval["mean"],
        text=measured(unit, interval["mean"]) + _percent(unit),
        low=None if low is None or high is None else scale * low,
        high=None if low is None or high is None else scale * high,
    )


def _finding(view: View, metric: str) -> str:
    """What a chart of ``metric`` shows, in a sentence or two."""
    unit = METRICS[metric].unit
    named = (("student", view.student), ("control", view.control), ("teacher", view.teacher))
    known = [(who, mean) for who, m in named if m and (mean := m.mean(metric)) is not None]
    if len(known) < 2:
        return f"How do the models compare on {plain(metric)}?"
    *first, (last, value) = known
    listed = [f"{who} {measured(unit, mean)}{_percent(unit)}" for who, mean in first]
    listed.append(f"{last} {with_unit(unit, value) if unit == 'nats' else measured(unit, value) + _percent(unit)}")
    name = plain(metric)
    found = (view.summary.get("gap_recovered") or {}).get(metric)
    ending = f": {_BESIDE[outcome(view, found)]} the control" if found and view.control else ""
    return f"{name[0].upper()}{name[1:]} – {', '.join(listed)}{ending}"


def _percent(unit: str) -> str:
    return "\u00a0%" if unit == "percent" else ""


def _gap(view: View) -> Html | None:
    """For each metric the student's difference to the control arm, the verdict, and the gap recovered."""
    gaps = {k: v for k, v in (view.summary.get("gap_recovered") or {}).items() if k in METRICS and v}
    if not gaps or view.control is None or view.student is None:
        return None
    rows = []
    for metric, found in gaps.items():
        info = METRICS[metric]
        difference = found.get("difference") or {}
        points = " points" if info.unit == "percent" else f" {_UNIT[info.unit]}"
        mean = finite(difference.get("mean"))
        rows.append(
            [
                element("span", info.label, _direction(metric)),
                {"draw": "draw", "better": "student better", "worse": "control better"}[outcome(view, found)],
                MISSING
                if mean is None
                else _cell(measured(info.unit, mean, signed=True) + points, span(info.unit, difference, True)),
                _recovered(found),
            ]
        )
    return join(
        [
            element("h3", "Is it better than the control?"),
            element(
                "p",
                "Gap recovered is the share of the way from the control arm to the teacher that the student went: "
                "0 % is no better than the control, 100 % is as good as the teacher.",
            ),
            table(
                f"{view.student.label} beside {view.control.label}, with 95 % intervals",
                ["metric", "verdict", "difference", "gap recovered"],
                rows,
            ),
        ]
    )


def _recovered(found: Mapping[str, Any]) -> Any:
    mean = finite(found.get("mean"))
    if mean is None:
        unknown = found.get("how") == "the teacher was not measured"
        return _cell("not defined", "the teacher was not measured" if unknown else "the control has no gap")
    if abs(mean) > 10:
        return _cell("not telling", "the gap is next to nothing")
    low, high = finite(found.get("low")), finite(found.get("high"))
    bounds = "" if low is None or high is None else f"{100 * low:,.0f} to {100 * high:,.0f}".replace("-", "−")
    return _cell(f"{100 * mean:,.0f} %".replace("-", "−"), bounds)


def _everything(view: View) -> Html | None:
    """Every metric of every model, and how the intervals were made."""
    names = [n for n in METRICS if any(m.interval(n) for m in view.models)]
    if not names:
        return None
    shown = [m for m in view.models if any(m.interval(n) for n in names)]
    rows = []
    for name in names:
        info = METRICS[name]
        cells = [m.interval(name) for m in shown]
        rows.append(
            [
                element("span", info.label, _direction(name)),
                *(
                    _cell(measured(info.unit, i["mean"]), span(info.unit, i))
                    if i
                    else element("span", MISSING, title="not measured")
                    for i in cells
                ),
            ]
        )
    return join(
        [
            element("h3", "Every number"),
            table("All models, with 95 % intervals below each value", ["metric", *(m.label for m in shown)], rows),
            element("p", _how(shown, names), class_="small"),
        ]
    )


def _how(models: list[Model], names: list[str]) -> str:
    """How each model's intervals were made, models that share a way named together."""
    ways: dict[tuple[str, ...], list[str]] = {}
    for m in models:
        said = {str(i["how"]) for n in names if (i := m.interval(n)) and i.get("how")}
        if said:
            ways.setdefault(tuple(sorted(said)), []).append(m.label)
    parts = [f"{', '.join(who)}: {', '.join(how)}" for how, who in ways.items()]
    return "How the intervals were made. " + "; ".join(parts) + "." if parts else ""


def _direction(metric: str) -> Html:
    info = METRICS[metric]
    return element("small", f"{_UNIT[info.unit]}, {'higher' if info.higher_is_better else 'lower'} is better")


def _cell(value: str, below: str) -> Html:
    return element("span", value, element("small", below) if below else None)
