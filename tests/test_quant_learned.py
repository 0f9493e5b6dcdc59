"""Weights that learn to be rounded: what they compute with is what will be written, and they learn through it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from truth import fresh

from pennyweight.quant.formats import FORMATS, decode, elements, encode, spread
from pennyweight.quant.learned import learn_to_be_rounded


@pytest.mark.parametrize("name", ["int4", "int3", "nvfp4", "mxfp4", "int8"])
def test_a_rounded_linear_computes_what_will_be_written_and_learns_through_it(name):
    """A weight whose output is wanted: training the codes gets nearer to it than rounding it does."""
    seed, f = fresh(), FORMATS[name]
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(512, 6, generator=g) @ torch.randn(6, 64, generator=g), torch.randn(16, 64, generator=g)
    model = nn.Sequential(nn.Linear(64, 16, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(w)
    weight = model[0].weight
    layer = learn_to_be_rounded(model, {"0": encode(w, f, search=True)})["0"]
    assert torch.equal(layer(x), x @ decode(layer.coded()).T) and layer.weight is weight
    before = float((layer(x).detach() - x @ w.T).square().mean())
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(150):
        optimizer.param_groups[0]["lr"] = (2e-2 if name != "int8" else 1e-3) * (1 - step / 150)
        optimizer.zero_grad()
        (layer(x) - x @ w.T).square().mean().backward()
        optimizer.step()
    after = float((layer(x).detach() - x @ w.T).square().mean())
    assert after < 0.8 * before, f"seed {seed}: {before:.4f} to {after:.4f}"


@pytest.mark.parametrize("name", ["int4", "nvfp4", "fp8_tensor", "ternary"])
def test_scales_learn_by_the_straight_through_gradient(name):
    """Against automatic differentiation of scale * (x / scale + what rounding adds, held fixed)."""
    seed, f = fresh(), FORMATS[name]
    g = torch.Generator().manual_seed(seed)
    w, up = torch.randn(16, 64, generator=g), torch.randn(16, 64, generator=g)
    model = nn.Sequential(nn.Linear(64, 16, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(w)
    start = encode(w, f, search=True)
    layer = learn_to_be_rounded(model, {"0": start})["0"]
    (layer(torch.eye(64)).T * up).sum().backward()
    stretch = torch.zeros_like(start.scale, dtype=torch.float64, requires_grad=True)
    scale = spread(start.scale.double() * start.whole * stretch.exp(), f.tile, w.shape)
    ratio = w.double() / scale
    added = elements(ratio.detach().float(), f).double() - ratio.detach()
    inside = ratio.detach().abs() <= f.largest * (1 + 2.0**-20)
    values = torch.where(inside, ratio + added, (ratio + added).detach())
    (values * scale * up).sum().backward()
    assert torch.allclose(layer.stretch.grad.double(), stretch.grad, rtol=1e-3, atol=1e-4), f"seed {seed}"
    assert torch.equal(layer.weight.grad, up)


def test_powers_of_two_do_not_learn_and_learnt_scales_are_what_is_written():
    model = nn.Sequential(nn.Linear(64, 16, bias=False), nn.Linear(16, 32, bias=False))
    starts = {"0": encode(model[0].weight, FORMATS["mxfp4"]), "1": encode(model[1].weight, FORMATS["int4"].grouped(16))}
    layers = learn_to_be_rounded(model, starts)
    assert layers["0"].stretch is None and "1.stretch" in dict(model.named_parameters())
    with torch.no_grad():
        layers["1"].stretch.fill_(0.1)
    written = layers["1"].coded()
    assert torch.equal(written.scale, (starts["1"].scale * torch.tensor(0.1).exp()).bfloat16().float())
    assert torch.equal(layers["1"](torch.eye(16)).T, decode(written))
