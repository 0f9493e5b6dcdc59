"""What the stages of a run share: the device, and models, samples and targets opened when first asked for."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pennyweight.data.both_tokenizers import BothTokenizers, encode_answered
from pennyweight.data.files import read_text
from pennyweight.data.pack import Batch, Packer, packer
from pennyweight.data.render import encode_all
from pennyweight.data.store import read_samples
from pennyweight.errors import RecipeError
from pennyweight.evaluate.agreement import Routed
from pennyweight.evaluate.held_out import HeldOut, check_harder, hold_out
from pennyweight.loss.signals import Sparse
from pennyweight.model.device import choose, set_threads
from pennyweight.model.head import check_packing
from pennyweight.model.load import language_of, load, open_tokenizer, stored_dtype
from pennyweight.model.loaded import Language, Loaded
from pennyweight.model.mixture import mixed
from pennyweight.model.options import check_options, ready
from pennyweight.model.projection import attach
from pennyweight.model.student import first
from pennyweight.model.token_bytes import difference, same_tokenizer
from pennyweight.progress import counting, say
from pennyweight.quant.experts import take_apart
from pennyweight.quant.scoring import check_scoring, for_scoring
from pennyweight.recipe import EndpointTeacher, Recipe, SeveralTeachers, TeacherSamples, TopKTargets
from pennyweight.records import Encoded, Sample
from pennyweight.settings import TEXT_ONLY, Schedule
from pennyweight.teacher.across import AcrossTeacher
from pennyweight.teacher.cache import LABELLED_AS, AssignedCache, CacheFacts, TargetCache, settled_keep
from pennyweight.teacher.endpoint import ServedTeacher, endpoint_of
from pennyweight.teacher.local import LocalTeacher
from pennyweight.teacher.paid import answers_of
from pennyweight.teacher.refusals import check_targets
from pennyweight.teacher.several import Team, added, cut_from, named_tokenizer, shared_language
from pennyweight.teacher.targets import Keep
from pennyweight.train.group import join
from pennyweight.train.optim import NO_FP8_PARTS


class Bench:
    """Everything is opened lazily: a run whose stages are all finished opens no model.

    Args:
        recipe: the resolved recipe.
        folder: the RUN folder.
        member: of a bench for one of several teachers (``team``), its name; ``whole`` is then that of the run.
    """

    def __init__(self, recipe: Recipe, folder: Path, member: str = "", whole: Bench | None = None):
        self.recipe, self.folder, self.member, self.whole, self.counting = recipe, folder, member, whole, counting
        self.prefix = f"{member}-" if member else ""  # of files that each teacher has its own of
        if recipe.evaluate.text:  # read now, so that a wrong path is not found out after all training
            read_text(Path(recipe.evaluate.text).expanduser(), recipe.evaluate.text)
        self.group = join()
        if self.group.size > 1 and recipe.train.moments == "fp8":
            raise RecipeError(NO_FP8_PARTS)
        self.threads = set_threads(recipe.compute.threads)
        self.compute = self.group.placed(choose(recipe.compute.device, recipe.compute.dtype))
        self.where = (self.compute.hardware, self.group.size, self.threads, self.compute.autocast is not None)

    @cached_property
    def team(self) -> Team | None:
        """Of several teachers, a bench each, as if it were the run's only one."""
        t, alone = self.recipe.teacher, lambda m: self.recipe.model_copy(update={"teacher": m})
        if not isinstance(t, SeveralTeachers):
            return None
        return Team(t, {n: Bench(alone(m), self.folder, n, self) for n, m in t.members.items()}, self.folder / "data")

    def of(self, member: str | None) -> Bench:
        """The bench of one of several teachers, with no other in memory; or this one."""
        return self.team.of(member) if self.team and member else self

    @cached_property
    def teacher_path(self) -> str:
        """The folder of the teacher, or its address; of several teachers, all."""
        if self.team:
            return ", ".join(b.teacher_path for b in self.team.benches.values())
        t = self.recipe.teacher
        return t.url if isinstance(t, EndpointTeacher) else getattr(t, "path", str(self.folder / "teacher"))

    @cached_property
    def teacher(self) -> Loaded:
        """The teacher in this process: on a GPU as it is stored, since it only reads; elsewhere in float32."""
        if self.team:
            return mixed(*self.team.parts(lambda bench: bench.local), 1.0).loaded
        dtype = None if self.compute.device.type == "cuda" else torch.float32
        trust = getattr(self.recipe.teacher, "trust_remote_code", False)
        opened = load(self.teacher_path, device=self.compute.device, dtype=dtype, trust_remote_code=trust)
        return replace(opened, name=f"{opened.name} ({self.member})") if self.member else opened

    def opened(self, path: str | Path) -> Loaded:
        """A folder that this run saved, in float32 on the run's device; it keeps the code its model came with."""
        came_with = self.recipe.teacher if self.recipe.student.kind == "cut" else self.recipe.student
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
        """What does not come from a teacher here: the student folder's, or a tokenizer's that is named, if any."""
        s, named = self.recipe.student, named_tokenizer(self.recipe)
        if s.kind == "folder":
            return language_of(s.path, s.trust_remote_code)
        return Language.of(open_tokenizer(named), self.recipe.data.context) if named else None

    @cached_property
    def language(self) -> Language:
        """Of the students: the teachers', but where theirs is another, or all teachers are behind servers."""
        t, own = self.recipe.teacher, self.own_language
        if self.whole:
            return self.whole.language
        if isinstance(t, SeveralTeachers) and (shared := shared_language(t, language_of, own)):
            return shared
        apart = own and (self.served or self.team or difference(own.tokenizer, self.teacher.tokenizer))
        return own if own and apart else self.teacher.language

    @property
    def apart(self) -> bool:
        """Whether the teacher is in this process and its tokens are not the student's."""
        return not (self.served or self.team or self.whole) and self.language is self.own_language

    @cached_property
    def both(self) -> BothTokenizers | None:
        """The samples in the tokens of both, where they are apart and the teacher's distribution is asked for."""
        asked = self.apart and self.recipe.method.kind not in TEXT_ONLY
        return BothTokenizers(self.language, self.teacher.language, self.context) if asked else None

    @cached_property
    def context(self) -> int:
        return self.whole.context if self.whole else min(self.recipe.data.context, self.language.context)

    @cached_property
    def served(self) -> ServedTeacher | None:
        """The teacher at an endpoint, if it is one, as it answers prompts; its answers are kept in the RUN folder."""
        t, r = self.recipe.teacher, self.recipe.data.responses
        if not isinstance(t, EndpointTeacher):
            return None
        tokenizer = open_tokenizer(t.tokenizer) if t.tokenizer else None
        how = (tokenizer, r.temperature, r.top_p, r.max_tokens, self.member)
        return ServedTeacher(endpoint_of(t, self.folder / answers_of(self.member)), t.api, *how)

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
        if self.team:
            return mixed(*self.team.parts(lambda b: b.labelling), getattr(self.recipe.method, "temperature", 1.0))
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
        how = encode_answered if self.apart else encode_all
        encoded = how(samples, self.language.tokenizer, self.context, self.recipe.data.too_long)
        return [e for e in (e.learnt_from(self.untold) for e in encoded) if e.loss_positions]

    @cached_property
    def untold(self) -> int:
        """First tokens of a text that are not learnt, because a server that labels tells nothing of them."""
        t = self.recipe.targets
        if self.team:
            return max(b.untold for b in self.team.benches.values())
        if not self.served or self.recipe.method.kind in TEXT_ONLY or not isinstance(t, TopKTargets):
            return 0
        return 2 if self.served.telling(t.k).silent_first else 0

    def asked(self) -> dict[str, Any]:
        """What a server was asked for, as it counts, and the first tokens of a text that are not learnt."""
        served = [b.served for b in (self.team.benches.values() if self.team else [self]) if b.served]
        return {"untold": self.untold, "usage": added([s.endpoint.paid.usage for s in served])} if served else {}

    @cached_property
    def encoded(self) -> list[Encoded]:
        """The training samples as tokens; of one of several teachers, those that are its."""
        if self.whole and self.whole.team:
            return [e for e in self.whole.encoded if self.whole.team.owner(e) == self.member]
        return self.encode(read_samples(self.folder / "data" / "train.jsonl"))

    def batches(self, schedule: Schedule, seed: int) -> Packer:
        """The training samples in the order of ``seed``; of each step what this process has of it."""
        whole = packer(self.encoded, schedule, seed, self.language.pad_id, self.context)
        return replace(whole, rank=self.group.rank, ranks=self.group.size)

    def first_student(self, seed: int) -> Any:
        """The student before training: given, made from nothing by ``seed``, or cut from the teacher. What the run
        could not do is refused now, not after hours of writing and training."""
        cut_from_it = lambda: self.of(cut_from(self.recipe)).teacher.model  # noqa: E731
        student = first(self.recipe.student, self.language, self.context, seed, cut_from_it, self._opened)
        self._check_targets()
        check_options(student, self.recipe.train)
        check_harder(self.recipe.evaluate)
        if self.recipe.train.pack and not self.served and (not self.team or self.team.mixture):
            check_packing(self.teacher.model)
        return student

    def _check_targets(self) -> None:
        m, t, precision = self.recipe.method, self.recipe.targets, getattr(self.recipe.targets, "precision", "auto")
        if m.kind != "kd":
            return  # which uses none
        for name in self.team.benches if self.team else ():
            self.of(name)._check_targets()
        check_targets(m, t, self.language.vocabulary, across=self.apart)
        if self.served and isinstance(t, TopKTargets):
            same_tokenizer(self.served.tokenizer, self.language.tokenizer)
            self.served.telling(t.k)
        elif precision != "auto" and not self.team:
            check_scoring(self.teacher.model, precision)

    @property
    def student_dtype(self) -> torch.dtype:
        """What students are kept in: as the teacher is stored where they are cut from it, or as they were given."""
        s, source = self.recipe.student, self.team.benches[cut_from(self.recipe)] if self.team else self
        return torch.float32 if s.kind == "shape" else stored_dtype(source.teacher_path if s.kind == "cut" else s.path)

    def label(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Facts of the targets, and names of shards that were damaged and are made again; live ones store nothing."""
        tokens = sum(len(e.loss_positions) for e in self.encoded)
        kind = "text" if self.recipe.method.kind in TEXT_ONLY else self.recipe.targets.kind
        if kind in ("text", "dense"):
            return {"kind": kind, "tokens": tokens, "bytes": 0, "bytes_per_token": 0.0, "entries_per_token": None}, ()
        made = self.fill_cache()
        if over := made.over(getattr(self.recipe.targets, "budget", float("inf"))):
            say(over)
        facts = {"kind": kind, "tokens": tokens, "across": self.both is not None}
        return facts | made.facts(self.cache.keep), made.damaged

    def fill_cache(self, own: bool = True) -> CacheFacts:
        """Label what is not labelled yet; ``own`` is False for a process that helps the run it is not."""
        with (self.whole or self).counting("targets", len(self.encoded), "samples") as c:
            made = self.cache.fill(self.encoded, c.advance, clean=own and self.group.first)
        for held in ("labelling", "teacher") if self.team else ("labelling",):  # not needed any more
            self.__dict__.pop(held, None)
        if self.both:
            self.across = replace(self.across, teacher=self.local)
        if self.team:
            self.team.put_away()
        return made

    def signal(self, batch: Batch):
        """The teacher at a batch's loss positions, live or from the cache."""
        if self.recipe.targets.kind == "dense":
            return self.labelling.dense(batch)
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
        v, own = self.both.vocabularies(self.encoded, self.teacher.ends), self.teacher.language
        return AcrossTeacher(self.labelling, v, self.both.theirs, own.identity)

    @cached_property
    def cache(self) -> TargetCache | AssignedCache:
        """The targets of the training samples, on disk."""
        if self.team and not self.team.mixture:
            return AssignedCache(self.team.owner, lambda name: self.of(name).cache)  # type: ignore[arg-type]
        t, temperature = self.recipe.targets, getattr(self.recipe.method, "temperature", 1.0)
        assert t.kind != "dense"
        self._check_targets()
        keep = Keep(t.kind, 0.0, getattr(t, "k", 0), 1.0 if t.kind == "hidden" else temperature, t.precision)
        entries = self.across.vocabularies.trie.outcomes if self.both else self.language.vocabulary
        made_by = (self.across if self.both else self.answering).fingerprint
        asked = {"teacher": made_by, "compute": self.compute.name, "asked": t.model_dump(mode="json")}
        expected = lambda some, tried: self.labels.expected(some, tried, keep.temperature)  # noqa: E731
        file = self.folder / f"{self.prefix}{LABELLED_AS}"
        keep = settled_keep(file, t, keep, self.encoded, entries, asked, expected)
        label = lambda some, keep: self.labels.targets(some, keep)  # noqa: E731
        return TargetCache(self.folder / "targets", f"{made_by} on {self.compute.name}", keep, entries, t.shard, label)

    @cached_property
    def held_out(self) -> HeldOut:
        """Held-out samples and problems; the recipe's text, where it names one, in place of the samples."""
        r, mine = self.recipe, (self.language.tokenizer, self.context, self.encode)
        return hold_out(self.folder / "data", r.evaluate, r.seed, *mine)

    @property
    def teachers_held_out(self) -> HeldOut:
        """The same in the teacher's tokens."""
        if not self.apart:
            return self.held_out
        r, tokenizer = self.recipe, self.teacher.tokenizer
        encode = lambda some: encode_all(some, tokenizer, self.asked_in, "truncate")  # noqa: E731
        return hold_out(self.folder / "data", r.evaluate, r.seed, tokenizer, self.asked_in, encode)

    @property
    def measurable(self) -> bool:
        """Whether the teacher can be measured: a server shows too little, and a text has none of several."""
        return self.team.measurable(self.recipe.evaluate.text) if self.team else not self.served

    @property
    def reference(self) -> Loaded | Routed | None:
        """The teacher that models are measured against, of several each sample's own; None where none can be."""
        if self.measurable and self.team and not self.team.mixture:
            return Routed(self.team.owner, lambda name: self.of(name).teacher, self.language.tokenizer)
        return self.teacher if self.measurable and not self.apart else None
