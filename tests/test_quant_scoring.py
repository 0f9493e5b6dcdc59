"""int8 products within the error their codes explain, copies that score like the model, and what is refused."""

from __future__ import annotations

import gc

import pytest
import torch
from architectures import MAKERS, V, make

from pennyweight.errors import ModelError, RecipeError
from pennyweight.loss.divergence import kl
from pennyweight.model.head import forward_hidden, head_of
from pennyweight.quant.scoring import Int8Linear, for_scoring

ROUNDING = 2.0**-21  # a few float32 roundings: codes are made, and sums scaled back, in float32


@pytest.fixture(autouse=True)
def _fast_enough(monkeypatch):
    """What is so small is quick on any processor."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)


def drawn(*shape, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g) * torch.rand(shape[0], 1, generator=g).exp()


def step(x):
    """(rows, 1): what one code stands for; float64."""
    return x.double().abs().amax(-1, keepdim=True) / 127


def bound(x, w):
    """(N, out) the most that int8 may be off.

    Each x and each w is off by at most half a step: |x w - x' w'| <= |x| |w - w'| + |x - x'| |w'|, with |w'| at most
    |w| and half a step, summed over the inputs. Codes made in float32 can lie 127 roundings beside a tie.
    """
    a, b = step(x) * (0.5 + 127 * ROUNDING), (step(w) * (0.5 + 127 * ROUNDING)).T
    x, w = x.double().abs(), w.double().abs()
    size = x @ w.T
    off = x.sum(-1, keepdim=True) * b + a * w.sum(-1).unsqueeze(0) + x.shape[1] * a * b
    return off + ROUNDING * (size + off)


def truth(x, w, b=None):
    return x.double() @ w.double().T + (0 if b is None else b.double())


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 64, 32), (17, 64, 33), (5, 13, 7), (2, 1, 1), (40, 172, 64), (3, 2048, 9)]
)
def test_the_error_is_what_the_codes_explain(rows, inputs, outputs):
    seed = torch.seed() % 10**6
    x, w, b = drawn(rows, inputs, seed=seed), drawn(outputs, inputs, seed=seed + 1), drawn(1, outputs, seed=seed + 2)[0]
    got = Int8Linear(w, b)(x)
    assert got.dtype == torch.float32 and got.shape == (rows, outputs)
    error = (got.double() - truth(x, w, b)).abs()
    assert bool((error <= bound(x, w) + ROUNDING * b.double().abs()).all()), f"seed {seed}"


def test_no_worse_than_one_scale_for_all_tokens():
    """The usual rival, whose one scale the largest token sets."""
    seed = torch.seed() % 10**6
    x, w = drawn(32, 96, seed=seed), drawn(48, 96, seed=seed + 1)
    x[3] *= 50
    one = step(x).max()
    rival = truth((x.double() / one).round() * one, (w.double() / step(w)).round() * step(w))
    errors = [(y.double() - truth(x, w)).square().sum(-1) for y in (Int8Linear(w, None)(x), rival)]
    assert float(errors[0].sum()) <= float(errors[1].sum()) * (1 + 1e-6), f"seed {seed}"
    assert float(errors[0][0]) < 0.01 * float(errors[1][0]), f"seed {seed}"


def test_what_lies_on_the_grid_is_exact():
    g = torch.Generator().manual_seed(torch.seed() % 10**6)
    x, w = (torch.randint(-127, 128, (n, 600), generator=g).float() for n in (9, 21))
    x[:, 0], w[:, 0] = 127, -127  # the largest code is there, so the scale is found again
    assert torch.equal(Int8Linear(w / 1024, None)(x / 8).double(), truth(x / 8, w / 1024))


def test_zeros_equals_outliers_and_no_numbers():
    seed = torch.seed() % 10**6
    x, w, b = drawn(8, 40, seed=seed), drawn(24, 40, seed=seed + 1), drawn(1, 24, seed=seed + 2)[0]
    layer = Int8Linear(w, b)
    x[0] = 0
    x[1] = -0.7
    x[2, 5] = 1e7
    x[3] *= 1e-30
    x[4] = 1e-45
    x[5, 1], x[6, 2] = float("nan"), float("inf")
    got = layer(x)
    assert torch.equal(got[0], b) and torch.equal(got[4], b)
    # All equal: every code is 127, so only the weights are off.
    off = 0.7 * 40 * step(w)[:, 0] * (0.5 + 127 * ROUNDING) + ROUNDING * (0.7 * w.double().abs().sum(-1) + b.abs())
    assert bool(((got[1] - truth(x[1:2], w, b)).abs() <= off).all()), f"seed {seed}"
    fine = [2, 3, 7]
    error = (got[fine] - truth(x[fine], w, b)).abs()
    assert bool((error <= bound(x[fine], w) + ROUNDING * b.abs()).all()), f"seed {seed}"
    assert not bool(got[5:7].isfinite().any())
    for i in (0, 2, 7):  # no row knows its neighbours
        assert torch.equal(layer(x[i : i + 1]), got[i : i + 1])
    assert torch.equal(Int8Linear(torch.zeros(24, 40), b)(x[7:]), b.unsqueeze(0))
    assert layer(x[:0]).shape == (0, 24)


def test_the_dtype_and_the_leading_shape_are_the_inputs():
    x, layer = drawn(6, 32, seed=1), Int8Linear(drawn(12, 32, seed=2), None)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        low = x.to(dtype).view(2, 3, 32)
        assert torch.equal(layer(low), layer(low.float()).to(dtype)) and layer(low).shape == (2, 3, 12)
    assert not layer(x.requires_grad_()).requires_grad


def test_an_input_changed_in_place_is_coded_again():
    x, layer = drawn(3, 32, seed=1), Int8Linear(drawn(4, 32, seed=2), None)
    first = layer(x)
    assert torch.equal(layer(x), first)
    assert torch.equal(layer(x.neg_()), -first)
    x = x.clone()
    assert torch.equal(layer(x), -first)
    with torch.inference_mode():
        y = x.clone()
        assert torch.equal(layer(y), -first) and torch.equal(layer(y.neg_()), first)


def scored(scoring, head, ids):
    """(B, T) ids -> (B * T, V) logits."""
    states = forward_hidden(scoring, ids, torch.arange(ids.shape[1]).expand_as(ids)).flatten(0, 1)
    out = torch.empty(len(states), V)
    assert head.logits(states, out) is out and torch.equal(head.logits(states), out)
    assert out.dtype == torch.float32
    return out


@pytest.mark.parametrize("name", MAKERS)
@torch.no_grad()
def test_a_copy_scores_like_the_model_which_stays_as_it_was(name):
    seed = torch.seed() % 1000
    model = make(name, seed).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modules = [type(m) for m in model.modules()]
    routed = any("experts" in n for n, _ in model.named_modules())
    ids = torch.randint(0, V, (16, 20), generator=torch.Generator().manual_seed(seed))
    model.eval()
    want = scored(model, head_of(model), ids)
    model.train()
    for precision in ("bfloat16", "int8"):
        copy, head = for_scoring(model, precision)
        assert not copy.training and model.training
        got = scored(copy, head, ids)
        # As a share of how far two positions are apart; what was misread would be at 1. A router near a tie picks
        # another expert at some position, which later ones of its row may heed, and the median over rows does not feel.
        apart, chance = kl(want, got), float(kl(want, want.roll(1, 0)).mean())
        assert 0 < float(apart.median()) < 0.01 * chance, f"{precision}, seed {seed}"
        assert float(apart.mean()) < (0.2 if routed else 0.02) * chance, f"{precision}, seed {seed}"
        whole = copy(input_ids=ids, use_cache=False).logits.float().flatten(0, 1)
        assert float((whole - got).norm()) < 0.05 * float(got.norm()), f"{precision}, seed {seed}"
    assert [type(m) for m in model.modules()] == modules
    for k, v in model.state_dict().items():
        assert v.dtype == before[k].dtype and torch.equal(v, before[k]), k


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_layer_is_coded_and_no_weight_is_kept_twice(name):
    model = make(name)
    copy, _ = for_scoring(model, "int8")
    per_layer = {"llama": 7, "gpt2": 4}[name]
    assert sum(isinstance(m, Int8Linear) for m in copy.modules()) == 3 * per_layer
    own = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in own for p in copy.parameters())  # embeddings and norms: the model's own memory
    assert all(b.dtype == torch.int8 or b.numel() <= 4 * 32 for b in copy.buffers())
    low, _ = for_scoring(model, "bfloat16")
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    assert all(b.dtype == torch.float32 for b in low.buffers() if b.is_floating_point())


def test_ties_are_kept():
    low, _ = for_scoring(make("llama-tied"), "bfloat16")
    assert low.get_output_embeddings().weight is low.get_input_embeddings().weight


@torch.no_grad()
def test_weights_of_16_bits_and_float32_scoring():
    model = make("llama")
    assert for_scoring(model, "float32")[0] is model
    low = make("llama").bfloat16()
    assert for_scoring(low, "bfloat16")[0] is low
    wide, head = for_scoring(low, "float32")
    ids = torch.randint(0, V, (1, 9), generator=torch.Generator().manual_seed(0))
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    coded, coded_head = for_scoring(low, "int8")
    assert float(kl(scored(wide, head, ids), scored(coded, coded_head, ids)).mean()) < 0.05
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}


def test_the_original_can_be_given_up():
    model = make("llama")
    copy, _ = for_scoring(model, "int8")
    weight = model.model.layers[0].mlp.up_proj.weight
    assert not any(p is weight for p in copy.parameters())
    del model
    gc.collect()
    assert copy(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.shape == (1, 4, V)


def test_what_is_refused(monkeypatch):
    model = make("llama")
    with pytest.raises(
        RecipeError, match="no precision named 'int4' to score in; choose float32, bfloat16, int8 or fp8"
    ):
        for_scoring(model, "int4")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(RecipeError, match="not on this cpu; leave targets.precision at auto"):
        for_scoring(model, "int8")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    with pytest.raises(RecipeError, match="not on this meta; leave targets"):
        for_scoring(make("llama").to("meta"), "int8")
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(ModelError, match="LlamaForCausalLM has no Linear layer to code"):
        for_scoring(model, "int8")
    model.config.quantization_config = {"quant_method": "compressed-tensors"}
    with pytest.raises(ModelError, match="low-bit copy already"):
        for_scoring(model, "int8")
