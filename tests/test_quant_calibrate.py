"""GPTQ: less of the output lost than by rounding alone, exact where nothing need be lost, block after block."""

from __future__ import annotations

import pytest
import torch
from architectures import make
from torch import nn
from truth import fresh

from pennyweight.model.loaded import blocks_of
from pennyweight.quant.calibrate import calibrated, gptq
from pennyweight.quant.formats import FORMATS, decode, encode

GROUPED = ["int8", "int4", "int3", "mxfp4", "nvfp4", "mxfp8"]


def correlated(seed, n=2000, i=160):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 12, generator=g) @ torch.randn(12, i, generator=g) + 0.3 * torch.randn(n, i, generator=g)


@pytest.mark.parametrize("name", GROUPED)
def test_less_of_the_output_is_lost_than_by_rounding_each_weight(name):
    seed, f = fresh(), FORMATS[name]
    x = correlated(seed)
    w = torch.randn(48, 160, generator=torch.Generator().manual_seed(seed + 1))
    lost = lambda coded: float(((decode(coded) - w) @ x.T).square().mean())  # noqa: E731
    usual, ours = lost(encode(w, f, search=True)), lost(gptq(w, x.T @ x, f)[0])
    assert ours < 0.7 * usual, f"seed {seed}: {ours / usual:.2f}"


@pytest.mark.parametrize("name", GROUPED)
def test_inputs_that_are_independent_leave_rounding_as_it_is(name):
    seed, f = fresh(), FORMATS[name]
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(gptq(w, torch.eye(64) * 5, f)[0].codes, encode(w, f, search=True).codes), f"seed {seed}"


def test_a_weight_that_the_format_holds_stays_and_dead_inputs_do_no_harm():
    seed, f = fresh(), FORMATS["int4"]
    x = correlated(seed)
    w = torch.randint(-7, 8, (9, 160), generator=torch.Generator().manual_seed(seed)).float() / 8
    w[:, ::32] = 7 / 8
    assert torch.equal(decode(gptq(w, x.T @ x, f)[0]), w)
    x[:, 5] = 0.0
    out = decode(gptq(w, x.T @ x, f)[0])
    assert bool(out.isfinite().all()) and torch.equal(out[:, 6:], w[:, 6:]), f"seed {seed}"


def test_one_scale_a_row():
    seed, f = fresh(), FORMATS["int4"].grouped(None)
    x, w = correlated(seed), torch.randn(8, 160, generator=torch.Generator().manual_seed(seed))
    coded, _ = gptq(w, x.T @ x, f)
    assert coded.scale.shape == (8, 1) and int(coded.codes.abs().max()) <= 8


@pytest.mark.parametrize(
    "architecture",
    ["llama", "qwen3-head-norms", "gemma2-softcap-and-window", "gemma3-window", "granite-scaled", "phi-head-bias"],
)
def test_blocks_are_coded_in_turn_and_the_model_is_nearer_to_its_parent_than_by_rounding(architecture):
    seed, f = fresh(), FORMATS["int4"].grouped(16)
    g = torch.Generator().manual_seed(seed)
    batches = [{"input_ids": torch.randint(3, 60, (8, 40), generator=g)} for _ in range(8)]
    held_out = torch.randint(3, 60, (16, 40), generator=g)
    parent, distance = make(architecture, 1), {}
    want = torch.log_softmax(parent(held_out).logits.detach(), -1)
    for how in ("rounded", "gptq"):
        model = make(architecture, 1)
        linears = {n: m for n, m in blocks_of(model)[1].named_modules(prefix="") if isinstance(m, nn.Linear)}
        assert linears
        names = {m: n for n, m in model.named_modules()}
        formats = {names[m]: f for m in linears.values()}
        if how == "gptq":
            seen: list[int] = []
            coded, _ = calibrated(model, blocks_of(model)[1], batches, formats, seen.append)
            assert set(coded) == set(formats) and sum(seen) == 3 and seen.count(0) == len(formats)
            assert all(torch.equal(decode(c), model.get_submodule(n).weight) for n, c in coded.items())
        else:
            with torch.no_grad():
                for m in linears.values():
                    m.weight.copy_(decode(encode(m.weight, f, search=True)))
        got = torch.log_softmax(model(held_out).logits.detach(), -1)
        distance[how] = float((want.exp() * (want - got)).sum(-1).mean())
    assert distance["gptq"] < distance["rounded"], f"seed {seed}: {distance}"
