"""The Triton kernels of fp8 tiles against ``quant/formats.py`` and float64; ``test_quant_kernels.py`` runs this file.

It needs a process of its own, in which Triton is first imported under its interpreter (TRITON_INTERPRET=1: on a CPU, no
GPU needed), or not (0: on a GPU).
"""

from __future__ import annotations

import copy
import os
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from truth import fresh

from pennyweight.quant import kernels, linear
from pennyweight.quant.formats import FORMATS, decode, encode
from pennyweight.quant.linear import SCHEMES, compute_by
from pennyweight.quant.scoring import Fp8Linear

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
SHAPES = [(1, 128), (200, 272), (128, 144), (300, 77)]
# Share of the sum of magnitudes: float32 sums here; on a GPU, 128 at a time, tensor cores that keep 14 bits or so.
SUMMED = 2.0**-20 if INTERPRETED else 2.0**-8
BFLOAT16 = 2.0**-7 if INTERPRETED else 2.0**-8  # the interpreter cuts off what a GPU rounds


def drawn(n, c, dtype=torch.float32, size=1.0):
    """Rows of very different sizes, zeros, and a row of nothing else."""
    g = torch.Generator().manual_seed(fresh())
    x = torch.randn(n, c, generator=g) * torch.exp(3 * torch.randn(n, 1, generator=g)) * size
    x.view(-1)[::97] = 0
    x[n // 2] *= n == 1
    return x.to(DEVICE, dtype)


def every_magnitude(n, c):
    """Bits at random: subnormals, infinities and NaN among them."""
    g = torch.Generator().manual_seed(fresh())
    return torch.randint(-(1 << 31), 1 << 31, (n, c), generator=g).to(torch.int32).view(torch.float32).to(DEVICE)


def same_codes(got, want):
    """NaN may lose its sign, as it does in a GPU's arithmetic."""
    got, want = (torch.where((c & 0x7F) == 0x7F, 0x7F, c) for c in (got, want))
    wrong = (got != want).nonzero()
    assert not len(wrong), f"at {wrong[0].tolist()}: {got[tuple(wrong[0])]} is not {want[tuple(wrong[0])]}"


CASES = [(torch.float32, 1.0), (torch.float32, 1e-37), (torch.float32, 1e36), (torch.bfloat16, 1.0), (torch.float16, 1)]


@pytest.fixture(scope="module", autouse=True)
def agreed():
    """Asked in an environment of low precision, and remembered: it takes as long as many of these tests."""
    with torch.autocast(DEVICE.type, torch.bfloat16):
        return linear.agree(DEVICE)


@pytest.mark.parametrize("pow2", [True, False])
@pytest.mark.parametrize(("n", "c"), SHAPES)
def test_codes_and_scales_are_those_of_the_formats(pow2, n, c):
    """Of every dtype and size in tiles that are whole in one direction only, and of three of them in other shapes."""
    along = FORMATS["fp8_act_pow2" if pow2 else "fp8_act"]
    across, block = replace(along, tile=(128, 1)), FORMATS["fp8_block_pow2" if pow2 else "fp8_block"]
    cases = CASES if (n, c) == (128, 144) else [CASES[0], CASES[3]]
    for x in (*(drawn(n, c, *case) for case in cases), every_magnitude(n, c)):
        rows, columns = kernels.tiles(x, pow2, "of numbers")
        for got, turned, want in (
            (rows, False, encode(x, along)),
            (kernels.tiles(x, pow2)[0], False, encode(x, along)),
            (columns, True, encode(x, across)),
            (kernels.tiles(x, pow2, "of codes")[1], True, encode(decode(encode(x, along)), across)),
        ):
            same_codes(got.codes[:, :n] if turned else got.codes[:n], want.codes.T if turned else want.codes)
            scale = got.scale if turned else got.scale[:n]
            assert torch.equal(scale, want.scale.T if turned else want.scale)
            filled = got.codes[:, n:] if turned else got.codes[n:]
            assert not filled.any()
        as_is, over = kernels.blocks(x, pow2), kernels.blocks(x, pow2, turned=True)
        want = encode(x, block)
        same_codes(as_is.codes, want.codes)
        same_codes(over.codes, want.codes.T)
        assert torch.equal(as_is.scale[: want.scale.shape[1]], want.scale.T)
        assert torch.equal(over.scale[: want.scale.shape[0]], want.scale)


def test_rows_need_not_lie_side_by_side():
    x = drawn(130, 256)
    for strided in (x[:, 64:192], x.T):
        got, want = (kernels.tiles(y, True, "of numbers") for y in (strided, strided.contiguous()))
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale)


def test_hopper_multiplies_by_cublas():
    if INTERPRETED or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a GPU of compute capability 9")
    assert kernels.by_cublas(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.parametrize("own", [True] if INTERPRETED else [True, False])
@pytest.mark.parametrize(("m", "k", "n"), [(128, 128, 128), (384, 640, 256), (200, 272, 144), (130, 77, 33)])
def test_products_are_those_of_what_the_codes_stand_for(own, m, k, n, monkeypatch):
    if own:
        monkeypatch.setattr(kernels, "by_cublas", lambda device: False)
    a, b = drawn(m, k), drawn(n, k, size=0.02)
    x, _ = kernels.tiles(a, True)
    left = decode(encode(a, FORMATS["fp8_act_pow2"])).double()
    for y, name in ((kernels.blocks(b, True), "fp8_block_pow2"), (kernels.tiles(b, True)[0], "fp8_act_pow2")):
        right = decode(encode(b, FORMATS[name])).double()
        want, most = left @ right.T, left.abs() @ right.abs().T
        for dtype, rounding in ((torch.float32, 0.0), (torch.bfloat16, BFLOAT16)):
            got = kernels.product(x, y, dtype)[:m, :n].double()
            over = float(((got - want).abs() - rounding * want.abs()).div(most.clamp(min=1e-300)).max())
            assert over <= SUMMED, f"{over:.2e} of the sum of magnitudes"


@pytest.mark.parametrize("name", ["fp8", "fp8_v3"])
@pytest.mark.parametrize(("n", "i", "o"), [(256, 256, 384), (37, 272, 144)])
def test_a_linear_computes_what_is_emulated_elsewhere(name, n, i, o, monkeypatch):
    layer = nn.Linear(i, o, device=DEVICE)
    emulated = copy.deepcopy(layer)
    for one in (layer, emulated):
        compute_by(SCHEMES[name], one)
    x, grad = drawn(n, i).requires_grad_(), drawn(n, o, size=0.1)
    for autocast in (False, True):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            out = layer(x)
            with monkeypatch.context() as m:
                m.setattr(linear, "on_tensor_cores", lambda scheme, device: False)
                want = emulated(x)
        dtype = torch.bfloat16 if autocast else torch.float32
        assert out.dtype == dtype and out.grad_fn.next_functions[0][0].name().startswith("_OnTensorCores")
        assert want.grad_fn.next_functions[0][0].name().startswith("_Emulated")
        got, told = (
            torch.autograd.grad(y, (x, m.weight, m.bias), grad.to(dtype)) for y, m in ((out, layer), (want, emulated))
        )
        for a, b in zip((out, *got), (want, *told), strict=True):
            noise = (a.double() - b.double()).square().sum() / b.double().square().sum()
            assert noise < (1e-4 if autocast or not INTERPRETED else 1e-10)


def test_an_activation_is_kept_in_a_byte_a_number():
    layer, kept = nn.Linear(256, 128, device=DEVICE), []
    compute_by(SCHEMES["fp8"], layer)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(drawn(256, 256).requires_grad_())
    assert sum(t.nbytes for t in kept if t is not layer.weight) <= 0.52 * 2 * 256 * 256


def test_scoring_multiplies_what_the_codes_stand_for():
    w, bias, x = drawn(144, 272, size=0.02), drawn(1, 144)[0], drawn(6, 272).view(2, 3, 272)
    got = Fp8Linear(w, bias)(x)
    left, right = decode(encode(x.flatten(0, 1), FORMATS["fp8_act_pow2"])), decode(encode(w, FORMATS["fp8_block"]))
    most = left.double().abs() @ right.double().abs().T + bias.double().abs()
    want = left.double() @ right.double().T + bias
    assert got.shape == (2, 3, 144) and bool(((got.view(6, 144) - want).abs() <= SUMMED * most).all())


def test_what_several_read_is_coded_once_and_anew_when_it_changes():
    """Query, key and value in bfloat16, one of them frozen; first without gradients, then with, then written to."""
    layers = [nn.Linear(128, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)]
    alone = copy.deepcopy(layers)
    compute_by(SCHEMES["fp8"], *layers)
    for layer in alone:
        compute_by(SCHEMES["fp8"], layer)
    layers[2].weight.requires_grad_(False)
    x = drawn(12, 128, torch.bfloat16).view(3, 4, 128)
    x, y = x.clone().requires_grad_(), x.clone().requires_grad_()
    with torch.no_grad():
        got = [layer(x) for layer in layers]
        assert all(torch.equal(g, layer(y)) for g, layer in zip(got, alone, strict=True))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        sum(layer(x) for layer in layers).square().sum().backward()
    sum(layer(y) for layer in alone).square().sum().backward()
    assert len({t.data_ptr() for t in kept if t.dtype == torch.uint8}) == 1
    assert torch.equal(x.grad, y.grad) and layers[2].weight.grad is None
    assert all(torch.equal(a.weight.grad, b.weight.grad) for a, b in zip(layers[:2], alone, strict=False))
    with torch.no_grad():
        x.mul_(2)
        y.mul_(2)
        assert torch.equal(layers[0](x), alone[0](y))
    none = x[:0].detach().requires_grad_()
    out = layers[0](none)
    out.sum().backward()
    assert out.shape == none.grad.shape == (0, 4, 128)


def test_a_layer_can_be_copied_and_stored_after_it_was_used():
    layer = nn.Linear(128, 128, device=DEVICE)
    compute_by(SCHEMES["fp8"], layer)
    x = drawn(4, 128)
    out = layer(x)
    for made in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert made.seen._last is None and torch.equal(made(x), out)


def test_kernels_that_are_wrong_are_not_used(agreed, monkeypatch):
    assert agreed
    for broken in ("tiles", "blocks", "product"):
        right = getattr(kernels, broken)

        def wrong(*args, right=right):
            made = right(*args)
            if isinstance(made, tuple):
                return tuple(replace(o, scale=2 * o.scale) for o in made)
            return 2 * made if isinstance(made, torch.Tensor) else replace(made, codes=made.codes ^ 1)

        with monkeypatch.context() as m:
            m.setattr(kernels, broken, lambda *a, **k: wrong(*a, *k.values()))
            with pytest.warns(
                UserWarning, match=r"does not make fp8 products .*its (tiles|blocks|products) are not those"
            ):
                assert not linear.agree.__wrapped__(DEVICE)
