"""What writing a million tokens takes with a finished model, on a chip of the catalogue: arithmetic, no torch.

A step writes a token for each of the rows at work. It reads all weights once (of a mixture the experts that its tokens
go to) and each row's KV cache, at a share of the chip's bandwidth; and it multiplies, at a share of its peak. It takes
the longer of the two, and for each layer the time in which its operations are started. Alone, a row waits for the
weights; many rows share them, until their caches or their products are what is waited for. Shares and a layer's time
are assumed: no serving of this toolkit's copies was measured on these chips.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from pennyweight.plan.flops import decode
from pennyweight.plan.forecast import Range, money
from pennyweight.plan.hardware import Chip, PriceRange
from pennyweight.plan.memory import copy_bytes
from pennyweight.plan.shapes import Shapes
from pennyweight.plan.sizes import cache_bytes

BANDWIDTH, PRODUCTS = (0.5, 0.7, 0.85), (0.3, 0.45, 0.6)
"""Shares of the chip's bandwidth and of its dense peak that decoding is taken to reach: low, middle, high."""

LAYER = (60e-6, 40e-6, 20e-6)
"""Seconds of a layer's operations in a step that is recorded once and replayed: about ten of them."""

PLAIN = "bf16"
SERVED_IN = ("fp8_block", "int8", "int4")
"""Formats whose serving is told of, where no recipe names any."""

_MOST, _FULL = 256, 0.9  # rows at a time; of a device's memory
_COUNTS = (1, 2, 4, 8, 16, 32, 64)  # devices that a model is cut over
_IN_FP8 = ("fp8_block", "fp8_row", "mxfp8")  # whose products are in fp8, where a chip has it; others widen weights


def serving(
    shapes: Shapes, formats: Iterable[str], chip: Chip, context: int, price: PriceRange | None
) -> dict[str, Any] | None:
    """Of the model in 16 bits and in each format: tokens a second alone and many at once, and money for a million, on
    as few devices as hold it; None on what is no chip of the catalogue."""
    if not {"bandwidth", "memory", "bf16"} <= set(chip.figures) or chip.key == "this":
        return None
    rows = []
    for name in (PLAIN, *formats):
        weights = 2 * shapes.parameters if name == PLAIN else copy_bytes(shapes, name)
        if weights is not None and (row := _served(shapes, name, float(weights), chip, context, price)):
            rows.append(row)
    return {
        "chip": chip.name,
        "context": context,
        "currency": price.currency if price else None,
        "formats": rows,
        "reason": _reason(chip, context, price),
    }


def _reason(chip: Chip, context: int, price: PriceRange | None) -> str:
    wide, busy = (f"{some[0]:.0%} to {some[2]:.0%}" for some in (BANDWIDTH, PRODUCTS))
    layer = f"{1e6 * LAYER[2]:.0f} to {1e6 * LAYER[0]:.0f} microseconds a layer"
    return (
        f"{wide} of {chip['bandwidth']:,.0f} GB/s, {busy} of the peak, and {layer} (all assumed), on as few devices as "
        f"hold it, each row with {context:,} tokens before it; counted are tokens that are written, by devices "
        f"that are never idle, and not the reading of prompts{f'; {price.reason}' if price else ''}"
    )


def _served(
    shapes: Shapes, name: str, weights: float, chip: Chip, context: int, price: PriceRange | None
) -> dict[str, Any] | None:
    """One format; None where 64 devices do not hold it with a row."""
    each, cache = _FULL * 1e9 * chip["memory"], cache_bytes(shapes, 1, context, 16)
    devices = next((n for n in _COUNTS if weights + cache <= n * each), None)
    if devices is None:
        return None
    room = int((devices * each - weights) // max(1, cache))
    many = max(n for n in (2**i for i in range(_MOST.bit_length())) if n <= min(room, _MOST))
    out: dict[str, Any] = {"format": name, "bytes": weights, "devices": devices}
    for key, rows in (("alone", 1), ("many", many)):
        out[key] = _step(shapes, name, weights, chip, devices, rows, context)
        if price is not None:
            speeds = out[key]["tokens_per_second"]
            hours = Range(*(devices * 1e6 / 3600 / speeds[end] for end in ("high", "middle", "low")), reason="")
            paid = asdict(money(hours, price))
            out[key]["money"] = {end: paid[end] for end in ("low", "middle", "high")}
    return out


def _step(
    shapes: Shapes, name: str, weights: float, chip: Chip, devices: int, rows: int, context: int
) -> dict[str, Any]:
    """A token of each of so many rows: how many a second, and what is waited for."""
    read = weights * _met(shapes, rows) + cache_bytes(shapes, rows, context, 16)
    flops = rows * decode(shapes, context).total
    peak = devices * chip.peak("fp8" if name in _IN_FP8 else "bf16")[0]
    seconds = [
        {
            "bandwidth": read / (wide * devices * 1e9 * chip["bandwidth"]),
            "products": flops / (busy * peak),
            "operations": layer * len(shapes.blocks),
        }
        for wide, busy, layer in zip(BANDWIDTH, PRODUCTS, LAYER, strict=True)
    ]
    times = [max(s["bandwidth"], s["products"]) + s["operations"] for s in seconds]
    speeds = {end: rows / time for end, time in zip(("low", "middle", "high"), times, strict=True)}
    return {"rows": rows, "tokens_per_second": speeds, "bound": max(seconds[1], key=lambda k: seconds[1][k])}


def _met(shapes: Shapes, rows: int) -> float:
    """Share of the weights that a step reads: of a table of its own that looks up tokens, next to nothing; of a
    mixture's experts, those that some row goes to."""
    left_out = 0 if shapes.tied else shapes.vocabulary * shapes.hidden
    for b in shapes.blocks:
        if b.experts:
            own = sum(t.count for t in b.tensors if t.kind == "experts")
            left_out += own * (1 - b.routed[0] / b.experts) ** rows
    return 1 - left_out / shapes.parameters
