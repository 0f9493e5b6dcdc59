"""Every format as its definition is written, in numpy and float64, for the package's formats to be held against.

Nothing of the package is used here. A small float is looked up in the list of all numbers that its format has, and the
nearest is found by comparison with the midpoints of neighbours, which float64 holds exactly. A power of two is found by
comparison, too. What the definitions leave to arithmetic is settled so:

quotient     The float32 number nearest to the exact quotient of two float32 numbers: what float32 division gives. It is
             this quotient, not the exact one, that may lie on a midpoint. It is computed in float64 and rounded once
             more, which is the same, since float64 has more than twice the digits of float32 and two.
amax         The largest finite magnitude of a tile.
float32      scale = quotient(amax, largest number of the element).
bfloat16     The same, rounded to bfloat16, ties to even, and at most its largest number.
             Either is 1 where it would be 0.
pow2         2^k for the least k in -127 .. 127 with amax <= largest * 2^k, in exact arithmetic.
pow2_floor   2^k for k = floor(log2(amax)) - floor(log2(largest)), OCP MX 1.0, section 6.3. Both: k = -127 for zeros.
e4m3         whole = quotient(amax of all tiles, 448 * 6), at least 2^-127, whose product with the least scale is not 0
             and whose reciprocal is finite; 1 where that quotient is 0. scale = quotient(quotient(amax, 6), whole),
             rounded to E4M3, at least its least number. Elements are divided by the float32 product of both.
element      quotient(x, scale), rounded to nearest, ties to the even code; the largest beyond it, infinities included;
             NaN's code where there is one, of either sign.
ternary      The k of the largest (sum of the k largest magnitudes)^2 / k, the least such k; the scale is the mean of
             those k, as float32 and then as bfloat16 above; where that is 0, the tile is one of zeros. Infinities
             are no part of it, and get the code of their sign.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Small:
    """A small float by its bits; ``nan`` is the code of a positive one."""

    exponent: int
    mantissa: int
    bias: int
    largest: float
    nan: int | None

    @property
    def sign(self) -> int:
        """The code of -0."""
        return 1 << (self.exponent + self.mantissa)


SMALL = {
    "e4m3": Small(4, 3, 7, 448.0, 0x7F),
    "e5m2": Small(5, 2, 15, 57344.0, 0x7F),
    "e2m1": Small(2, 1, 1, 6.0, None),
    "e5m6": Small(5, 6, 15, 65024.0, 0x7FF),
}

ROWS = {  # element (a small float, or (least, largest) integer), tile of rows x columns (0: all), rule of the scale
    "int8": ((-128, 127), (1, 32), "bfloat16"),
    "int4": ((-8, 7), (1, 32), "bfloat16"),
    "int3": ((-4, 3), (1, 32), "bfloat16"),
    "ternary": ((-1, 1), (1, 32), "ternary"),
    "fp8_tensor": ("e4m3", (0, 0), "float32"),
    "fp8_tensor_e5m2": ("e5m2", (0, 0), "float32"),
    "fp8_row": ("e4m3", (1, 0), "float32"),
    "fp8_act": ("e4m3", (1, 128), "float32"),
    "fp8_act_pow2": ("e4m3", (1, 128), "pow2"),
    "fp8_block": ("e4m3", (128, 128), "float32"),
    "fp8_block_pow2": ("e4m3", (128, 128), "pow2"),
    "mxfp8": ("e4m3", (1, 32), "pow2"),
    "mxfp8_floor": ("e4m3", (1, 32), "pow2_floor"),
    "mxfp4": ("e2m1", (1, 32), "pow2_floor"),
    "nvfp4": ("e2m1", (1, 16), "e4m3"),
}

_EXPONENTS = np.arange(-127, 128)
_BFLOAT16_LARGEST = (2 - 2.0**-7) * 2.0**127


def numbers(name: str) -> np.ndarray:
    """The finite numbers >= 0 of a small float; the index of each is its code."""
    f = SMALL[name]
    out = []
    for code in range(f.sign):
        e, m = code >> f.mantissa, code & ((1 << f.mantissa) - 1)
        out.append((m if e == 0 else (1 << f.mantissa) + m) * 2.0 ** (max(e, 1) - f.bias - f.mantissa))
    return np.array([x for x in out if x <= f.largest])


def midpoints(name: str) -> np.ndarray:
    """Of neighbours among ``numbers``."""
    grid = numbers(name)
    return (grid[1:] + grid[:-1]) / 2


def nearest(x: np.ndarray, name: str) -> np.ndarray:
    """Codes of the numbers nearest to x."""
    f, middle, size = SMALL[name], midpoints(name), np.abs(x.astype(np.float64))
    code = np.searchsorted(middle, size)  # as many midpoints are less than x: on a midpoint, the number below
    tie = np.append(middle, np.inf)[np.minimum(code, len(middle))] == size
    code = np.minimum(code + (tie & (code % 2 == 1)), len(middle))
    if f.nan is not None:
        code = np.where(np.isnan(x), f.nan, code)
    return np.where(np.signbit(x), code | f.sign, code)


def quotient(x: np.ndarray, by: np.ndarray | float) -> np.ndarray:
    """Rounded to float32 once; float64 numbers that float32 holds."""
    with np.errstate(over="ignore", invalid="ignore"):
        return (np.asarray(x, np.float64) / by).astype(np.float32).astype(np.float64)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """x >= 0 to the nearest of 8 digits, ties to even, saturating."""
    unit = np.exp2(np.maximum(np.frexp(x)[1] - 8, -133.0))
    return np.minimum(np.rint(x / unit) * unit, _BFLOAT16_LARGEST)


def power_of_two(amax: np.ndarray, largest: float, up: bool) -> np.ndarray:
    if up:
        return np.exp2(_EXPONENTS[np.minimum(np.searchsorted(largest * np.exp2(_EXPONENTS), amax), 254)])
    powers = np.exp2(np.arange(-149, 128.0))  # of every float32 number
    floor = np.searchsorted(powers, amax, side="right") - 150  # zero: less than all
    of_largest = np.searchsorted(powers, largest, side="right") - 150
    return np.exp2(np.clip(np.where(amax > 0, floor - of_largest, -127), -127, 127))


def tiles_of(x: np.ndarray, tile: tuple[int, int]) -> np.ndarray:
    """(R, C) -> (rows of tiles, rows of one, columns of tiles, columns of one), filled up with zeros."""
    high, wide = tile[0] or x.shape[0], tile[1] or x.shape[1]
    full = np.zeros((-(-x.shape[0] // high) * high, -(-x.shape[1] // wide) * wide), x.dtype)
    full[: x.shape[0], : x.shape[1]] = x
    return full.reshape(full.shape[0] // high, high, full.shape[1] // wide, wide)


def encoded(x: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Codes (R, C), scales (one a tile) and the scale over all of a float32 array, by the row of that name."""
    element, tile, rule = ROWS[name]
    parts = tiles_of(x, tile)
    size = np.abs(np.where(np.isfinite(parts), parts, 0).astype(np.float64))
    if rule == "ternary":
        codes, scale, whole = *_ternary(parts, size), 1.0
    else:
        amax = size.max((1, 3))
        largest = SMALL[element].largest if isinstance(element, str) else element[1]
        scale, whole = _scales(amax, largest, rule)
        divisor = (scale * whole).astype(np.float32).astype(np.float64)
        codes = _elements(quotient(parts, divisor[:, None, :, None]), element)
    return codes.reshape(parts.shape[0] * parts.shape[1], -1)[: x.shape[0], : x.shape[1]], scale, whole


def _scales(amax: np.ndarray, largest: float, rule: str) -> tuple[np.ndarray, float]:
    if rule.startswith("pow2"):
        return power_of_two(amax, largest, rule == "pow2"), 1.0
    if rule == "e4m3":
        over_all = float(quotient(amax.max(), 448 * largest))
        whole = max(over_all, 2.0**-127) if over_all else 1.0
        least = numbers("e4m3")[1]
        return np.maximum(numbers("e4m3")[nearest(quotient(quotient(amax, largest), whole), "e4m3")], least), whole
    scale = quotient(amax, largest)
    scale = to_bfloat16(scale) if rule == "bfloat16" else scale
    return np.where(scale > 0, scale, 1.0), 1.0


def _elements(x: np.ndarray, element: str | tuple[int, int]) -> np.ndarray:
    if isinstance(element, str):
        return nearest(x, element)
    return np.clip(np.rint(x), *element).astype(np.int64)


def _ternary(parts: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    of_tile = -np.sort(-size.transpose(0, 2, 1, 3).reshape(size.shape[0], size.shape[2], -1))
    sums = np.cumsum(of_tile, -1)
    k = np.argmax(sums**2 / np.arange(1, sums.shape[-1] + 1), -1)[..., None]  # one less than k, as an index is
    scale = to_bfloat16(quotient(np.take_along_axis(sums, k, -1), k + 1.0)[..., 0])
    least = np.where(scale > 0, np.take_along_axis(of_tile, k, -1)[..., 0], np.inf)
    kept = (size >= least[:, None, :, None]) | np.isinf(parts)
    return (np.sign(parts) * kept).astype(np.int64), np.where(scale > 0, scale, 1.0)
