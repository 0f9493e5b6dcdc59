"""What the stages of a run share: the device, and models, samples and targets opened when first asked for."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pennyweight.data.both_tokenizers import BothTokenizers
from pennyweight.data.files import read_text
from pennyweight.data.pack import Batch, Packer, packer
from pennyweight.data.render import encode_all
from pennyweight.data.store import read_samples
from pennyweight.errors import RecipeError
from pennyweight.evaluate.held_out import HeldOut, hold_out
from pennyweight.loss.signals import Sparse
from pennyweight.model.device import Compute, choose, set_threads
from pennyweight.model.head import keeps_samples_apart
from pennyweight.model.load import language_of, load, open_tokenizer, stored_dtype
from pennyweight.model.loaded import Language, Loaded
from pennyweight.model.options import ready
from pennyweight.model.projection import attach
from pennyweight.model.student import cut, fitted, from_shape
from pennyweight.model.token_bytes import difference, same_tokenizer
from pennyweight.progress import counting, say
from pennyweight.quant.experts import take_apart
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
from pennyweight.records import Encoded, Sample
from pennyweight.teacher.across import AcrossTeacher
from pennyweight.teacher.alignment import compare
from pennyweight.teacher.cache import LABELLED_AS, CacheFacts, TargetCache, settled_keep
from pennyweight.teacher.endpoint import ANSWERS, ServedTeacher, endpoint_of
from pennyweight.teacher.local import LocalTeacher
from pennyweight.teacher.refusals import check_targets
from pennyweight.teacher.targets import Keep
from pennyweight.train.group import join
from pennyweight.train.optim import NO_FP8_PARTS


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
    def own_language(self) -> Language | None:
        """What the student brings: its folder's, or that of a tokenizer that is named; an endpoint's brings none."""
        t, s = self.recipe.teacher, self.recipe.student
        if isinstance(s, FolderStudent):
            return language_of(s.path, s.trust_remote_code)
        named = getattr(s, "tokenizer", None) or (t.tokenizer if isinstance(t, EndpointTeacher) else None)
        if named is None:
            return None
        tokenizer = open_tokenizer(named)
        return Language(tokenizer, len(tokenizer), self.recipe.data.context)

    @cached_property
    def language(self) -> Language:
        """Of all students of the run: the teacher's, where theirs is the same or it is not behind a server."""
        own = self.own_language
        if self.served and own:
            return own
        return own if own and difference(own.tokenizer, self.teacher.tokenizer) else self.teacher.language

    @property
    def apart(self) -> bool:
        """Whether the teacher is in this process and its tokens are not the student's."""
        return not self.served and self.language is self.own_language

    @cached_property
    def both(self) -> BothTokenizers | None:
        """The samples in the tokens of both, where they are apart and the teacher's distribution is asked for."""
        if not self.apart or self.recipe.method.kind == "sft":
            return None
        return BothTokenizers(self.language, self.teacher.language, self.context)

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
    def asked_in(self) -> int:
        """The longest sequence in which the teacher is asked, in its own tokens."""
        return min(self.recipe.data.context, self.teacher.context) if self.apart else self.context

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
        return LocalTeacher(self.teacher, self.compute, 128, temperature, top_p, max_tokens, self.asked_in)

    def encode(self, samples: list[Sample]) -> list[Encoded]:
        if self.both:
            return self.both.encode(samples, self.recipe.data.too_long)
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
        both = (student, *(() if self.served else (self.teacher.model,)))
        if self.recipe.train.pack and not all(keeps_samples_apart(m) for m in both):
            raise RecipeError(
                f"train.pack=true, but samples in one row of a {type(student).__name__} would see each other; set "
                "train.pack=false"
            )
        return student

    def _check_targets(self) -> None:
        m, t, precision = self.recipe.method, self.recipe.targets, getattr(self.recipe.targets, "precision", "auto")
        if m.kind == "sft":
            return  # which uses none
        check_targets(m, t, self.language.vocabulary, across=self.apart)
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

    def _first_student(self, seed: int) -> Any:
        s = self.recipe.student
        if s.kind == "shape":
            return from_shape(s.shape, self.language.tokenizer, self.context, seed, self.language.vocabulary)
        if s.kind == "cut":
            return cut(self.teacher.model, s).float()
        return fitted(self._opened(s.path, s.trust_remote_code), s.path, self.language, self.context)

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
        facts = {"kind": kind, "tokens": tokens, **made.facts(self.cache.keep)}
        return facts | ({"across": True} if self.both else {}), made.damaged

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
        told = self.cache.signal(batch, self.compute.device, lambda: self.local.head)
        return self.across.signal(batch.placed, told) if self.both and isinstance(told, Sparse) else told

    @property
    def labels(self) -> Any:
        """The teacher as it labels the student's tokens."""
        return self.served or (self.across if self.both else self.labelling)

    @cached_property
    def across(self) -> AcrossTeacher:
        """The teacher as it labels for a student of another tokenizer."""
        assert self.both
        bos, spellings = self.teacher.tokenizer.bos_token_id, self.both.spellings
        ends = self.both.ends(self.encoded), sorted(self.teacher.eos_ids | ({bos} - {None}))
        v = compare(*spellings, *ends, self.language.vocabulary, self.teacher.vocabulary)
        return AcrossTeacher(self.labelling, v, self.both.theirs)

    @cached_property
    def cache(self) -> TargetCache:
        """The targets of the training samples, on disk."""
        t, temperature = self.recipe.targets, getattr(self.recipe.method, "temperature", 1.0)
        assert not isinstance(t, DenseTargets)
        self._check_targets()
        keep = Keep(t.kind, 0.0, getattr(t, "k", 0), 1.0 if t.kind == "hidden" else temperature, t.precision)
        entries = self.across.vocabularies.trie.outcomes if self.both else self.language.vocabulary
        asked = {"teacher": self.labels.fingerprint, "compute": self.compute.name, "asked": t.model_dump(mode="json")}
        expected = lambda some, tried: self.labels.expected(some, tried, keep.temperature)  # noqa: E731
        keep = settled_keep(self.folder / LABELLED_AS, t, keep, self.encoded, entries, asked, expected)
        label = lambda some, keep: self.labels.targets(some, keep)  # noqa: E731
        made_by = f"{self.labels.fingerprint} on {self.compute.name}"
        return TargetCache(self.folder / "targets", made_by, keep, entries, t.shard, label)

    @cached_property
    def held_out(self) -> HeldOut:
        """Held-out samples and problems; the recipe's text, where it names one, in place of the samples."""
        samples = read_samples(self.folder / "data" / "eval.jsonl")
        return hold_out(samples, self.recipe.evaluate, self.language.tokenizer, self.context, self.encode)

    @property
    def teachers_held_out(self) -> HeldOut:
        """The same in the teacher's tokens."""
        if not self.apart:
            return self.held_out
        own, samples = self.teacher, read_samples(self.folder / "data" / "eval.jsonl")
        encode = lambda some: encode_all(some, own.tokenizer, own.context, "drop")  # noqa: E731
        return hold_out(samples, self.recipe.evaluate, own.tokenizer, own.context, encode)

    @property
    def reference(self) -> Loaded | None:
        """The teacher that models are measured against token by token; None where it is behind a server, which shows
        too little, or has other tokens."""
        return None if self.served or self.apart else self.teacher

    @property
    def measuring(self) -> Compute:
        """How evaluation computes: as training does on a GPU, in float32 elsewhere."""
        return self.compute if self.compute.device.type == "cuda" else replace(self.compute, autocast=None)
