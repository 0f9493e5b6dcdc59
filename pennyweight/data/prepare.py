"""A recipe's data, made ready: gathered, split by content, answered by the teacher, checked and counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pennyweight.data.render import prompt_of
from pennyweight.data.sources import read, read_tasks
from pennyweight.data.split import Split, is_held_out, split
from pennyweight.errors import DataError
from pennyweight.recipe import Data, Responses, Source, TaskData, TaskSource, TeacherSamples
from pennyweight.records import Encoded, Sample, Teacher, Verdict, sha256_json
from pennyweight.teacher.answers import keep, write_answers
from pennyweight.teacher.own_samples import own_samples

Progress = Callable[[int], None]
Counting = Callable[[str, int, str], Any]
"""(label, total, unit) -> a context manager that yields something with ``advance``"""


@dataclass(frozen=True)
class Writer:
    """A teacher that writes, its tokenizer, the folder its finished parts wait in, a seed, and how to show progress.

    Prompts that leave no room in ``context`` are refused, or left out where ``too_long`` is not ``refuse``.
    """

    teacher: Teacher
    tokenizer: Any
    parts: Path
    seed: int
    counting: Counting
    context: int
    too_long: str


def problems_of(tasks: list[TaskSource], seed: int, held_out: float) -> list[Sample]:
    """Problems of tasks, less those of the share that is held out."""
    drawn = read_tasks(TaskData(tasks=tasks, seed=seed))
    return [s for s in drawn if not is_held_out(s.prompt_hash, held_out)]


def gather(source: Source, writer: Writer | None, licence: str) -> list[Sample]:
    """Prompts and texts from where the recipe says; ``writer`` is needed for the teacher's own samples."""
    if isinstance(source, TaskData):
        return read_tasks(source)
    if not isinstance(source, TeacherSamples):
        return read(source)
    assert writer is not None
    with writer.counting("teacher writes samples", source.count, "samples") as c:
        return own_samples(
            writer.teacher, writer.tokenizer, source.count, writer.seed, writer.parts / "own", licence, c.advance
        )


def answer(samples: Sequence[Sample], by: str, writer: Callable[[], Writer], name: str) -> list[Sample]:
    """Samples with a response each: theirs or the teacher's, as ``by`` (auto, given, teacher) says.

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
    if not asked:
        return list(samples)
    w = writer()
    prompts = {id(s): prompt_of(s, w.tokenizer) for s in asked}
    fits = [s for s in asked if len(prompts[id(s)].ids) < w.context]
    if len(fits) < len(asked) and w.too_long == "refuse":
        raise DataError(
            f"{len(asked) - len(fits):,} of {len(asked):,} prompts leave no room for a response in the context of "
            f"{w.context:,} tokens; set data.too_long=drop, or a larger data.context"
        )
    with w.counting(f"teacher answers ({name})", len(fits), "prompts") as c:
        prompt = lambda s: prompts[id(s)]  # noqa: E731
        replies = iter(write_answers(fits, prompt, w.teacher, w.parts / name, w.seed * 2 + (name == "eval"), c.advance))
    chosen = {id(s) for s in fits}
    return [next(replies) if id(s) in chosen else s for s in samples if id(s) in chosen or id(s) not in prompts]


def both_sides(
    gathered: list[Sample],
    data: Data,
    writer: Callable[[], Writer],
    judge: Callable[[Sample], Verdict | None],
    encode: Callable[[list[Sample]], list[Encoded]],
) -> tuple[dict[str, list[Sample]], dict[str, Any]]:
    """Samples to train on (``train``) and held out (``eval``), and facts of them: split by content, answered, judged
    where asked for, and with tokens to learn.

    Raises:
        DataError: nothing is left on one side.
    """
    parts = split(gathered, data.eval_fraction, data.eval_limit)
    train, held_out, rejected = prepare(parts, data.responses, writer, judge)
    train, of_train = _settled("train", train, encode)
    held_out, of_eval = _settled("eval", held_out, encode)
    return {"train": train, "eval": held_out}, _facts(train, held_out, parts, rejected) | of_train | of_eval


def prepare(
    parts: Split, responses: Responses, writer: Callable[[], Writer], judge: Callable[[Sample], Verdict | None]
) -> tuple[list[Sample], list[Sample], int]:
    """(training samples, held-out samples, training samples turned down): answered, and judged where asked for.

    Raises:
        DataError: nothing is left on one side.
    """
    wanted = judge if responses.keep == "verified" else None
    train, rejected = keep(answer(parts.train, responses.by, writer, "train"), wanted)
    held_out, _ = keep(answer(parts.evaluation, responses.by, writer, "eval"), None)
    if not train or not held_out:
        raise DataError(
            f"no sample is left of {len(parts.train):,} for training or {len(parts.evaluation):,} for evaluation; "
            "give more data, or set data.responses.keep=all"
        )
    return train, held_out, rejected


def _facts(train: list[Sample], held_out: list[Sample], parts: Split, rejected: int) -> dict[str, Any]:
    """What the report says of the data."""
    return {
        "source": ", ".join(sorted({s.source for s in train})),
        "licence": ", ".join(sorted({s.licence for s in train})),
        "train": len(train),
        "evaluation": len(held_out),
        "duplicates": parts.duplicates,
        "rejected": rejected,
        "overlap": parts.overlap,
        "authors": {a: sum(s.author == a for s in train) for a in sorted({s.author for s in train})},
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
    return kept, {
        f"{name}_tokens": sum(len(e.ids) for e in encoded),
        f"{name}_left_out": len(samples) - len(kept),
        f"{name}_stream": sha256_json([[e.id, e.token_hash] for e in encoded]),
    }


def told(found: dict[str, Any]) -> str:
    """The facts in one line."""
    others = found["train_left_out"] + found["eval_left_out"]
    left_out = f"{found['rejected']:,} rejected" + (f", {others:,} left out" if others else "")
    overlap = "train/eval overlap: {normalised} whole, {ngram} by 13-gram".format(**found["overlap"])
    return f"data: {found['train']:,} to train on, {found['evaluation']:,} held out; {left_out}; {overlap}"
