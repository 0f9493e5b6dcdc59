"""Linears in few bits: error of every product, of the worst row too; what is kept for the backward pass; gradients."""

from __future__ import annotations

import pytest
import torch
from architectures import make
from torch import nn
from truth import fresh

from pennyweight.quant.formats import FORMATS, decode, encode
from pennyweight.quant.linear import SCHEMES, Scheme, compute_by, swap

ONE_BLOCK = SCHEMES["fp8_v3"]
DIVERGED = Scheme("blocks", FORMATS["fp8_act"], FORMATS["fp8_block"], FORMATS["fp8_block"])
"""Gradients in blocks of 128 x 128: what DeepSeek-V3 found to diverge (section B.2 of arXiv 2412.19437)."""


def decibels(got, want):
    return float(10 * torch.log10(want.square().sum() / (got.double() - want).square().sum()))


def worst_row(got, want):
    return float((10 * torch.log10(want.square().sum(-1) / (got.double() - want).square().sum(-1))).min())


def passes(scheme, x, w, g, bias=None):
    layer = nn.Linear(w.shape[1], w.shape[0], bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(w)
        if bias is not None:
            layer.bias.copy_(bias)
    compute_by(scheme, layer)
    x = x.clone().requires_grad_()
    out = layer(x)
    out.backward(g)
    return out.detach(), x.grad, layer.weight.grad, None if bias is None else layer.bias.grad


def a_case(seed, n=2048, i=384, o=256, hard=True):
    g = torch.Generator().manual_seed(seed)
    x, w, grad = torch.randn(n, i, generator=g), torch.randn(o, i, generator=g) / i**0.5, torch.randn(n, o, generator=g)
    if hard:  # outlier channels, and tokens whose gradients differ by orders of magnitude
        x[:, ::8] *= 100  # as many as it takes for the error not to hang on where a few scales happen to lie
        grad *= torch.exp(torch.randn(n, 1, generator=g))
        grad[7] *= 1e-5
    return x, w, grad


def truth(x, w, grad):
    x, w, grad = x.double(), w.double(), grad.double()
    return x @ w.T, grad @ w, grad.T @ x


@pytest.mark.parametrize("hard", [False, True])
def test_fp8_errs_by_little_in_every_product_and_row_and_the_design_that_diverged_does_not(hard):
    seed = fresh()
    case = a_case(seed, hard=hard)
    want = truth(*case)
    got = passes(SCHEMES["fp8"], *case)[:3]
    for what, mine, exact in zip(("out", "dX", "dW"), got, want, strict=True):
        assert decibels(mine, exact) >= 28, f"seed {seed}: {what} at {decibels(mine, exact):.1f} dB"
    assert worst_row(got[1], want[1]) >= 25, f"seed {seed}: {worst_row(got[1], want[1]):.1f} dB"
    if hard:
        _, dx, _, _ = passes(DIVERGED, *case)
        assert decibels(dx, want[1]) > 25 and worst_row(dx, want[1]) < 15, f"seed {seed}: the test does not see it"


def test_powers_of_two_make_new_tiles_of_the_cached_activation_free():
    seed = fresh()
    case = a_case(seed, hard=False)
    want = truth(*case)[2]

    def error(name, cached):
        s = SCHEMES[name]
        return decibels(passes(Scheme(s.name, s.activation, s.weight, s.gradient, cached), *case)[2], want)

    assert abs(error("fp8", True) - error("fp8", False)) < 0.1, f"seed {seed}"
    assert error("fp8_v3", False) - error("fp8_v3", True) > 1, f"seed {seed}"


def test_what_is_kept_for_the_backward_pass_takes_half_the_bytes_of_bfloat16():
    x, _, g = a_case(0)
    for name, most in (("fp8", 0.52), ("fp8_v3", 0.52)):
        kept = []
        layer = nn.Linear(384, 256, bias=False)
        compute_by(SCHEMES[name], layer)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            layer(x.requires_grad_()).backward(g)
        of_activation = [t for t in kept if t is not layer.weight]
        size = sum(t.numel() * t.element_size() for t in of_activation)
        assert len(of_activation) == 2 and size <= most * 2 * x.numel(), f"{name}: {size / (2 * x.numel()):.3f}"


def test_what_is_exact_in_the_format_comes_out_exact():
    """Small integers are E4M3 numbers, whose products and sums float32 holds."""
    g = torch.Generator().manual_seed(fresh())
    x, w, grad = (torch.randint(-8, 9, s, generator=g).float() for s in ((200, 130), (70, 130), (200, 70)))
    bias = torch.randn(70, generator=g)
    out, dx, dw, db = passes(SCHEMES["fp8"], x, w, grad, bias)
    assert torch.equal(out, x @ w.T + bias) and torch.equal(dx, grad @ w) and torch.equal(dw, grad.T @ x)
    assert torch.allclose(db, grad.sum(0))


@pytest.mark.parametrize("name", SCHEMES)
def test_any_leading_shape_and_dtype(name):
    layer = nn.Linear(33, 17)
    compute_by(SCHEMES[name], layer)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 5, 33, dtype=dtype, requires_grad=True)
        out = layer(x)
        assert out.shape == (2, 5, 17) and out.dtype == dtype
        out.sum().backward()
        assert x.grad is not None and x.grad.dtype == dtype and layer.weight.grad.dtype == torch.float32


def test_stochastic_gradients_are_unbiased():
    seed = fresh()
    x, w, grad = a_case(seed, 64, 64, 64, hard=False)
    torch.manual_seed(seed)
    mx = FORMATS["mxfp8"]  # whose scales are rounded up, so that nothing saturates
    noisy = Scheme("noisy", mx, mx, mx, noisy=True)
    many = torch.stack([passes(noisy, x, w, grad)[1] for _ in range(200)]).double()
    rounded_w = decode(encode(w, mx)).double()
    z = (many.mean(0) - grad.double() @ rounded_w) / (many.std(0) / 200**0.5)
    assert abs(float(z.std()) - 1) < 0.25 and abs(float(z.mean())) < 0.2, f"seed {seed}: {z.mean():.2f} {z.std():.2f}"


@pytest.mark.parametrize("architecture", ["llama", "qwen3-head-norms", "gemma3-window", "mixtral-experts"])
def test_every_linear_but_head_and_routers_is_swapped_and_the_parameters_stay(architecture):
    model = make(architecture, 0)
    before, plain = dict(model.named_parameters()), model(torch.arange(8)[None]).logits.detach()
    names = swap(model, SCHEMES["fp8"])
    assert names and not any("lm_head" in n or n.endswith((".gate", ".router")) for n in names)
    assert all(p is before[n] for n, p in model.named_parameters())
    low = model(torch.arange(8)[None]).logits
    assert 0 < float((low.detach() - plain).norm() / plain.norm()) < 0.2
    low.sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
