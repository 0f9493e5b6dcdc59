"""What the stages of a run share: the device, and models, samples and targets opened when first asked for."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pennyweight.data.pack import Batch, Packer
from pennyweight.data.render import encode_all, learnt_bytes, prompt_ids, windows
from pennyweight.data.store import read_samples
from pennyweight.evaluate.held_out import HeldOut
from pennyweight.model.device import Compute, choose, set_threads
from pennyweight.model.load import load, same_tokenizer
from pennyweight.model.loaded import Loaded
from pennyweight.model.student import cut, from_shape
from pennyweight.progress import counting
from pennyweight.quant.export import codable
from pennyweight.recipe import FolderTeacher, Recipe, SampledTargets, Schedule, TeacherSamples
from pennyweight.records import Encoded, Sample
from pennyweight.teacher.cache import CacheFacts, TargetCache
from pennyweight.teacher.local import LocalTeacher


class Bench:
    """Everything is opened lazily: a run whose stages are all finished opens no model.

    Args:
        recipe: the resolved recipe.
        folder: the RUN folder.
    """

    def __init__(self, recipe: Recipe, folder: Path):
        self.recipe, self.folder = recipe, folder
        set_threads(recipe.compute.threads)
        self.compute = choose(recipe.compute.device, recipe.compute.dtype)

    @cached_property
    def teacher_path(self) -> str:
        t = self.recipe.teacher
        return t.path if isinstance(t, FolderTeacher) else str(self.folder / "teacher")

    @cached_property
    def teacher(self) -> Loaded:
        t = self.recipe.teacher
        return self.opened(self.teacher_path, isinstance(t, FolderTeacher) and t.trust_remote_code)

    def opened(self, path: str | Path, trust_remote_code: bool = False) -> Loaded:
        """A model folder, in float32 on the run's device."""
        return load(str(path), device=self.compute.device, dtype=torch.float32, trust_remote_code=trust_remote_code)

    @cached_property
    def context(self) -> int:
        return min(self.recipe.data.context, self.teacher.context)

    @cached_property
    def answering(self) -> LocalTeacher:
        """The teacher as it labels, and answers prompts."""
        r = self.recipe.data.responses
        return self._writing(r.temperature, r.top_p, r.max_tokens)

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
        """The training samples in the order of ``seed``."""
        return packer(self.encoded, schedule, seed, self.teacher.pad_id, self.context)

    def first_student(self, seed: int) -> Any:
        """The student before training: given, made from nothing by ``seed``, or cut from the teacher."""
        student = self._first_student(seed)
        if self.recipe.quantize.formats:
            codable(student)  # refused now, not after hours of training
        return student

    def _first_student(self, seed: int) -> Any:
        s = self.recipe.student
        if s.kind == "shape":
            return from_shape(s.shape, self.teacher.tokenizer, self.context, seed)
        if s.kind == "cut":
            return cut(self.teacher.model, s)
        given = self.opened(s.path, s.trust_remote_code)
        same_tokenizer(self.teacher.tokenizer, given.tokenizer)
        return given.model

    def label(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Facts of the targets, and names of shards that were damaged and are made again; live ones store nothing."""
        tokens = sum(len(e.loss_positions) for e in self.encoded)
        kind = self.recipe.targets.kind
        if self.recipe.method.kind == "sft" or kind == "dense":
            return {"kind": kind, "tokens": tokens, "bytes": 0, "bytes_per_token": 0.0, "entries_per_token": None}, ()
        made = self.fill_cache()
        facts = {
            "bytes": made.bytes,
            "bytes_per_token": made.bytes_per_token,
            "entries_per_token": made.entries / tokens,
        }
        return {"kind": kind, "tokens": tokens, **facts}, made.damaged

    def fill_cache(self) -> CacheFacts:
        """Label what is not labelled yet."""
        with counting("targets", len(self.encoded), "samples") as c:
            return self._cache.fill(self.encoded, c.advance)

    def signal(self, batch: Batch):
        """The teacher at a batch's loss positions, live or from the cache."""
        if self.recipe.targets.kind == "dense":
            return self.answering.dense(batch)
        if not self._cache.filled:
            self.fill_cache()
        return self._cache.signal(batch, self.compute.device)

    @cached_property
    def _cache(self) -> TargetCache:
        t = self.recipe.targets
        assert isinstance(t, SampledTargets)
        temperature = getattr(self.recipe.method, "temperature", 1.0)
        place = self.folder / "targets"
        return TargetCache(place, self.teacher.fingerprint, t.threshold, temperature, t.shard, self.answering.targets)

    @cached_property
    def held_out(self) -> HeldOut:
        """Held-out samples and problems; the recipe's text, where it names one, in place of the samples."""
        e, tokenizer = self.recipe.evaluate, self.teacher.tokenizer
        samples = read_samples(self.folder / "data" / "eval.jsonl")
        encoded = windows(e.text, tokenizer, self.context) if e.text else self.encode(samples)
        problems = [s for s in samples if s.task][: e.problems]
        prompts = [prompt_ids(s, tokenizer) for s in problems]
        openings = [_opening(x) for x in encoded[: e.shown]]
        return HeldOut(encoded, learnt_bytes(encoded, tokenizer), problems, prompts, openings)

    @property
    def measuring(self) -> Compute:
        """How evaluation computes: as training does on a GPU, in float32 elsewhere."""
        return self.compute if self.compute.device.type == "cuda" else replace(self.compute, autocast=None)


def packer(samples: list[Encoded], schedule: Schedule, seed: int, pad_id: int, context: int) -> Packer:
    """Batches as a schedule wants them."""
    s = schedule
    return Packer(samples, s.batch, s.micro_batch or s.batch, seed, pad_id, s.pack, context)


def _opening(sample: Encoded) -> list[int]:
    """A sample up to its first learnt token, and of a text (learnt from the start) a few tokens more."""
    first = sample.mask.index(True) if True in sample.mask else len(sample.ids)
    return list(sample.ids[: first if first > 1 else 1 + min(12, len(sample.ids) // 2)])
