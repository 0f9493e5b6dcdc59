"""What each stage of a recipe has to do, before any of it runs: passes over tokens, counted. Arithmetic, no torch.

How long rows are is not known before the data is there, so that every count has a low, a middle and a high end:
those of ``LENGTHS``, as shares of what would be the longest, unless a mean is given.
"""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pennyweight.data.columns import ANSWERS, MESSAGES, PROMPTS, RESPONSES, SEVERAL, TEXTS
from pennyweight.plan.passes import Ends, Pass, Subjects, Work
from pennyweight.plan.precision import of_linears
from pennyweight.plan.shapes import Shapes
from pennyweight.recipe import FileData, Recipe, TaskData, TeacherSamples, TrainedTeacher
from pennyweight.settings import TEXT_ONLY, Schedule

LENGTHS: Ends = (0.2, 0.45, 0.9)
"""Share of the longest row that a mean row is taken to have, and of ``max_tokens`` that a response is."""

PADDED = 1.15
"""Rows are filled up to the longest of their batch: how many times the tokens are computed that there are."""

_BELOW_8 = frozenset({"int4", "int3", "ternary", "mxfp4", "nvfp4"})
_SORTED = 1.03  # as PADDED, where rows of like length go together
_CALIBRATED = 128  # samples that rounding looks at, once for each block
_WRITTEN_AT_ONCE, _SCORED_AT_ONCE = 64, 16
_CHARACTERS = 4.0  # of a token, of English under a vocabulary of ten thousands
_READ = 1 << 22  # bytes of a file that its rows are counted in


@dataclass(frozen=True, slots=True)
class Rows:
    """Samples to train on and held out, the mean length of one, and what that is from.

    ``learnt`` is the share of tokens whose logits are made, where prompts are not learnt; ``padded`` how many times the
    tokens of training are computed, rows being filled up to the longest of their batch; ``response`` the tokens of a
    mean one, where some were looked at; ``teacher`` those that a teacher from nothing learns, where they were, too;
    ``bytes_of_a_token`` what targets of some were found to take.
    """

    train: float
    held_out: float
    length: Ends
    reason: str
    learnt: float = 0.6
    padded: float = PADDED
    response: float | None = None
    teacher: Rows | None = None
    bytes_of_a_token: float | None = None

    @property
    def prompt(self) -> Ends:
        """Of a mean prompt: what is not its response, or a third of the sample."""
        a, b, c = self.length
        if self.response is not None:
            return max(1.0, a - self.response), max(1.0, b - self.response), max(1.0, c - self.response)
        return a / 3, b / 3, c / 3

    def written(self, most: float) -> Ends:
        """Tokens of a response of at most so many."""
        return shares(most) if self.response is None else _always(min(most, self.response))


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
        known = f"a sample has {mean:,.4g} tokens on average, as given"
        length, reason = (mean, mean, mean), "; ".join([known, *reason.split("; ")[1:]])
    held_out = min(d.eval_limit, count * d.eval_fraction)
    learnt = 1.0 if isinstance(source, TeacherSamples) else 0.6
    train = min(d.train_limit or count, count * (1 - d.eval_fraction))
    return Rows(max(1.0, train), max(1.0, held_out), length, reason, learnt)


def _of_file(source: FileData, context: int, length: Ends, reason: str) -> tuple[float, Ends, str]:
    """Rows of a file of lines, and their mean length by their characters; of anything else a guess."""
    file = Path(source.path).expanduser()
    if not file.is_file() or file.suffix not in (".jsonl", ".csv", ".txt"):
        taken = source.limit or 10_000
        return float(taken), length, f"{reason}; rows of {source.path} are not counted, {taken:,} taken"
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


DISTILLED = ("kd", "on_policy", "offline")
"""Arms that learn a teacher's distribution."""

ENCODED_ONLY = 0.55
"""What a problem of a teacher that is trained takes, as times one of the data's, which is judged and divided, too."""


def _always(n: float) -> Ends:
    return n, n, n


def _trained(
    shapes: Shapes, s: Schedule, length: Ends, rows: Rows, steps: float | None = None, distilled: bool = False
) -> Pass:
    rank = s.lora.rank if s.lora else 0
    many, padded = _always(s.steps if steps is None else steps), 1.0 if s.pack else rows.padded
    how = {"rank": rank, "recompute": s.gradient_checkpointing, "padded": padded, "distilled": distilled}
    how |= {"precision": of_linears(s.precision), "micro": s.micro_batch or 0}
    return Pass("train", shapes, many, s.batch, length, learnt=rows.learnt, **how)  # type: ignore[arg-type]


def _teacher(recipe: Recipe, of: Subjects, rows: Rows) -> Work | None:
    t = recipe.teacher
    if not isinstance(t, TrainedTeacher) or of.teacher is None:
        return None
    # Its problems are of the kind of the data's, where those are tasks, too.
    if rows.teacher is None and not isinstance(recipe.data.source, TaskData):
        rows = replace(rows, length=shares(t.context))
    rows = rows.teacher or rows
    size = _always(4.0 * of.teacher.parameters)
    passes = (_trained(of.teacher, t.schedule, rows.length, rows),)
    drawn = ENCODED_ONLY * sum(x.size for x in t.tasks), rows.length[1]
    return Work("teacher", "trains the teacher", passes, size, prepared=drawn, tasks=len(t.tasks))


def _data(recipe: Recipe, of: Subjects, rows: Rows) -> Work | None:
    """What the teacher writes: its own samples, or responses."""
    r, source = recipe.data.responses, recipe.data.source
    if isinstance(source, TeacherSamples):
        count, prompt, new = float(source.count), _always(1.0), rows.length
    elif r.by == "teacher" or (r.by == "auto" and _without_responses(source)):
        count, prompt = rows.train * (r.samples if r.by == "teacher" else 1) + rows.held_out, rows.prompt
        new = rows.written(min(r.max_tokens, recipe.data.context))
    elif isinstance(source, TaskData):
        drawn = float(sum(t.size for t in source.tasks)), rows.length[1]
        return Work("data", "draws problems", opens=0, prepared=drawn, tasks=len(source.tasks))
    else:
        return Work("data", "reads rows", prepared=(rows.train + rows.held_out, rows.length[1]))
    if of.teacher is None:
        sent, got = (tuple(count * n for n in ends) for ends in (prompt, new))
        return Work("data", "a server writes", sent=sent, got=got)  # type: ignore[arg-type]
    steps = _always(max(1.0, count / _WRITTEN_AT_ONCE))
    writes = Pass("write", of.teacher, steps, min(count, _WRITTEN_AT_ONCE), prompt, new, who="teacher")
    tasks = len(source.tasks) if isinstance(source, TaskData) else 0
    return Work("data", "the teacher writes", (writes,), prepared=(count, rows.length[1]), tasks=tasks)


def _without_responses(source: Any) -> bool:
    """Whether the first row of a file has a prompt and nothing that it is answered by, so that the teacher writes."""
    if not isinstance(source, FileData) or source.response or source.text:
        return False
    file = Path(source.path).expanduser()
    if not file.is_file() or file.suffix not in (".jsonl", ".csv"):
        return False
    with open(file, encoding="utf-8", errors="replace") as f:
        first = next((line for line in f if line.strip()), "")
    try:
        row = json.loads(first) if file.suffix == ".jsonl" else dict.fromkeys(next(csv.reader([first]), []))
        names = {n for n, value in row.items() if value is not None or file.suffix == ".csv"}
    except (ValueError, AttributeError):
        return False  # the run says what is wrong with it
    gold = {source.answer} if source.answer else set(ANSWERS) if source.verifier else set()
    gold = {n for n in gold if "####" not in str(row.get(n))}  # a worked solution is a response, too
    written = {*RESPONSES, *SEVERAL, *TEXTS, *MESSAGES} - gold
    return bool(names & {*PROMPTS, source.prompt}) and not names & written


def _kept(recipe: Recipe, rows: Rows) -> float:
    """Samples to train on: of several responses to a prompt as many as may be kept."""
    r = recipe.data.responses
    return rows.train * (min(r.samples, r.most or r.samples) if r.by == "teacher" else 1)


def _targets(recipe: Recipe, of: Subjects, rows: Rows) -> Work | None:
    """The teacher's forward pass over what is learnt, and what is kept of it."""
    t = recipe.targets
    if recipe.method.kind in TEXT_ONLY or t.kind == "dense":
        return None
    learnt = rows.learnt
    many = _kept(recipe, rows)
    tokens = [learnt * many * n for n in rows.length]
    each = _bytes_of_a_token(t, of) if rows.bytes_of_a_token is None else _always(rows.bytes_of_a_token)
    kept: Any = tuple(n * b for n, b in zip(tokens, each, strict=True))
    if of.teacher is None:
        return Work("targets", "a server labels", bytes=kept, sent=tuple(many * n for n in rows.length))  # type: ignore[arg-type]
    labels = _forward(of.teacher, many, rows.length, learnt)
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
    how = {"learnt": learnt, "padded": _SORTED, "apart": True}
    return Pass("forward", shapes, _always(rows / at_once), at_once, length, **how)  # type: ignore[arg-type]


def _live(teacher: Shapes, s: Schedule, length: Ends, rows: Rows) -> Pass:
    """The teacher's forward pass beside each step."""
    how = {"learnt": rows.learnt, "padded": rows.padded, "micro": s.micro_batch or 0}
    return Pass("forward", teacher, _always(s.steps), s.batch, length, **how)  # type: ignore[arg-type]


def _arm(recipe: Recipe, of: Subjects, rows: Rows, arm: str, seed: int) -> Work:
    s, student, size = recipe.train, of.student, _always(4.0 * of.student.parameters)
    m, name = recipe.method, f"{arm}-{seed}"
    if arm in ("sft", "kd"):
        passes = [_trained(student, s, rows.length, rows, distilled=arm in DISTILLED)]
        if arm == "kd" and recipe.targets.kind == "dense" and of.teacher is not None:
            passes.append(_live(of.teacher, s, rows.length, rows))
        return Work(name, f"trains by {arm}", tuple(passes), size)
    most = min(m.max_tokens, recipe.data.context)  # type: ignore[union-attr]
    new = rows.written(most)
    whole: Any = tuple(p + n for p, n in zip(rows.prompt, new, strict=True))
    if arm == "offline":
        count = float(m.rollouts)  # type: ignore[union-attr]
        written = _always(max(1.0, count / _WRITTEN_AT_ONCE))
        passes = [Pass("write", student, written, min(count, _WRITTEN_AT_ONCE), rows.prompt, new)]
        if of.teacher is not None:
            passes.append(_forward(of.teacher, count, whole, rows.learnt))
    else:
        rounds = s.steps / m.updates  # type: ignore[union-attr]
        batch = s.batch * (1 - getattr(m, "given", 0.0)) * m.updates  # type: ignore[union-attr]
        at_once = min(batch, float(_WRITTEN_AT_ONCE))
        again = getattr(m, "dynamic", 1.0)
        calls = rounds * batch / at_once
        passes = [Pass("write", student, (calls, calls * (1 + again) / 2, calls * again), at_once, rows.prompt, new)]
        passes += _checks(recipe, student, rows, rounds, new)
        if arm == "on_policy" and of.teacher is not None:
            passes.append(_live(of.teacher, s, whole, rows))
        if getattr(m, "kl", 0.0):
            passes.append(_live(student, s, whole, rows))  # the start, that is held on to
    return Work(
        name, f"writes and trains by {arm}", (*passes, _trained(student, s, whole, rows, None, arm in DISTILLED)), size
    )


def _checks(recipe: Recipe, student: Shapes, rows: Rows, rounds: float, new: Ends) -> list[Pass]:
    """Held-out problems that are answered now and then while a student learns from what it writes."""
    limits = recipe.tripwires.rollouts
    every = max(1.0, rounds // 10) if limits.held_out_every is None else limits.held_out_every
    if not every or not _has_problems(recipe):
        return []
    asked = min(limits.held_out_problems, rows.held_out)
    return [_written(student, asked * math.ceil(rounds / every), rows, new)]


def _has_problems(recipe: Recipe) -> bool:
    source = recipe.data.source
    return isinstance(source, TaskData) or bool(getattr(source, "verifier", None))


def _copy(recipe: Recipe, of: Subjects, rows: Rows, fmt: str) -> Work:
    """Rounding, and for fewer than 8 bits a short training by the student; a copy rounded only comes beside it."""
    q, s, student = recipe.quantize, recipe.train, of.student
    bits = 8 if fmt not in _BELOW_8 else 4
    steps = round(q.recover * s.steps) if bits < 8 else 0
    # Before a block is rounded, and after; of a copy that is taught, the one that is rounded only comes beside it.
    looked = _forward(student, 2 * min(rows.train, _CALIBRATED) * (2 if steps else 1), rows.length, 0.0)
    passes = [looked]
    if steps:
        plain = s.model_copy(update={"lora": None})
        passes += [_trained(student, plain, rows.length, rows, steps, distilled=True)]
        passes += [_forward(student, min(rows.train, steps * s.batch), rows.length, rows.learnt)]
    size = _always(student.parameters * bits / 8 * 1.15)
    return Work(fmt, "rounds, and is taught" if steps else "rounds", tuple(passes), size, opens=10 if steps else 5)


def _evaluations(recipe: Recipe, of: Subjects, rows: Rows, arms: list[str]) -> list[Work]:
    """All models on what was held out, together: likelihood of held-out tokens, beside the teacher's, and answers.

    A student that nothing was taught yet ends no answer by itself.
    """
    e, seeds, made = recipe.evaluate, len(recipe.seeds), recipe.student.kind == "shape"
    taught = sum(
        1 for f in recipe.quantize.formats if f in _BELOW_8 and round(recipe.quantize.recover * recipe.train.steps)
    )
    copies, most = len(recipe.quantize.formats), min(e.max_tokens, recipe.data.context)
    students = (seeds if made else 1) + len(arms) * seeds + copies
    each = problems_asked(recipe, rows) * (1 + e.samples)
    out = []
    if of.teacher is not None:
        passes = [_forward(of.teacher, rows.held_out, rows.length, rows.learnt)]
        passes += [_written(of.teacher, each, rows, rows.written(most), "teacher")] if each else []
        out.append(Work("evaluate teacher", "measures the teacher", tuple(passes)))
    seen, beside = (students + taught) * rows.held_out, 2 * (copies + taught) * rows.held_out
    passes = [_forward(of.student, seen + beside, rows.length, rows.learnt)]
    passes += [_forward(of.teacher, seen, rows.length, rows.learnt)] if of.teacher else []
    if each:
        blank = seeds if made else 0
        passes += [_written(of.student, (students - blank) * each, rows, rows.written(most))]
        passes += [_written(of.student, blank * each, rows, _always(most))] if blank else []
        # A copy that is only rounded is asked once, beside the one that was taught.
        passes += [_written(of.student, taught * each / (1 + e.samples), rows, rows.written(most))] if taught else []
    does = f"measures {students + taught:,} students and copies"
    return [*out, Work("evaluate students", does, tuple(passes), opens=students + taught)]


def problems_asked(recipe: Recipe, rows: Rows) -> float:
    """Problems that each model is asked once."""
    e = recipe.evaluate
    if not _has_problems(recipe):
        return 0.0
    return min(e.problems, rows.held_out) + min(e.problems, sum(t.size for t in e.harder))


def _written(shapes: Shapes, answers: float, rows: Rows, new: Ends, who: str = "student") -> Pass:
    at_once = max(1.0, min(answers, _WRITTEN_AT_ONCE))
    return Pass("write", shapes, _always(answers / at_once), at_once, rows.prompt, new, who=who)
