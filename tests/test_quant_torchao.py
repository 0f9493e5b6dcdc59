"""Codes and scales against torchao's own CPU encoders, bit for bit where both define the same.

Where they do not, the test says so and compares what is left:

MX          torchao takes a block with NaN or infinity whole (scale NaN, or made from the infinity); here scales are
            made from finite numbers. torchao's scale 2^-127 divides as 2^-126, or as 1 when rounding up, so that
            blocks of subnormals get other codes. Rounding up, it takes log2 in float32, so that an amax just above
            448 * 2^k, by less than 2^-17 of it, has the scale 2^k there and saturates.
NVFP4       The least scale is 2^-6 there, E4M3's least normal number, and 2^-9 here. Elements are multiplied by the
            reciprocal of the scale there and divided by it here.
fp8, int    A tile of zeros has the scale 0 (0 / 0 is NaN then), or the least that is allowed; here 1. Training code and
            integers multiply by a reciprocal, too.
"""

from __future__ import annotations

import pytest
import torch
from plain_formats import midpoints
from truth import fresh

from pennyweight.quant.formats import E4M3, FORMATS, Coded, Float, decode, encode, spread

pytest.importorskip("torchao", "0.18", reason="needs torchao to compare with: pip install torchao==0.18.0")

from torchao.float8.config import ScalingGranularity
from torchao.float8.float8_utils import tensor_to_scale, to_fp8_saturated
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.kernels import unpack_uint4
from torchao.prototype.mx_formats.mx_tensor import to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale
from torchao.quantization.quant_primitives import (
    MappingType,
    _choose_scale_float8,
    _quantize_affine_float8,
    choose_qparams_affine,
    quantize_affine,
)

SIZES = [2.0**-126, 1e-20, 1e-3, 1.0, 1e4, 1e20, 1e37]
JUST_ABOVE = 2.0**-17
"""How far above a power of two the logarithm, in float32, is an integer still."""


def a_tensor(size, seed, rows=512, columns=512):
    """Outliers too, finite at every size."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=g) * torch.exp(0.5 * torch.randn(rows, columns, generator=g))
    return (x.clamp(-30, 30) * size).contiguous()


def hard_cases(element: str, scale: float, tile: int) -> torch.Tensor:
    """Rows of a tile, which begin with the largest, of every midpoint of an element and what lies beside it."""
    middle, inf = torch.tensor(midpoints(element)).float() * scale, torch.tensor(torch.inf)
    x = torch.cat([middle, torch.nextafter(middle, inf), torch.nextafter(middle, -inf), torch.zeros(1)])
    x = torch.cat([x, -x])
    rows = torch.nn.functional.pad(x, (0, -len(x) % (tile - 1))).view(-1, tile - 1)
    return torch.cat([torch.full((len(rows), 1), {"e4m3": 448.0, "e2m1": 6.0}[element] * scale), rows], 1).contiguous()


def equally_near(mine: Coded, codes: torch.Tensor, x: torch.Tensor, why: str) -> None:
    """Codes differ from ours where both are as near to the exact quotient as float32 can tell, and almost nowhere."""
    exact = x.double() / (spread(mine.scale, mine.format.tile, x.shape).double() * mine.whole)
    ones = Coded(codes, torch.ones_like(mine.scale), mine.format)
    off = (decode(ones).double() - exact).abs() - (decode(Coded(mine.codes, ones.scale, mine.format)) - exact).abs()
    assert bool((off.abs() <= 2.0**-20 * exact.abs()).all()), f"{why}: {off.abs().max()}"
    assert float((codes != mine.codes).double().mean()) < 1e-3, why


def by_torchao_mx(x: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(exponents of scales, codes)."""
    mode = ScaleCalculationMode.RCEIL if name == "mxfp8" else ScaleCalculationMode.FLOOR
    scale, codes = to_mx(x, torch.float4_e2m1fn_x2 if name == "mxfp4" else torch.float8_e4m3fn, 32, mode)
    return scale.view(torch.uint8).int() - 127, unpack_uint4(codes) if name == "mxfp4" else codes.view(torch.uint8)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["mxfp8", "mxfp8_floor", "mxfp4"])
def test_mx_codes_and_scales_are_torchaos(name, size):
    seed = fresh()
    x = a_tensor(size, seed)
    x[0, :64] = 0
    mine = encode(x, FORMATS[name])
    exponents, codes = by_torchao_mx(x, name)
    k = torch.frexp(mine.scale).exponent - 1
    amax = x.abs().unflatten(1, (-1, 32)).amax(-1).double()
    above = amax / (448 * torch.exp2(k.double() - 1))
    same = ~((above > 1) & (above <= 1 + JUST_ABOVE)) if name == "mxfp8" else torch.ones_like(k, dtype=torch.bool)
    assert torch.equal(exponents[same], k[same]) and bool((exponents[~same] - k[~same]).abs().le(1).all()), f"{seed}"
    same &= (k > -127) | (amax == 0)
    at = spread(same, (1, 32), x.shape)
    assert torch.equal(codes[at], mine.codes[at]), f"seed {seed}"
    assert bool(same[1:].any()) or size == SIZES[0]


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-3, 1.0, 2.0**60])
@pytest.mark.parametrize("name", ["mxfp8", "mxfp8_floor", "mxfp4"])
def test_mx_midpoints_go_where_torchao_takes_them(name, scale):
    x = hard_cases(FORMATS[name].element.name, scale, 32)
    mine = encode(x, FORMATS[name])
    exponents, codes = by_torchao_mx(x, name)
    assert torch.equal(torch.exp2(exponents.float()), mine.scale) and torch.equal(codes, mine.codes)


def test_torchao_rounds_an_amax_just_above_a_power_down_and_we_do_not():
    """Should this fail, torchao is exact, and JUST_ABOVE can go."""
    k = torch.arange(-100, 100)
    amax = torch.nextafter(448 * torch.exp2(k.float()), torch.tensor(torch.inf))
    x = torch.nn.functional.pad(amax[:, None], (0, 31)).contiguous()
    assert torch.equal(encode(x, FORMATS["mxfp8"]).scale[:, 0], torch.exp2(k + 1.0))
    exponents, _ = by_torchao_mx(x, "mxfp8")
    assert float((exponents[:, 0] == k).double().mean()) > 0.9


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("over_all", [True, False])
def test_nvfp4_scales_are_torchaos_and_codes_but_for_ties(size, over_all):
    seed = fresh()
    x = a_tensor(size, seed)
    x[0, :64] = 0
    x[1] *= 2e-4
    whole = per_tensor_amax_to_scale(x.abs().amax()) if over_all else None
    mine = encode(x, FORMATS["nvfp4"], whole=None if over_all else 1.0)
    assert mine.whole == (float(whole) if over_all else 1.0)
    scale, packed = nvfp4_quantize(x, 16, whole)
    assert torch.equal(scale.float(), mine.scale.clamp(min=2.0**-6)), f"seed {seed}"
    same = spread(mine.scale >= 2.0**-6, (1, 16), x.shape)
    codes = torch.where(same, unpack_uint4(packed), mine.codes)
    equally_near(mine, codes, x, f"seed {seed}")
    assert not over_all or float(same.double().mean()) > 0.9


@pytest.mark.parametrize("scale", [2.0**-3, 1.0, 2.0**6])
def test_nvfp4_midpoints_go_where_torchao_takes_them(scale):
    """Scales are powers of two, whose reciprocals are exact."""
    x = hard_cases("e2m1", scale, 16)
    mine = encode(x, FORMATS["nvfp4"], whole=1.0)
    theirs, packed = nvfp4_quantize(x)
    assert bool((mine.scale == scale).all()) and torch.equal(theirs.float(), mine.scale)
    assert torch.equal(unpack_uint4(packed), mine.codes)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["fp8_tensor", "fp8_tensor_e5m2", "fp8_row", "fp8_act", "fp8_block"])
def test_fp8_codes_and_float32_scales_are_torchaos(name, size):
    seed, f = fresh(), FORMATS[name]
    assert isinstance(f.element, Float)
    dtype = torch.float8_e4m3fn if f.element is E4M3 else torch.float8_e5m2
    x = a_tensor(size, seed)
    scale = _choose_scale_float8(x, [part or whole for part, whole in zip(f.tile, x.shape, strict=True)], dtype)
    mine = encode(x, f)
    assert torch.equal(scale, mine.scale), f"seed {seed}"
    assert torch.equal(_quantize_affine_float8(x, scale, dtype).view(torch.uint8), mine.codes), f"seed {seed}"


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4, 1e20])
def test_powers_of_two_for_128_columns_are_those_of_torchaos_training(size):
    seed = fresh()
    x = a_tensor(size, seed)
    mine, tiles = encode(x, FORMATS["fp8_act_pow2"]), x.view(-1, 128)
    axis = {"scaling_granularity": ScalingGranularity.AXISWISE, "axiswise_dim": 1}
    scale = tensor_to_scale(tiles, torch.float8_e4m3fn, round_scales_to_power_of_2=True, **axis)
    above = tiles.abs().amax(1, keepdim=True).double() / (448 * mine.scale.view(-1, 1).double() / 2)
    same = (above > 1 + JUST_ABOVE)[:, 0]
    assert torch.equal((1 / scale)[same], mine.scale.view(-1, 1)[same]), f"seed {seed}"
    codes = to_fp8_saturated(tiles * scale, torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(codes[same], mine.codes.view(-1, 128)[same]) and float(same.double().mean()) > 0.9


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4, 1e20])
def test_blocks_of_torchaos_fp8_training_are_ours_but_for_ties(size):
    pytest.importorskip("triton", reason="torchao's module of these functions needs triton")
    from torchao.prototype.blockwise_fp8_training.kernels import (
        torch_blockwise_scale_act_quant_lhs,
        torch_blockwise_scale_weight_quant,
    )

    seed = fresh()
    x = a_tensor(size, seed)
    for name, quantise in (
        ("fp8_act", torch_blockwise_scale_act_quant_lhs),
        ("fp8_block", torch_blockwise_scale_weight_quant),
    ):
        mine, (codes, scale) = encode(x, FORMATS[name]), quantise(x)
        torch.testing.assert_close(scale, mine.scale, rtol=2.0**-22, atol=0)  # the reciprocal of a rounded reciprocal
        equally_near(mine, codes.view(torch.uint8), x, f"seed {seed}")


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize(("name", "largest"), [("int8", 127), ("int4", 7), ("int3", 3)])
def test_integers_and_their_scales_of_16_bits_are_torchaos_but_for_ties(name, largest, size):
    seed = fresh()
    x = a_tensor(size, seed)
    mine, block = encode(x, FORMATS[name]), (1, 32)
    scale, zero = choose_qparams_affine(
        x, MappingType.SYMMETRIC, block, torch.int8, -largest, largest, scale_dtype=torch.bfloat16
    )
    assert torch.equal(scale.float(), mine.scale), f"seed {seed}"
    codes = quantize_affine(x, block, scale.float(), zero, torch.int8, -largest - 1, largest)
    equally_near(mine, codes, x, f"seed {seed}")


def test_what_is_near_enough_is_not_everything():
    """The comparison above sees a single code that is the next one."""
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(fresh()))
    mine = encode(x, FORMATS["int8"])
    wrong = mine.codes.clone()
    wrong[2, 5] += 1 if wrong[2, 5] < 0 else -1
    with pytest.raises(AssertionError):
        equally_near(mine, wrong, x, "")
