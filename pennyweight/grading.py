"""Answers in a file, judged: counts, reasons, agreement with labels that somebody else gave."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from pennyweight.atomic import write_whole
from pennyweight.data.files import rows
from pennyweight.errors import DataError
from pennyweight.evaluate.intervals import wilson
from pennyweight.records import Task, Verdict
from pennyweight.verifiers.exact import final_answer
from pennyweight.verifiers.own import is_own, own_verifier

Judge = Callable[[str, Task], Verdict]
Counting = Callable[[str, int, str], AbstractContextManager[Any]]

_ALONE_SECONDS = 3.0  # starting processes takes as long as judging most files in one
_TRUE, _FALSE = ("true", "1", "1.0", "yes", "correct", "right"), ("false", "0", "0.0", "no", "incorrect", "wrong")
_WORKED = ("math", "exact")
"""Verifiers whose gold may be a worked solution; the others read the gold field in their own way."""


@dataclass(frozen=True)
class Fields:
    """Which fields of a row hold what; dots reach into nested records. ``entry``: FIELD, or several NAME=FIELD."""

    answer: str
    gold: str | None
    label: str | None = None
    entry: Sequence[str] = ()


@dataclass(frozen=True)
class Graded:
    """One answer: the line it stands on, its verdict, the gold it was held against, and its label if it has one."""

    line: int
    verdict: Verdict
    gold: str
    label: bool | None = None


def grade(
    path: str,
    verifier: str,
    fields: Fields,
    judge: Judge,
    known: Collection[str],
    counting: Counting,
    limit: int | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Judge the answers of a file of rows, in the order of the file; ``out`` gets the rows with their verdicts.

    Raises:
        DataError: no such verifier (``known`` are those there are), no such file, a line that is not JSON, a field that
            is not there or holds something else than it should, nothing in the file, nowhere to write ``out`` to.
    """
    if is_own(verifier):
        own_verifier(verifier)
    elif verifier not in known:
        raise DataError(f"no verifier is named {verifier!r}; use one of {', '.join(known)}")
    if verifier in ("code", "reasoning_gym") and not fields.entry:
        raise DataError(f"--verifier {verifier} needs --entry FIELD: {_ENTRIES[verifier]}")
    if fields.gold is None and verifier not in ("code", "reasoning_gym") and not is_own(verifier):
        raise DataError(f"--verifier {verifier} needs --gold FIELD, the field with the gold answers")
    if not Path(path).expanduser().is_file():
        raise DataError(f"there is no file {path}; check the path")
    if out is not None and out.resolve() == Path(path).expanduser().resolve():
        raise DataError(f"--out {out} is the file that is read; give it another name")
    given = list(islice(rows(path, "train"), limit))
    if not given:
        raise DataError(f"{path} is empty; it has to hold one JSON object a line")
    asked = [_asked(place, row, verifier, fields) for place, row in given]
    if out is not None:
        _can_be_written(out)
    with counting("grading", len(asked), "answers") as counter:
        verdicts = list(judged(judge, [(a.response, a.task) for a in asked], counter.advance))
    graded = [Graded(a.line, v, a.task.answer, a.label) for a, v in zip(asked, verdicts, strict=True)]
    if out is not None:
        with _written(out):
            write_whole(out, "".join(_line(row, g) for (_, row), g in zip(given, graded, strict=True)))
    return {"file": path, "verifier": verifier} | summary(graded)


def _can_be_written(out: Path) -> None:
    """Refuse where nothing can be written, before anything is judged; the folder is made, the file left as it is."""
    with _written(out):
        if out.is_dir():
            raise DataError(f"--out {out} is a folder; name a file in it")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass


@contextlib.contextmanager
def _written(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise DataError(
            f"--out {out} cannot be written: {e.strerror or e}; name a file in a folder that you may write to"
        ) from None


_ENTRIES = {
    "code": "a field with the tests, or tests=FIELD and entry_point=FIELD",
    "reasoning_gym": "a field with name, config and entry of the task",
}


@dataclass(frozen=True)
class _Asked:
    line: int
    response: str
    task: Task
    label: bool | None


def _asked(place: str, row: Any, verifier: str, fields: Fields) -> _Asked:
    if not isinstance(row, dict):
        raise DataError(f"{place} is no object, but {json.dumps(row)[:40]}; each line has to be one, as in {{...}}")
    gold = "" if fields.gold is None else _text(place, row, fields.gold)
    gold = (final_answer(gold) or "") if verifier in _WORKED else gold
    entry = _entry(place, row, verifier, fields.entry)
    name = str(entry.get("name", verifier))
    task = Task(name, verifier, gold, json.dumps(entry, default=str))
    label = None if fields.label is None else _label(place, row, fields.label)
    return _Asked(int(place.rpartition(" ")[2]), _text(place, row, fields.answer), task, label)


def field_of(place: str, row: dict[str, Any], name: str) -> Any:
    """The value of a field; ``a.b`` is the field of that name, or else ``b`` in the record ``a``.

    Raises:
        DataError: it is not there; the message has the fields that are.
    """
    if name in row:
        return row[name]
    for dot in (i for i, c in enumerate(name) if c == "."):
        inside = row.get(name[:dot])
        if isinstance(inside, dict):
            return field_of(f"{name[:dot]!r} in {place}", inside, name[dot + 1 :])
    raise DataError(f"{place} has no field {name!r}; it has {', '.join(map(str, row)) or 'none'}")


def _text(place: str, row: dict[str, Any], name: str) -> str:
    value = field_of(place, row, name)
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"{name!r} in {place} is no text but {json.dumps(value)[:60]}; name a field that holds a text")


def _label(place: str, row: dict[str, Any], name: str) -> bool:
    value = field_of(place, row, name)
    said = str(value).strip().lower()
    if said in _TRUE or said in _FALSE:
        return said in _TRUE
    raise DataError(f"the label {name!r} in {place} is {json.dumps(value)[:60]}; it has to be true or false, 1 or 0")


def _entry(place: str, row: dict[str, Any], verifier: str, names: Sequence[str]) -> dict[str, Any]:
    """What else the verifier wants: a record as it is, choices or tests under that name, or the named parts."""
    found: dict[str, Any] = {"row": row} if is_own(verifier) else {}
    for name in names:
        key, _, inside = name.rpartition("=")
        value = field_of(place, row, inside)
        own = {"choice": "choices", "code": "tests"}.get(verifier, "")
        if key:
            found[key] = value
        elif isinstance(value, dict) and (not own or own in value):
            found |= value
        elif own:
            found[own] = value
        else:
            raise DataError(f"{inside!r} in {place} is no record but {json.dumps(value)[:60]}; write NAME={inside}")
    return found


def judged(
    judge: Judge, asked: Sequence[tuple[str, Task]], progress: Callable[[int], Any], processes: int | None = None
) -> Iterator[Verdict]:
    """Verdicts in order: in this process while that is quick, in as many as there are cores once it is not."""
    cores, began, done = processes or _cores(), time.monotonic(), 0
    for response, task in asked:
        taken = time.monotonic() - began
        if cores > 1 and taken > _ALONE_SECONDS and taken / done * (len(asked) - done) > _ALONE_SECONDS:
            break
        yield judge(response, task)
        done += 1
        progress(1)
    if done == len(asked):
        return
    yield from _in_processes(judge, asked[done:], progress, cores)


def _in_processes(
    judge: Judge, asked: Sequence[tuple[str, Task]], progress: Callable[[int], Any], cores: int
) -> Iterator[Verdict]:
    """Verdicts in order, from processes that each judge one answer at a time. None is left, however this ends."""
    spawning = multiprocessing.get_context("spawn")
    pipes = [spawning.Pipe() for _ in range(min(cores, len(asked)))]
    workers = [spawning.Process(target=_judging, args=(judge, theirs), daemon=True) for _, theirs in pipes]
    todo, busy, found, following = iter(range(len(asked))), {}, {}, 0
    try:
        with _born_deaf():
            for worker in workers:
                worker.start()
        for ours, theirs in pipes:
            theirs.close()
            busy[ours] = next(todo)
            ours.send(asked[busy[ours]])
        while busy:
            ready = wait(list(busy))
            for ours in [pipe for pipe in busy if pipe in ready]:
                found[busy.pop(ours)] = ours.recv()
                progress(1)
                number = next(todo, None)
                if number is not None:
                    busy[ours] = number
                    ours.send(asked[number])
            while following in found:
                yield found.pop(following)
                following += 1
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise DataError(
            "the system stopped a process that judged, as it does when memory is full; free some, or grade in parts "
            "with --limit"
        ) from None
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.kill()
                worker.join()


def _judging(judge: Judge, asked: Connection) -> None:
    """A process's life: judge what comes, until nobody is there."""
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            asked.send(judge(*asked.recv()))


@contextlib.contextmanager
def _born_deaf() -> Iterator[None]:
    """Processes that start within it never hear Ctrl-C: they are stopped from here, and say nothing of it. One that is
    typed meanwhile is heard afterwards."""
    resource_tracker.ensure_running()  # it would unblock the signal when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def summary(graded: Sequence[Graded]) -> dict[str, Any]:
    """Counts with their intervals, how often each reason came, the wrong answers, and what the labels say to it."""
    wrong = [g for g in graded if not g.verdict.correct]
    found: dict[str, Any] = {"answers": len(graded), "correct": len(graded) - len(wrong)}
    found["accuracy"] = wilson(found["correct"], len(graded)).to_json()
    found["reasons"] = dict(Counter(kind_of(g.verdict.reason) for g in wrong).most_common())
    found["wrong"] = [_shown(g) for g in wrong]
    if graded and graded[0].label is not None:
        found["labels"] = _against_labels(graded)
    return found


def _against_labels(graded: Sequence[Graded]) -> dict[str, Any]:
    cells = Counter((g.label, g.verdict.correct) for g in graded)
    differ = [g for g in graded if g.label != g.verdict.correct]
    agree = len(graded) - len(differ)
    table = {
        f"label_{'right' if label else 'wrong'}": {
            f"verdict_{'right' if verdict else 'wrong'}": cells[label, verdict] for verdict in (True, False)
        }
        for label in (True, False)
    }
    agreement = wilson(agree, len(graded)).to_json()
    return {"agree": agree, "agreement": agreement, "table": table, "disagreements": [_shown(g) for g in differ]}


def kind_of(reason: str) -> str:
    """A reason without what is of one answer only: quoted texts, numbers, and what follows a colon."""
    short = re.sub(r"(['\"]).*\1", "…", reason.partition(": ")[0], flags=re.DOTALL)
    return re.sub(r"\d+(?:\.\d+)?", "N", short)[:100]


def _shown(g: Graded) -> dict[str, Any]:
    verdict = {"verdict": g.verdict.correct, "answer": g.verdict.answer, "gold": g.gold, "reason": g.verdict.reason}
    return {"line": g.line} | ({} if g.label is None else {"label": g.label}) | verdict


def _line(row: dict[str, Any], g: Graded) -> str:
    """The row as it was read, with ``verdict``; surrogates that stand alone stay escaped."""
    return json.dumps(row | {"verdict": asdict(g.verdict) | {"gold": g.gold}}, ensure_ascii=True) + "\n"


def first(found: dict[str, Any], count: int) -> dict[str, Any]:
    """The same findings with at most so many wrong answers and disagreements listed."""
    short = found | {"wrong": found["wrong"][:count]}
    if "labels" in found:
        short["labels"] = found["labels"] | {"disagreements": found["labels"]["disagreements"][:count]}
    return short
