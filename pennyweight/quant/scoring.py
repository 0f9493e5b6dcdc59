"""A teacher's forward pass in low precision: what labels tokens, without gradients.

In int8 each weight row has one scale and each token another, from their largest magnitudes (as the vector-wise part of
LLM.int8(), Dettmers et al., arXiv 2208.07339). Products of codes are summed exactly and scaled back to float32, logits
too; residual stream, norms and attention stay float32. What it gives and costs: benchmarks/scoring.py.

In fp8, on a GPU, weights are E4M3 in blocks of 128 x 128 and what they read in tiles of 1 x 128 (DeepSeek-V3, arXiv
2412.19437); everything else is bfloat16, and the head stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pennyweight.errors import ModelError, RecipeError
from pennyweight.model.head import Head, head_of
from pennyweight.model.loaded import refuse_low_bit
from pennyweight.quant.linear import SCHEMES, Seen, is_router, kernels, on_tensor_cores


def for_scoring(model: Any, precision: str) -> tuple[Any, Head]:
    """A causal LM to score in float32, bfloat16, int8 or fp8, and the head that makes float32 logits of its hidden
    states.

    The given model is not changed, and is itself returned where it has that precision already. A copy is in evaluation
    mode, for use outside autocast, and shares what need not differ: int8 and fp8 add one byte for each weight of a
    Linear, bfloat16 two for each parameter. Its embedding, output layer and routers are not coded; the head is, in
    int8. Whether fp8 is faster depends on the widths: at 2,048 and below it may not be.

    Raises:
        RecipeError: no such precision, or int8 or fp8 on a device that has no fast products of it.
        ModelError: int8 or fp8, and the model is a low-bit copy already or has no layer that could be coded.
    """
    check_scoring(model, precision)
    if precision == "int8":
        return _int8(model)
    if precision == "fp8":
        return _fp8(model)
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    # The head of the given model, not of the copy: a CPU has no bfloat16 product with float32 logits.
    return _copy(model, dtype, set()), head_of(model)


def check_scoring(model: Any, precision: str) -> None:
    """Raise RecipeError where ``for_scoring`` would, without making anything."""
    if precision not in ("float32", "bfloat16", "int8", "fp8"):
        raise RecipeError(f"no precision named {precision!r} to score in; choose float32, bfloat16, int8 or fp8")
    # Without VNNI the product alone is at most twice as fast as float32's; on a GPU none of this was measured.
    on_cpu = model.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if precision == "int8" and not (on_cpu and torch.cpu._is_vnni_supported()):
        raise RecipeError(
            "scoring in int8 runs on CPUs with int8 instructions (AVX-512 VNNI) only, "
            f"not on this {model.device.type}; leave targets.precision at auto"
        )
    if precision == "fp8" and not (on_tensor_cores(SCHEMES["fp8"], model.device) and kernels.by_cublas(model.device)):
        raise RecipeError(
            "scoring in fp8 runs on NVIDIA Hopper GPUs with Triton and a cuBLAS that multiplies fp8 blocks only, "
            f"not on this {model.device.type}; leave targets.precision at auto"
        )


class Int8Linear(nn.Module):
    """``x W^T + b`` with int8 codes of W and, made anew for each row, of x; scales in float32.

    ``weight`` (out, in) and ``bias`` (out) or None, of any float dtype; layers that may read the same x share ``seen``.
    Forward takes (..., in) of any float dtype to (..., out) of that dtype, without gradient.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, seen: Seen | None = None):
        super().__init__()
        self.seen = seen or Seen(_by_row)
        self.codes, self.scale = map(nn.Buffer, _coded(weight))
        self.bias = nn.Buffer(bias.detach().float()) if bias is not None else None

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        rows, row_scale = self.seen.coded(x)
        out = _product(rows, row_scale, self.codes, self.scale)
        if self.bias is not None:
            out.add_(self.bias)
        return out.to(x.dtype).view(*x.shape[:-1], len(self.codes))


class Fp8Linear(nn.Module):
    """``x W^T + b`` in E4M3: W (out, in) in blocks, x in tiles with scales 2^k; products of 128 summed in float32.

    Takes what ``Int8Linear`` takes, on a GPU; the output is of x's dtype.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, seen: Seen | None = None):
        super().__init__()
        self.seen = seen or Seen(_tiles)
        coded = kernels.blocks(weight.detach(), pow2=False)
        self.codes, self.scale = nn.Buffer(coded.codes), nn.Buffer(coded.scale)
        self.bias = nn.Buffer(bias.detach()) if bias is not None else None

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        weight = kernels.Operand(self.codes, self.scale, blocks=True)
        out = kernels.product(self.seen.coded(x), weight, x.dtype)[: x.shape[:-1].numel()]
        if self.bias is not None:
            out += self.bias.to(x.dtype)
        return out.view(*x.shape[:-1], len(self.codes))


@dataclass(frozen=True)
class Int8Head(Head):
    """A head whose ``weight`` (V, D) is int8 codes, with ``row_scale`` (V,) float32."""

    row_scale: Tensor = field(kw_only=True)

    @torch.no_grad()
    def logits(self, hidden_ND: Tensor, out: Tensor | None = None) -> Tensor:
        """(N, D) hidden states of any float dtype -> (N, V) float32 logits, in ``out`` if given; without gradient."""
        out = _product(*_by_row(hidden_ND), self.weight, self.row_scale, out)
        if self.bias is not None:
            out.add_(self.bias)
        if self.scale != 1.0:
            out.mul_(self.scale)
        return out if self.softcap is None else out.div_(self.softcap).tanh_().mul_(self.softcap)


def _int8(model: Any) -> tuple[Any, Head]:
    head = head_of(model)
    scoring = _swapped(model, torch.float32, Int8Linear, Seen(_by_row))
    codes, scale = _coded(head.weight)
    return scoring, Int8Head(codes, head.bias, head.scale, head.softcap, row_scale=scale)


def _fp8(model: Any) -> tuple[Any, Head]:
    return _swapped(model, torch.bfloat16, Fp8Linear, Seen(_tiles)), head_of(model)


def _swapped(model: Any, dtype: torch.dtype, layer: Callable[..., nn.Module], seen: Seen) -> Any:
    """A copy with ``layer`` for every Linear but the output layer and routers, and all else in ``dtype``."""
    refuse_low_bit(model)
    output = model.get_output_embeddings()
    every = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not output)
    linears = {name: m for name, m in every if not is_router(name)}
    if not linears:
        raise ModelError(f"{type(model).__name__} has no Linear layer to code; leave targets.precision at auto")
    scoring = _copy(model, dtype, {id(m.weight) for m in linears.values()})
    for name, m in linears.items():
        scoring.set_submodule(name, layer(m.weight.T if isinstance(m, Conv1D) else m.weight, m.bias, seen))
    return scoring


def _tiles(x: Tensor) -> Any:
    return kernels.tiles(x, pow2=True)[0]


def _copy(model: Any, dtype: torch.dtype, kept: set[int]) -> Any:
    """``model`` with parameters of ``dtype``; those that are so, and the ids in ``kept``, are shared, not copied."""
    if not kept and all(p.dtype == dtype for p in model.parameters()):
        return model
    # deepcopy takes these for copies it has made, ties included. Buffers keep their dtype, as rotary frequencies must.
    made: dict[int, Any] = {id(p): p for p in model.parameters()}
    for i, p in made.items():
        if p.dtype != dtype and i not in kept:
            made[i] = nn.Parameter(p.detach().to(dtype), requires_grad=False)
    return copy.deepcopy(model, made).eval()


def _coded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (V, D) -> its codes (V, D) int8 and scales (V,) float32."""
    codes, scale = _by_row(weight.detach())
    if codes.shape[1] % 2048 == 0:  # rows this far apart compete for the same places in a cache, which costs up to 9 %
        codes = nn.functional.pad(codes, (0, 64))[:, :-64]
    return codes, scale.flatten()


def _by_row(x: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) of any float dtype -> int8 codes from -127 to 127, and (rows, 1) float32 scales."""
    x = x.float()
    # Two reductions are faster than one of the magnitudes, which would have to be written first.
    largest = torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).neg_())
    largest.clamp_(min=128 * torch.finfo(torch.float32).tiny)  # so that zeros get codes 0, and nothing overflows
    return torch.mul(x, 127.0 / largest).round_().to(torch.int8), largest / 127.0


def _product(rows: Tensor, row_scale: Tensor, codes: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
    """Rows (N, D) times a weight (V, D), both as codes and scales -> (N, V) float32, in ``out`` if given."""
    out = row_scale.new_empty((len(rows), len(codes))) if out is None else out
    torch._int_mm(rows, codes.T, out=out.view(torch.int32))  # type: ignore[attr-defined]
    block = max(1, (1 << 21) // len(codes))  # rows that a cache holds while they are passed over three times
    for part, part_scale in zip(out.split(block), row_scale.split(block), strict=True):
        part.copy_(part.view(torch.int32)).mul_(scale).mul_(part_scale)
    return out
