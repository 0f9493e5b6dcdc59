"""Bytes of what training and use hold, part by part, from shapes alone: arithmetic, no torch.

Weights, gradients, moments and the KV cache are exact. Activations are what autograd keeps of a forward pass of
transformers' modules until the backward pass has come by; of a token, D being the hidden width, I an MLP's inner width,
r the bytes of a weight (the residual stream's, too) and a those of what a Linear gives:

    RMSNorm          (4 + r) D: its input in float32 and what the weight multiplies; LayerNorm r D
    a Linear's input once for all that read it; under autocast from float32 a copy of 2 bytes for each of them; in fp8 a
                     byte once, and a scale for 128 for each of them
    attention, fused queries, keys, values and output, and 4 bytes a head; unfused also (T tokens in a row) heads x T
                     float32 probabilities, with keys and values repeated for all heads
    MLP with a gate  3 I a: gate, its activation, up; the down projection reads their product
    experts          (4 I + 2 D) r for each that a token goes to
    dropout          masks of what it drops
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pennyweight.plan.shapes import Block, Shapes

_TILE_ENTRIES = {"cpu": 1 << 27, "cuda": 1 << 28}  # as loss/chunked.py has them
_TILE_ROWS = {"cpu": 1024, "cuda": 4096}
_SCALED, _BLOCK = 128, 128  # features of a token, and values of a moment, that share a scale
_UNFUSED = 128  # tokens in a row up to which a CPU's attention under autocast is not fused (model/head.py)
_KEPT_BY_ACTIVATION = {"gelu_new": 4, "relu": 0}  # tensors of the inner width; others keep their input
_IN_PASSING, _AT_ONCE = {"bfloat16": 34, "fp8": 75}, 1 << 20  # bytes of LowAdamW's step for a number, of so many


@dataclass(frozen=True, slots=True)
class Way:
    """A way to train. ``weight``: bytes of a weight, and of its gradient; ``moments``: what those are stored in;
    ``autocast``: products are in bfloat16; ``fp8``: those of Linears are in fp8."""

    name: str
    weight: int
    moments: str
    autocast: bool = True
    fp8: bool = False

    @property
    def settings(self) -> str:
        """The recipe's."""
        said = {
            "compute.dtype": "bfloat16" if self.autocast else "float32",
            "train.weights": "bfloat16" if self.weight == 2 else "float32",
            "train.moments": self.moments,
            "train.precision": "fp8" if self.fp8 else "full",
        }
        left_out = {"float32", "full"}  # which is what a recipe has by itself
        return " ".join(f"{k}={v}" for k, v in said.items() if v not in left_out or k == "compute.dtype")

    @property
    def product(self) -> int:
        """Bytes of a number that a Linear gives."""
        return 2 if self.autocast else 4


WAYS = (
    Way("float32", 4, "float32", autocast=False),
    Way("bfloat16", 4, "float32"),
    Way("all bfloat16", 2, "bfloat16"),
    Way("fp8 Linears", 2, "bfloat16", fp8=True),
    Way("fp8 moments", 2, "fp8", fp8=True),
)
"""Each as the one before, with less."""


def cache_bytes(shapes: Shapes, batch: int, length: int, bits: int) -> int:
    """Bytes of keys and values of ``batch`` rows. In 8 bits a scale of 16 bits comes with each vector of a token: the
    keys and the values of a head, or the two halves of a latent."""
    total = 0
    for a in (block.attention for block in shapes.blocks):
        vectors = 2 if a.latent else 2 * a.kv_heads
        total += min(length, a.window or length) * (2 * a.cached if bits == 16 else a.cached + 2 * vectors)
    return batch * total


def moment_bytes(shapes: Shapes, stored: str) -> int:
    """Bytes of AdamW's two moments: float32, bfloat16, or fp8 with a float32 scale for 128 values of a tensor."""
    if stored != "fp8":
        return 2 * {"float32": 4, "bfloat16": 2}[stored] * shapes.parameters
    return 2 * sum(math.ceil(t.count / _BLOCK) * (_BLOCK + 4) for t in shapes.all_tensors)


def cast_bytes(shapes: Shapes, way: Way) -> int:
    """Bytes of the 16-bit copies of matrices that autocast makes, and keeps until the backward pass is through."""
    if not way.autocast or way.weight == 2:
        return 0
    return 2 * shapes.counted("conv1d", "router", *(() if way.fp8 else ("linear",)))


def loss_bytes(shapes: Shapes, way: Way, tokens: int, device: str) -> int:
    """Bytes that the one-pass loss holds: a tile of logits, the hidden states that it reads and their gradient, the
    head's gradient in float32 (beside that of micro-batches before), and the head in the precision it multiplies in."""
    low, head = device == "cuda" and way.autocast, shapes.vocabulary * shapes.hidden
    rows = min(tokens, max(16, min(_TILE_ROWS[device], _TILE_ENTRIES[device] // shapes.vocabulary)))
    spare = 64 if device == "cpu" and shapes.vocabulary % 1024 == 0 else 0
    tile = rows * (shapes.vocabulary + spare) * (6 if low else 4)
    widened = 4 if way.weight == 2 else 0  # a CPU multiplies no 16-bit numbers into float32 ones
    hidden = 2 * way.weight + 4 + (2 * (way.weight == 4) if low else widened)
    of_head = 4 + 2 * (way.weight == 4) if low else widened  # low: a tile's share of the gradient in float32, too
    return tile + tokens * shapes.hidden * hidden + head * (4 + of_head)


def step_bytes(shapes: Shapes, moments: str, device: str) -> int:
    """Bytes that an optimizer's step holds in passing: torch's AdamW of all tensors at once on a GPU, else of one."""
    largest = max(t.count for t in shapes.all_tensors)
    if moments == "float32":
        return 4 * shapes.parameters if device == "cuda" else 8 * largest
    return _IN_PASSING[moments] * min(largest, _AT_ONCE)


def activation_bytes(shapes: Shapes, way: Way, batch: int, length: int, device: str) -> int:
    """Bytes that autograd keeps of a forward pass, between embedding and head; the module's docstring has the terms."""
    d, tokens = shapes.hidden, batch * length
    of_rotary = 2 * shapes.rotary * way.weight
    of_mask = _mask(way.weight, device) * d * (shapes.dropout[0] > 0)
    once = of_rotary + of_mask + 8 + _norm(shapes.norm, d, way, way.weight)
    blocks = sum(_block(shapes, block, way, length, device) for block in shapes.blocks)
    return tokens * (once + blocks)


def _block(shapes: Shapes, b: Block, way: Way, length: int, device: str) -> int:
    """Bytes a token."""
    d, out = shapes.hidden, b.attention.heads * b.attention.value
    total = b.norms * _norm(shapes.norm, d, way, way.weight)
    total += _attention(shapes, b, way, length, device)
    total += 2 * _mask(way.product, device) * d * (shapes.dropout[1] > 0)
    total += sum(_read(width, linears, others, way) for width, linears, others in b.inputs)
    if way.fp8:
        total += _read(out, 1, 0, way)
    inner = _KEPT_BY_ACTIVATION.get(shapes.activation, 1)
    total += way.product * (b.gated * (2 + inner) + b.plain * inner + d * b.weighed)
    chosen, width = b.routed
    return total + chosen * ((4 * width + 2 * d) * way.weight + 40) + (4 * b.experts if chosen else 0)


def _norm(kind: str, width: int, way: Way, given: int) -> int:
    """Of a norm that reads numbers of ``given`` bytes: its input in float32, and what the weight multiplies."""
    if kind == "layer":
        return width * given + 2 * given
    return width * (4 + (4 if kind == "rms32" else given)) + 4


def _read(width: int, linears: int, others: int, way: Way) -> int:
    """What so many Linears, and other matrices, keep of the same input."""
    if not way.autocast:
        return 4 * width
    cast = way.weight == 4
    if way.fp8:
        codes = width * min(1, linears) + linears * math.ceil(width / _SCALED)
        return codes + 2 * width * (others if cast else min(1, others))
    return 2 * width * (linears + others if cast else 1)


def _attention(shapes: Shapes, b: Block, way: Way, length: int, device: str) -> int:
    a, number = b.attention, 2 if way.autocast else 4
    keys, values = a.heads * a.key, a.heads * a.value
    total = 0
    if a.head_norms:
        total += _norm(shapes.norm, (a.heads + a.kv_heads) * a.key, way, way.product) + 4 * (a.heads + a.kv_heads - 1)
    if a.latent:
        total += sum(_norm(shapes.norm, rank, way, way.product) for rank in a.latent[:2] if rank)
        total += a.latent[2] * way.product * (way.product == 4)  # lies beside the latent that the norm keeps
    unread = 0 if way.fp8 else number * values  # what the output projection reads
    if a.capped:
        scores = a.heads * length * (8 if number == 4 else 4 + 2 + 2)
        return total + number * (2 * keys + values) + scores + unread
    on_cpu = a.dropout > 0 or a.key != a.value or (way.autocast and length <= _UNFUSED)
    if device == "cpu" and on_cpu:
        return total + 4 * (2 * keys + values + a.heads * length * (3 if a.dropout else 1)) + unread
    masked = a.window is not None and length > a.window
    of_keys = (a.heads if masked else a.kv_heads) * (a.key + a.value)  # beside a mask repeated for all heads
    if a.latent:
        of_keys += a.heads * (a.key - a.latent[2])  # values are a part of what lies there
    if a.as_one:
        of_keys += (a.heads + a.kv_heads) * a.key + values * (not way.fp8)  # likewise; and the output is copied
    return total + number * (keys + of_keys + values + length * masked) + 4 * a.heads


def _mask(number: int, device: str) -> int:
    """Bytes of a number of a dropout mask."""
    return number if device == "cpu" else 1
