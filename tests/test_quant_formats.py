"""Formats against a plain reference, tile by tile in float64; sizes; what is defined at the edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_quant_floats import nearest
from truth import fresh

from pennyweight.quant.formats import E4M3, FORMATS, TERNARY, Float, decode, encode, numbers_of, size

SHAPES = [(1, 1), (3, 40), (130, 260), (256, 128)]


def a_tensor(rows, columns, seed, spread=3.0):
    """Rows and columns of very different size, with a tile of zeros, tiny numbers and infinities among them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=g)
    x = x * torch.exp(spread * torch.randn(rows, 1, generator=g)) * torch.exp(torch.randn(1, columns, generator=g))
    x[: rows // 4 + 1, : columns // 2] *= 0.0 if seed % 2 else 1e-30
    if rows * columns > 100:
        x[rows // 2, columns // 3], x[rows // 2, columns // 3 + 1] = torch.inf, -torch.inf
    return x


def tiles(x: np.ndarray, tile):
    high, wide = tile[0] or x.shape[0], tile[1] or x.shape[1]
    for i in range(0, x.shape[0], high):
        for j in range(0, x.shape[1], wide):
            yield i // high, j // wide, np.s_[i : i + high, j : j + wide]


def element_codes(quotient: np.ndarray, element) -> np.ndarray:
    if isinstance(element, Float):
        return nearest(quotient, element)
    return np.clip(np.rint(quotient), -(2 ** (element - 1)), 2 ** (element - 1) - 1)


def to_dtype(x: float, name: str) -> np.float32:
    return torch.tensor(np.float32(x)).to(getattr(torch, name)).float().numpy()


def reference(x: torch.Tensor, f):
    """Codes and scales, from the written rules. Quotients are float32 numbers, as every implementation has them."""
    values = x.numpy()
    finite = np.where(np.isfinite(values), values, 0.0).astype(np.float64)
    found, codes, whole = {}, np.zeros(values.shape, np.int64), np.float32(1.0)
    if f.scale == "e4m3":
        whole = np.float32(np.float32(np.abs(finite).max()) / np.float32(f.largest * 448)) or np.float32(1.0)
    for i, j, place in tiles(values, f.tile):
        amax = np.abs(finite[place]).max()
        if f.scale.startswith("pow2"):
            if f.scale == "pow2":  # the least power of two that holds it
                k = next(k for k in range(-127, 128) if amax <= f.largest * 2.0**k or k == 127)
            else:
                k = -127 if amax == 0 else math.floor(math.log2(amax)) - math.floor(math.log2(f.largest))
            scale = np.float32(2.0 ** max(-127, min(127, k)))
        elif f.scale == "e4m3":
            quotient = np.float32(np.float32(amax) / np.float32(f.largest)) / whole
            scale = max(np.float32(numbers_of(E4M3)[int(nearest(np.array([quotient]), E4M3)[0])]), np.float32(2.0**-9))
        else:
            scale = to_dtype(np.float32(amax) / np.float32(f.largest), f.scale)
            scale = scale if scale > 0 else np.float32(1.0)
        found[i, j] = scale
        with np.errstate(over="ignore"):
            codes[place] = element_codes(values[place] / np.float32(scale * whole), f.element)
    return codes, found, whole


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.element != TERNARY])
def test_codes_and_scales_are_those_of_the_written_rules(name, shape):
    seed, f = fresh(), FORMATS[name]
    x = a_tensor(*shape, seed)
    got = encode(x, f)
    codes, scales, whole = reference(x, f)
    assert got.scale.dtype == torch.float32 and got.whole == whole
    for (i, j), scale in scales.items():
        assert float(got.scale[i, j]) == scale, f"seed {seed}: scale of tile {i}, {j}"
    mine = got.codes.numpy().astype(np.int64)
    assert np.array_equal(mine, codes), f"seed {seed}: {np.argwhere(mine != codes)[:3]}"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("exponent", [-60, -8, 0, 8, 60])
def test_what_is_decoded_is_near_at_every_size(name, exponent):
    seed, f = fresh(), FORMATS[name]
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    error = float((decode(encode(x, f)).double() - x.double()).norm() / x.double().norm())
    bits = f.element.mantissa + 2 if isinstance(f.element, Float) else f.element or 1.6
    assert error < 1.1 * 2.0 ** (1 - bits), f"seed {seed}: {error:.3f}"


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_nan_and_infinity_are_as_defined(name):
    f = FORMATS[name]
    assert not decode(encode(torch.zeros(5, 70), f)).any()
    x = torch.randn(4, 64)
    x[1, 3] = torch.nan
    if isinstance(f.element, Float) and f.element.nan is not None:
        assert decode(encode(x, f)).isnan().nonzero().tolist() == [[1, 3]]
    else:
        with pytest.raises(ValueError, match="no code for NaN"):
            encode(x, f)
    x[1, 3] = torch.inf
    back = decode(encode(x, f))
    assert bool(back.isfinite().all()) and float(back[1, 3]) > 0.2 * float(x[1, 4:32].abs().amax())


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.element != TERNARY])
def test_stochastic_rounding_is_unbiased(name):
    seed, f, draws = fresh(), FORMATS[name], 2000
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 64, generator=g)
    if f.scale in ("pow2_floor", "e4m3", "bfloat16"):  # whose largest may saturate
        x[:, ::16] *= 1.3
    total, square = torch.zeros(4, 64, dtype=torch.float64), torch.zeros(4, 64, dtype=torch.float64)
    for _ in range(draws):
        y = decode(encode(x, f, torch.rand(4, 64, generator=g))).double()
        total += y
        square += y * y
    mean = total / draws
    spread = (square / draws - mean**2).clamp(min=0).sqrt()
    inside = spread > 0
    z = ((mean - x).abs() / (spread / draws**0.5))[inside]
    # Elements that saturate have no spread, or are off by a share of a step: they are the few largest.
    assert float((z < 6).double().mean()) > 0.97, f"seed {seed}"
    assert float(z.median()) < 1.2, f"seed {seed}"


def test_ternary_is_the_best_there_is():
    """Against all choices of how many codes are not zero, each with its own best scale."""
    seed = fresh()
    x = torch.randn(30, 32, generator=torch.Generator().manual_seed(seed))
    coded = encode(x, FORMATS["ternary"])
    assert set(coded.codes.unique().tolist()) <= {-1, 0, 1}
    for row in range(30):
        best = math.inf
        order = x[row].abs().argsort(descending=True)
        for k in range(1, 33):
            codes = torch.zeros(32)
            codes[order[:k]] = x[row][order[:k]].sign()
            scale = (x[row] * codes).sum() / k
            best = min(best, float((x[row] - scale * codes).square().sum()))
        mine = float((x[row] - decode(coded)[row]).square().sum())
        assert mine <= best * 1.001 + 1e-6, f"seed {seed}, row {row}"


def test_a_searched_scale_is_never_worse():
    seed = fresh()
    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(seed))
    for name, f in FORMATS.items():
        plain, searched = (float((decode(encode(x, f, search=s)) - x).square().sum()) for s in (False, True))
        assert searched <= plain * (1 + 1e-6), f"seed {seed}, {name}"


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("int8", 64 * 4096 + 64 * 128 * 2),
        ("int4", 64 * 2048 + 64 * 128 * 2),
        ("fp8_block", 64 * 4096 + 32 * 4),
        ("fp8_block_pow2", 64 * 4096 + 32),
        ("fp8_act", 64 * 4096 + 64 * 32 * 4),
        ("fp8_row", 64 * 4096 + 64 * 4),
        ("fp8_tensor", 64 * 4096 + 4),
        ("mxfp8", 64 * 4096 + 64 * 128),
        ("mxfp4", 64 * 2048 + 64 * 128),
        ("nvfp4", 64 * 2048 + 64 * 256 + 4),
    ],
)
def test_bytes(name, want):
    assert size(64, 4096, FORMATS[name]) == want
    assert size(64, 4096, FORMATS["int4"].grouped(None)) == 64 * 2048 + 64 * 2
