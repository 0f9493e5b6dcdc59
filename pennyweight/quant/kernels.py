"""Casts to E4M3 tiles, and their products, on a GPU: the numbers of ``quant/formats.py``, code for code.

Shape letters: N (of a weight R) rows, Q rows filled up to whole tiles of 128, C columns; of a product M rows and N
columns, K what it sums over. A program works on 128 x 128 numbers. Scales lie as cuBLAS reads them: those of rows by
tile, then row; those of blocks filled up to 4 along K. Chips round to E4M3 themselves, to nearest even and saturating;
BY_HAND does it in integer arithmetic, for the interpreter.

Products go to cuBLAS where it has this scaling (torch.nn.functional.scaled_mm; compute capability 9.0) and otherwise to
a kernel here. Both sum 128 products in the tensor core and add them, scaled, to float32 (DeepSeek-V3, arXiv 2412.19437,
section 3.3).
"""
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import triton  # type: ignore
import triton.language as tl  # type: ignore
from torch import Tensor


@triton.jit
def power(k):
    """2^k as float32, for k from -127 to 127."""
    return tl.where(k == -127, 0x400000, (k + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scaled(x, amax, POW2: tl.constexpr):
    """The scale of numbers whose largest finite magnitude is ``amax``, and x divided by it; both (rows, columns)."""
    if POW2:  # the least power of two with amax / 2^k <= 448 = 1.75 * 2^8
        bits = amax.to(tl.int32, bitcast=True)
        k = (bits >> 23) - 135 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
        k = tl.minimum(tl.maximum(k, -127), 127)
        return power(k), x * power(-k)
    scale = tl.div_rn(amax, tl.full(amax.shape, 448.0, tl.float32))
    scale = tl.where(scale > 0, scale, 1.0)
    x, divisor = tl.broadcast(x, scale)
    return scale, tl.div_rn(x, divisor)


@triton.jit
def e4m3(x, BY_HAND: tl.constexpr):
    """The code of a float32, rounded to nearest even, saturating; NaN stays one."""
    if not BY_HAND:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    at_most = tl.minimum(size, 0x43E00000)  # 448
    normal = ((at_most + 0x7FFFF + ((at_most >> 20) & 1)) >> 20) - 960
    # The last place of 2^14 is 2^-9, the least E4M3: the sum is rounded to it.
    below = (at_most.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(at_most < 0x3C800000, below, normal)  # 2^-6
    return (tl.where(size > 0x7F800000, 0x7F, code) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def number(code, BY_HAND: tl.constexpr):
    """The float32 of an E4M3 code."""
    if not BY_HAND:
        return code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    wide = code.to(tl.int32)
    bits = ((wide & 0x80) << 24) | ((wide & 0x7F) << 20)
    value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120: from one bias to another
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def finite_size(x):
    """Magnitudes, 0 where a number is not finite."""
    size = tl.abs(x)
    return tl.where(size < float("inf"), size, 0.0)


@triton.jit
def row_coded(v, POW2: tl.constexpr, BY_HAND: tl.constexpr):
    """Numbers along a row of a tile -> their scale, and codes."""
    s, y = scaled(v, tl.max(finite_size(v), 1)[:, None], POW2)
    return s, e4m3(y, BY_HAND)


@triton.jit
def tiles_kernel(
    x, codes, scale, turned, turned_scale, N, Q, C, stride,
    COLUMNS: tl.constexpr, POW2: tl.constexpr, BY_HAND: tl.constexpr, SIDE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """128 x 128 of x (N, C) coded along rows, and ``COLUMNS`` along columns and turned, too, of the numbers themselves
    or of what the codes along rows stand for. What lies past N or C is zero. ``PART`` rows at a time."""
    column = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    here = (column < C)[None, :]
    largest = tl.zeros([PART, SIDE], tl.float32)
    for at in range(0, SIDE, PART):
        row = tl.program_id(0) * SIDE + at + tl.arange(0, PART)
        place = row[:, None].to(tl.int64)
        v = tl.load(x + place * stride + column[None, :], mask=here & (row < N)[:, None], other=0).to(tl.float32)
        s, code = row_coded(v, POW2, BY_HAND)
        tl.store(scale + tl.program_id(1) * Q + row[:, None], s)
        tl.store(codes + place * C + column[None, :], code, mask=here)
        if COLUMNS == "of codes":
            v = number(code, BY_HAND) * s
        if COLUMNS != "none":
            largest = tl.maximum(largest, finite_size(v))
    if COLUMNS != "none":
        amax = tl.max(largest, 0)[None, :]
        of_columns, _ = scaled(amax, amax, POW2)
        tl.store(turned_scale + tl.program_id(0) * C + column[None, :], of_columns, mask=here)
        for at in range(0, SIDE, PART):  # read again, from a cache, which takes fewer registers than keeping it
            row = tl.program_id(0) * SIDE + at + tl.arange(0, PART)
            again = x + row[:, None].to(tl.int64) * stride + column[None, :]
            v = tl.load(again, mask=here & (row < N)[:, None], other=0).to(tl.float32)
            if COLUMNS == "of codes":
                s, code = row_coded(v, POW2, BY_HAND)
                v = number(code, BY_HAND) * s
            _, y = scaled(v, amax, POW2)
            over = turned + column[:, None].to(tl.int64) * Q + row[None, :]
            tl.store(over, e4m3(tl.trans(y), BY_HAND), mask=(column < C)[:, None])


@triton.jit
def blocks_kernel(
    w, codes, scale, R, C, stride, wide,
    TURNED: tl.constexpr, POW2: tl.constexpr, BY_HAND: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """A block of w (R, C): its codes and its scale, both turned if ``TURNED``. ``wide``: blocks along what a product
    sums over, filled up to a multiple of 4."""
    row = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    column = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    inside = (row < R)[:, None] & (column < C)[None, :]
    v = tl.load(w + row[:, None].to(tl.int64) * stride + column[None, :], mask=inside, other=0).to(tl.float32)
    amax = tl.zeros([1, 1], tl.float32) + tl.max(tl.max(finite_size(v), 1), 0)
    s, y = scaled(v, amax, POW2)
    one = tl.zeros([1, 1], tl.int32)
    if TURNED:
        tl.store(scale + tl.program_id(1) * wide + tl.program_id(0) + one, s)
        place = codes + column[:, None].to(tl.int64) * R + row[None, :]
        tl.store(place, e4m3(tl.trans(y), BY_HAND), mask=(column < C)[:, None] & (row < R)[None, :])
    else:
        tl.store(scale + tl.program_id(0) * wide + tl.program_id(1) + one, s)
        tl.store(codes + row[:, None].to(tl.int64) * C + column[None, :], e4m3(y, BY_HAND), mask=inside)


@triton.jit
def product_kernel(
    a, b, a_scale, b_scale, out, M, N, K, wide,
    BLOCKS: tl.constexpr, BY_HAND: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """128 x 128 of a (M, K) times b (N, K) turned. a has a scale for each row and 128 of K; b too, or one for each
    block."""
    row = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    column = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    k = tl.arange(0, SIDE)
    total = tl.zeros([SIDE, SIDE], tl.float32)
    for at in range(0, K, SIDE):
        here = (at + k) < K
        left = (row < M)[:, None] & here[None, :]
        right = here[:, None] & (column < N)[None, :]
        x = tl.load(a + row[:, None].to(tl.int64) * K + (at + k)[None, :], mask=left, other=0)
        y = tl.load(b + column[None, :].to(tl.int64) * K + (at + k)[:, None], mask=right, other=0)
        if BY_HAND:
            part = tl.dot(number(x, BY_HAND), number(y, BY_HAND))
        else:
            part = tl.dot(x.to(tl.float8e4nv, bitcast=True), y.to(tl.float8e4nv, bitcast=True))
        per_row = tl.load(a_scale + at // SIDE * M + row, mask=row < M, other=0.0)
        if BLOCKS:
            total += part * (per_row * tl.load(b_scale + tl.program_id(1) * wide + at // SIDE))[:, None]
        else:
            per_column = tl.load(b_scale + at // SIDE * N + column, mask=column < N, other=0.0)
            total += part * per_row[:, None] * per_column[None, :]
    place = out + row[:, None].to(tl.int64) * N + column[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=(row < M)[:, None] & (column < N)[None, :])


COMPILED = isinstance(product_kernel, triton.runtime.JITFunction)
"""False under Triton's interpreter: TRITON_INTERPRET was set when it was imported."""

_SIDE = 128
_FLAGS = {"BY_HAND": not COMPILED, "SIDE": _SIDE}


@dataclass(frozen=True, slots=True)
class Operand:
    """One side of a product that sums over K: ``codes`` (rows, K) uint8; ``scale`` float32, for tiles of 1 x 128 (rows,
    tiles of K), for blocks of 128 x 128 (tiles of K filled up to 4, tiles of rows), the first of them contiguous."""

    codes: Tensor
    scale: Tensor
    blocks: bool = False


@cache
def runs_on(device: torch.device) -> bool:
    """Whether it has fp8 tensor cores; or is a CPU under Triton's interpreter, for tests."""
    if device.type == "cuda" and COMPILED:
        return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)
    return device.type == "cpu" and not COMPILED


def tiles(
    x: Tensor, pow2: bool, columns: Literal["none", "of numbers", "of codes"] = "none"
) -> tuple[Operand, Operand]:
    """x (N, C), of any float dtype, in tiles along its rows, (Q, C); and turned, in tiles along its columns, (C, Q).

    Args:
        columns: whether the second is made of x itself, of what the codes of the first stand for, or is the first.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    (n, c), wide, high = x.shape, -(-x.shape[1] // _SIDE), -(-x.shape[0] // _SIDE)
    q, both = high * _SIDE, columns != "none"
    along = Operand(x.new_empty((q, c), dtype=torch.uint8), x.new_empty((wide, q), dtype=torch.float32).T)
    across = along
    if both:
        across = Operand(x.new_empty((c, q), dtype=torch.uint8), x.new_empty((high, c), dtype=torch.float32).T)
    flags = {"COLUMNS": columns, "POW2": pow2, "PART": 32 if both else 64, **_FLAGS}
    with torch.cuda.device_of(x):
        tiles_kernel[high, wide](
            x, along.codes, along.scale, across.codes, across.scale, n, q, c, x.stride(0), **flags, num_warps=4
        )
    return along, across


def blocks(w: Tensor, pow2: bool, turned: bool = False) -> Operand:
    """w (R, C), of any float dtype, in blocks; ``turned``: (C, R)."""
    w = w if w.stride(1) == 1 else w.contiguous()
    (r, c), (high, wide) = w.shape, (-(-s // _SIDE) for s in w.shape)
    outer, inner = (wide, high) if turned else (high, wide)
    fill = w.new_zeros if inner % 4 else w.new_empty
    scale = fill((outer, -(-inner // 4) * 4), dtype=torch.float32)
    codes = w.new_empty((c, r) if turned else (r, c), dtype=torch.uint8)
    flags = {"TURNED": turned, "POW2": pow2, **_FLAGS}
    with torch.cuda.device_of(w):
        blocks_kernel[high, wide](w, codes, scale, r, c, w.stride(0), scale.shape[1], **flags, num_warps=8)
    return Operand(codes, scale.T, blocks=True)


def product(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    """a (M, K) times b (N, K) turned -> (M, N) of ``dtype``, summed in float32. Only b may be in blocks."""
    assert not a.blocks
    (m, k), n = a.codes.shape, len(b.codes)
    if not m * k:
        return a.codes.new_zeros((m, n), dtype=dtype)
    if by_cublas(a.codes.device) and not any(s % 16 for s in (m, k, n)):
        return _by_cublas(a, b, dtype)
    out = a.codes.new_empty((m, n), dtype=dtype)
    grid = (-(-m // _SIDE), -(-n // _SIDE))
    with torch.cuda.device_of(out):
        product_kernel[grid](
            a.codes, b.codes, a.scale, b.scale, out, m, n, k, len(b.scale), BLOCKS=b.blocks, **_FLAGS, num_warps=8
        )
    return out


def _by_cublas(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    from torch.nn.functional import ScalingType, scaled_mm  # not in every torch

    kind = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
    x, y = a.codes.view(torch.float8_e4m3fn), b.codes.view(torch.float8_e4m3fn).T
    return scaled_mm(x, y, a.scale, kind[0], b.scale, kind[b.blocks], output_dtype=dtype)


@cache
def by_cublas(device: torch.device) -> bool:
    """Whether products go to cuBLAS: on compute capability 9 (Hopper), where small ones do, which is tried; a warning
    says why not. Ours is slower than bfloat16 is there."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    one = torch.ones(128, 128, device=device)
    x = tiles(one, True)[0]
    try:
        for y in (blocks(one, True), x):
            _by_cublas(x, y, torch.bfloat16)
    except (ImportError, RuntimeError, ValueError) as error:
        told = (str(error).strip() or repr(error)).splitlines()[0]
        warnings.warn(f"cuBLAS multiplies no fp8 blocks on {device} ({told}); a slower kernel does", stacklevel=2)
        return False
    return True
