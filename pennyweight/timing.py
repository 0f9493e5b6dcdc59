"""A little of each kind of work of a run, done and timed: what ``rehearsal.py`` tells of a recipe."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any

from pennyweight.bench import Bench
from pennyweight.data.files import rows
from pennyweight.data.lengths import lengths, mean_row, padding
from pennyweight.data.pack import Batch, packer
from pennyweight.data.prepare import Writer, both_sides, gather, problems_of
from pennyweight.data.render import encode_all, prompt_ids
from pennyweight.data.store import read_samples, write_samples
from pennyweight.errors import Stopped, Tripped
from pennyweight.evaluate.agreement import as_scorer, score
from pennyweight.evaluate.held_out import learnt_bytes
from pennyweight.fewer import by_programs, up_to
from pennyweight.meter.peak import peak_memory, start_peak
from pennyweight.methods import METHODS
from pennyweight.model.device import peak
from pennyweight.model.generate import generate
from pennyweight.model.load import save
from pennyweight.model.loaded import Loaded
from pennyweight.model.student import from_shape
from pennyweight.model.tokenizer import PAD_ID, train_tokenizer
from pennyweight.plan.pace import DRAWING
from pennyweight.plan.precision import of_linears
from pennyweight.quant.linear import compute_in
from pennyweight.recipe import (
    Data,
    FileData,
    TaskData,
    TeacherSamples,
    TrainedTeacher,
)
from pennyweight.records import Encoded, Sample
from pennyweight.settings import Schedule, SftMethod
from pennyweight.train.checkpoint import Checkpoints
from pennyweight.train.loop import train
from pennyweight.verifiers import check_golds, judge_sample

_READ = 5000  # rows that are read at most, to know how many there are of each side, and how long
_SCORED, _WRITTEN = 64, (64, 512)  # rows scored; written where no problems are asked, and at the most
_SHAPES = 16  # of batches that are met first, since kernels are made, and kept, for each
_LOOKED = 64  # steps in which they are looked for
_TO_THE_LIMIT = 4.0  # seconds, about, that rows may take which are written on to the limit
_SECONDS, _LEAST, _MOST, _PATIENCE = 1.5, 4, 60, 30.0  # of a training that is timed, and its steps; at the most


class Timing:
    """Does a little of each kind of work, and notes what it took."""

    def __init__(self, bench: Bench):
        self.bench, self.folder = bench, bench.folder
        self.timed: list[dict[str, Any]] = []
        self.gathered: list[tuple[int, float]] = []  # rows, and seconds

    @property
    def on_gpu(self) -> bool:
        return self.bench.compute.device.type == "cuda"

    def note(self, what: str, seconds: float, **of: Any) -> None:
        """``seconds`` for so many ``rows`` of ``length`` tokens and ``new`` ones."""
        device = peak(self.bench.compute.device, False)
        memory = peak_memory() if device is None else device
        self.timed.append({"what": what, "seconds": seconds, "memory": memory, **of})
        self.start_peaks()

    def start_peaks(self) -> None:
        start_peak()
        peak(self.bench.compute.device, True)

    def meet(self, model: Loaded) -> None:
        """A GPU makes its kernels ready when they are first asked for, once in a process: not what the rest takes."""
        if not self.on_gpu:
            return
        some = [Encoded("", tuple(range(8)), (True,) * 8)] * 32
        score(some, [8] * 32, as_scorer(model, self.bench.compute.measuring), None, model.pad_id)
        if model.writes:
            how = {"temperature": 1.0, "eos_ids": set(), "pad_id": model.pad_id, "seed": 0, "context": 16}
            generate(model.model, [list(some[0].ids)] * 64, max_tokens=8, batch=64, **how)

    def teacher(self, t: TrainedTeacher, held_out: float) -> None:
        problems = problems_of(t.tasks, t.seed, held_out)
        tokenizer = train_tokenizer([m.content for s in problems for m in s.messages], t.vocabulary, t.context)
        model = from_shape(t.shape, tokenizer, t.context, t.seed)
        encoded = encode_all(problems, tokenizer, t.context, "refuse")
        batches = packer(encoded, t.schedule, t.seed, PAD_ID, t.context)
        next_batch = lambda step: [METHODS["sft"].apply(b, SftMethod(), None) for b in batches(step)]  # noqa: E731
        self.trained("teacher", model, t.schedule, next_batch, batches, encoded)
        save(model, tokenizer, self.folder / "teacher")

    def data(self, writes: bool) -> float:
        """The share of samples that is kept: those that are too long are not."""
        bench, d = self.bench, self.bench.recipe.data
        began = time.perf_counter()
        gathered = self._gathered(d)
        if isinstance(d.source, TaskData):
            began = time.perf_counter()  # a process that draws is told apart
        sides, found = both_sides(gathered, d, self._writer, judge_sample, check_golds, bench.encode)
        took = time.perf_counter() - began
        for name, samples in sides.items():
            write_samples(self.folder / "data" / f"{name}.jsonl", samples)
        if writes and (isinstance(d.source, TeacherSamples) or d.responses.by == "teacher"):
            rows = found["train"] + found["evaluation"]
            encoded = [*bench.encoded, *bench.held_out.encoded]
            new = fmean(len(e.loss_positions) for e in encoded)
            length = max(1.0, fmean(len(e.ids) for e in encoded) - new)
            self.note("data", took, rows=rows, length=length, new=new)
        return found["train"] / (found["train"] + found["train_left_out"])

    def counted(self, d: Data) -> dict[str, float] | None:
        """Lengths of the rows as the run will have them, and how many it will have of each side where that is known;
        None where a teacher writes some of them, or where judging so many takes programs."""
        if isinstance(d.source, TeacherSamples) or d.responses.by == "teacher" or by_programs(d.source):
            return None
        source = up_to(d.source, _READ)
        began = time.perf_counter()
        gathered = self._gathered(d.model_copy(update={"source": source}))
        whole = source == d.source
        if isinstance(source, FileData) and not whole:
            whole = sum(1 for _ in islice(rows(source.path, source.split), _READ + 1)) <= _READ
        if any(s.response is None for s in gathered):
            return None
        sides, found = both_sides(gathered, d, self._writer, judge_sample, check_golds, self.bench.encode)
        judged = time.perf_counter()
        encoded = self.bench.encode(sides["train"])
        encoding = time.perf_counter() - judged
        known, took = lengths(encoded, self.bench.recipe.train), judged + encoding - began
        of = {"rows": len(gathered), "length": known["length"]}
        if isinstance(source, TaskData):
            (few, a), (many, b) = self.gathered[-2:]
            start = min(a, b, DRAWING * len(source.tasks))  # where both drew as many
            if many > few:
                start = min(b, max(0.0, a - few * (b - a) / (many - few)))
            self.note("draw", start, tasks=len(source.tasks))
            self.note("prepare teacher", max(0.0, b - start) + encoding, **of)
            took = max(0.0, took - start)
        self.note("prepare", took, **of)
        known["kept"] = found["train"] / (found["train"] + found["train_left_out"])
        if whole:
            known["held_out"] = len(self.bench.encode(sides["eval"]))
        if whole or len({s.prompt_hash for s in sides["train"]}) == d.train_limit:
            known["train"] = known["rows"]
        return known

    def _gathered(self, d: Data) -> list[Sample]:
        began = time.perf_counter()
        samples = gather(d.source, partial(self._writer, source=d.source), self.bench.recipe.teacher)
        self.gathered.append((len(samples), time.perf_counter() - began))
        return samples

    def _writer(self, member: str | None, source: Any = None) -> Writer:
        bench = self.bench
        speaker = bench.sampling(source) if source else bench.answering
        place = (speaker, speaker.tokenizer, self.folder / "parts")
        return Writer(*place, bench.recipe.seed, bench.counting, bench.asked_in, bench.recipe.data.too_long)

    def start(self) -> Loaded:
        """The student as it would begin, saved and opened again."""
        place = self.folder / "student"
        model = self.bench.first_student(self.bench.recipe.seeds[0])
        save(model, self.bench.language.tokenizer, place, self.bench.student_dtype)
        return self.bench.opened(place)

    def targets(self) -> float:
        """Bytes a token."""
        encoded = self.bench.encoded
        if self.on_gpu:
            self.bench.labels.targets(encoded[:_SCORED], self.bench.cache.keep)
        began = time.perf_counter()
        facts, _ = self.bench.label()
        self.note("targets", time.perf_counter() - began, **mean_row(encoded))
        return facts["bytes_per_token"]

    def arm(self, arm: str) -> None:
        bench, row = self.bench, METHODS[arm]
        method = SftMethod() if arm == "sft" or row.rolls else bench.recipe.method
        by, seed = METHODS[method.kind], bench.recipe.seeds[0]
        signal = bench.signal if by.signals(method) else None
        batches, begin = bench.batches(bench.recipe.train, seed), bench.to_train(self.folder / "student", seed)
        next_batch = lambda step: [by.apply(b, method, signal) for b in batches(step)]  # noqa: E731
        self.trained(arm, begin.model, bench.recipe.train, next_batch, batches, bench.encoded)

    def trained(
        self,
        what: str,
        model: Any,
        s: Schedule,
        next_batch: Callable[[int], list[Batch]],
        plain: Callable[[int], list[Batch]],
        encoded: Sequence[Encoded],
    ) -> None:
        """A few steps of a training, the first of which meet its shapes; ``seconds`` are those of the median of others,
        and for each shape of the whole training what its first step took more.

        Args:
            plain: batches that nothing was made of.
        """
        compute_in(model, s.precision, s.weights)
        shapes = _of_each_shape(plain, min(s.steps, _LOOKED))
        first = shapes[:_SHAPES]
        stamps, began = [time.perf_counter()], time.perf_counter()

        def enough() -> bool:
            met = len(stamps) - len(first) - 1
            late = stamps[-1] - began > _PATIENCE and len(stamps) > _LEAST
            return late or (met > _LEAST and (stamps[-1] - stamps[len(first)] > _SECONDS or met > _MOST))

        tried = s.model_copy(update={"checkpoint_every": 1 << 30, "compile": False, "steps": 1 << 20})
        with TemporaryDirectory(dir=self.folder) as work:
            self.start_peaks()
            with contextlib.suppress(Stopped, Tripped):
                train(
                    model,
                    lambda step: next_batch(first[step] if step < len(first) else step - len(first)),
                    schedule=tried,
                    tripwires=self.bench.recipe.tripwires,
                    compute=self.bench.compute,
                    checkpoints=Checkpoints(Path(work)),
                    seed=self.bench.recipe.seed,
                    admit=lambda ids: None,
                    log=lambda line: None,
                    progress=lambda step, note: stamps.append(time.perf_counter()),
                    should_stop=enough,
                )
        took = [b - a for a, b in itertools.pairwise(stamps[1:])] or [stamps[-1] - stamps[0]]
        seconds = median(took[len(first) :] or took)
        # Without the very first step, which opens more; a GPU's kernels are kept on disk, for the run to find.
        met = [] if self.on_gpu else [t - seconds for t in took[: len(first) - 1]]
        seconds += max(0.0, fmean(met or [0.0])) * len(shapes) / s.steps
        how = {"rows": s.batch, "rank": s.lora.rank if s.lora else 0, "recompute": s.gradient_checkpointing}
        how |= {
            "precision": of_linears(s.precision),
            "micro": s.micro_batch or 0,
            "live": what == "kd" and self.bench.recipe.targets.kind == "dense",
        }
        self.note(f"train {what}", seconds, **mean_row(encoded) | how | padding(encoded, s))

    def scored(self, student: Loaded) -> None:
        bench, compute = self.bench, self.bench.compute.measuring
        encoded = [*bench.held_out.encoded, *bench.encoded][:_SCORED]
        spelt = learnt_bytes(encoded, student.tokenizer)
        reference = as_scorer(bench.teacher, compute) if bench.reference else None
        self.start_peaks()  # what was trained is let go only now
        began = time.perf_counter()
        score(encoded, spelt, as_scorer(student, compute), reference, student.pad_id)
        self.note("score", time.perf_counter() - began, both=bool(reference), **mean_row(encoded))
        if reference:
            began = time.perf_counter()
            score(encoded, spelt, reference, None, student.pad_id)
            self.note("score teacher", time.perf_counter() - began, **mean_row(encoded))

    def written(self, who: str, model: Loaded, asked: int, limit: int) -> None:
        """Rows written from the prompts there are, as many tokens as their responses have, as an evaluation of so many
        problems has them; where that takes no more than seconds, again up to the ``limit`` of tokens, for the memory
        that models take which do not find their end."""
        count = min(asked or _WRITTEN[0], _WRITTEN[1])
        samples = [s for s in read_samples(self.folder / "data" / "train.jsonl") if s.prompt][:count]
        if not samples or not model.writes:
            return
        prompts = [prompt_ids(s, model.tokenizer) for s in samples]
        prompts = [*islice(itertools.cycle(prompts), count)]
        most = [max(1, len(e.loss_positions)) for e in islice(itertools.cycle(self.bench.encoded), count)]
        began = time.perf_counter()
        how = {"temperature": 1.0, "eos_ids": set(), "pad_id": model.pad_id, "seed": 0, "context": self.bench.context}
        generate(model.model, prompts, max_tokens=most, batch=256, **how)
        took, limit = time.perf_counter() - began, min(limit, self.bench.context)
        if max(most) < limit and took * limit < _TO_THE_LIMIT * max(most):
            generate(model.model, prompts, max_tokens=limit, batch=256, **how)
        length, new = fmean(map(len, prompts)), fmean(most)
        self.note(f"write {who}", took, rows=count, length=length, new=new)


def _of_each_shape(batches: Callable[[int], list[Batch]], steps: int) -> list[int]:
    """Steps that have a shape of a batch which those before them here have not. The first is that of the most tokens,
    which takes the most memory."""
    shapes = [{tuple(b.ids.shape) for b in batches(step)} for step in range(steps)]
    largest = max(range(steps), key=lambda step: max((rows * width for rows, width in shapes[step]), default=0))
    found, met = [largest], shapes[largest]
    for step in range(steps):
        if shapes[step] - met:
            found.append(step)
            met = met | shapes[step]
    return found
