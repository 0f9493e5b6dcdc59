"""Bytes of a device that a stage's passes take at their most, part by part, from shapes alone: arithmetic, no torch.

What is cut over devices and what is not is as ``docs/processes.md`` has it: training of an arm by sft or kd has its
weights, gradients and moments cut, with the block at work and the tables whole on each device; a teacher beside it, and
all that is not such a training, is whole on one device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pennyweight.plan.passes import Pass, Work
from pennyweight.plan.shapes import Shapes
from pennyweight.plan.sizes import (
    Way,
    activation_bytes,
    cache_bytes,
    cast_bytes,
    loss_bytes,
    moment_bytes,
    step_bytes,
)
from pennyweight.recipe import Recipe, TrainedTeacher
from pennyweight.settings import Schedule

PROCESS = 0.45e9
"""Bytes of a process that has torch and transformers in it: 0.43 to 0.50 GB on Linux, torch 2.13 for CPUs. On a GPU
they are in main memory, and the device's own context takes about as much."""

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "teacher", "kv_cache", "process")
"""What the bytes of a stage are of; ``teacher`` are its weights where it does not train."""

Parts = dict[str, float]

_OF_BASE = {"int8": 1 + 2 / 32, "int4": 0.5 + 2 / 32, "nvfp4": 0.5 + 1 / 16}  # bytes of a frozen number, by lora.base


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stage runs. ``device``: ``cpu`` or ``cuda``; ``devices``: over which its training is cut; ``context``:
    tokens of the longest row, which the high end has; ``teacher``: whose passes are the teacher's."""

    device: str
    autocast: bool
    devices: int
    context: int
    teacher: Shapes | None = None


def of_stage(
    work: Work, recipe: Recipe, teacher: Shapes | None, device: str, autocast: bool, devices: int, end: int = 2
) -> Parts:
    """What a stage of a recipe takes of each of so many devices, part by part; ``end`` as ``taken`` has it."""
    t = recipe.teacher
    own = t if work.stage == "teacher" and isinstance(t, TrainedTeacher) else None
    s, context = (own.schedule, own.context) if own else (recipe.train, recipe.data.context)
    return taken(work.passes, s, Place(device, autocast, devices if work.shared else 1, context, teacher), end)


def taken(passes: Sequence[Pass], s: Schedule, at: Place, end: int) -> Parts:
    """The most that is there at once: the process, each model once, and the largest of what its passes do.

    Args:
        s: how what is trained is trained.
        end: 0, 1 or 2: low, middle, high.
    """
    out: Parts = dict.fromkeys(PARTS, 0.0) | {"process": PROCESS}
    trained = {id(p.shapes) for p in passes if p.kind == "train"}
    for shapes in {id(p.shapes): p.shapes for p in passes if id(p.shapes) not in trained}.values():
        teaches = shapes is at.teacher  # on a GPU it is there as it is stored, a student in float32
        number = 2 if teaches and at.device == "cuda" else 4
        out["teacher" if teaches else "weights"] += number * shapes.parameters
    most = max((_of(p, s, at, end) for p in passes), key=lambda parts: sum(parts.values()), default={})
    for name, bytes_ in most.items():
        out[name] += bytes_
    return out


def _of(p: Pass, s: Schedule, at: Place, end: int) -> Parts:
    """What a pass needs besides the models that it only reads."""
    length = min(at.context, round(p.padded * (p.length[end] + p.new[end])) or 1) if end < 2 else at.context
    shared = math.ceil(p.rows / (1 if p.apart else at.devices))
    rows = max(1, round(min(shared, p.micro or shared)))
    if p.kind == "train":
        return _trained(p, s, rows, length, at)
    if p.kind == "write":
        cache = cache_bytes(p.shapes, rows, length, 16) * (2 if at.device == "cpu" else 1)
        return {"kv_cache": float(cache), "logits": 4.0 * rows * p.shapes.vocabulary}
    tile = Way("", 4, "float32", at.autocast)
    logits = loss_bytes(p.shapes, tile, rows * length, at.device)
    return {"activations": 4.0 * rows * length * p.shapes.hidden * 4, "logits": float(logits)}


def _trained(p: Pass, s: Schedule, rows: int, length: int, at: Place) -> Parts:
    shapes, rank = p.shapes, p.rank
    way = Way("", 2 if s.weights == "bfloat16" else 4, s.moments, at.autocast, s.precision != "full")
    factors = rank * sum(sum(t.shape) for t in shapes.all_tensors if t.kind == "linear")
    weights = float(way.weight * (shapes.parameters + factors) + cast_bytes(shapes, way))
    if rank and s.lora and s.lora.base != "full":
        weights -= (way.weight - _OF_BASE[s.lora.base]) * shapes.counted("linear")
    gradients = way.weight * (factors if rank else shapes.parameters)
    moments = 8 * factors if rank else moment_bytes(shapes, s.moments)
    activations = float(activation_bytes(shapes, way, rows, length, at.device))
    if p.recompute:
        inputs = len(shapes.blocks) * rows * length * shapes.hidden * way.weight
        activations = inputs + activations / max(1, len(shapes.blocks))
    logits = float(loss_bytes(shapes, way, max(1, round(p.learnt * rows * length)), at.device))
    step = 0.0 if rank else step_bytes(shapes, s.moments, at.device) / at.devices
    if at.devices > 1:
        weights = weights / at.devices + way.weight * _gathered(shapes)
    out = {"weights": weights, "gradients": gradients / at.devices, "optimizer": moments / at.devices}
    if step > activations + logits:  # the optimizer works when activations are gone
        return out | {"optimizer": out["optimizer"] + step}
    return out | {"activations": activations, "logits": logits}


def _gathered(shapes: Shapes) -> int:
    """Parameters that are whole on each device while a block is at work: the largest block's, and the tables."""
    return shapes.counted("table") + max(sum(t.count for t in b.tensors) for b in shapes.blocks)
