"""What the stages of a run share: the device, and models, samples and targets opened when first asked for."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pennyweight.data.files import read_text
from pennyweight.data.pack import Batch, Packer, packer
from pennyweight.data.render import encode_all
from pennyweight.data.store import read_samples
from pennyweight.errors import ModelError, RecipeError
from pennyweight.evaluate.held_out import HeldOut, hold_out
from pennyweight.model.device import Compute, choose, set_threads
from pennyweight.model.head import keeps_samples_apart
from pennyweight.model.load import language_of, load, open_tokenizer, same_tokenizer, stored_dtype
from pennyweight.model.loaded import Language, Loaded, refuse_low_bit
from pennyweight.model.options import check_options, ready
from pennyweight.model.projection import attach
from pennyweight.model.student import align_vocabulary, cut, from_shape
from pennyweight.progress import counting, say
from pennyweight.quant.experts import take_apart
from pennyweight.quant.export import export, formats_of
from pennyweight.quant.rounding import Recovery, recovery_of, rounded_to
from pennyweight.quant.scoring import check_scoring, for_scoring
from pennyweight.recipe import (
    DenseTargets,
    EndpointTeacher,
    FolderStudent,
    FolderTeacher,
    Recipe,
    Schedule,
    TeacherSamples,
    TopKTargets,
)
from pennyweight.records import ROUNDED, Encoded, Sample
from pennyweight.teacher.cache import CacheFacts, TargetCache, settled_keep
from pennyweight.teacher.endpoint import ServedTeacher, endpoint_of
from pennyweight.teacher.local import LocalTeacher
from pennyweight.teacher.targets import Keep
from pennyweight.train.group import join
from pennyweight.train.optim import NO_FP8_PARTS

ANSWERS = "answers.jsonl"
"""File of a RUN folder: every answer of an endpoint, as it was paid for."""

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
        """The folder of the teacher, or its address."""
        t = self.recipe.teacher
        if isinstance(t, EndpointTeacher):
            return t.url
        return t.path if isinstance(t, FolderTeacher) else str(self.folder / "teacher")

    @cached_property
    def teacher(self) -> Loaded:
        """The teacher in this process: on a GPU as it is stored, since it only reads; elsewhere in float32."""
        dtype = None if self.compute.device.type == "cuda" else torch.float32
        trust = getattr(self.recipe.teacher, "trust_remote_code", False)
        return load(self.teacher_path, device=self.compute.device, dtype=dtype, trust_remote_code=trust)

    def opened(self, path: str | Path) -> Loaded:
        """A folder that this run saved, in float32 on the run's device; it keeps the code its model came with."""
        r = self.recipe
        came_with = r.teacher if r.student.kind == "cut" else r.student
        return self._opened(path, getattr(came_with, "trust_remote_code", False))

    def to_train(self, path: str | Path, seed: int) -> Loaded:
        """A student's start, with a map to the teacher's hidden width where the method matches hidden states."""
        begin = self.opened(path)
        self._check_packing(begin.model)
        ready(begin.model, self.recipe.train, seed)
        if getattr(self.recipe.method, "hidden", 0):
            mine, theirs = (m.get_output_embeddings().weight.shape[1] for m in (begin.model, self.teacher.model))
            attach(begin.model, mine, theirs, seed)
        if self.recipe.train.precision != "full":
            take_apart(begin.model)  # so that experts compute in it, too
        return begin

    def _opened(self, path: str | Path, trust_remote_code: bool) -> Loaded:
        return load(str(path), device=self.compute.device, dtype=torch.float32, trust_remote_code=trust_remote_code)

    @cached_property
    def language(self) -> Language:
        """Of all models of the run: the teacher's; with an endpoint the student's, or that of the tokenizer named."""
        t, s = self.recipe.teacher, self.recipe.student
        if not isinstance(t, EndpointTeacher):
            return self.teacher.language
        if isinstance(s, FolderStudent):
            return language_of(s.path, s.trust_remote_code)
        tokenizer = open_tokenizer(t.tokenizer or "")
        return Language(tokenizer, len(tokenizer), self.recipe.data.context)

    @cached_property
    def context(self) -> int:
        return min(self.recipe.data.context, self.language.context)

    @cached_property
    def served(self) -> ServedTeacher | None:
        """The teacher at an endpoint, if it is one, as it answers prompts; its answers are kept in the RUN folder."""
        t, r = self.recipe.teacher, self.recipe.data.responses
        if not isinstance(t, EndpointTeacher):
            return None
        tokenizer = open_tokenizer(t.tokenizer) if t.tokenizer else None
        how = (r.temperature, r.top_p, r.max_tokens)
        return ServedTeacher(endpoint_of(t, self.folder / ANSWERS), t.api, tokenizer, *how)

    @cached_property
    def local(self) -> LocalTeacher:
        """The teacher in this process as it answers prompts."""
        r = self.recipe.data.responses
        return self._writing(r.temperature, r.top_p, r.max_tokens)

    @property
    def answering(self) -> LocalTeacher | ServedTeacher:
        return self.served or self.local

    @cached_property
    def labelling(self) -> LocalTeacher:
        """The teacher in this process as it labels: as it answers, or a copy in the precision that was asked for."""
        precision = getattr(self.recipe.targets, "precision", "auto")
        if precision == "auto":
            return self.local
        model, head = for_scoring(self.teacher.model, precision)
        plain = replace(self.compute, autocast=None)
        return replace(self.local, loaded=replace(self.teacher, model=model), compute=plain, output=head)

    def sampling(self, source: TeacherSamples) -> LocalTeacher | ServedTeacher:
        """The teacher as it writes from nothing."""
        how = (source.temperature, 1.0, source.max_tokens)
        return self.served.from_nothing(*how) if self.served else self._writing(*how)

    def _writing(self, temperature: float, top_p: float, max_tokens: int) -> LocalTeacher:
        return LocalTeacher(self.teacher, self.compute, 128, temperature, top_p, max_tokens, self.context)

    def encode(self, samples: list[Sample]) -> list[Encoded]:
        encoded = encode_all(samples, self.language.tokenizer, self.context, self.recipe.data.too_long)
        return (
            [e for e in (e.learnt_from(self.untold) for e in encoded) if e.loss_positions] if self.untold else encoded
        )

    @cached_property
    def untold(self) -> int:
        """First tokens of a text that are not learnt, because a server that labels tells nothing of them."""
        t = self.recipe.targets
        if not self.served or self.recipe.method.kind == "sft" or not isinstance(t, TopKTargets):
            return 0
        return 2 if self.served.telling(t.k).silent_first else 0

    def asked(self) -> dict[str, Any]:
        """What a server was asked for, as it counts, and the first tokens of a text that are not learnt."""
        return {"untold": self.untold, "usage": self.served.endpoint.paid.usage} if self.served else {}

    @cached_property
    def encoded(self) -> list[Encoded]:
        """The training samples as tokens."""
        return self.encode(read_samples(self.folder / "data" / "train.jsonl"))

    def batches(self, schedule: Schedule, seed: int) -> Packer:
        """The training samples in the order of ``seed``; of each step what this process has of it."""
        whole = packer(self.encoded, schedule, seed, self.language.pad_id, self.context)
        return replace(whole, rank=self.group.rank, ranks=self.group.size)

    def first_student(self, seed: int) -> Any:
        """The student before training: given, made from nothing by ``seed``, or cut from the teacher."""
        student = self._first_student(seed)
        # What cannot be done is refused now, not after hours of writing and training.
        self._check_targets()
        check_options(student, self.recipe.train)
        self._check_packing(student)
        return student

    def _check_packing(self, student: Any) -> None:
        if not self.recipe.train.pack:
            return
        both = (student, *(() if self.served else (self.teacher.model,)))
        if not all(keeps_samples_apart(m) for m in both):
            raise RecipeError(
                f"train.pack=true, but samples in one row of a {type(student).__name__} would see each other; set "
                "train.pack=false"
            )

    def _check_targets(self) -> None:
        if self.recipe.method.kind == "sft":
            return  # which uses none
        t, precision = self.recipe.targets, getattr(self.recipe.targets, "precision", "auto")
        if isinstance(t, TopKTargets) and t.k > self.language.vocabulary:
            raise RecipeError(f"targets.k={t.k} is more than the teacher's vocabulary of {self.language.vocabulary:,}")
        if self.served and isinstance(t, TopKTargets):
            same_tokenizer(self.served.tokenizer, self.language.tokenizer)
            self.served.telling(t.k)
        elif precision != "auto":
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
        """How a copy of this name is taught; None where it is not."""
        return recovery_of(name, self.recipe.quantize, self.recipe.train, self.recipe.seeds[0])

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
            return from_shape(s.shape, self.language.tokenizer, self.context, seed, self.language.vocabulary)
        if s.kind == "cut":
            return cut(self.teacher.model, s).float()
        given = self._opened(s.path, s.trust_remote_code)
        refuse_low_bit(given.model)
        same_tokenizer(self.language.tokenizer, given.tokenizer)
        if given.context < self.context:
            raise RecipeError(
                f"the student {s.path} takes {given.context:,} tokens and data.context is {self.context:,}; set "
                f"data.context={given.context}"
            )
        before = given.vocabulary
        if align_vocabulary(given.model, self.language.vocabulary):
            now = self.language.vocabulary
            say(f"the student's vocabulary of {before:,} is set to the teacher's {now:,} (padding)")
        return given.model

    def label(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Facts of the targets, and names of shards that were damaged and are made again; live ones store nothing."""
        tokens = sum(len(e.loss_positions) for e in self.encoded)
        kind = "text" if self.recipe.method.kind == "sft" else self.recipe.targets.kind
        if kind in ("text", "dense"):
            return {"kind": kind, "tokens": tokens, "bytes": 0, "bytes_per_token": 0.0, "entries_per_token": None}, ()
        made = self.fill_cache()
        budget = getattr(self.recipe.targets, "budget", math.inf)
        if made.bytes_per_token > budget:
            say(
                f"targets take {made.bytes_per_token:.1f} bytes a token, more than targets.budget={budget:g}: samples "
                "have few tokens to learn, or the teacher is diffuse; a higher targets.threshold takes less"
            )
        return {"kind": kind, "tokens": tokens, **made.facts(self.cache.keep)}, made.damaged

    def fill_cache(self, own: bool = True) -> CacheFacts:
        """Label what is not labelled yet; ``own`` is False for a process that helps the run it is not."""
        with counting("targets", len(self.encoded), "samples") as c:
            made = self.cache.fill(self.encoded, c.advance, clean=own and self.group.first)
        self.__dict__.pop("labelling", None)  # a copy of the teacher that is not needed any more
        return made

    def signal(self, batch: Batch):
        """The teacher at a batch's loss positions, live or from the cache."""
        if self.recipe.targets.kind == "dense":
            return self.local.dense(batch)
        if not self.cache.filled:
            self.fill_cache()
        return self.cache.signal(batch, self.compute.device, lambda: self.local.head)

    @cached_property
    def cache(self) -> TargetCache:
        """The targets of the training samples, on disk."""
        t, temperature = self.recipe.targets, getattr(self.recipe.method, "temperature", 1.0)
        assert not isinstance(t, DenseTargets)
        self._check_targets()
        keep = Keep(t.kind, 0.0, getattr(t, "k", 0), 1.0 if t.kind == "hidden" else temperature, t.precision)
        asked = {
            "teacher": self.answering.fingerprint,
            "compute": self.compute.name,
            "asked": t.model_dump(mode="json"),
        }
        expected = lambda some, tried: self.labelling.expected(some, tried, keep.temperature)  # noqa: E731
        keep = settled_keep(self.folder / LABELLED_AS, t, keep, self.encoded, self.language.vocabulary, asked, expected)
        return TargetCache(
            self.folder / "targets",
            f"{self.answering.fingerprint} on {self.compute.name}",
            keep,
            self.language.vocabulary,
            t.shard,
            lambda samples, keep: (self.served or self.labelling).targets(samples, keep),
        )

    @cached_property
    def held_out(self) -> HeldOut:
        """Held-out samples and problems; the recipe's text, where it names one, in place of the samples."""
        samples = read_samples(self.folder / "data" / "eval.jsonl")
        return hold_out(samples, self.recipe.evaluate, self.language.tokenizer, self.context, self.encode)

    @property
    def reference(self) -> Loaded | None:
        """The teacher that models are measured against; None where it is behind a server, which shows too little."""
        return None if self.served else self.teacher

    @property
    def measuring(self) -> Compute:
        """How evaluation computes: as training does on a GPU, in float32 elsewhere."""
        return self.compute if self.compute.device.type == "cuda" else replace(self.compute, autocast=None)
