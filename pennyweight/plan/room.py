"""Bytes of a device that a stage's passes take at their most, from shapes alone: arithmetic, no torch."""

from __future__ import annotations

from collections.abc import Sequence

from pennyweight.plan.passes import Pass
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
from pennyweight.settings import Schedule

PROCESS = 0.45e9
"""Bytes of a process that has torch and transformers in it: 0.43 to 0.50 GB on Linux, torch 2.13 for CPUs. On a GPU
they are in main memory, and the device's own context takes about as much."""


def taken(passes: Sequence[Pass], s: Schedule, context: int, autocast: bool, device: str, end: int) -> float:
    """The most that is there at once: the process, each model once, and the largest of what its passes do.

    Args:
        s: how what is trained is trained.
        context: tokens of the longest row, which the high end has.
        device: ``cpu`` or ``cuda``.
        end: 0, 1 or 2: low, middle, high.
    """
    trained = {id(p.shapes) for p in passes if p.kind == "train"}
    read = {id(p.shapes): p.shapes for p in passes if id(p.shapes) not in trained}
    number = 4 if device == "cpu" else 2
    held = PROCESS + sum(number * shapes.parameters for shapes in read.values())
    return held + max((_of(p, s, context, autocast, device, end) for p in passes), default=0.0)


def _of(p: Pass, s: Schedule, context: int, autocast: bool, device: str, end: int) -> float:
    length = min(context, round(p.padded * (p.length[end] + p.new[end])) or 1) if end < 2 else context
    rows = max(1, round(min(p.rows, s.micro_batch or p.rows) if p.kind == "train" else p.rows))
    if p.kind == "train":
        return _trained(p.shapes, p.rank, p.recompute, s, rows, length, p.learnt, autocast, device)
    if p.kind == "write":
        return cache_bytes(p.shapes, rows, length, 16) * (2 if device == "cpu" else 1)
    tile = Way("", 4, "float32", autocast)
    return loss_bytes(p.shapes, tile, rows * length, device) + 4 * rows * length * p.shapes.hidden * 4


def _trained(
    shapes: Shapes,
    rank: int,
    recompute: bool,
    s: Schedule,
    rows: int,
    length: int,
    learnt: float,
    autocast: bool,
    device: str,
) -> float:
    way = Way("", 2 if s.weights == "bfloat16" else 4, s.moments, autocast, s.precision != "full")
    changed = rank * sum(sum(t.shape) for t in shapes.all_tensors if t.kind == "linear") if rank else shapes.parameters
    moments = 8 * changed if rank else moment_bytes(shapes, s.moments)
    kept = way.weight * (shapes.parameters + changed) + cast_bytes(shapes, way) + moments
    activations = float(activation_bytes(shapes, way, rows, length, device))
    if recompute:
        inputs = len(shapes.blocks) * rows * length * shapes.hidden * way.weight
        activations = inputs + activations / max(1, len(shapes.blocks))
    at_work = activations + loss_bytes(shapes, way, max(1, round(learnt * rows * length)), device)
    return kept + max(at_work, 0 if rank else step_bytes(shapes, s.moments, device))
