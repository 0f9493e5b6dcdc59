"""Small floats against the definition in plain float64: every code and midpoint, and random numbers of any size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from plain_formats import SMALL, midpoints, nearest, numbers
from truth import fresh

from pennyweight.quant.formats import (
    E2M1,
    E4M3,
    E5M2,
    E5M6,
    FORMATS,
    decode_float,
    encode_float,
    numbers_of,
    power_exponent,
    rounded,
)

FLOATS = [E4M3, E5M2, E2M1, E5M6]
TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def codes(x: torch.Tensor, f) -> np.ndarray:
    return encode_float(rounded(x, f), f).numpy().astype(np.int64) & ((1 << f.bits) - 1)


def by_torch(x: torch.Tensor, f) -> np.ndarray:
    """Clamped first: what is too large becomes NaN (E4M3) or infinity (E5M2) in the cast before torch 2.12."""
    return x.clamp(-f.largest, f.largest).to(TORCH[f.name]).view(torch.uint8).numpy().astype(np.int64)


@pytest.mark.parametrize("f", FLOATS, ids=lambda f: f.name)
def test_every_code_stands_for_its_number_and_comes_back(f):
    grid = numbers(f.name)
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
    middle, inf = torch.tensor(midpoints(f.name)).float(), torch.tensor(torch.inf)
    grid = torch.tensor(numbers(f.name)).float()
    x = torch.cat([middle, torch.nextafter(middle, inf), torch.nextafter(middle, -inf), grid])
    x = torch.cat([x, -x, torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, torch.inf, -torch.inf])])
    assert np.array_equal(codes(x, f), nearest(x.numpy(), f.name))
    if f.name in TORCH:
        assert np.array_equal(codes(x, f), by_torch(x, f))


@pytest.mark.parametrize("f", FLOATS, ids=lambda f: f.name)
@pytest.mark.parametrize("exponent", [-30, -16, -9, -3, 0, 4, 9, 17])
def test_random_numbers_round_as_the_definition_says(f, exponent):
    seed = fresh()
    x = torch.randn(1_000_000 // 8, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    wrong = codes(x, f) != nearest(x.numpy(), f.name)
    assert not wrong.any(), f"seed {seed}: {x[torch.tensor(wrong)][:3].tolist()}"
    if f.name in TORCH:
        assert np.array_equal(codes(x, f), by_torch(x, f)), f"seed {seed}"


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
        assert torch.equal(y.signbit(), x.signbit()), f"seed {seed}"  # of zeros, too
        total += y.double()
        seen.update(y.tolist())
    assert seen <= set(numbers(f.name)) | set(-numbers(f.name))
    grid = np.concatenate([-numbers(f.name)[::-1], numbers(f.name)[1:]])
    at = np.clip(np.searchsorted(grid, x.numpy().astype(np.float64), side="right"), 1, len(grid) - 1)
    low, high = grid[at - 1], grid[at]
    p = (x.numpy() - low) / (high - low)
    z = (total.numpy() / draws - x.numpy()) / ((high - low) * np.sqrt(np.maximum(p * (1 - p), 1e-3) / draws))
    assert np.abs(z).max() < 6.5, f"seed {seed}: {np.abs(z).max():.1f} standard errors"


@pytest.mark.parametrize("f", FLOATS, ids=lambda f: f.name)
def test_what_is_too_large_saturates_whatever_a_cast_of_torchs_would_do(f):
    """Written out, not clamped by the test: a cast gives NaN or infinity here before torch 2.12."""
    largest = SMALL[f.name].largest
    x = torch.tensor([largest, 1.0001 * largest, 1e9, 3.4e38, torch.inf])
    assert rounded(torch.cat([x, -x]), f).tolist() == [largest] * 5 + [-largest] * 5
    assert decode_float(encode_float(rounded(x, f), f), f).tolist() == [largest] * 5


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


OCP = {  # OCP MX 1.0, section 5.3: code and number
    "e4m3": {0: 0.0, 0x01: 2.0**-9, 0x07: 2.0**-6 * 0.875, 0x08: 2.0**-6, 0x38: 1.0, 0x7E: 448.0, 0xFE: -448.0},
    "e5m2": {0: 0.0, 0x01: 2.0**-16, 0x03: 2.0**-14 * 0.75, 0x04: 2.0**-14, 0x3C: 1.0, 0x7B: 57344.0, 0xFB: -57344.0},
    "e2m1": {0: 0.0, 1: 0.5, 2: 1.0, 3: 1.5, 4: 2.0, 5: 3.0, 6: 4.0, 7: 6.0, 15: -6.0},
}
E5M2_NAN = (0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF)


@pytest.mark.parametrize("f", [E4M3, E5M2, E2M1], ids=lambda f: f.name)
def test_elements_are_those_that_the_ocp_specification_prints(f):
    want = OCP[f.name]
    assert decode_float(torch.tensor(list(want)), f).tolist() == list(want.values())
    assert encode_float(torch.tensor(list(want.values())), f).tolist() == list(want)
    every = numbers_of(f)
    assert every.isnan().nonzero()[:, 0].tolist() == {"e4m3": [0x7F, 0xFF], "e5m2": [*E5M2_NAN]}.get(f.name, [])
    assert every.isinf().nonzero()[:, 0].tolist() == {"e5m2": [0x7C, 0xFC]}.get(f.name, [])


def test_shared_exponents_are_those_that_the_ocp_specification_prints():
    """Section 6.3: the largest power of two in a block over that of the element, 2^8, 2^15 and 2^2."""
    amax = torch.tensor([1.0, 1.99, 2.0, 448.0, 511.0, 512.0, 2.0**-140, 3e38])
    for f, of_largest in ((E4M3, 8), (E5M2, 15), (E2M1, 2)):
        want = [max(-127, e - of_largest) for e in (0, 0, 1, 8, 8, 9, -140, 127)]
        assert power_exponent(amax, f, up=False).tolist() == want
    for name in ("mxfp8", "mxfp8_floor", "mxfp4"):
        assert FORMATS[name].tile == (1, 32) and FORMATS[name].scale_bytes == 1


@pytest.mark.parametrize("f", FLOATS, ids=lambda f: f.name)
def test_stochastic_rounding_leaves_what_is_a_number_of_the_format_where_it_is(f):
    """Also where noise is the most there is: added to it, the largest would be rounded to the next integer, and NaN."""
    x = numbers_of(f)[: 1 << (f.bits - 1)]
    x = x[x.isfinite()]
    assert torch.equal(rounded(x, f, torch.full_like(x, 1 - 2.0**-24)), x)
