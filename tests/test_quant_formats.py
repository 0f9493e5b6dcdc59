"""Integer formats: codes in range, error no larger than the usual scale's, decoding exact, sizes as stored."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from pennyweight.quant.formats import BITS, decode, encode, size


def weight(seed, rows=24, columns=96):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=g) * torch.rand(rows, 1, generator=g)
    w[0, :32] = 0
    w[1, 3] = 40.0  # an outlier in an otherwise small group
    return w


def rival(w, bits, group):
    """The usual way: the largest magnitude becomes the largest code, in float32 with a bfloat16 scale."""
    high = 2 ** (bits - 1) - 1
    parts = w.reshape(len(w), -1, group or w.shape[1])
    scale = (parts.abs().amax(-1, keepdim=True) / high).bfloat16().float()
    scale[scale == 0] = 1
    return ((parts / scale).round().clamp(-high - 1, high) * scale).reshape(w.shape)


@pytest.mark.parametrize("bits", BITS.values())
@pytest.mark.parametrize("group", [32, 16, None])
def test_error_is_bounded_and_no_worse_than_the_usual_scale(bits, group):
    seed = torch.seed() % 10**6
    w = weight(seed)
    coded = encode(w, bits, group, torch.bfloat16)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert coded.codes.dtype == torch.int8 and low <= int(coded.codes.min()) and int(coded.codes.max()) <= high
    assert coded.scale.dtype == torch.bfloat16 and coded.scale.shape == (24, 96 // (group or 96))
    parts = lambda x: x.double().reshape(24, -1, group or 96).square().sum(-1)  # noqa: E731
    ours, theirs = parts(decode(coded) - w), parts(rival(w, bits, group) - w)
    assert bool((ours <= theirs + 1e-9).all()), f"seed {seed}"
    assert bool((decode(coded)[0, :32] == 0).all())


@pytest.mark.parametrize("bits", BITS.values())
def test_a_weight_on_the_grid_is_kept_exactly(bits):
    g = torch.Generator().manual_seed(torch.seed() % 10**6)
    high = 2 ** (bits - 1) - 1
    codes = torch.randint(-high, high + 1, (6, 64), generator=g)
    codes[:, ::32] = high  # the largest code is there, so the scale is found again
    w = codes * torch.tensor(0.0078125)
    assert torch.equal(decode(encode(w, bits, 32, torch.bfloat16)), w)


@pytest.mark.parametrize("bits", BITS.values())
@pytest.mark.parametrize(("rows", "columns", "group"), [(24, 96, 32), (3, 100, None)])
def test_size_is_what_the_packed_tensors_take(bits, rows, columns, group):
    coded = encode(weight(1, rows, columns), bits, group, torch.bfloat16)
    packed = pack_to_int32(coded.codes, bits)
    want = packed.numel() * packed.element_size() + coded.scale.numel() * coded.scale.element_size()
    assert size(rows, columns, bits, group) == want


def test_columns_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="100 columns do not divide into groups of 32"):
        encode(torch.randn(3, 100), 4, 32, torch.bfloat16)
