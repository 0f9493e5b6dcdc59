"""What each stage of a recipe has to do, before any of it runs: passes over tokens, counted. Arithmetic, no torch.

How long rows are is not known before the data is there, so that every count has a low, a middle and a high end:
those of ``LENGTHS``, as shares of what would be the longest, unless a mean is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pennyweight.plan.passes import Ends, Pass, Subjects, Work
from pennyweight.plan.shapes import Shapes
from pennyweight.recipe import FileData, Recipe, TaskData, TeacherSamples, TrainedTeacher
from pennyweight.settings import TEXT_ONLY, Schedule

LENGTHS: Ends = (0.2, 0.45, 0.9)
"""Share of the longest row that a mean row is taken to have, and of ``max_tokens`` that a response is."""

PADDED = 1.15
"""Rows are filled up to the longest of their batch: how many times the tokens are computed that there are."""

_LEARNT = 0.6  # share of tokens whose logits are made, where prompts are not learnt
_BELOW_8 = frozenset({"int4", "int3", "ternary", "mxfp4", "nvfp4"})
_CALIBRATED = 128  # samples that rounding looks at, once for each block
_WRITTEN_AT_ONCE, _SCORED_AT_ONCE = 64, 16
_CHARACTERS = 4.0  # of a token, of English under a vocabulary of ten thousands
_READ = 1 << 22  # bytes of a file that its rows are counted in


@dataclass(frozen=True, slots=True)
class Rows:
    """Samples to train on and held out, the mean length of one, and what that is from."""

    train: float
    held_out: float
    length: Ends
    reason: str

    @property
    def prompt(self) -> Ends:
        """Of a mean prompt: a third of the sample."""
        a, b, c = self.length
        return a / 3, b / 3, c / 3


def shares(longest: float, ends: Ends = LENGTHS) -> Ends:
    """So much of the longest."""
    a, b, c = ends
    return max(1.0, a * longest), max(1.0, b * longest), max(1.0, c * longest)


def rows_of(recipe: Recipe, mean: float | None = None) -> Rows:
    """Samples of a recipe's data; ``mean`` tokens each where that is given."""
    d, source = recipe.data, recipe.data.source
    length = shares(d.context)
    reason = f"a sample is taken to have {LENGTHS[0]:.0%} to {LENGTHS[2]:.0%} of data.context={d.context:,} tokens"
    if isinstance(source, TaskData):
        count = float(sum(t.size for t in source.tasks))
    elif isinstance(source, TeacherSamples):
        count, length = float(source.count), shares(min(d.context, source.max_tokens))
        reason = f"a sample is taken to have {LENGTHS[0]:.0%} to {LENGTHS[2]:.0%} of its max_tokens"
    else:
        count, length, reason = _of_file(source, d.context, length, reason)
    if mean is not None:
        length, reason = (mean, mean, mean), f"a sample has {mean:,.4g} tokens on average, as given"
    held_out = min(d.eval_limit, count * d.eval_fraction)
    return Rows(max(1.0, count * (1 - d.eval_fraction)), max(1.0, held_out), length, reason)


def _of_file(source: FileData, context: int, length: Ends, reason: str) -> tuple[float, Ends, str]:
    """Rows of a file of lines, and their mean length by their characters; of anything else a guess."""
    file = Path(source.path).expanduser()
    if not file.is_file() or file.suffix not in (".jsonl", ".csv", ".txt"):
        return float(source.limit or 10_000), length, f"{reason}; rows of {source.path} are not counted, 10,000 taken"
    with open(file, "rb") as f:
        some = f.read(_READ)
    lines = max(1, some.count(b"\n"))
    count = lines * max(1.0, file.stat().st_size / max(1, len(some)))
    tokens = len(some) / lines / _CHARACTERS
    count = min(count, float(source.limit or count))
    ends = tuple(min(float(context), max(1.0, tokens * x)) for x in (0.6, 1.0, 1.6))
    return count, ends, f"a token is taken to have {_CHARACTERS:.0f} characters of {source.path}"  # type: ignore[return-value]


def works(recipe: Recipe, of: Subjects, rows: Rows) -> list[Work]:
    """The stages of a recipe's line, in their order; those that take next to nothing are left out."""
    out = [w for w in (_teacher(recipe, of, rows), _data(recipe, of, rows), _targets(recipe, of, rows)) if w]
    methods = dict.fromkeys(["sft", recipe.method.kind] if recipe.control else [recipe.method.kind])
    for arm in methods:
        out += [_arm(recipe, of, rows, arm, seed) for seed in recipe.seeds]
    out += [_copy(recipe, of, rows, fmt) for fmt in recipe.quantize.formats]
    return [*out, *_evaluations(recipe, of, rows, list(methods))]


def _drawing(problems: int) -> float:
    """Problems are drawn in a process of its own: what that takes, as times a model is opened."""
    return 4 + problems / 3000


def _always(n: float) -> Ends:
    return n, n, n


def _trained(shapes: Shapes, s: Schedule, length: Ends, learnt: float, steps: float | None = None) -> Pass:
    rank = s.lora.rank if s.lora else 0
    many, padded = _always(s.steps if steps is None else steps), 1.0 if s.pack else PADDED
    how = {"rank": rank, "recompute": s.gradient_checkpointing, "padded": padded}
    return Pass("train", shapes, many, s.batch, length, learnt=learnt, **how)  # type: ignore[arg-type]


def _teacher(recipe: Recipe, of: Subjects, rows: Rows) -> Work | None:
    t = recipe.teacher
    if not isinstance(t, TrainedTeacher) or of.teacher is None:
        return None
    # Its problems are of the kind of the data's, where those are tasks, too.
    length = rows.length if isinstance(recipe.data.source, TaskData) else shares(t.context)
    size = _always(4.0 * of.teacher.parameters)
    passes = (_trained(of.teacher, t.schedule, length, _LEARNT),)
    return Work("teacher", "trains the teacher", passes, size, opens=1 + _drawing(sum(x.size for x in t.tasks)))


def _data(recipe: Recipe, of: Subjects, rows: Rows) -> Work | None:
    """What the teacher writes: its own samples, or responses."""
    r, source = recipe.data.responses, recipe.data.source
    if isinstance(source, TeacherSamples):
        count, prompt, new = float(source.count), _always(1.0), rows.length
    elif r.by == "teacher":
        count, prompt = rows.train * r.samples + rows.held_out, rows.prompt
        new = shares(min(r.max_tokens, recipe.data.context))
    elif isinstance(source, TaskData):
        return Work("data", "draws problems", opens=_drawing(sum(t.size for t in source.tasks)))
    else:
        return None
    if of.teacher is None:
        sent, got = (tuple(count * n for n in ends) for ends in (prompt, new))
        return Work("data", "a server writes", sent=sent, got=got)  # type: ignore[arg-type]
    steps = _always(max(1.0, count / _WRITTEN_AT_ONCE))
    writes = Pass("write", of.teacher, steps, min(count, _WRITTEN_AT_ONCE), prompt, new)
    return Work("data", "the teacher writes", (writes,))


def _targets(recipe: Recipe, of: Subjects, rows: Rows) -> Work | None:
    """The teacher's forward pass over what is learnt, and what is kept of it."""
    t = recipe.targets
    if recipe.method.kind in TEXT_ONLY or t.kind == "dense":
        return None
    learnt = 1.0 if isinstance(recipe.data.source, TeacherSamples) else _LEARNT
    tokens = [learnt * rows.train * n for n in rows.length]
    each = _bytes_of_a_token(t, of)
    kept: Any = tuple(n * b for n, b in zip(tokens, each, strict=True))
    if of.teacher is None:
        return Work("targets", "a server labels", bytes=kept, sent=tuple(rows.train * n for n in rows.length))  # type: ignore[arg-type]
    labels = _forward(of.teacher, rows.train, rows.length, learnt)
    return Work("targets", "the teacher labels", (labels,), kept)


def _bytes_of_a_token(t: Any, of: Subjects) -> Ends:
    """Of targets: an id takes as many bits as the vocabulary has; what a diffuse teacher needs is not known before."""
    bits = max(1, (of.student.vocabulary - 1).bit_length())
    if t.kind == "top_k":
        return _always((min(t.k, of.student.vocabulary) * (bits + 16)) / 8 + 3)
    if t.kind == "hidden":
        return _always(2.0 * (of.teacher.hidden if of.teacher else 0))
    most = min(t.budget, (1 / t.threshold) * (bits + 8) / 8)
    return 3.0, min(most, 3 + 4 * (bits + 8) / 8), float(most)


def _forward(shapes: Shapes, rows: float, length: Ends, learnt: float, at_once: int = _SCORED_AT_ONCE) -> Pass:
    return Pass("forward", shapes, _always(rows / at_once), at_once, length, learnt=learnt, padded=PADDED)


def _arm(recipe: Recipe, of: Subjects, rows: Rows, arm: str, seed: int) -> Work:
    s, student, size = recipe.train, of.student, _always(4.0 * of.student.parameters)
    learnt = 1.0 if isinstance(recipe.data.source, TeacherSamples) else _LEARNT
    m, name = recipe.method, f"{arm}-{seed}"
    if arm in ("sft", "kd"):
        passes = [_trained(student, s, rows.length, learnt)]
        if arm == "kd" and recipe.targets.kind == "dense" and of.teacher is not None:
            passes.append(
                Pass("forward", of.teacher, _always(s.steps), s.batch, rows.length, learnt=learnt, padded=PADDED)
            )
        return Work(name, f"trains by {arm}", tuple(passes), size)
    most = min(m.max_tokens, recipe.data.context)  # type: ignore[union-attr]
    new = shares(most)
    whole: Any = tuple(p + n for p, n in zip(rows.prompt, new, strict=True))
    if arm == "offline":
        count = float(m.rollouts)  # type: ignore[union-attr]
        written = _always(max(1.0, count / _WRITTEN_AT_ONCE))
        passes = [Pass("write", student, written, min(count, _WRITTEN_AT_ONCE), rows.prompt, new)]
        if of.teacher is not None:
            passes.append(_forward(of.teacher, count, whole, _LEARNT))
    else:
        rounds = s.steps / m.updates  # type: ignore[union-attr]
        batch = s.batch * (1 - getattr(m, "given", 0.0)) * m.updates  # type: ignore[union-attr]
        at_once = min(batch, float(_WRITTEN_AT_ONCE))
        again = getattr(m, "dynamic", 1.0)
        calls = rounds * batch / at_once
        passes = [Pass("write", student, (calls, calls * (1 + again) / 2, calls * again), at_once, rows.prompt, new)]
        if arm == "on_policy" and of.teacher is not None:
            passes.append(Pass("forward", of.teacher, _always(s.steps), s.batch, whole, learnt=_LEARNT, padded=PADDED))
    return Work(name, f"writes and trains by {arm}", (*passes, _trained(student, s, whole, _LEARNT)), size)


def _copy(recipe: Recipe, of: Subjects, rows: Rows, fmt: str) -> Work:
    """Rounding, and for fewer than 8 bits a short training by the student; a copy rounded only comes beside it."""
    q, s, student = recipe.quantize, recipe.train, of.student
    bits = 8 if fmt not in _BELOW_8 else 4
    steps = round(q.recover * s.steps) if bits < 8 else 0
    looked = _forward(student, min(rows.train, _CALIBRATED) * (1 if not steps else 2), rows.length, 0.0)
    passes = [looked]
    if steps:
        plain = s.model_copy(update={"lora": None})
        passes += [_trained(student, plain, rows.length, _LEARNT, steps)]
        passes += [_forward(student, min(rows.train, steps * s.batch), rows.length, _LEARNT)]
    size = _always(student.parameters * bits / 8 * 1.15)
    return Work(fmt, "rounds, and is taught" if steps else "rounds", tuple(passes), size, opens=2 if steps else 1)


def _evaluations(recipe: Recipe, of: Subjects, rows: Rows, arms: list[str]) -> list[Work]:
    """All models on what was held out, together: likelihood of held-out tokens, beside the teacher's, and answers."""
    e, seeds = recipe.evaluate, len(recipe.seeds)
    taught = sum(
        1 for f in recipe.quantize.formats if f in _BELOW_8 and round(recipe.quantize.recover * recipe.train.steps)
    )
    copies = len(recipe.quantize.formats)
    students = (seeds if recipe.student.kind == "shape" else 1) + len(arms) * seeds + copies + taught
    tasks = isinstance(recipe.data.source, TaskData) or bool(getattr(recipe.data.source, "verifier", None))
    harder = min(e.problems, sum(t.size for t in e.harder))
    problems = (min(e.problems, rows.held_out) + harder) if tasks else 0.0
    new, out = shares(min(e.max_tokens, recipe.data.context)), []
    for name, shapes, count, passes in (("teacher", of.teacher, 1, 1), ("students", of.student, students, 1)):
        if shapes is None:
            continue
        each = [_forward(shapes, count * passes * rows.held_out, rows.length, _LEARNT)]
        if name == "students":
            each += [_forward(of.teacher, count * rows.held_out, rows.length, _LEARNT)] if of.teacher else []
            each += [_forward(shapes, 2 * (copies + taught) * rows.held_out, rows.length, _LEARNT)]
        if answers := problems * (1 + e.samples) * count:
            steps = _always(max(1.0, answers / _WRITTEN_AT_ONCE))
            each += [Pass("write", shapes, steps, min(answers, _WRITTEN_AT_ONCE), rows.prompt, new)]
        does = "measures the teacher" if name == "teacher" else f"measures {students:,} students and copies"
        out.append(Work(f"evaluate {name}", does, tuple(each), opens=count))
    return out
