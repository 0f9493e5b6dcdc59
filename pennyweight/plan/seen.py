"""What a rehearsal saw of a recipe (``rehearsal.py``), put into its plan: rows as they are, and how many times what the
formulas have each kind of work takes. Arithmetic, no torch."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pennyweight.atomic import write_whole
from pennyweight.plan.hardware import Chip, Figure
from pennyweight.plan.pace import DRAWING, Pace
from pennyweight.plan.passes import Pass, Subjects
from pennyweight.plan.work import DISTILLED, ENCODED_ONLY, Rows, works
from pennyweight.recipe import Recipe
from pennyweight.records import sha256_json
from pennyweight.teacher.store import cache
from pennyweight.version import __version__

Seen = Mapping[str, Any]
"""``rehearsal.rehearse``'s, of one recipe"""

_FORMAT = 2  # of what is kept of a trial; of another one nothing is read
_TELLING = 0.5  # seconds of a stage that tell how long others of its kind take

_PAST = ("prepare", "prepare teacher", "draw", "data", "targets", "train teacher")
"""What is over when students train."""

TRIED = (0.8, 1.3)
"""Ends of a time, as times the middle, where the recipe's own steps were timed."""


def seen_rows(rows: Rows, seen: Seen) -> Rows:
    """Rows with the lengths that some of them have."""
    found = seen.get("rows")
    if not found:
        return rows
    length, times = found["length"], found.get("kept", 1.0) * found["rows"] / max(1.0, found["samples"])
    of_teacher = next((t for t in seen["timed"] if t["what"] == "train teacher"), None)
    return replace(
        rows,
        train=found.get("train") or max(1.0, rows.train * times),
        held_out=found.get("held_out") or max(1.0, rows.held_out * times),
        length=(length, length, length),
        learnt=found["learnt"],
        padded=found["padded"],
        response=found["learnt"] * length,
        teacher=of_teacher
        and replace(rows, length=(of_teacher["length"],) * 3, learnt=of_teacher["learnt"], padded=of_teacher["padded"]),
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
    are, and what its training takes. Where the recipe was tried before, by what it took then: of other trainings the
    geometric middle of that and of as many times as this one is off.

    Args:
        recipe, of, rows, pace: as they were taken before the run.
        lengths: ``data.lengths``'s, of the samples to train on, and how many there are.
        seconds: of the stage's whole training, by the rate of its first steps.
        over: seconds of the stages that are finished.
    """
    known = {"rows": lengths, "timed": [], "bytes_per_token": None}
    each = works(recipe, of, seen_rows(rows, known))
    said = {w.stage: sum(pace.factor(w.stage, p) * pace.seconds(p, 1) for p in w.passes) for w in each}
    factor = seconds / said[stage] if said.get(stage) else 1.0
    if pace.factors:
        # Both the trial and these steps are a few seconds of a machine that others use as well: their middle counts.
        factors = {k: v * factor**0.5 if k.startswith("train ") else v for k, v in pace.factors.items()}
    else:
        times = {s: over[s] / said[s] for s in ("data", "targets") if said.get(s) and over.get(s, 0.0) > _TELLING}
        # A training tells of the machine and of its own formula alike: what is written goes by the former only.
        labels, writes = times.get("targets", factor), times.get("data", factor**0.5)
        factors = {f"train {stage.rpartition('-')[0]}": factor, "score": labels, "write student": writes}
        factors["write teacher"] = writes
    pace = replace(pace, factors=factors)
    return sum(3600 * pace.ends(w)[1] for w in each if w.stage != stage and w.stage not in over)


def peak_retold(pace: Pace, stage: str, now: float, over: float) -> float:
    """Bytes of the run's peak, told by what its first steps take (``now``) and stages before took (``over``): what else
    was tried takes as much more than it did then as these steps do."""
    tried = pace.peaks.get(f"train {stage.rpartition('-')[0]}")
    more = max(0.0, now - tried) if tried else 0.0
    come = [b for what, b in pace.peaks.items() if what not in _PAST]
    return max(now, over, *(pace.grown(b + more, "training") for b in come if tried))


def seen_pace(pace: Pace, of: Subjects, seen: Seen) -> Pace:
    """The pace with what was timed in it."""
    if not seen.get("timed"):
        return pace
    reason = "as the recipe's own steps took when they were tried here; "
    reason += f"{TRIED[0]:g} to {TRIED[1]:g} times that, others' work on it included"
    factors = {t["what"]: t["seconds"] / said for t in seen["timed"] if (said := _said(pace, of, t)) > 0}
    peaks = {t["what"]: t["memory"] for t in seen["timed"]}
    return replace(pace, factors=factors, spread=TRIED, reason=reason, peaks=peaks, watts=seen.get("watts"))


def _said(pace: Pace, of: Subjects, timed: Seen) -> float:
    """Seconds that the formulas have for what was timed; 0 where they have none for it."""
    what = timed["what"]
    if what == "draw":
        return DRAWING * timed["tasks"]
    if what.startswith("prepare"):
        return pace.preparing(timed["rows"] * (ENCODED_ONLY if what == "prepare teacher" else 1), timed["length"])
    student = [("student", of.student)]
    teacher = [("teacher", of.teacher)] if of.teacher else []
    whose = teacher if what in ("train teacher", "write teacher", "score teacher", "data", "targets") else student
    if what == "score" and timed["both"]:
        whose = student + teacher
    said = sum(pace.seconds(_pass(timed, who, shapes), 1) for who, shapes in whose)
    if timed.get("live") and of.teacher:
        said += pace.seconds(_pass(timed, "student", of.teacher, "forward"), 1)
    return said


def _pass(timed: Seen, who: str, shapes: Any, kind: str = "") -> Pass:
    """``kind``: where it is not what ``what`` says."""
    what, new = timed["what"], timed.get("new", 0.0)
    if not kind:
        written = what == "data" or what.startswith("write")
        kind = "train" if what.startswith("train") else "write" if written else "forward"
    ends = (timed["length"],) * 3
    most = timed["rows"] if what.startswith("train") else 16.0 if kind == "forward" else 64.0
    at_once = min(timed["rows"], most)
    steps = timed["rows"] / at_once
    how = {"rank": timed.get("rank", 0), "recompute": timed.get("recompute", False), "who": who}
    how["precision"] = timed.get("precision", "")
    how["distilled"] = kind == "train" and what.removeprefix("train ") in DISTILLED
    how |= {"learnt": timed.get("learnt", 1.0), "padded": timed.get("padded", 1.0), "micro": timed.get("micro", 0)}
    return Pass(kind, shapes, (steps,) * 3, at_once, ends, (new,) * 3, **how)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Trial:
    """A recipe as an earlier plan tried it on this machine: the machine as it was measured, and what was seen."""

    chip: Chip
    seen: Seen

    @property
    def on_cpu(self) -> bool:
        return self.chip.name.startswith("this machine")

    def put(self, of: Subjects, rows: Rows, pace: Pace) -> tuple[Rows, Pace]:
        """Both with what was seen in them; as they are where it was of other models."""
        if self.seen.get("parameters") != of.student.parameters:
            return rows, pace
        return seen_rows(rows, self.seen), seen_pace(pace, of, self.seen)


def keep_trial(recipe: Recipe, of: Subjects, seen: Seen, chip: Chip) -> None:
    """Keep what was seen for the run of the same recipe, which then is foretold as its plan was. A cache that cannot be
    written is no reason to fail."""
    if not seen:
        return
    file = _place_of(recipe)
    figures = {k: asdict(f) for k, f in chip.figures.items()}
    kept = {"seen": {**seen, "parameters": of.student.parameters}, "chip": {"name": chip.name, "figures": figures}}
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(kept))


def trial_of(recipe: Recipe) -> Trial | None:
    """What an earlier plan of just this recipe, its files as they are, saw on this machine."""
    try:
        kept = json.loads(_place_of(recipe).read_text())
        figures = {k: Figure(**f) for k, f in kept["chip"]["figures"].items()}
        return Trial(Chip("this", kept["chip"]["name"], figures), kept["seen"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _place_of(recipe: Recipe) -> Path:
    whole = {k: v for k, v in recipe.model_dump(mode="json").items() if k not in ("name", "log", "budget")}
    return cache() / "trials" / f"{sha256_json([__version__, _FORMAT, platform.node(), _by_what_it_is(whole)])}.json"


def _by_what_it_is(part: Any) -> Any:
    """Settings, with files by their size and time too, and folders, which a plan has elsewhere, by their last names."""
    if isinstance(part, list):
        return [_by_what_it_is(x) for x in part]
    if not isinstance(part, dict):
        return part
    out = {k: _by_what_it_is(v) for k, v in part.items()}
    if isinstance(path := part.get("path"), str):
        file = Path(path).expanduser()
        out["path"] = [*file.parts[-2:]]
        if file.is_file():
            out["path"] += [file.stat().st_size, file.stat().st_mtime_ns]
    return out
