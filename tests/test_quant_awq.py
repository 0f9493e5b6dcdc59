"""Scaling before rounding: nothing computed changes, rounding loses less, and what would change something is undone."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import MAKERS, V, make
from truth import fresh

from pennyweight.errors import ModelError
from pennyweight.model.loaded import blocks_of
from pennyweight.quant.awq import scale_for_rounding
from pennyweight.quant.export import formats_of
from pennyweight.quant.rounding import rounded_to

BATCHES = [{"input_ids": torch.randint(3, V, (4, 30), generator=torch.Generator().manual_seed(i))} for i in range(2)]


def outliers(model):
    """Some channels of every norm much larger than the others, as language models have them."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 and "norm" in name and "q_norm" not in name and "k_norm" not in name:
                p[::9] += 6.0
    return model


@pytest.mark.parametrize("name", MAKERS)
@torch.no_grad()
def test_a_scaled_model_computes_what_it_did(name):
    model, x = outliers(make(name)), torch.randint(3, V, (2, 25), generator=torch.Generator().manual_seed(fresh()))
    before = model(x, use_cache=False).logits
    try:
        formats = formats_of(model, "int4", 16)
    except ModelError as e:
        assert name == "gpt2" and "has no Linear layer" in str(e)
        return
    weights = copy.deepcopy({n: model.get_submodule(n).weight for n in formats})
    scaled = scale_for_rounding(model, blocks_of(model)[1], BATCHES, formats)
    changed = [n for n, w in weights.items() if not torch.equal(w, model.get_submodule(n).weight)]
    assert len(changed) >= scaled >= 3  # a Linear that another makes up for is changed, too
    after = model(x, use_cache=False).logits
    assert (after - before).norm() < 0.01 * before.norm()


@pytest.mark.parametrize("name", ["llama", "gemma2-softcap-and-window", "gemma3-window"])
@torch.no_grad()
def test_an_enormous_token_hides_no_change_of_the_others(name):
    """As the first token of most language models is."""
    model = outliers(make(name))
    model.get_input_embeddings().weight[1] *= 2000
    batches = [{"input_ids": torch.cat([torch.ones(4, 1, dtype=torch.long), b["input_ids"]], 1)} for b in BATCHES]
    before = model(**batches[0], use_cache=False).logits.log_softmax(-1)
    scale_for_rounding(model, blocks_of(model)[1], batches, formats_of(model, "int4", 16))
    after = model(**batches[0], use_cache=False).logits.log_softmax(-1)
    assert float((before.exp() * (before - after)).sum(-1).max()) < 1e-4


@torch.no_grad()
def test_rounding_loses_less_where_channels_differ():
    x, lost = BATCHES[0]["input_ids"], {}
    want = outliers(make("llama"))(x, use_cache=False).logits.log_softmax(-1)
    for method in ("nearest", "awq"):
        model = outliers(make("llama"))
        rounded_to(model, formats_of(model, "int4", 16), method, BATCHES)
        got = model(x, use_cache=False).logits.log_softmax(-1)
        lost[method] = float((want.exp() * (want - got)).sum(-1).mean())
    assert lost["awq"] < 0.95 * lost["nearest"], lost


@torch.no_grad()
def test_what_somebody_else_reads_is_left_alone():
    """With up_proj kept in 16 bits the norm before it cannot make up for gate_proj's scales."""
    model = outliers(make("llama"))
    formats = {n: f for n, f in formats_of(model, "int4", 16).items() if "up_proj" not in n}
    before = {n: p.clone() for n, p in model.named_parameters()}
    scale_for_rounding(model, blocks_of(model)[1], BATCHES, formats)
    after = dict(model.named_parameters())
    kept = [n for n in before if torch.equal(before[n], after[n])]
    assert all(n in kept for n in before if "gate_proj" in n or "up_proj" in n or "post_attention" in n)
    assert any("q_proj" in n and n not in kept for n in before)
