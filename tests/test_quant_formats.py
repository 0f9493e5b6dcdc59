"""Formats against their plain definitions in float64, bit for bit; sizes; what is defined at the edges."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from plain_formats import ROWS, SMALL, encoded, midpoints, numbers
from truth import bound, fresh, surprise

from pennyweight.quant.formats import FORMATS, TERNARY, Coded, Float, decode, encode, size, spread

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


def hold_to_the_definition(x: torch.Tensor, name: str, what: str) -> None:
    """Codes and scales bit for bit; a code of NaN with either sign."""
    got = encode(x, FORMATS[name])
    codes, scale, whole = encoded(x.numpy(), name)
    assert got.scale.dtype == torch.float32 and got.whole == whole, f"{what}: scale over all"
    off = np.argwhere(got.scale.numpy() != scale)
    assert not len(off), f"{what}: scales of tiles {off[:3].tolist()}"
    mine = got.codes.numpy().astype(np.int64)
    off = np.argwhere(np.where(x.isnan(), mine & 0x7F != 0x7F, mine != codes))
    assert not len(off), f"{what}: codes at {off[:3].tolist()} of {x[*off[0]]}, {mine[*off[0]]} not {codes[*off[0]]}"


def keeps_nan(name: str) -> bool:
    return isinstance(ROWS[name][0], str) and SMALL[ROWS[name][0]].nan is not None


def test_every_format_has_a_plain_definition():
    assert set(ROWS) == set(FORMATS)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_codes_and_scales_are_those_of_the_written_rules(name, shape):
    seed = fresh()
    hold_to_the_definition(a_tensor(*shape, seed), name, f"seed {seed}")


SIZES = {"2^-140": 2.0**-140, "2^-126": 2.0**-126, "1e-20": 1e-20, "1e-3": 1e-3, "1": 1.0, "1e4": 1e4, "1e20": 1e20}
REGIMES = [*SIZES, "1e37", "outliers", "any bits"]


@pytest.fixture(scope="module", params=REGIMES)
def a_million(request):
    """(seed, 2^20 finite numbers of a size; of sizes far apart, with outliers; or of any bits)."""
    seed = fresh()
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(1024, 1024, generator=g)
    if request.param == "outliers":
        x = x * torch.exp(3 * torch.randn(1024, 1, generator=g) + 2 * torch.randn(1024, 1024, generator=g))
        x[torch.rand(1024, 1024, generator=g) < 0.003] *= 1e4
    elif request.param == "any bits":  # also those of infinities and NaN, which are elsewhere: halved, they are numbers
        bits = torch.randint(-(2**31), 2**31, (1024, 1024), generator=g).int()
        x = torch.where(bits.view(torch.float32).isfinite(), bits, bits & ~0x40000000).view(torch.float32)
    else:
        x = x * SIZES.get(request.param, 1e37)
    assert bool(x.isfinite().all())
    return seed, x


@pytest.mark.parametrize("name", FORMATS)
def test_a_million_numbers_of_any_size_get_the_codes_and_scales_of_the_definition(name, a_million):
    seed, x = a_million
    hold_to_the_definition(x, name, f"seed {seed}")


def points_and_midpoints(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Elements of a format, and the midpoints of neighbours."""
    element = ROWS[name][0]
    if isinstance(element, str):
        points, middle = torch.tensor(numbers(element)), torch.tensor(midpoints(element))
        return torch.cat([points, -points]), torch.cat([middle, -middle])
    points = torch.arange(-element[1], element[1] + 1).double()
    return points, points[1:] - 0.5


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-7, 1.0, 2.0**90, 0.003, 1.7e20])
@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.element != TERNARY])
def test_every_element_and_midpoint_and_what_lies_beside_it_gets_its_code(name, scale):
    """Each row begins with the largest element, so that its tile has the scale that is wanted."""
    points, middle = points_and_midpoints(name)
    middle, inf = (middle * scale).float(), torch.tensor(torch.inf)
    x = torch.cat([middle, torch.nextafter(middle, inf), torch.nextafter(middle, -inf), (points * scale).float()])
    wide = FORMATS[name].tile[1] or 128
    rows = torch.nn.functional.pad(x, (0, -len(x) % (wide - 1))).view(-1, wide - 1)
    x = torch.cat([torch.full((len(rows), 1), points.max().item() * scale), rows], 1)
    hold_to_the_definition(x, name, f"scale {scale}")
    if math.frexp(scale)[0] == 0.5 and FORMATS[name].scale != "e4m3":  # whose scale over all takes a share of it
        exact = torch.isin(x, (points * scale).float())
        assert torch.equal(decode(encode(x, FORMATS[name]))[exact], x[exact]) and int(exact.sum()) >= len(points)


def test_ties_of_how_many_ternary_codes_to_keep_go_to_the_fewest():
    seed = fresh()
    x = torch.randint(-3, 4, (4000, 32), generator=torch.Generator().manual_seed(seed)).float()
    hold_to_the_definition(x, "ternary", f"seed {seed}")
    x = torch.tensor([[3.0, -1.0, 1.0, 1.0] + [0.0] * 28])  # 3^2 / 1 = 6^2 / 4
    assert encode(x, FORMATS["ternary"]).codes[0].tolist() == [1] + [0] * 31


def test_ternary_scales_of_16_bits_neither_vanish_nor_overflow():
    """A scale that is stored as 0 stands for a tile of zeros; its codes would be read as -1 and 1 otherwise."""
    half = replace(FORMATS["ternary"], scale="float16")
    for f, tiny, huge, largest in ((half, 1e-9, 1e6, 65504.0), (FORMATS["ternary"], 1e-41, 3.4e38, 255 * 2.0**120)):
        assert not decode(encode(torch.tensor([[tiny, -tiny] * 16]), f)).any()
        assert decode(encode(torch.tensor([[huge, -huge] * 16]), f))[0, :2].tolist() == [largest, -largest]


ODD = [0.0, 1e-45, 6e-41, 1.1754942e-38, 1.1754944e-38, 5e-36, 1e-20, 1.0, 448.0, 1e20, 3.4028235e38, torch.inf]


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_subnormals_the_largest_and_infinities_in_any_company(name):
    """Tiles, some beside others, that draw from very few odd numbers each."""
    seed, (high, wide) = fresh(), (part or 24 for part in FORMATS[name].tile)
    g = torch.Generator().manual_seed(seed)
    odd = torch.tensor(ODD + ([torch.nan] if keeps_nan(name) else []))
    for few in [1, 1, 2, 2, 3] * (1 if high > 100 else 8):
        chosen = odd[torch.randint(len(odd), (3, 3, few), generator=g)]
        which = torch.randint(few, (3, high, 3, wide), generator=g)
        at = torch.arange(3)
        x = chosen[at[:, None, None, None], at[:, None], which].reshape(3 * high, 3 * wide)
        x = x * (1 - 2 * torch.randint(2, x.shape, generator=g))
        hold_to_the_definition(x, name, f"seed {seed}")
        hold_to_the_definition(x[:high, :wide].contiguous(), name, f"seed {seed}, one tile")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("exponent", [-60, -8, 0, 8, 60])
def test_what_is_decoded_is_near_at_every_size(name, exponent):
    seed, f = fresh(), FORMATS[name]
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    error = float((decode(encode(x, f)).double() - x.double()).norm() / x.double().norm())
    bits = f.element.mantissa + 2 if isinstance(f.element, Float) else f.element or 2
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
    """Up as often as the place between two neighbours says, and never to any other; what is too large saturates."""
    seed, f, draws = fresh(), FORMATS[name], 2000
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 64, generator=g).repeat(draws, 1)  # all of them in tiles of the same scales
    coded = encode(x, f, torch.rand(x.shape, generator=g))
    grid = points_and_midpoints(name)[0].unique()
    grid = grid if isinstance(f.element, Float) else torch.cat([grid[:1] - 1, grid])  # -128 may be reached
    ratio = (x / spread(coded.scale * coded.whole, f.tile, x.shape)).double().clamp(grid[0], grid[-1])
    at = (torch.searchsorted(grid, ratio, right=True) - 1).clamp(max=len(grid) - 2)
    low, high = grid[at], grid[at + 1]
    values = decode(Coded(coded.codes, torch.ones_like(coded.scale), f))
    up = values == high
    assert bool((up | (values == low)).all()), f"seed {seed}"
    share = ((ratio - low) / (high - low)).view(draws, 4, 64)
    assert bool((share == share[0]).all())
    off = surprise(up.view(draws, 4, 64).sum(0), draws, share[0], slack=2.0**-24)  # the step of torch.rand
    assert float(off.max()) < bound(off.numel()), f"seed {seed}: {off.max():.1f} nats"


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
