"""A low-bit copy, and its recovery by distillation: a model teaches its own copy what rounding took from it.

Quantisation-aware distillation (QAD; NVIDIA, arXiv 2601.20088): forward KL to the full-precision parent at every token,
with straight-through gradients, and no labels. Either the parent stays in memory and labels every batch, or it labels
the samples once, before its weights are rounded, and an unbiased sample of its distributions is kept. A share of the
steps may be on-policy: on what the copy itself writes on from the samples' prompts (Agarwal et al., arXiv 2306.13649).
Loop, loss and kept targets are those of any distillation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from pennyweight.data.pack import Batch, Packer, collate
from pennyweight.errors import ModelError, RecipeError
from pennyweight.methods.kd import kd
from pennyweight.model.generate import generate
from pennyweight.model.loaded import Loaded, blocks_of
from pennyweight.quant.export import export, formats_of, storage_dtype
from pennyweight.quant.formats import Coded, Format
from pennyweight.quant.learned import RoundedLinear, rounded_once
from pennyweight.quant.rounding import Recovery, coded_for_storage, rounded_to
from pennyweight.recipe import SampledTargets
from pennyweight.records import Encoded
from pennyweight.settings import KdMethod, Quantize, Schedule
from pennyweight.teacher.cache import TargetCache
from pennyweight.teacher.local import LocalTeacher
from pennyweight.teacher.targets import Keep

_STEP = 0.01  # of a scale: how far a weight may move in a step, so that none jumps over codes
_PULL = 0.03  # of the way to a weight's code, at the last step
_CALIBRATED, _ROWS = 128, 16  # samples that GPTQ looks at, and how many at once

Fit = Callable[[nn.Module, Schedule, Callable[[int], list[Batch]]], object]
"""Trains a model in place: (model, schedule, batches by step)."""


def check_copies(opened: Callable[[Path], Loaded], q: Quantize, student: Path, work: Path) -> None:
    """Write a low-bit copy of the untouched student and open it, since not every architecture takes one.

    Raises:
        RecipeError: this one does not.
    """
    if not q.formats:
        return
    model = opened(student).model
    codes, _ = rounded_to(model, formats_of(model, q.formats[0], q.group))
    export(model, codes, student, work / "copy")
    try:
        opened(work / "copy")
    except ModelError as e:
        raise RecipeError(f"low-bit copies of this student would not work: {e}; set quantize.formats=[]") from None


def low_bit(
    parent: LocalTeacher,
    formats: dict[str, Format],
    method: str,
    samples: list[Encoded],
    recovery: Recovery | None,
    folder: Path,
    fit: Fit,
    counting: Callable[[str, int, str], AbstractContextManager[Any]],
    vectors: torch.dtype | None = None,
) -> dict[str, Coded]:
    """Codes of the Linears named in ``formats``; the parent's model becomes what will be read from the file.

    Args:
        method: ``absmax``, ``nearest``, ``awq`` or ``gptq``.
        samples: to calibrate and to recover with; of as many as are needed, the first by their hashes.
        folder: where the parent's targets are kept, so that an interrupted recovery goes on with them.
        vectors: what norms and biases are stored in, where that is not what matrices are.
        counting: (label, total, unit) -> a context that shows progress.
    """
    model = parent.loaded.model
    ordered = sorted(samples, key=lambda s: s.token_hash)
    teach: Callable[[dict[str, Coded]], object] | None = None
    if recovery is not None:
        chosen = ordered[: recovery.steps * recovery.batch]
        if recovery.live:
            next_batch = _live_lessons(parent, chosen, recovery)
        else:
            with counting("targets", len(chosen), "samples") as c:
                next_batch = _kept_lessons(parent, chosen, folder, recovery, c.advance)
        calmed = _calmed(model, recovery.steps, next_batch)
        teach = lambda codes: fit(model, _schedule(codes, recovery), calmed)  # noqa: E731
    some = ordered[:_CALIBRATED]
    ids = [collate([[s] for s in some[a : a + _ROWS]], parent.loaded.pad_id).ids for a in range(0, len(some), _ROWS)]
    batches = [{"input_ids": x.to(parent.compute.device)} for x in ids]
    with counting("calibrating", len(blocks_of(model)[1]), "blocks") as c:
        storage = storage_dtype(model) if vectors is None else torch.bfloat16  # a GGUF's matrices
        return coded_for_storage(model, formats, storage, method, batches, teach, vectors, c.advance)


def _schedule(codes: dict[str, Coded], r: Recovery) -> Schedule:
    """No weight decay, since the weights are right already, and a rate in proportion to the codes' scales."""
    rate = r.lr or _STEP * median(float((c.scale * c.whole).median()) for c in codes.values())
    settings = {"lr": rate, "floor": 0.0, "weight_decay": 0.0, "warmup": 0.05, "micro_batch": r.micro_batch}
    return Schedule(steps=r.steps, batch=r.batch, **settings)  # type: ignore[arg-type]


def _calmed(model: nn.Module, steps: int, next_batch: Callable[[int], list[Batch]]) -> Callable[[int], list[Batch]]:
    """The same batches, to be asked for once a step, as the loop does: before each, weights are drawn towards their
    codes, more and more from a fifth of the steps on.

    A weight whose best place is between two codes would otherwise go back and forth between them until the end, where
    chance decides (Nagel et al., arXiv 2203.11086, who add the distance to the loss).
    """

    def batches(step: int) -> list[Batch]:
        share = _PULL * (step / steps - 0.2) / 0.8
        for m in model.modules() if share > 0 else ():
            if isinstance(m, RoundedLinear):
                m.pull(share)
        return next_batch(step)

    return batches


def _live_lessons(parent: LocalTeacher, samples: list[Encoded], r: Recovery) -> Callable[[int], list[Batch]]:
    """Batches by step that carry the distributions of a parent which stays as it is."""
    whole = replace(parent, loaded=replace(parent.loaded, model=copy.deepcopy(parent.loaded.model)))
    given = Packer(samples, r.batch, r.micro_batch or r.batch, r.seed, parent.loaded.pad_id)

    def next_batch(step: int) -> list[Batch]:
        batches = given(step)
        if int((step + 1) * r.on_policy) > int(step * r.on_policy):
            seed = (r.seed * 1_000_003 + step) * 1_000_003
            batches = [_rewritten(parent, batch, seed + i) for i, batch in enumerate(batches)]
        return [kd(batch, KdMethod(), whole.dense) for batch in batches]

    return next_batch


def _rewritten(copied: LocalTeacher, batch: Batch, seed: int) -> Batch:
    """The batch with what the copy, as it is now, writes on from where each sample begins to be learnt."""
    model, ends = copied.loaded.model, copied.loaded.eos_ids
    samples = list(batch.placed)
    prompts = [s.ids[: s.loss_positions[0] + 1] for s in samples]
    room = max(len(s.ids) - len(p) for s, p in zip(samples, prompts, strict=True))
    settings: dict[str, Any] = {"temperature": 1.0, "eos_ids": ends, "pad_id": copied.loaded.pad_id, "seed": seed}
    model.eval()
    with rounded_once(model):
        longest = max(len(s.ids) for s in samples)
        written = generate(model, prompts, max_tokens=room, batch=len(prompts), context=longest, **settings)
    model.train()
    rows = []
    for sample, prompt, new in zip(samples, prompts, written, strict=True):
        ids = (*new.ids, *(() if new.end is None else (new.end,)))
        mask = (False,) * len(prompt) + (True,) * len(ids)
        rows.append([replace(sample, ids=(*prompt, *ids), mask=mask)])  # at least one token is written
    return collate(rows, copied.loaded.pad_id)


def _kept_lessons(
    parent: LocalTeacher, samples: list[Encoded], folder: Path, r: Recovery, progress: Callable[[int], None]
) -> Callable[[int], list[Batch]]:
    """Batches by step that carry the parent's targets, which are labelled now: it is not needed afterwards."""
    settings, device = SampledTargets(), parent.compute.device
    keep = Keep("sampled", settings.threshold)
    made_by = f"{parent.fingerprint} on {parent.compute.name}"
    cache = TargetCache(folder, made_by, keep, parent.loaded.vocabulary, settings.shard, parent.targets)
    cache.fill(samples, progress)
    batches = Packer(samples, r.batch, r.micro_batch or r.batch, r.seed, parent.loaded.pad_id)
    signal = lambda batch: cache.signal(batch, device, lambda: parent.head)  # noqa: E731
    return lambda step: [kd(batch, KdMethod(), signal) for batch in batches(step)]
