"""Small floats against the definition in plain float64: every code and midpoint, and random numbers of any size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from truth import fresh

from pennyweight.quant.formats import (
    E2M1,
    E4M3,
    E5M2,
    E5M6,
    decode_float,
    encode_float,
    numbers_of,
    power_exponent,
    rounded,
)

FLOATS = [E4M3, E5M2, E2M1, E5M6]
TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def numbers(f) -> np.ndarray:
    """The finite non-negative numbers of a format by code, from its definition."""
    out = []
    for code in range(1 << (f.bits - 1)):
        e, m = code >> f.mantissa, code & ((1 << f.mantissa) - 1)
        out.append((m if e == 0 else (1 << f.mantissa) + m) * 2.0 ** (max(e, 1) - f.bias - f.mantissa))
    return np.array([x for x in out if x <= f.largest])


def nearest(x: np.ndarray, f) -> np.ndarray:
    """Codes of the nearest numbers, ties to the even one, sign in the top bit; NaN where x is."""
    grid, size = numbers(f), np.minimum(np.abs(x.astype(np.float64)), f.largest)
    above = np.clip(np.searchsorted(grid, np.nan_to_num(size)), 1, len(grid) - 1)
    low, high = np.nan_to_num(size) - grid[above - 1], grid[above] - np.nan_to_num(size)
    code = np.where((low < high) | ((low == high) & ((above - 1) % 2 == 0)), above - 1, above)
    code = np.where(np.isnan(x), f.nan or 0, code)
    return code | (np.signbit(x).astype(np.int64) << (f.bits - 1))


def codes(x: torch.Tensor, f) -> np.ndarray:
    return encode_float(rounded(x, f), f).numpy().astype(np.int64) & ((1 << f.bits) - 1)


@pytest.mark.parametrize("f", FLOATS, ids=lambda f: f.name)
def test_every_code_stands_for_its_number_and_comes_back(f):
    grid = numbers(f)
    want = np.concatenate([grid, -grid])
    at = np.concatenate([np.arange(len(grid)), np.arange(len(grid)) + (1 << (f.bits - 1))])
    assert np.array_equal(numbers_of(f).numpy().astype(np.float64)[at], want)
    assert np.array_equal(codes(torch.tensor(want).float(), f), at)
    assert np.array_equal(decode_float(torch.tensor(at), f).numpy(), want)
    others = np.setdiff1d(np.arange(1 << f.bits), at)
    assert not np.isfinite(numbers_of(f).numpy()[others]).any() and (len(others) == 0) == (f is E2M1)
    if f.name in TORCH:
        theirs = torch.arange(256, dtype=torch.uint8).view(TORCH[f.name]).float()
        assert torch.equal(theirs.nan_to_num(-1e9), numbers_of(f).nan_to_num(-1e9))


@pytest.mark.parametrize("f", FLOATS, ids=lambda f: f.name)
def test_midpoints_and_their_neighbours_round_as_the_definition_says(f):
    grid = numbers(f)
    middle = torch.tensor((grid[1:] + grid[:-1]) / 2).float()
    inf = torch.tensor(torch.inf)
    x = torch.cat([middle, torch.nextafter(middle, inf), torch.nextafter(middle, -inf), torch.tensor(grid).float()])
    x = torch.cat([x, -x, torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, torch.inf, -torch.inf])])
    assert np.array_equal(codes(x, f), nearest(x.numpy(), f))


@pytest.mark.parametrize("f", FLOATS, ids=lambda f: f.name)
@pytest.mark.parametrize("exponent", [-30, -16, -9, -3, 0, 4, 9, 17])
def test_random_numbers_round_as_the_definition_says(f, exponent):
    seed = fresh()
    x = torch.randn(1_000_000 // 8, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    wrong = codes(x, f) != nearest(x.numpy(), f)
    assert not wrong.any(), f"seed {seed}: {x[torch.tensor(wrong)][:3].tolist()}"
    if f.name in TORCH:
        theirs = x.clamp(-f.largest, f.largest).to(TORCH[f.name]).view(torch.uint8)
        assert np.array_equal(codes(x, f), theirs.numpy().astype(np.int64))


def test_nan_is_kept_where_there_is_one_and_refused_elsewhere():
    x = torch.tensor([1.0, torch.nan, -torch.nan])
    for f in FLOATS:
        if f is E2M1:
            with pytest.raises(ValueError, match="e2m1 has no code for NaN"):
                encode_float(rounded(x, f), f)
        else:
            assert decode_float(encode_float(rounded(x, f), f), f).isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("f", FLOATS, ids=lambda f: f.name)
def test_stochastic_rounding_is_unbiased_and_goes_to_neighbours_only(f):
    """Each mean is a count of independent tosses: the largest deviation is held against the 1e-6 level."""
    seed, draws = fresh(), 4000
    g = torch.Generator().manual_seed(seed)
    x = (torch.rand(300, generator=g) * 2 - 1) * f.largest * torch.rand(300, generator=g) ** 6
    total, seen = torch.zeros(300, dtype=torch.float64), set()
    for _ in range(draws):
        y = rounded(x, f, torch.rand(300, generator=g))
        total += y.double()
        seen.update(y.tolist())
    assert seen <= set(numbers(f)) | set(-numbers(f))
    grid = np.concatenate([-numbers(f)[::-1], numbers(f)[1:]])
    at = np.clip(np.searchsorted(grid, x.numpy().astype(np.float64), side="right"), 1, len(grid) - 1)
    low, high = grid[at - 1], grid[at]
    p = (x.numpy() - low) / (high - low)
    z = (total.numpy() / draws - x.numpy()) / ((high - low) * np.sqrt(np.maximum(p * (1 - p), 1e-3) / draws))
    assert np.abs(z).max() < 6.5, f"seed {seed}: {np.abs(z).max():.1f} standard errors"


def test_exponents_of_scales_are_the_least_that_fit_or_the_floor():
    seed = fresh()
    amax = torch.rand(20_000, generator=torch.Generator().manual_seed(seed)) * 2.0 ** torch.randint(
        -140, 120, (20_000,)
    )
    exact = torch.tensor([2.0**k * m for k in range(-100, 100) for m in (1.0, 1.5, 1.75)])
    amax = torch.cat([amax, exact, torch.nextafter(exact, torch.tensor(torch.inf))])
    for f in (E4M3, E2M1):
        k = power_exponent(amax, f).double()
        fits, tight = amax.double() <= f.largest * torch.exp2(k), amax.double() > f.largest * torch.exp2(k - 1)
        assert bool((fits | (k == 127)).all() and (tight | (k == -127)).all()), f"seed {seed}"
        floor = power_exponent(amax, f, up=False)
        want = torch.floor(torch.log2(amax.double())) - int(np.floor(np.log2(f.largest)))
        assert torch.equal(floor.double(), want.clamp(-127, 127)), f"seed {seed}"
    assert power_exponent(torch.zeros(1), E4M3).tolist() == [-127]


@pytest.mark.parametrize("f", FLOATS, ids=lambda f: f.name)
def test_stochastic_rounding_leaves_what_is_a_number_of_the_format_where_it_is(f):
    """Also where noise is the most there is: added to it, the largest would be rounded to the next integer, and NaN."""
    x = numbers_of(f)[: 1 << (f.bits - 1)]
    x = x[x.isfinite()]
    assert torch.equal(rounded(x, f, torch.full_like(x, 1 - 2.0**-24)), x)
