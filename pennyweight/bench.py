"""What the stages of a run share: the device, and models, samples and targets opened when first asked for."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pennyweight.data.files import documents, read_text
from pennyweight.data.pack import Batch, Packer
from pennyweight.data.render import encode_all, learnt_bytes, prompt_ids, windows
from pennyweight.data.split import overlap
from pennyweight.data.store import read_samples
from pennyweight.errors import ModelError, RecipeError
from pennyweight.evaluate.held_out import HeldOut
from pennyweight.model.device import Compute, choose, set_threads
from pennyweight.model.head import keeps_samples_apart
from pennyweight.model.load import load, same_tokenizer, stored_dtype
from pennyweight.model.loaded import Loaded, refuse_low_bit
from pennyweight.model.projection import attach
from pennyweight.model.student import align_vocabulary, cut, from_shape
from pennyweight.progress import counting, say
from pennyweight.quant.experts import take_apart
from pennyweight.quant.export import export, formats_of
from pennyweight.quant.formats import FORMATS
from pennyweight.quant.rounding import Recovery, rounded_to
from pennyweight.quant.scoring import check_scoring, for_scoring
from pennyweight.recipe import (
    DenseTargets,
    FolderTeacher,
    HiddenTargets,
    Recipe,
    SampledTargets,
    Schedule,
    StudentChoice,
    TeacherChoice,
    TeacherSamples,
    TopKTargets,
)
from pennyweight.records import ROUNDED, Encoded, Sample, sha256_json
from pennyweight.teacher.cache import CacheFacts, TargetCache, settled
from pennyweight.teacher.local import LocalTeacher
from pennyweight.teacher.targets import Keep, threshold_within
from pennyweight.train.group import join
from pennyweight.train.optim import NO_FP8_PARTS

LABELLED_AS = "labelling.json"
"""File of a RUN folder: the threshold that was settled on, and what it was found from."""


class Bench:
    """Everything is opened lazily: a run whose stages are all finished opens no model.

    Args:
        recipe: the resolved recipe.
        folder: the RUN folder.
    """

    def __init__(self, recipe: Recipe, folder: Path):
        self.recipe, self.folder = recipe, folder
        if recipe.evaluate.text:  # read now, so that a wrong path is not found out after all training
            read_text(Path(recipe.evaluate.text).expanduser(), recipe.evaluate.text)
        self.group = join()
        if self.group.size > 1 and recipe.train.moments == "fp8":
            raise RecipeError(NO_FP8_PARTS)
        self.threads = set_threads(recipe.compute.threads)
        self.compute = self.group.placed(choose(recipe.compute.device, recipe.compute.dtype))

    @cached_property
    def teacher_path(self) -> str:
        t = self.recipe.teacher
        return t.path if isinstance(t, FolderTeacher) else str(self.folder / "teacher")

    @cached_property
    def teacher(self) -> Loaded:
        """The teacher: on a GPU as it is stored, since it only reads; elsewhere in float32."""
        dtype = None if self.compute.device.type == "cuda" else torch.float32
        trust = _trusted(self.recipe.teacher)
        return load(self.teacher_path, device=self.compute.device, dtype=dtype, trust_remote_code=trust)

    def opened(self, path: str | Path) -> Loaded:
        """A folder that this run saved, in float32 on the run's device; it keeps the code its model came with."""
        r = self.recipe
        return self._opened(path, _trusted(r.teacher) if r.student.kind == "cut" else _trusted(r.student))

    def to_train(self, path: str | Path, seed: int) -> Loaded:
        """A student's start, with a map to the teacher's hidden width where the method matches hidden states."""
        begin = self.opened(path)
        if getattr(self.recipe.method, "hidden", 0):
            mine, theirs = (m.get_output_embeddings().weight.shape[1] for m in (begin.model, self.teacher.model))
            attach(begin.model, mine, theirs, seed)
        if self.recipe.train.precision != "full":
            take_apart(begin.model)  # so that experts compute in it, too
        return begin

    def _opened(self, path: str | Path, trust_remote_code: bool) -> Loaded:
        return load(str(path), device=self.compute.device, dtype=torch.float32, trust_remote_code=trust_remote_code)

    @cached_property
    def context(self) -> int:
        return min(self.recipe.data.context, self.teacher.context)

    @cached_property
    def answering(self) -> LocalTeacher:
        """The teacher as it answers prompts."""
        r = self.recipe.data.responses
        return self._writing(r.temperature, r.top_p, r.max_tokens)

    @cached_property
    def labelling(self) -> LocalTeacher:
        """The teacher as it labels: as it answers, or a copy in the precision that was asked for."""
        precision = getattr(self.recipe.targets, "precision", "auto")
        if precision == "auto":
            return self.answering
        model, head = for_scoring(self.teacher.model, precision)
        plain = replace(self.compute, autocast=None)
        return replace(self.answering, loaded=replace(self.teacher, model=model), compute=plain, output=head)

    def sampling(self, source: TeacherSamples) -> LocalTeacher:
        """The teacher as it writes from nothing."""
        return self._writing(source.temperature, 1.0, source.max_tokens)

    def _writing(self, temperature: float, top_p: float, max_tokens: int) -> LocalTeacher:
        return LocalTeacher(
            self.teacher,
            self.compute,
            rows=128,
            write_temperature=temperature,
            write_top_p=top_p,
            write_tokens=max_tokens,
            context=self.context,
        )

    def encode(self, samples: list[Sample]) -> list[Encoded]:
        return encode_all(samples, self.teacher.tokenizer, self.context, self.recipe.data.too_long)

    @cached_property
    def encoded(self) -> list[Encoded]:
        """The training samples as tokens."""
        return self.encode(read_samples(self.folder / "data" / "train.jsonl"))

    def batches(self, schedule: Schedule, seed: int) -> Packer:
        """The training samples in the order of ``seed``; of each step what this process has of it."""
        whole = packer(self.encoded, schedule, seed, self.teacher.pad_id, self.context)
        return replace(whole, rank=self.group.rank, ranks=self.group.size)

    def first_student(self, seed: int) -> Any:
        """The student before training: given, made from nothing by ``seed``, or cut from the teacher."""
        student = self._first_student(seed)
        # What cannot be done is refused now, not after hours of writing and training.
        self._check_targets()
        if self.recipe.train.pack and not (keeps_samples_apart(student) and keeps_samples_apart(self.teacher.model)):
            raise RecipeError(
                f"train.pack=true, but samples in one row of a {type(student).__name__} would see each other; set "
                "train.pack=false"
            )
        return student

    def _check_targets(self) -> None:
        if self.recipe.method.kind == "sft":
            return  # which uses none
        t, precision = self.recipe.targets, getattr(self.recipe.targets, "precision", "auto")
        if isinstance(t, TopKTargets) and t.k > self.teacher.vocabulary:
            raise RecipeError(f"targets.k={t.k} is more than the teacher's vocabulary of {self.teacher.vocabulary:,}")
        if precision != "auto":
            check_scoring(self.teacher.model, precision)

    @property
    def student_dtype(self) -> torch.dtype:
        """What students are kept in: as the teacher is stored where they are cut from it, or as they were given."""
        s = self.recipe.student
        return torch.float32 if s.kind == "shape" else stored_dtype(self.teacher_path if s.kind == "cut" else s.path)

    def as_teacher(self, path: Path) -> LocalTeacher:
        """A folder that this run saved, as the teacher of its own copies."""
        return LocalTeacher(self.opened(path), self.compute)

    @property
    def copies(self) -> list[str]:
        """Names of the low-bit copies: one a format, and one that is rounded only beside each that is taught."""
        formats = self.recipe.quantize.formats
        return [*formats, *(f"{fmt}{ROUNDED}" for fmt in formats if self.recovery(fmt))]

    def recovery(self, name: str) -> Recovery | None:
        """How a copy of this name is taught; None where it is not: 8 bits lose next to nothing."""
        s, q = self.recipe.train, self.recipe.quantize
        taught = not name.endswith(ROUNDED) and FORMATS[name].element_bits < 8
        steps = round(q.recover * s.steps) if taught else 0
        return Recovery(steps, s.batch, s.micro_batch, q.lr, self.recipe.seeds[0]) if steps else None

    def check_copies(self, student: Path, work: Path) -> None:
        """Write a low-bit copy of the untouched student and open it, since not every architecture takes one."""
        q = self.recipe.quantize
        if not q.formats:
            return
        model = self.opened(student).model
        codes, _ = rounded_to(model, formats_of(model, q.formats[0], q.group))
        export(model, codes, student, work / "copy")
        try:
            self.opened(work / "copy")
        except ModelError as e:
            raise RecipeError(f"low-bit copies of this student would not work: {e}; set quantize.formats=[]") from None

    def _first_student(self, seed: int) -> Any:
        s = self.recipe.student
        if s.kind == "shape":
            return from_shape(s.shape, self.teacher.tokenizer, self.context, seed, self.teacher.vocabulary)
        if s.kind == "cut":
            return cut(self.teacher.model, s).float()
        given = self._opened(s.path, s.trust_remote_code)
        refuse_low_bit(given.model)
        same_tokenizer(self.teacher.tokenizer, given.tokenizer)
        if given.context < self.context:
            raise RecipeError(
                f"the student {s.path} takes {given.context:,} tokens and data.context is {self.context:,}; set "
                f"data.context={given.context}"
            )
        before = given.vocabulary
        if align_vocabulary(given.model, self.teacher.vocabulary):
            say(f"the student's vocabulary of {before:,} is set to the teacher's {self.teacher.vocabulary:,} (padding)")
        return given.model

    def label(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Facts of the targets, and names of shards that were damaged and are made again; live ones store nothing."""
        tokens = sum(len(e.loss_positions) for e in self.encoded)
        kind = self.recipe.targets.kind
        if self.recipe.method.kind == "sft" or kind == "dense":
            return {"kind": kind, "tokens": tokens, "bytes": 0, "bytes_per_token": 0.0, "entries_per_token": None}, ()
        made = self.fill_cache()
        budget = getattr(self.recipe.targets, "budget", math.inf)
        if made.bytes_per_token > budget:
            say(
                f"targets take {made.bytes_per_token:.1f} bytes a token, more than targets.budget={budget:g}: samples "
                "have few tokens to learn, or the teacher is diffuse; a higher targets.threshold takes less"
            )
        facts: dict[str, Any] = {"bytes": made.bytes, "bytes_per_token": made.bytes_per_token}
        facts["entries_per_token"] = made.entries / max(1, made.tokens) if kind != "hidden" else None
        if kind == "sampled":
            facts["threshold"] = self.cache.keep.threshold
        return {"kind": kind, "tokens": tokens, **facts}, made.damaged

    def fill_cache(self, own: bool = True) -> CacheFacts:
        """Label what is not labelled yet; ``own`` is False for a process that helps the run it is not."""
        with counting("targets", len(self.encoded), "samples") as c:
            made = self.cache.fill(self.encoded, c.advance, clean=own and self.group.first)
        self.__dict__.pop("labelling", None)  # a copy of the teacher that is not needed any more
        return made

    def signal(self, batch: Batch):
        """The teacher at a batch's loss positions, live or from the cache."""
        if self.recipe.targets.kind == "dense":
            return self.answering.dense(batch)
        if not self.cache.filled:
            self.fill_cache()
        return self.cache.signal(batch, self.compute.device, lambda: self.answering.head)

    @cached_property
    def cache(self) -> TargetCache:
        """The targets of the training samples, on disk."""
        t, temperature = self.recipe.targets, getattr(self.recipe.method, "temperature", 1.0)
        assert not isinstance(t, DenseTargets)
        self._check_targets()
        keep = Keep(t.kind, 0.0, getattr(t, "k", 0), 1.0 if t.kind == "hidden" else temperature, t.precision)
        keep = replace(keep, threshold=self._threshold(t, keep))
        return TargetCache(
            self.folder / "targets",
            f"{self.teacher.fingerprint} on {self.compute.name}",
            keep,
            self.teacher.vocabulary,
            t.shard,
            lambda samples, keep: self.labelling.targets(samples, keep),
        )

    def _threshold(self, t: SampledTargets | TopKTargets | HiddenTargets, keep: Keep) -> float:
        """The recipe's threshold, or the least above it that keeps to the budget on some of the training samples.

        Other kinds have none, but tell in the same file how they are labelled.
        """
        some = sorted(self.encoded, key=lambda e: e.token_hash)[:16]
        made_from = {
            "teacher": self.teacher.fingerprint,
            "compute": self.compute.name,
            "keep": asdict(keep),
            "asked": t.model_dump(mode="json"),
            "from": sha256_json([e.token_hash for e in some]),
        }

        def find() -> float:
            if not isinstance(t, SampledTargets):
                return 0.0
            expected = lambda tried: self.labelling.expected(some, tried, keep.temperature)  # noqa: E731
            return threshold_within(t.budget, t.threshold, self.teacher.vocabulary, expected)

        return settled(self.folder / LABELLED_AS, made_from, find)

    @cached_property
    def held_out(self) -> HeldOut:
        """Held-out samples and problems; the recipe's text, where it names one, in place of the samples."""
        e, tokenizer = self.recipe.evaluate, self.teacher.tokenizer
        samples = read_samples(self.folder / "data" / "eval.jsonl")
        encoded = windows(e.text, tokenizer, self.context) if e.text else self.encode(samples)
        asked = [(s, ids) for s in samples if s.task and len(ids := prompt_ids(s, tokenizer)) < self.context]
        problems, prompts = [s for s, _ in asked[: e.problems]], [ids for _, ids in asked[: e.problems]]
        asked_of = {s.id: s.prompt[-1].content for s in samples if s.prompt}
        begun = [(x.id, _opening(x)) for x in encoded[: e.shown]]
        openings = [(ids, asked_of.get(i) or tokenizer.decode(ids, skip_special_tokens=True)) for i, ids in begun]
        return HeldOut(encoded, learnt_bytes(encoded, tokenizer), problems, prompts, openings)

    def device_peak(self, anew: bool) -> int | None:
        """Most bytes that tensors took on a CUDA device since the count was last started anew."""
        if self.compute.device.type != "cuda":
            return None
        if anew:
            torch.cuda.reset_peak_memory_stats(self.compute.device)
        return torch.cuda.max_memory_allocated(self.compute.device)

    def text_overlap(self) -> dict[str, Any]:
        """How much of the evaluation text is in the training samples; nothing where there is no such text."""
        path = self.recipe.evaluate.text
        if not path:
            return {}
        texts = documents(read_text(Path(path).expanduser(), path), by_paragraph=False)
        found = overlap(read_samples(self.folder / "data" / "train.jsonl"), [Sample((), t, path) for t in texts])
        return {"text_overlap": {k: found[k] for k in ("eval", "normalised", "ngram")}}

    @property
    def measuring(self) -> Compute:
        """How evaluation computes: as training does on a GPU, in float32 elsewhere."""
        return self.compute if self.compute.device.type == "cuda" else replace(self.compute, autocast=None)


def _trusted(choice: TeacherChoice | StudentChoice) -> bool:
    """Whether the recipe lets the code that comes with this model run."""
    return getattr(choice, "trust_remote_code", False)


def packer(samples: list[Encoded], schedule: Schedule, seed: int, pad_id: int, context: int) -> Packer:
    """Batches as a schedule wants them."""
    s = schedule
    return Packer(samples, s.batch, s.micro_batch or s.batch, seed, pad_id, s.pack, context)


def _opening(sample: Encoded) -> list[int]:
    """A sample up to its first learnt token, and of a text (learnt from the start) a few tokens more."""
    first = sample.mask.index(True) if True in sample.mask else len(sample.ids)
    return list(sample.ids[: first if first > 1 else 1 + min(12, len(sample.ids) // 2)])
