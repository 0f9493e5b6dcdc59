"""Steps of a method that learns from what the student writes: rounds of rollouts, made into batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pennyweight.data.pack import Batch, packer
from pennyweight.data.render import prompt_ids
from pennyweight.data.store import read_samples
from pennyweight.errors import DataError, RecipeError
from pennyweight.loss.chunked import label_logprobs
from pennyweight.model.device import Compute
from pennyweight.model.loaded import Loaded
from pennyweight.progress import Counter, say
from pennyweight.records import Sample, Task, Verdict
from pennyweight.settings import GrpoMethod, OfflineMethod, Schedule
from pennyweight.teacher.cache import TargetCache
from pennyweight.teacher.local import LocalTeacher
from pennyweight.teacher.targets import Keep
from pennyweight.train.rollout import Judge, Roller, Rollout, Round
from pennyweight.train.tripwire import UNWATCHED, Watch


@dataclass(frozen=True)
class Written:
    """A step's rollouts as a method is handed them: in groups, and by the id of their tokens. And who can be asked of
    their tokens: the reference and the teacher for log-probabilities, (N,) each; the teacher for all it knows."""

    groups: list[list[Rollout]]
    of: dict[str, Rollout]
    reference: Callable[[Batch], Tensor]
    told: Callable[[Batch], Tensor]
    teacher: Callable[[Batch], Any]


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
    own = isinstance(method, GrpoMethod) or getattr(method, "rewarded", 0)
    samples = askable(read_samples(bench.folder / "data" / "train.jsonl"), begin.tokenizer, bench.context, bool(own))
    record = lambda written: ledger.add_records(written, "train", None)  # noqa: E731
    by = trained_by(method, judge)
    roller = Roller(begin, samples, groups_of(schedule, method), method, by, seed, bench.context, work, record)
    write = lambda line: journal.write({"arm": arm, "seed": seed, **line})  # noqa: E731
    if isinstance(method, OfflineMethod):
        return _offline(bench, roller, row.apply, lambda line: write({"stage": "rollout", **line})), UNWATCHED
    if row.asks and bench.recipe.targets.kind in ("top_k", "hidden"):
        say(
            f"{arm}: the teacher is asked live for its whole distribution, and nothing of it is kept, so that "
            f"targets.kind={bench.recipe.targets.kind} changes nothing; method.kind=offline goes by kept targets"
        )
    asked = Asked(reference_of(begin, method, bench.compute), *_teacher_of(bench, row))
    given = given_of(schedule, method)
    others = replace(bench.batches(schedule, seed), batch=given) if given else None
    held_out, limits = read_samples(bench.folder / "data" / "eval.jsonl"), bench.recipe.tripwires.rollouts
    rounds = -(-schedule.steps // method.updates)
    watch = lookout(roller, limits, rounds, held_out, judge, write, bench.folder, f"{arm}-{seed}")
    return steps_of(roller, row.apply, schedule, asked, watch.look, others), watch


@dataclass(frozen=True)
class Asked:
    """Who can be asked about a batch of rollouts, as ``Written`` has them."""

    reference: Callable[[Batch], Tensor]
    told: Callable[[Batch], Tensor]
    teacher: Callable[[Batch], Any]


def steps_of(
    roller: Roller,
    apply: Callable[[Batch, Any, Written], Batch],
    schedule: Schedule,
    asked: Asked,
    log: Callable[[dict[str, Any]], None],
    others: Callable[[int], list[Batch]] | None = None,
) -> Callable[[int], list[Batch]]:
    """step -> its micro-batches: of rollouts, and of the data's own samples (``others``) where there are any. ``log``
    takes a line for each round, with the step that it is written for."""
    method = roller.method
    assert not isinstance(method, OfflineMethod)

    def next_batch(step: int) -> list[Batch]:
        number, part = divmod(step, method.updates)
        whole = roller(number, may_write=part == 0)
        if part == 0:
            log({"step": step + 1, **{k: round(v, 6) for k, v in whole.facts().items()}})
        mine = whole.part(part, method.updates).first(getattr(method, "first", 1.0))
        signal = Written(mine.groups, mine.of, **vars(asked))
        micro, all_of_them = schedule.micro_batch or schedule.batch, getattr(method, "cut_off", "learnt") == "learnt"
        batches = mine.batches(micro, roller.pad_id, all_of_them)
        return [apply(b, method, signal) for b in (*batches, *(others(step) if others else ()))]

    return next_batch


def _offline(bench: Any, roller: Roller, apply: Any, log: Callable[[dict[str, Any]], None]) -> Any:
    """Steps over rollouts that the start writes once, with targets that the teacher gives them once: when the first
    step asks for its batches, so that the loop's clock has both. Both are kept for a run that goes on."""
    made: list[tuple[Callable[[int], list[Batch]], Callable[[Batch], Any]]] = []

    def next_batch(step: int) -> list[Batch]:
        if not made:
            whole = roller(0, may_write=step == 0)  # later than that the weights are no longer the start's
            if step == 0:
                log({"step": 1, **{k: round(v, 6) for k, v in whole.facts().items()}})
            made.append(_scored(bench, roller, whole))
        packed, signal = made[0]
        return [apply(b, roller.method, signal) for b in packed(step)]

    return next_batch


def _scored(bench: Any, roller: Roller, whole: Round) -> tuple[Callable[[int], list[Batch]], Callable[[Batch], Any]]:
    """step -> micro-batches of a round's rollouts; and the teacher at their loss positions."""
    method, schedule, t = roller.method, bench.recipe.train, bench.recipe.targets
    rollouts = [r.encoded for group in whole.first(method.first).groups for r in group]  # type: ignore[union-attr]
    packed = packer(rollouts, schedule, roller.seed, roller.pad_id, bench.context)
    if t.kind == "dense":
        return packed, bench.labelling.dense
    temperature = 1.0 if t.kind == "hidden" else method.temperature  # type: ignore[union-attr]
    keep = Keep(t.kind, getattr(t, "threshold", 0.0), getattr(t, "k", 0), temperature, t.precision)
    made_by = f"{bench.labelling.fingerprint} on {bench.compute.name}"
    place, label = roller.folder / "targets", lambda some, keep: bench.labelling.targets(some, keep)
    cache = TargetCache(place, made_by, keep, bench.language.vocabulary, t.shard, label)
    cache.fill(rollouts, Counter("targets of rollouts", len(rollouts), "rollouts").advance)
    return packed, lambda batch: cache.signal(batch, bench.compute.device, lambda: bench.local.head)


def _teacher_of(bench: Any, row: Any) -> tuple[Callable[[Batch], Tensor], Callable[[Batch], Any]]:
    """(N,) log-probabilities of a batch's labels under the teacher, and the teacher at its loss positions."""
    if not row.asks:
        nobody = lambda batch: None  # noqa: E731
        return nobody, nobody  # type: ignore[return-value]
    teacher = bench.labelling
    return lambda batch: _logprobs(teacher, batch), teacher.dense


def _logprobs(model: LocalTeacher, batch: Batch) -> Tensor:
    return label_logprobs(model.hidden(batch), model.head, batch.loss_labels.to(model.compute.device))


def reference_of(start: Loaded, method: Any, compute: Compute) -> Callable[[Batch], Tensor]:
    """(N,) log-probabilities of a batch's labels under a model as it is now, whatever becomes of it; asked for only
    where the method has a KL term."""
    kept = replace(start, model=copy.deepcopy(start.model).eval()) if getattr(method, "kl", 0) else start
    model = LocalTeacher(kept, compute)
    return lambda batch: _logprobs(model, batch)


def given_of(schedule: Schedule, method: Any) -> int:
    """Of a step's samples those that are the data's: at least one where any are asked for, and never all.

    Raises:
        RecipeError: a step has one sample alone.
    """
    share = getattr(method, "given", 0.0)
    if share and schedule.batch < 2:
        raise RecipeError(
            f"method.given={share:g} asks for samples of the data beside the student's own, and train.batch=1 has room "
            "for one sample; set train.batch=2 or more, or method.given=0"
        )
    return min(schedule.batch - 1, max(1, round(schedule.batch * share))) if share else 0


def groups_of(schedule: Schedule, method: Any) -> int:
    """Prompts of a round; of a step's responses those are left out that are to be samples of the data.

    Raises:
        RecipeError: they are not a whole number of groups, or there is no room for them.
    """
    if isinstance(method, OfflineMethod):
        what, count, rounds = "method.rollouts", method.rollouts, 1
    else:
        count, rounds = schedule.batch - given_of(schedule, method), method.updates
        what = "train.batch less method.given" if count < schedule.batch else "train.batch"
    if count % method.group:
        raise RecipeError(
            f"{count} responses ({what}) are not a whole number of groups of method.group={method.group}; make the one "
            "a multiple of the other"
        )
    return count // method.group * rounds


def askable(samples: list[Sample], tokenizer: Any, room: int, judged: bool = True) -> list[Sample]:
    """One sample for each prompt that leaves room for a response in ``room`` tokens and, where it is to be ``judged``,
    can be.

    Raises:
        DataError: there is none.
    """
    prompts = {s.prompt_hash: s for s in samples if s.prompt and (s.task is not None or not judged)}
    fits = [s for s in prompts.values() if len(prompt_ids(s, tokenizer)) < room]
    if not fits:
        what = "can be judged and leaves" if judged else "leaves"
        raise DataError(
            f"no prompt of {len(samples):,} training samples {what} room for a response in {room} tokens; give "
            "problems with an answer (data.source.kind=tasks, or data.source.answer and .verifier), or a larger "
            "data.context"
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
