"""Weight and activation formats: encode, decode, size. Pure tensors.

A format says what an element is, which elements share a scale (a tile of rows x columns), and what a scale is:

    int8 int4 int3     symmetric integers; a scale of 16 bits for each group of columns, or row
    ternary            -1, 0, 1 and a scale, likewise; four to a byte
    fp8_tensor fp8_row E4M3, one float32 scale for all or for each row
    fp8_act fp8_block  E4M3, tiles of 1 x 128 and 128 x 128 with float32 scales: DeepSeek-V3 (arXiv 2412.19437) for
                       activations and for weights; ``_pow2`` with scales 2^k, as in V3.1
    mxfp8 mxfp4        E4M3 and E2M1, tiles of 1 x 32, scales 2^k: OCP Microscaling Formats (MX) 1.0
    nvfp4              E2M1, tiles of 1 x 16, a scale in E4M3 and one float32 for all: arXiv 2509.25149

Elements are rounded to nearest even, or stochastically where noise is given. What is too large saturates, infinity
included, since scales are made from a tile's finite numbers. NaN stays NaN in 8-bit floats and is refused elsewhere. A
tile of zeros has the scale 1, or the least one there is where scales are 2^k or E4M3.

A small float has a sign, ``exponent`` bits with a bias, and ``mantissa`` bits; exponent 0 holds the subnormals. E4M3
and E5M2 are those of Micikevicius et al. (arXiv 2209.05433), E2M1 is OCP MX's, E5M6 keeps DeepSeek-V3's activations for
attention's backward pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Float:
    """A small float format. ``nan`` is the code of a positive NaN, None where there is none."""

    name: str
    exponent: int
    mantissa: int
    bias: int
    largest: float
    nan: int | None

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def smallest_normal(self) -> float:
        return 2.0 ** (1 - self.bias)


E4M3 = Float("e4m3", 4, 3, 7, 448.0, 0x7F)
E5M2 = Float("e5m2", 5, 2, 15, 57344.0, 0x7F)
E2M1 = Float("e2m1", 2, 1, 1, 6.0, None)
E5M6 = Float("e5m6", 5, 6, 15, 65024.0, 0x7FF)


def rounded(x: Tensor, to: Float, noise: Tensor | None = None) -> Tensor:
    """The numbers of ``to``, as float32, that are nearest to ``x`` (taken as float32), ties to the even code.

    Args:
        noise: uniform in [0, 1), of x's shape: then rounded up with the probability that makes the expectation x.
    """
    x = x.float().clamp(-to.largest, to.largest)
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=to.smallest_normal)
    step = power.mul_(2.0**-to.mantissa)
    steps = x / step  # exact, as is the way back: both are scalings by a power of two
    steps = steps.round_() if noise is None else _by_chance(steps, noise)
    return torch.copysign(steps.mul_(step), x)


def _by_chance(x: Tensor, noise: Tensor) -> Tensor:
    below = x.floor()
    return below + (noise < x - below)  # noise + x may round up to an integer that is none of the two beside x


def encode_float(values: Tensor, to: Float) -> Tensor:
    """Codes, uint8 (int16 for more than 8 bits), of numbers that ``rounded`` made.

    Raises:
        ValueError: one is NaN and the format has none.
    """
    magnitude = values.abs()
    is_nan = magnitude.isnan()
    if to.nan is None and bool(is_nan.any()):
        raise ValueError(f"{to.name} has no code for NaN")
    fraction, exponent = torch.frexp(magnitude.nan_to_num(0.0))  # fraction in [0.5, 1)
    normal = magnitude >= to.smallest_normal
    biased = torch.where(normal, exponent.int() - 1 + to.bias, 0)
    unit = 2.0**to.mantissa
    digits = torch.where(normal, 2 * fraction - 1, magnitude.nan_to_num(0.0) / to.smallest_normal).mul(unit).int()
    codes = (biased << to.mantissa) + digits
    if to.nan is not None:
        codes = torch.where(is_nan, to.nan, codes)
    codes = codes | (torch.signbit(values).int() << (to.bits - 1))
    return codes.to(torch.uint8 if to.bits <= 8 else torch.int16)


def decode_float(codes: Tensor, of: Float) -> Tensor:
    """float32 numbers of codes."""
    return numbers_of(of).to(codes.device)[codes.long() & ((1 << of.bits) - 1)]


def numbers_of(of: Float) -> Tensor:
    """(2^bits,) float32: the number of every code. Infinities where the format has them (E5M2)."""
    codes = torch.arange(1 << of.bits)
    biased = (codes >> of.mantissa) & ((1 << of.exponent) - 1)
    digits = (codes & ((1 << of.mantissa) - 1)).double() / 2.0**of.mantissa
    normal = (1 + digits) * torch.exp2((biased - of.bias).double())
    value = torch.where(biased > 0, normal, digits * of.smallest_normal)
    beyond = value > of.largest
    if of.nan is not None:
        value[beyond] = torch.nan
        if of is E5M2:
            value[beyond & (digits == 0)] = torch.inf
    return torch.where(codes >> (of.bits - 1) > 0, -value, value).float()


def power_exponent(amax: Tensor, to: Float, up: bool = True) -> Tensor:
    """int32 exponents k of scales 2^k, in -127 .. 127, for blocks whose largest magnitude is ``amax`` (>= 0).

    ``up``: the least k with amax / 2^k within the format (what MXFP8 training needs, arXiv 2506.08027); otherwise the
    exponent of amax less that of the largest number, as OCP MX 1.0 has it, where the largest may saturate. 0 -> -127.
    """
    fraction, exponent = torch.frexp(amax.float())
    of_largest = torch.frexp(torch.tensor(to.largest, device=amax.device))
    k = exponent - of_largest.exponent
    if up:
        k = k + (fraction > of_largest.mantissa).to(k.dtype)
    return torch.where(amax > 0, k, -127).clamp(-127, 127).int()


TERNARY = 0
"""Element bits that stand for -1, 0, 1."""

_CLIPS = [1.0 - 0.05 * i for i in range(9)]  # shares of the largest magnitude that a searched scale may reach


@dataclass(frozen=True, slots=True)
class Format:
    """``element``: a small float, or the bits of a symmetric integer. ``tile``: rows x columns that share a scale, 0
    for all of them. ``scale``: float32, bfloat16, float16, pow2 (rounded up), pow2_floor or e4m3."""

    name: str
    element: Float | int
    tile: tuple[int, int]
    scale: str

    def grouped(self, columns: int | None) -> Format:
        """The same with a scale for so many columns, or a row (None)."""
        return replace(self, tile=(self.tile[0], columns or 0))

    @property
    def element_bits(self) -> int:
        if isinstance(self.element, Float):
            return self.element.bits
        return 2 if self.element == TERNARY else self.element

    @property
    def scale_bytes(self) -> int:
        return {"float32": 4, "bfloat16": 2, "float16": 2}.get(self.scale, 1)

    @property
    def largest(self) -> float:
        """The largest magnitude of an element that a scale is made for."""
        if isinstance(self.element, Float):
            return self.element.largest
        return max(1, (1 << (self.element - 1)) - 1) if self.element else 1


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("int8", 8, (1, 32), "bfloat16"),
        Format("int4", 4, (1, 32), "bfloat16"),
        Format("int3", 3, (1, 32), "bfloat16"),
        Format("ternary", TERNARY, (1, 32), "bfloat16"),
        Format("fp8_tensor", E4M3, (0, 0), "float32"),
        Format("fp8_tensor_e5m2", E5M2, (0, 0), "float32"),
        Format("fp8_row", E4M3, (1, 0), "float32"),
        Format("fp8_act", E4M3, (1, 128), "float32"),
        Format("fp8_act_pow2", E4M3, (1, 128), "pow2"),
        Format("fp8_block", E4M3, (128, 128), "float32"),
        Format("fp8_block_pow2", E4M3, (128, 128), "pow2"),
        Format("mxfp8", E4M3, (1, 32), "pow2"),
        Format("mxfp8_floor", E4M3, (1, 32), "pow2_floor"),
        Format("mxfp4", E2M1, (1, 32), "pow2_floor"),
        Format("nvfp4", E2M1, (1, 16), "e4m3"),
    )
}


@dataclass(frozen=True, slots=True)
class Coded:
    """An encoded (R, C) tensor: ``codes`` (R, C), int8 for integers and uint8 for floats; ``scale``, one a tile,
    float32 numbers that their storage type holds exactly; ``whole``, a scale over all of them (NVFP4; else 1)."""

    codes: Tensor
    scale: Tensor
    format: Format
    whole: float = 1.0


def encode(
    x: Tensor,
    to: Format,
    noise: Tensor | None = None,
    search: bool | Tensor = False,
    whole: float | None = None,
    scale: Tensor | None = None,
) -> Coded:
    """Encode ``x`` (R, C), taken as float32.

    Args:
        noise: (R, C) uniform in [0, 1): rounds stochastically, so that the expectation of what is decoded is x, unless
            x saturates.
        search: scales are those of a small grid, from the largest magnitude down to 0.6 of it, that leave the least
            squared error, where scales are not powers of two; or (C,) weights of the columns in that error.
        whole, scale: the scale over all and those of the tiles, where they are settled already.

    Raises:
        ValueError: NaN in a format that has none.
    """
    x = x.detach().float()
    if scale is not None:
        assert whole is not None, "scales are settled together"
        return Coded(codes_of(elements(x / spread(scale * whole, to.tile, x.shape), to, noise), to), scale, to, whole)
    finite = x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    if to.element == TERNARY:
        return _ternary(x, finite, to)
    amax = over_tiles(finite.abs(), to.tile, "amax")
    whole = _whole(amax, to) if whole is None else whole
    best: tuple[Tensor, ...] | None = None
    for clip in (1.0,) if search is False or to.scale.startswith("pow2") else _CLIPS:
        scale = _scales(amax * clip, to, whole)
        values = elements(x / spread(scale * whole, to.tile, x.shape), to, noise)
        if search is False:
            return Coded(codes_of(values, to), scale, to, whole)
        error = (values * spread(scale * whole, to.tile, x.shape) - x).square() * search
        found = over_tiles(error, to.tile, "sum"), scale, values
        if best is not None:
            better = found[0] < best[0]
            where = better, better, spread(better, to.tile, x.shape)
            found = tuple(torch.where(*three) for three in zip(where, found, best, strict=True))
        best = found
    assert best is not None
    return Coded(codes_of(best[2], to), best[1], to, whole)


def decode(coded: Coded) -> Tensor:
    """The (R, C) float32 tensor that ``coded`` stands for."""
    element = coded.format.element
    values = decode_float(coded.codes, element) if isinstance(element, Float) else coded.codes.float()
    return values * spread(coded.scale * coded.whole, coded.format.tile, coded.codes.shape)


def size(rows: int, columns: int, of: Format) -> int:
    """Bytes of an encoded tensor: packed codes (each row in whole 32-bit words where elements are integers), scales."""
    bits = columns * of.element_bits
    per_row = bits / 8 if isinstance(of.element, Float) else -(-bits // 32) * 4
    tiles = math.prod(-(-whole // (part or whole)) for whole, part in zip((rows, columns), of.tile, strict=True))
    return math.ceil(rows * per_row) + tiles * of.scale_bytes + 4 * (of.scale == "e4m3")


def _sides(tile: tuple[int, int], shape: torch.Size) -> tuple[int, int]:
    """Rows and columns of a tile of a tensor of that shape."""
    return tile[0] or max(1, shape[0]), tile[1] or max(1, shape[1])


def _tiled(x: Tensor, tile: tuple[int, int]) -> Tensor:
    """(R, C) -> (tile rows, rows of a tile, tile columns, columns of a tile), filled up with zeros."""
    rows, columns = x.shape
    high, wide = _sides(tile, x.shape)
    filled = torch.nn.functional.pad(x, (0, -columns % wide, 0, -rows % high))
    return filled.view(filled.shape[0] // high, high, filled.shape[1] // wide, wide)


def over_tiles(x: Tensor, tile: tuple[int, int], how: str) -> Tensor:
    """The largest (``amax``) or the ``sum`` of each tile of (R, C): one number a tile."""
    parts = _tiled(x, tile)
    return parts.amax((1, 3)) if how == "amax" else parts.sum((1, 3))


def spread(of_tiles: Tensor, tile: tuple[int, int], shape: torch.Size) -> Tensor:
    """A number of each tile -> (R, C), its own for every element; a view where it can be."""
    rows, columns = shape
    high, wide = _sides(tile, shape)
    spread = of_tiles[:, None, :, None].expand(-1, high, -1, wide)
    return spread.reshape(of_tiles.shape[0] * high, of_tiles.shape[1] * wide)[:rows, :columns]


def _whole(amax: Tensor, to: Format) -> float:
    if to.scale != "e4m3" or not amax.numel():
        return 1.0
    whole = float(amax.max() / amax.new_tensor(to.largest * E4M3.largest))
    return max(whole, 2.0**-127) if whole else 1.0  # so that times the least scale it is not 0, and 1 / whole is finite


def _scales(amax: Tensor, to: Format, whole: float) -> Tensor:
    if to.scale.startswith("pow2"):
        assert isinstance(to.element, Float)
        return torch.ldexp(torch.ones_like(amax), power_exponent(amax, to.element, up=to.scale == "pow2"))
    scale = amax / amax.new_tensor(to.largest)  # a tensor: with a number a GPU multiplies by its reciprocal
    return stored_scale(scale if whole == 1.0 else scale / amax.new_tensor(whole), to)


def stored_scale(scale: Tensor, to: Format) -> Tensor:
    """Scales, float32, as near to ``scale`` as the format holds them where they are not powers of two; none is zero."""
    if to.scale == "e4m3":
        return rounded(scale, E4M3).clamp_(min=2.0**-9)
    dtype: torch.dtype = getattr(torch, to.scale)
    scale = scale.clamp(max=torch.finfo(dtype).max).to(dtype).float()
    return torch.where(scale > 0, scale, 1.0)


def elements(x: Tensor, to: Format, noise: Tensor | None = None) -> Tensor:
    """Elements, float32, of x that has been divided by its scales."""
    if isinstance(to.element, Float):
        return rounded(x, to.element, noise)
    low, high = (-(1 << (to.element - 1)), (1 << (to.element - 1)) - 1) if to.element else (-1, 1)
    return (x.round() if noise is None else _by_chance(x, noise)).clamp_(low, high)


def codes_of(values: Tensor, to: Format) -> Tensor:
    """Codes of elements.

    Raises:
        ValueError: NaN in a format that has none.
    """
    if isinstance(to.element, Float):
        return encode_float(values, to.element)
    if bool(values.isnan().any()):
        raise ValueError(f"{to.name} has no code for NaN")
    return values.to(torch.int8)


def _ternary(x: Tensor, finite: Tensor, to: Format) -> Coded:
    """The codes and scale of least squared error: of each tile the k largest magnitudes, and their mean, for the k that
    maximises (their sum)^2 / k (Li and Liu, Ternary weight networks, arXiv 1605.04711, solved exactly)."""
    if bool(x.isnan().any()):  # whose sign is 0, so that codes would not tell
        raise ValueError(f"{to.name} has no code for NaN")
    parts = _tiled(finite.abs(), to.tile).transpose(1, 2).flatten(2)
    ordered = parts.sort(-1, descending=True).values
    wide = torch.float32 if x.device.type == "mps" else torch.float64  # holds every square
    sums = ordered.cumsum(-1, dtype=wide)
    best = (sums.square() / torch.arange(1, parts.shape[-1] + 1, device=x.device)).argmax(-1, keepdim=True)
    mean = (sums.gather(-1, best) / (best + 1)).squeeze(-1).float()
    scale = stored_scale(mean, to)  # 1 where the mean is 0, or so small that it would be stored as 0
    least = ordered.gather(-1, best).squeeze(-1).where(scale < 2 * mean, torch.inf)
    kept = x.abs() >= spread(least, to.tile, x.shape)
    return Coded((x.sign() * kept).to(torch.int8), scale, to)
