"""A recipe's data, made ready: gathered, split by content, answered by the teacher, checked and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pennyweight.data.render import prompt_of
from pennyweight.data.sources import read, read_tasks
from pennyweight.data.split import Split, is_held_out, split
from pennyweight.data.traces import asked_for, selected
from pennyweight.errors import DataError
from pennyweight.recipe import Data, Responses, Source, TaskData, TeacherSamples
from pennyweight.records import Encoded, Sample, Teacher, Verdict, sha256_json
from pennyweight.settings import TaskSource
from pennyweight.teacher.answers import keep, write_answers
from pennyweight.teacher.own_samples import own_samples
from pennyweight.teacher.several import assigned, by_teacher, member_of, one_teacher_each, route_of
from pennyweight.verifiers.own import is_own

Progress = Callable[[int], None]
Counting = Callable[[str, int, str], Any]
"""(label, total, unit) -> a context manager that yields something with ``advance``"""


@dataclass(frozen=True)
class Writer:
    """A teacher that writes, its tokenizer, the folder its finished parts wait in, a seed, and how to show progress.

    Prompts that leave no room in ``context`` are refused, or left out where ``too_long`` is not ``refuse``. ``licence``
    is that of what it writes.
    """

    teacher: Teacher
    tokenizer: Any
    parts: Path
    seed: int
    counting: Counting
    context: int
    too_long: str
    licence: str = "undeclared"


Writers = Callable[[str | None], Writer]
"""One of several teachers by name, None where there is one -> that teacher as it writes"""


def problems_of(tasks: list[TaskSource], seed: int, held_out: float) -> list[Sample]:
    """Problems of tasks, less those of the share that is held out."""
    drawn = read_tasks(TaskData(tasks=tasks, seed=seed))
    return [s for s in drawn if not is_held_out(s.prompt_hash, held_out)]


def gather(source: Source, writers: Writers, teacher: Any = None) -> list[Sample]:
    """Prompts and texts from where the recipe says; of several teachers each has one.

    Args:
        writers: teachers as they write from nothing, asked for where their own samples are the data.
        teacher: the recipe's.
    """
    if isinstance(source, TaskData):
        return assigned(read_tasks(source), teacher)
    if not isinstance(source, TeacherSamples):
        route = route_of(teacher)
        samples = read(source, route)
        if route:
            route.check()
        return assigned(samples, teacher)
    shares, out = getattr(teacher, "shares", None), []
    counts = Counter(member_of(f"own sample {i}", shares) if shares else None for i in range(source.count))
    for member, count in sorted(counts.items(), key=str):
        w = writers(member)
        with w.counting("teacher writes samples", count, "samples") as c:
            own = own_samples(w.teacher, w.tokenizer, count, w.seed, w.parts / "own", w.licence, c.advance)
        out += [replace(s, teacher=member) for s in own]
    return out


def answer(samples: Sequence[Sample], by: str, writers: Writers, name: str) -> list[Sample]:
    """Samples with a response each: theirs or their teacher's, as ``by`` (auto, given, teacher) says.

    Raises:
        DataError: ``by`` is given and a sample has none, or a prompt leaves no room for a response.
    """
    missing = [s for s in samples if s.response is None]
    if by == "given" and missing:
        raise DataError(
            f"data.responses.by=given, but {len(missing):,} of {len(samples):,} rows have no response; add them, or "
            "leave it to the teacher with data.responses.by=auto"
        )
    asked = [s for s in samples if s.prompt] if by == "teacher" else missing
    found: dict[int, Sample | None] = {}
    for member, group in by_teacher(asked).items():
        found |= _answers(group, writers(member), name)
    return [x for s in samples if (x := found.get(id(s), s)) is not None]


def _answers(asked: Sequence[Sample], w: Writer, name: str) -> dict[int, Sample | None]:
    """Samples answered by one teacher, by the ``id`` of what was asked; None where there is no room."""
    prompts = {id(s): prompt_of(s, w.tokenizer) for s in asked}
    fits = [s for s in asked if len(prompts[id(s)].ids) < w.context]
    if len(fits) < len(asked) and w.too_long == "refuse":
        raise DataError(
            f"{len(asked) - len(fits):,} of {len(asked):,} prompts leave no room for a response in the context of "
            f"{w.context:,} tokens; set data.too_long=drop, or a larger data.context"
        )
    with w.counting(f"teacher answers ({name})", len(fits), "prompts") as c:
        prompt = lambda s: prompts[id(s)]  # noqa: E731
        replies = write_answers(fits, prompt, w.teacher, w.parts / name, w.seed * 2 + (name == "eval"), c.advance)
    licensed = [replace(r, licence=both_licences(r.licence, w.licence)) for r in replies]
    return dict.fromkeys(prompts) | {id(s): r for s, r in zip(fits, licensed, strict=True)}


def both_licences(prompt: str, response: str) -> str:
    """The licence of a record whose two sides have one each, as SPDX writes it."""
    bracketed = lambda x: f"({x})" if " OR " in x else x  # noqa: E731
    return prompt if prompt == response else f"{bracketed(prompt)} AND {bracketed(response)}"


def both_sides(
    gathered: list[Sample],
    data: Data,
    writers: Writers,
    judge: Callable[[Sample], Verdict | None],
    golds: Callable[[list[Sample]], list[tuple[Sample, str]]],
    encode: Callable[[list[Sample]], list[Encoded]],
) -> tuple[dict[str, list[Sample]], dict[str, Any]]:
    """Samples to train on (``train``) and held out (``eval``), and facts of them: of problems that can be
    solved, split by content, answered, judged where asked for, and with tokens to learn.

    Args:
        golds: the samples whose gold answer does not pass its own verifier, each with the reason.

    Raises:
        DataError: nothing is left on one side, or no gold answer passes.
    """
    gathered, unsound = _sound(gathered, golds)
    parts = split(gathered, data.eval_fraction, data.eval_limit, data.train_limit)
    train, held_out, rejected = prepare(parts, data.responses, writers, judge)
    train, of_train = _settled("train", train, encode)
    held_out, of_eval = _settled("eval", held_out, encode)
    return {"train": train, "eval": held_out}, _facts(train, held_out, parts, rejected) | unsound | of_train | of_eval


def _sound(
    gathered: list[Sample], golds: Callable[[list[Sample]], list[tuple[Sample, str]]]
) -> tuple[list[Sample], dict[str, Any]]:
    """The samples without problems that no answer can solve, and facts: how many these were, and what the first had.

    A user's own verifier may well ask for more of a response than its gold answer is, so those are left in, and said.
    """
    wrong = [(s, s.task, why) for s, why in golds(gathered) if s.task]
    said = [f"{t.answer[:40]!r} by {t.verifier}: {why}" for _, t, why in wrong[:1]]
    broken = {id(s) for s, t, _ in wrong if not is_own(t.verifier)}
    if broken and len(broken) == sum(s.task is not None for s in gathered):
        raise DataError(
            f"no gold answer of the {len(broken):,} problems passes its own verifier; the first: {said[0]}; correct "
            "the answers, or data.source.verifier"
        )
    left = [s for s in gathered if id(s) not in broken]
    return left, {"unsound": len(broken), "unsure_golds": len(wrong) - len(broken), "unsound_for": said}


def prepare(
    parts: Split, responses: Responses, writers: Writers, judge: Callable[[Sample], Verdict | None]
) -> tuple[list[Sample], list[Sample], dict[str, int]]:
    """(training samples, held-out samples, training samples turned down, by what for): answered, and judged where asked
    for.

    Raises:
        DataError: nothing is left on one side.
    """
    wanted = judge if responses.keep == "verified" else None
    answered = answer(asked_for(parts.train, responses), responses.by, writers, "train")
    train, rejected = keep(one_teacher_each(answered), wanted)
    train, turned_down = selected(train, responses)
    held_out, _ = keep(answer(parts.evaluation, responses.by, writers, "eval"), None)
    if not train or not held_out:
        raise DataError(
            f"no sample is left of {len(parts.train):,} for training or {len(parts.evaluation):,} for evaluation; "
            "give more data, or set data.responses.keep=all"
        )
    return train, held_out, {"verifier": rejected, **turned_down} if rejected else turned_down


def _facts(train: list[Sample], held_out: list[Sample], parts: Split, rejected: dict[str, int]) -> dict[str, Any]:
    """What the report says of the data."""
    return {
        "source": ", ".join(sorted({s.source for s in train})),
        "licence": ", ".join(sorted({s.licence for s in train})),
        "train": len(train),
        "evaluation": len(held_out),
        "duplicates": parts.duplicates,
        "beyond_limit": parts.beyond,
        "rejected": sum(rejected.values()),
        "rejected_for": rejected,
        "overlap": parts.overlap,
        "authors": dict(sorted(Counter(s.author for s in train).items())),
        **({"teachers": of} if (of := dict(sorted(Counter(s.teacher for s in train if s.teacher).items()))) else {}),
    }


def _settled(
    name: str, samples: Sequence[Sample], encode: Callable[[list[Sample]], list[Encoded]]
) -> tuple[list[Sample], dict[str, Any]]:
    """The samples of one side that have tokens to learn in the context, and facts of their streams.

    The hash of the masked token streams is what later stages depend on: the texts alone do not fix them, the chat
    template, the context and ``too_long`` do so too.
    """
    encoded = encode(list(samples))
    whole = {e.id.partition(":")[0] for e in encoded}
    kept = [s for s in samples if s.id in whole]
    teachers = [[s.teacher] for s in kept if s.teacher]  # whose distribution the same tokens get
    return kept, {
        f"{name}_tokens": sum(len(e.ids) for e in encoded),
        f"{name}_left_out": len(samples) - len(kept),
        f"{name}_stream": sha256_json([[e.id, e.token_hash] for e in encoded] + teachers),
    }


def told(found: dict[str, Any]) -> str:
    """The facts in one line."""
    others = found["train_left_out"] + found["eval_left_out"]
    why = ", ".join(f"{n:,} {reason}" for reason, n in found["rejected_for"].items())
    left_out = (
        f"{found['rejected']:,} rejected" + (f" ({why})" if why else "") + (f", {others:,} left out" if others else "")
    )
    if beyond := found.get("beyond_limit"):
        left_out += f"; {beyond:,} beyond data.train_limit"
    first = f"; the first: {found['unsound_for'][0]}" if found.get("unsound_for") else ""
    if found.get("unsound"):
        left_out += f"; {found['unsound']:,} left out whose gold answer does not pass its own verifier{first}"
    elif found.get("unsure_golds"):
        left_out += f"; {found['unsure_golds']:,} gold answers do not pass your verifier as they stand{first}"
    thoughts = found.get("thoughts_dropped")
    if thoughts:
        left_out += (
            f"; the chat template leaves {thoughts:,} thoughts out of earlier turns, which are not learnt: give each "
            "turn a row that ends with it"
        )
    overlap = "train/eval overlap: {normalised} whole, {ngram} by 13-gram".format(**found["overlap"])
    return f"data: {found['train']:,} to train on, {found['evaluation']:,} held out; {left_out}; {overlap}"
