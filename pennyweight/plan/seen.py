"""What a rehearsal saw of a recipe (``rehearsal.py``), put into its plan: rows as they are, and how many times what the
formulas have each kind of work takes. Arithmetic, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pennyweight.plan.pace import Pace
from pennyweight.plan.passes import Pass, Subjects
from pennyweight.plan.work import Rows, works
from pennyweight.recipe import Recipe

Seen = Mapping[str, Any]
"""``rehearsal.rehearse``'s, of one recipe"""

_TELLING = 0.5  # seconds of a stage that tell how long others of its kind take

TRIED = (0.8, 1.3)
"""Ends of a time, as times the middle, where the recipe's own steps were timed."""


def seen_rows(rows: Rows, seen: Seen) -> Rows:
    """Rows with the lengths that some of them have."""
    found = seen.get("rows")
    if not found:
        return rows
    length, times = found["length"], found.get("kept", 1.0) * found["rows"] / max(1.0, found["samples"])
    teacher = next((t["length"] for t in seen["timed"] if t["what"] == "train teacher"), None)
    return replace(
        rows,
        train=found.get("train") or max(1.0, rows.train * times),
        held_out=found.get("held_out") or max(1.0, rows.held_out * times),
        length=(length, length, length),
        learnt=found["learnt"],
        padded=found["padded"],
        response=found["learnt"] * length,
        teacher=teacher and (teacher, teacher, teacher),
        bytes_of_a_token=seen["bytes_per_token"],
        reason=f"{found['samples']:,.0f} samples to train on were looked at: {length:,.1f} tokens on average",
    )


def retold(
    recipe: Recipe,
    of: Subjects,
    rows: Rows,
    pace: Pace,
    lengths: Mapping[str, float],
    stage: str,
    seconds: float,
    over: Mapping[str, float],
) -> float:
    """Seconds of the stages that are still to come after ``stage``, told by what is known once it trains: how long rows
    are, and what its training takes.

    Args:
        recipe, of, rows, pace: as they were taken before the run.
        lengths: ``data.lengths``'s, of the samples to train on.
        seconds: of the stage's whole training, by the rate of its first steps.
        over: seconds of the stages that are finished.
    """
    known = {"rows": lengths, "timed": [], "bytes_per_token": None}
    each = works(recipe, of, seen_rows(rows, known))
    said = {w.stage: sum(pace.seconds(p, 1) for p in w.passes) for w in each}
    factor = seconds / said[stage] if said.get(stage) else 1.0
    times = {s: over[s] / said[s] for s in ("data", "targets") if said.get(s) and over.get(s, 0.0) > _TELLING}
    # A training tells of the machine and of its own formula alike: what is written goes by the former only.
    labels, writes = times.get("targets", factor), times.get("data", factor**0.5)
    factors = {f"train {stage.rpartition('-')[0]}": factor, "score": labels, "write student": writes}
    pace = replace(pace, factors=factors | {"write teacher": writes})
    return sum(3600 * pace.ends(w)[1] for w in each if w.stage != stage and w.stage not in over)


def seen_pace(pace: Pace, of: Subjects, seen: Seen) -> Pace:
    """The pace with what was timed in it."""
    if not seen.get("timed"):
        return pace
    reason = "as the recipe's own steps took when they were tried here; "
    reason += f"{TRIED[0]:g} to {TRIED[1]:g} times that, others' work on it included"
    factors = {t["what"]: t["seconds"] / said for t in seen["timed"] if (said := _said(pace, of, t)) > 0}
    peak = max(t["memory"] for t in seen["timed"])
    return replace(pace, factors=factors, spread=TRIED, reason=reason, peak=peak if pace.on_cpu else None)


def _said(pace: Pace, of: Subjects, timed: Seen) -> float:
    """Seconds that the formulas have for what was timed; 0 where they have none for it."""
    what = timed["what"]
    student = [("student", of.student)]
    teacher = [("teacher", of.teacher)] if of.teacher else []
    whose = teacher if what in ("train teacher", "write teacher", "score teacher", "data", "targets") else student
    if what == "score" and timed["both"]:
        whose = student + teacher
    return sum(pace.seconds(_pass(timed, who, shapes), 1) for who, shapes in whose if what != "opening")


def _pass(timed: Seen, who: str, shapes: Any) -> Pass:
    what, new = timed["what"], timed.get("new", 0.0)
    kind = "train" if what.startswith("train") else "write" if what == "data" or what.startswith("write") else "forward"
    ends = (timed["length"],) * 3
    at_once = min(timed["rows"], 16.0 if kind == "forward" else 64.0 if kind == "write" else timed["rows"])
    steps = timed["rows"] / at_once
    how = {"rank": timed.get("rank", 0), "recompute": timed.get("recompute", False), "who": who}
    how |= {"learnt": timed.get("learnt", 1.0), "padded": timed.get("padded", 1.0)}
    return Pass(kind, shapes, (steps,) * 3, at_once, ends, (new,) * 3, **how)  # type: ignore[arg-type]
