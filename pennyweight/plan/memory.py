"""Bytes that training a model and using it take, from its shapes alone: arithmetic, no weights, no torch.

``plan/sizes.py`` has the terms. The peak of training is the weights, gradients and moments with the larger of two:
activations and the loss at work; or what the optimizer needs in passing, when activations are gone.
``tests/test_plan_memory.py`` holds activations and peak to what torch keeps and allocates on a CPU, on several
architectures, within ``ACCURACY``.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pennyweight.errors import RecipeError
from pennyweight.plan.architectures import read_shapes
from pennyweight.plan.shapes import Shapes
from pennyweight.plan.sizes import (
    WAYS,
    Way,
    activation_bytes,
    cache_bytes,
    cast_bytes,
    loss_bytes,
    moment_bytes,
    step_bytes,
)
from pennyweight.quant.footprint import OF_EXPERTS, STORED, near_divisor, stored_bytes

ACCURACY = 0.1
"""Share by which activations and peak may be off."""

DEVICES = ("cuda", "cpu")
_LENGTH = 2048  # tokens in a row, where none are asked for


@dataclass(frozen=True, slots=True)
class Row:
    """Bytes that one way takes. ``settings``: the recipe's, or how many bits the KV cache has."""

    way: str
    settings: str
    weights: int
    gradients: int = 0
    moments: int = 0
    activations: int = 0
    kv_cache: int = 0
    logits_tile: int = 0
    optimizer_step: int = 0

    @property
    def peak(self) -> int:
        """The most that is there at once."""
        at_work = self.activations + self.kv_cache + self.logits_tile
        return self.weights + self.gradients + self.moments + max(at_work, self.optimizer_step)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "peak": self.peak}


def memory(model: str, batch: int = 1, length: int | None = None, device: str = "cuda") -> dict[str, Any]:
    """What the model whose config.json (or folder) ``model`` is takes to train and to use; every size in bytes.

    Args:
        batch: rows of a forward pass.
        length: tokens in a row; default: as many as the model takes, 2,048 at most.
        device: ``cuda``, where attention is taken to be fused, or ``cpu``.

    Raises:
        ModelError: config.json cannot be read, or is of an architecture that is not known.
        RecipeError: the model takes no row of that length, or there is no such device.
    """
    shapes = read_shapes(model)
    if device not in DEVICES:
        raise RecipeError(f"memory is planned for {' or '.join(DEVICES)}, not for {device!r}; give one of them")
    length = length or min(shapes.context, _LENGTH)
    if length > shapes.context:
        raise RecipeError(
            f"--length={length} is more than the {shapes.context:,} tokens that {model} takes; give that or less"
        )
    used, notes = _used(shapes, batch, length)
    trains = [w for w in WAYS if not w.fp8 or shapes.counted("linear")]
    place = Path(model).expanduser().resolve()
    return {
        "model": place.parent.name if place.name == "config.json" else place.name,
        "architecture": shapes.architecture,
        "parameters": shapes.parameters,
        "experts": shapes.counted("experts"),
        "vocabulary": shapes.vocabulary,
        "layers": len(shapes.blocks),
        "hidden": shapes.hidden,
        "batch": batch,
        "length": length,
        "device": device,
        "accuracy": ACCURACY,
        "train": [_trained(shapes, way, batch, length, device).to_json() for way in trains],
        "use": [row.to_json() for row in used],
        "notes": notes,
    }


def _trained(shapes: Shapes, way: Way, batch: int, length: int, device: str) -> Row:
    return Row(
        way=way.name,
        settings=way.settings,
        weights=way.weight * shapes.parameters + cast_bytes(shapes, way),
        gradients=way.weight * shapes.parameters,
        moments=moment_bytes(shapes, way.moments),
        activations=activation_bytes(shapes, way, batch, length, device),
        logits_tile=loss_bytes(shapes, way, batch * length, device),
        optimizer_step=step_bytes(shapes, way.moments, device),
    )


def _used(shapes: Shapes, batch: int, length: int) -> tuple[list[Row], list[str]]:
    """Rows of ``bfloat16`` and of each format that a copy can be written in; and what is to be said of them."""
    copies = {"bfloat16": 2 * shapes.parameters} | {f: n for f in STORED if (n := copy_bytes(shapes, f)) is not None}
    notes = []
    if left := [f for f in STORED if f not in copies]:
        why = "their blocks divide none of its widths, or transformers opens no experts in them"
        why = why if shapes.coded else "they are of Linears, of which it has none"
        notes.append(f"left out, since {why}: {', '.join(left)}")
    if not shapes.coded:
        notes.append("train.precision=fp8 is left out: it computes Linears, of which this architecture has none")
    if experts := shapes.counted("experts"):
        notes.append(
            f"{experts:,} of the parameters are experts, whose activations in fp8 are an estimate to 10 %, too"
        )
    logits = 4 * batch * shapes.vocabulary
    rows = [
        Row(name, f"KV cache in {bits} bits", n, kv_cache=cache_bytes(shapes, batch, length, bits), logits_tile=logits)
        for name, n in copies.items()
        for bits in (16, 8)
    ]
    return rows, notes


def copy_bytes(shapes: Shapes, fmt: str) -> int | None:
    """Bytes of the low-bit copy that ``quantize`` writes with its defaults (a mixture of experts in fp8: in DeepSeek's
    layout): Linears in ``fmt`` where its blocks divide them, all else in 16 bits; None where it writes none."""
    sparse, group, scale = shapes.counted("experts") > 0, 32, None
    if sparse and fmt not in (*OF_EXPERTS, "fp8_block"):
        return None
    if sparse:  # one group for all, which divides every width; DeepSeek's scales are float32
        common = near_divisor(math.gcd(*(columns for _, columns, _ in shapes.coded)), group)
        if common is None and not fmt.startswith("fp8"):
            return None
        group = common or group
        scale = 4 if fmt == "fp8_block" else None
    stored = [(r * c * n, stored_bytes(fmt, r, c, group, scale), n) for r, c, n in shapes.coded]
    if all(one is None for _, one, _ in stored):
        return None
    coded = sum(2 * numbers if one is None else n * one for numbers, one, n in stored)
    return 2 * (shapes.parameters - sum(numbers for numbers, _, _ in stored)) + coded
