"""Bytes on disk that a run leaves, and its checkpoints while it trains: arithmetic, no torch."""

from __future__ import annotations

import json
from pathlib import Path

from pennyweight.plan.passes import Ends, Pass, Subjects, Work
from pennyweight.plan.sizes import moment_bytes
from pennyweight.recipe import CutStudent, FolderStudent, FolderTeacher, Recipe, SeveralTeachers, TrainedTeacher
from pennyweight.settings import Schedule

_CHECKPOINTS = 2  # of a training, which are kept until it is finished

SAID = (
    "targets, models, the first students and the chosen one's copy, a trained teacher's copy in the cache and, at the "
    "high end, checkpoints while there are any"
)
"""What is counted."""


def left_by(work: Work, recipe: Recipe, of: Subjects) -> Ends:
    """Bytes that the stage leaves, and at its high end those of checkpoints while it trains."""
    low, middle, high = work.bytes
    t, s = recipe.teacher, recipe.train
    if work.stage == "teacher" and isinstance(t, TrainedTeacher):  # it is kept for other runs as well
        s, low, middle, high = t.schedule, 2 * low, 2 * middle, 2 * high
    elif work.stage not in recipe.quantize.formats and any(p.kind == "train" for p in work.passes):
        low, middle, high = _student(recipe, of)
    return low, middle, high + _CHECKPOINTS * max((_checkpoint(p, s) for p in work.passes), default=0.0)


def beside(recipe: Recipe, of: Subjects) -> Ends:
    """Bytes of what no stage of a plan has: students before training, and the copy of the chosen one."""
    count = (len(recipe.seeds) if recipe.student.kind == "shape" else 1) + 1
    a, b, c = _student(recipe, of)
    return count * a, count * b, count * c


def _checkpoint(p: Pass, s: Schedule) -> float:
    """What is trained and its moments: of LoRA the factors alone, whose moments are float32."""
    if p.kind != "train":
        return 0.0
    if p.rank:
        return 12.0 * p.rank * sum(sum(t.shape) for t in p.shapes.all_tensors if t.kind == "linear")
    return (2.0 if s.weights == "bfloat16" else 4.0) * p.shapes.parameters + moment_bytes(p.shapes, s.moments)


def _student(recipe: Recipe, of: Subjects) -> Ends:
    """Bytes of a student as it is stored: as it was given, or as the teacher that it is cut from."""
    a, b, c = _number(recipe)
    count = of.student.parameters
    return a * count, b * count, c * count


def _number(recipe: Recipe) -> Ends:
    """Bytes of a stored number; where a folder is not there yet, 2 to 4."""
    s, t = recipe.student, recipe.teacher
    if isinstance(s, FolderStudent):
        return _said_by(s.path)
    if not isinstance(s, CutStudent) or isinstance(t, TrainedTeacher):
        return 4.0, 4.0, 4.0
    if isinstance(t, SeveralTeachers):
        given = {name: m for name, m in t.members.items() if isinstance(m, FolderTeacher)}
        t = given.get(s.member or "") or next(iter(given.values()), None)
    return _said_by(t.path) if isinstance(t, FolderTeacher) else (2.0, 4.0, 4.0)


def _said_by(path: str) -> Ends:
    file = Path(path).expanduser()
    try:
        config = json.loads((file / "config.json" if file.is_dir() else file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 2.0, 4.0, 4.0
    each = 2.0 if str(config.get("dtype") or config.get("torch_dtype")) in ("bfloat16", "float16") else 4.0
    return each, each, each
