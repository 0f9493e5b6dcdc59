"""A run's summary, metrics and sample outputs -> one HTML page that needs nothing but itself.

No script, no outside address: what a browser fetches for this page is this page. Sample outputs were written by
models and are not trusted: everything is escaped, and a content policy forbids scripts and fetches besides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pennyweight.records import METRICS
from pennyweight.report import origin, sections
from pennyweight.report.markup import Html, document, element
from pennyweight.report.quality import how_good, outcome, plain, verdict
from pennyweight.report.rollouts import learning, stopped
from pennyweight.report.run_bill import bill
from pennyweight.report.scatter import quality_against_bytes
from pennyweight.report.style import sheet
from pennyweight.report.view import Model, View, view
from pennyweight.report.wording import finite, parameters, share_of, size, with_unit


def render(
    summary: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, Any]],
    rollouts: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The report as one self-contained HTML page; the same input gives the same text.

    Args:
        summary: summary.json of a run. Parts that are missing, empty or null are left out of the page or shown as
            not measured; a run that is not finished is said to be so.
        metrics: lines of metrics.jsonl, of which ``arm``, ``seed``, ``step`` and ``loss`` are used.
        samples: prompts with each model's output: ``prompt``, ``gold`` or None, and
            ``outputs`` (model name -> ``text``, ``correct`` or None).
        rollouts: responses early and late of arms that learnt from rollouts (``rollouts.learning``).
    """
    seen = view(summary)
    name = str(summary.get("name") or (summary.get("recipe") or {}).get("name") or "run")
    said = headline(seen)
    body = [
        element(
            "header",
            element("h1", f"Pennyweight report: {name}"),
            element("p", said, class_="lead"),
            element("p", beside, class_="verdict") if (beside := against_control(seen)) else None,
            _notice(seen, metrics),
            _tiles(seen),
        ),
        element(
            "main",
            how_good(seen),
            sections.size_and_speed(seen, quality_against_bytes(seen)),
            sections.training(seen, metrics),
            learning(seen, metrics, rollouts),
            sections.outputs(seen, samples),
            sections.cost(seen),
            bill(seen),
            origin.data(seen),
            origin.targets(seen),
            origin.provenance(seen),
        ),
        _foot(seen),
    ]
    return document(f"{name} – Pennyweight report", said, sheet(), *body)


_TAUGHT_BY_NOBODY = "grpo"
"""The method that has a verifier in place of a teacher: its student is held against its own start."""


def headline(seen: View) -> str:
    """What was made, in one plain sentence with its numbers."""
    student, teacher = seen.student, seen.teacher if seen.method != _TAUGHT_BY_NOBODY else None
    if student is None or not student.facts.get("params"):
        return "No student has been measured yet."
    size_words = f"A student of {parameters(student.facts['params'])} parameters"
    part = share_of(student.facts["params"], teacher.facts.get("params"), "its teacher") if teacher else ""
    alike = teacher is not None and student.facts["params"] == teacher.facts.get("params")
    beside = ", as large as its teacher," if alike else f", {part}," if part else ""
    return f"{size_words}{beside} {_achievement(seen, student)}{_smallest_words(seen)}."


def _achievement(seen: View, student: Model) -> str:
    """What the student does, by the plainest metric it was measured on."""
    metric = seen.leading
    mine = student.mean(metric) if metric else None
    if metric is None or mine is None:
        return "was made, and not measured yet"
    theirs = seen.teacher.mean(metric) if seen.teacher else None
    if metric == "accuracy":
        base = seen.find("base")
        before = base.mean(metric) if base and seen.method == _TAUGHT_BY_NOBODY else None
        if before is not None or not theirs:
            than = "" if before is None else f", where it was {with_unit('percent', before)} before training"
            return f"answers {with_unit('percent', mine)} of the held-out problems right{than}"
        share = mine / theirs
        return f"{'keeps' if share <= 1 else 'reaches'} {100 * share:.0f}\u00a0% of the teacher’s accuracy"
    if metric == "kl_to_teacher":
        base = seen.find("base")
        before = base.mean(metric) if base else None
        worse = before is not None and mine > before
        words = "worse than the {} before training" if worse else "from {} before training"
        start = "" if before is None else ", " + words.format(with_unit("nats", before))
        return f"is {with_unit('nats', mine)} away from its teacher (KL divergence, 0 is the same model){start}"
    other = f" where its teacher needs {with_unit('bits', theirs)}" if theirs is not None else ""
    return f"needs {with_unit('bits', mine)} of text{other}"


def _smallest_words(seen: View) -> str:
    copy = seen.smallest
    part = share_of(copy.facts["bytes"], sections.teacher_bytes(seen), "the teacher’s bytes") if copy else ""
    return f"; its {copy.label} takes {part}" if copy and part else ""


def against_control(seen: View) -> str | None:
    """How the student stands beside the control arm, in one sentence."""
    metric = _decisive(seen)
    return verdict(seen, metric) if metric else None


def _decisive(seen: View) -> str | None:
    """The metric that the comparison with the control arm is told by at the top of the page."""
    gaps = seen.summary.get("gap_recovered") or {}
    return next((m for m in (seen.leading, *METRICS) if m and gaps.get(m)), None)


def _notice(seen: View, metrics: Sequence[Mapping[str, Any]]) -> Html | None:
    if not seen.unfinished:
        return None
    done = ", ".join(seen.summary.get("stages") or {}) or "none"
    return element(
        "p",
        element("strong", "This run is not finished. "),
        *(f"{said} " for said in stopped(metrics)),
        f"Stages done so far: {done}. Start the run again to go on.",
        class_="notice",
        role="note",
    )


def _tiles(seen: View) -> Html | None:
    """Up to four numbers to take away."""
    tiles = [t for t in (_parameters_tile(seen), _quality_tile(seen), _size_tile(seen), _verdict_tile(seen)) if t]
    if not tiles:
        return None
    return element(
        "dl",
        *(
            element("div", element("dt", name), element("dd", value, element("small", note)))
            for name, value, note in tiles
        ),
        class_="tiles",
    )


_Tile = tuple[str, str, str] | None


def _parameters_tile(seen: View) -> _Tile:
    mine = seen.student.facts.get("params") if seen.student else None
    theirs = seen.teacher.facts.get("params") if seen.teacher else None
    if not finite(mine):
        return None
    part = share_of(mine, theirs, f"the teacher’s {parameters(theirs)}")
    return "Parameters", parameters(mine), part or "of the student"


def _quality_tile(seen: View) -> _Tile:
    metric = seen.leading
    mine = seen.student.mean(metric) if seen.student and metric else None
    if metric is None or mine is None:
        return None
    info = METRICS[metric]
    value, _, unit = with_unit(info.unit, mine).partition("\u00a0")
    percent = info.unit == "percent"
    theirs = seen.teacher.mean(metric) if seen.teacher else None
    beside = (
        f"the teacher’s is {with_unit(info.unit, theirs)}" if theirs is not None else "0 is the same as the teacher"
    )
    note = beside if percent else f"{unit}; {beside}"
    if theirs is None and metric != "kl_to_teacher":
        note = "" if percent else unit
    label = {"accuracy": "Accuracy", "kl_to_teacher": "Distance to the teacher", "bits_per_byte": "Bits per byte"}[
        metric
    ]
    return label, f"{value}\u00a0%" if percent else value, note


def _size_tile(seen: View) -> _Tile:
    smallest = seen.smallest or seen.student
    mine = smallest.facts.get("bytes") if smallest else None
    if smallest is None or not finite(mine):
        return None
    whole = sections.teacher_bytes(seen)
    part = share_of(mine, whole, f"the teacher’s {size(whole)}")
    name = f"Size of the {smallest.label}" if seen.smallest else "Size of the student"
    return name, size(mine), part or "on disk"


def _verdict_tile(seen: View) -> _Tile:
    metric = _decisive(seen)
    if metric is None or seen.control is None or metric not in METRICS:
        return None
    result = outcome(seen, seen.summary["gap_recovered"][metric])
    words = {"draw": "Draw", "better": "Better", "worse": "Worse"}[result]
    than = "with the control on" if result == "draw" else "than the control on"
    alone = ", by one seed" if len(seen.summary.get("seeds") or []) == 1 and result != "draw" else ""
    return "Beside the control", words, f"{than} {plain(metric)}{alone}"


def _foot(seen: View) -> Html:
    version = f" {seen.summary['version']}" if seen.summary.get("version") else ""
    head = (seen.summary.get("ledger") or {}).get("head")
    return element(
        "footer",
        element("p", f"Pennyweight{version}", f" · ledger head {str(head)[:12]}" if head else None),
    )
