"""Steps of a method that learns from what the student writes: rounds of rollouts, made into batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pennyweight.data.pack import Batch
from pennyweight.data.render import prompt_ids
from pennyweight.data.store import read_samples
from pennyweight.errors import DataError, RecipeError
from pennyweight.loss.chunked import label_logprobs
from pennyweight.model.device import Compute
from pennyweight.model.loaded import Loaded
from pennyweight.records import Sample, Task, Verdict
from pennyweight.settings import Schedule
from pennyweight.teacher.local import LocalTeacher
from pennyweight.train.rollout import Judge, Roller, Rollout
from pennyweight.train.tripwire import UNWATCHED, Watch


@dataclass(frozen=True)
class Written:
    """A step's rollouts as a method is handed them: in groups, by the id of their tokens, and log-probabilities of
    their tokens under the reference."""

    groups: list[list[Rollout]]
    of: dict[str, Rollout]
    reference: Callable[[Batch], Tensor]


def steps(
    bench: Any,
    row: Any,
    method: Any,
    begin: Loaded,
    arm: str,
    seed: int,
    work: Path,
    ledger: Any,
    journal: Any,
    judge: Judge,
    lookout: Callable[..., Any],
) -> tuple[Callable[[int], list[Batch]], Watch]:
    """step -> its micro-batches, for one arm of a run; and what watches over them.

    Args:
        bench: of the run, which has its recipe, folder, context, device and training samples.
        row: the method's, of METHODS; ``method`` are its settings.
        begin: the student, which is trained by these steps.
        work: where rounds of rollouts are kept.
        ledger, journal: take the samples of a round, and a line of what they were like.
        judge: of rollouts, by each task's own verifier; the method may name another for training.
        lookout: ``watching.lookout``.
    """
    schedule = bench.recipe.train
    if not row.rolls:
        batches, signal = bench.batches(schedule, seed), bench.signal if row.signals(method) else None
        return lambda step: [row.apply(b, method, signal) for b in batches(step)], UNWATCHED
    if bench.group.size > 1:
        raise RecipeError(
            f"method {method.kind} writes with the model that it trains, which several processes have in parts; run it "
            "in one process"
        )
    samples = askable(read_samples(bench.folder / "data" / "train.jsonl"), begin.tokenizer, bench.context)
    record = lambda written: ledger.add_records(written, "train", None)  # noqa: E731
    by = trained_by(method, judge)
    roller = Roller(begin, samples, groups_of(schedule, method), method, by, seed, bench.context, work, record)
    write = lambda line: journal.write({"arm": arm, "seed": seed, **line})  # noqa: E731
    held_out, limits = read_samples(bench.folder / "data" / "eval.jsonl"), bench.recipe.tripwires.rollouts
    rounds = -(-schedule.steps // method.updates)
    watch = lookout(roller, limits, rounds, held_out, judge, write, bench.folder, f"{arm}-{seed}")
    return steps_of(roller, row.apply, schedule, reference_of(begin, method, bench.compute), watch.look), watch


def steps_of(
    roller: Roller,
    apply: Callable[[Batch, Any, Written], Batch],
    schedule: Schedule,
    reference: Callable[[Batch], Tensor],
    log: Callable[[dict[str, Any]], None],
) -> Callable[[int], list[Batch]]:
    """step -> its micro-batches. ``log`` takes a line for each round, with the step that it is written for."""
    method = roller.method

    def next_batch(step: int) -> list[Batch]:
        number, part = divmod(step, method.updates)
        whole = roller(number, may_write=part == 0)
        if part == 0:
            log({"step": step + 1, **{k: round(v, 6) for k, v in whole.facts().items()}})
        mine = whole.part(part, method.updates)
        signal = Written(mine.groups, mine.of, reference)
        return [apply(b, method, signal) for b in mine.batches(schedule.micro_batch or schedule.batch, roller.pad_id)]

    return next_batch


def reference_of(start: Loaded, method: Any, compute: Compute) -> Callable[[Batch], Tensor]:
    """(N,) log-probabilities of a batch's labels under a model as it is now, whatever becomes of it; asked for only
    where the method has a KL term."""
    kept = replace(start, model=copy.deepcopy(start.model).eval()) if getattr(method, "kl", 0) else start
    teacher = LocalTeacher(kept, compute)
    return lambda batch: label_logprobs(teacher.hidden(batch), teacher.head, batch.loss_labels.to(compute.device))


def groups_of(schedule: Schedule, method: Any) -> int:
    """Prompts of a round.

    Raises:
        RecipeError: a step is not a whole number of groups.
    """
    if schedule.batch % method.group:
        raise RecipeError(
            f"train.batch={schedule.batch} responses are not a whole number of groups of method.group={method.group}; "
            "make the one a multiple of the other"
        )
    return schedule.batch // method.group * method.updates


def askable(samples: list[Sample], tokenizer: Any, room: int) -> list[Sample]:
    """One sample for each prompt that can be judged and leaves room for a response in ``room`` tokens.

    Raises:
        DataError: there is none.
    """
    with_task = {s.prompt_hash: s for s in samples if s.task is not None and s.prompt}
    fits = [s for s in with_task.values() if len(prompt_ids(s, tokenizer)) < room]
    if not fits:
        raise DataError(
            f"no prompt of {len(samples):,} training samples can be judged and leaves room for a response in {room} "
            "tokens; give problems with an answer (data.source.kind=tasks, or data.source.answer and .verifier)"
        )
    return fits


def trained_by(method: Any, judge: Judge) -> Judge:
    """Who judges rollouts in training: the task's own verifier, or the one that the method's reward names.

    Raises:
        RecipeError: there is no verifier of that name.
    """
    name = getattr(getattr(method, "reward", None), "verifier", None)
    if name is None:
        return judge

    def by_that_one(response: str, task: Task) -> Verdict:
        return judge(response, replace(task, verifier=name))

    try:
        by_that_one("", Task("", name, ""))  # what goes wrong inside a verifier is a verdict, so this finds it or not
    except DataError as e:
        raise RecipeError(f"method.reward.verifier: {e}, or leave it out for each task's own") from None
    return by_that_one
