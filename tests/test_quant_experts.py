"""Fused experts taken apart, coded, stored as engines know them, and opened again by transformers."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers as tf
from architectures import make, save_with_tokenizer
from safetensors import safe_open
from truth import fresh

from pennyweight.errors import ModelError
from pennyweight.model.load import load
from pennyweight.quant.calibrate import gptq
from pennyweight.quant.experts import Experts, take_apart
from pennyweight.quant.export import as_transformers_reads, export, formats_of, linears_of
from pennyweight.quant.formats import FORMATS, decode, encode
from pennyweight.quant.linear import SCHEMES, LowLinear, swap
from pennyweight.quant.planning import IN_A_MIXTURE, candidates
from pennyweight.quant.rounding import coded_for_storage

MIXTURES = ("mixtral-experts", "qwen3-moe", "deepseek-v3")


def ids(seed=None, rows=2, length=40):
    g = torch.Generator().manual_seed(fresh() if seed is None else seed)
    return torch.randint(3, 113, (rows, length), generator=g)


@pytest.mark.parametrize("name", MIXTURES)
def test_apart_they_compute_what_they_did_and_share_its_weights(name):
    model, x = make(name), ids()
    before = model(x, use_cache=False).logits
    first = next(m for m in model.modules() if hasattr(m, "gate_up_proj") and m.gate_up_proj.ndim == 3)
    assert take_apart(model) and take_apart(model)
    assert torch.allclose(model(x, use_cache=False).logits, before, atol=1e-4)
    apart = next(m for m in model.modules() if isinstance(m, Experts))
    assert next(apart.parameters()).data_ptr() == first.gate_up_proj.data_ptr()
    assert not any(hasattr(m, "gate_up_proj") and m.gate_up_proj.ndim == 3 for m in model.modules())


@pytest.mark.parametrize("name", MIXTURES)
def test_gradients_apart_are_those_of_fused_ones(name):
    fused, x = make(name), ids()
    apart = copy.deepcopy(fused)
    take_apart(apart)
    for model in (fused, apart):
        model(x, labels=x, use_cache=False).loss.backward()
    prefix = next(n for n, m in fused.named_modules() if hasattr(m, "gate_up_proj") and m.gate_up_proj.ndim == 3)
    want, experts = fused.get_submodule(prefix).down_proj.grad, apart.get_submodule(prefix)
    got = [experts[i].get_submodule(experts.names[2]).weight.grad for i in range(4)]
    got = torch.stack([torch.zeros_like(want[0]) if g is None else g for g in got])
    assert want.abs().max() > 0 and torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_that_were_trained_apart_in_fp8_are_saved_as_any_others(name, tmp_path):
    model, x = make(name), ids()
    take_apart(model)
    swapped = swap(model, SCHEMES["fp8"])
    assert sum(".experts." in n for n in swapped) >= 2 * 4 * 3 and not any("gate.weight" in n for n in swapped)
    model(x, labels=x, use_cache=False).loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 1e-3 * p.grad if p.grad is not None else 0
    saved = copy.deepcopy(model)
    for m in saved.modules():
        if isinstance(m, LowLinear):
            m.__class__ = torch.nn.Linear
    saved.save_pretrained(tmp_path)
    opened = tf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(opened(x, use_cache=False).logits, saved(x, use_cache=False).logits, atol=1e-4)


def coded_copy(name, fmt, tmp_path, layout="compressed-tensors", **sizes):
    parent = save_with_tokenizer(make(name) if not sizes else wide(sizes), tmp_path / "parent")
    model = load(str(parent)).model
    codes = coded_for_storage(model, formats_of(model, fmt, 32, layout), torch.bfloat16)
    export(model, codes, parent, tmp_path / "copy", layout)
    return model, codes, tmp_path / "copy"


def wide(sizes):
    torch.manual_seed(0)
    config = tf.MixtralConfig(
        vocab_size=113, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **sizes
    )
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0
    return tf.MixtralForCausalLM(config).eval()


@pytest.mark.parametrize("fmt", ["int8", "int4", "int3", "ternary", "fp8_row"])
@pytest.mark.parametrize("name", MIXTURES)
def test_transformers_opens_the_copy_and_computes_what_was_meant(name, fmt, tmp_path):
    model, codes, place = coded_copy(name, fmt, tmp_path)
    x = ids()
    opened = tf.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).float().eval()
    with as_transformers_reads(model, codes), torch.no_grad():
        want, got = model(x, use_cache=False).logits, opened(x, use_cache=False).logits
    assert torch.allclose(got, want, atol=1e-5 * float(want.abs().max()))
    assert torch.allclose(load(str(place)).model(x, use_cache=False).logits, got, atol=1e-4)


def test_deepseeks_layout_holds_experts_too(tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_local_experts": 4, "max_position_embeddings": 128}
    model, codes, place = coded_copy("wide", "fp8_block", tmp_path, "deepseek", **sizes)
    with safe_open(place / "model.safetensors", "pt") as f:
        held = f.get_tensor("model.layers.1.block_sparse_moe.experts.3.w2.weight_scale_inv")
    assert held.shape == (1, 1) and held.dtype == torch.float32
    x = ids()
    with as_transformers_reads(model, codes, "deepseek"), torch.no_grad():
        want, got = model(x, use_cache=False).logits, load(str(place)).model(x, use_cache=False).logits
    assert torch.allclose(got, want, atol=1e-5 * float(want.abs().max()))


def test_tensors_have_the_names_of_a_checkpoint_and_routers_keep_their_bits(tmp_path):
    _, codes, place = coded_copy("mixtral-experts", "int4", tmp_path)
    with safe_open(place / "model.safetensors", "pt") as f:
        names = set(f.keys())
        router = f.get_tensor("model.layers.0.block_sparse_moe.gate.weight")
    assert {f"model.layers.2.block_sparse_moe.experts.3.{w}.weight_packed" for w in ("w1", "w2", "w3")} <= names
    assert not any("gate_up_proj" in n or ".mlp." in n for n in names)
    assert router.dtype == torch.bfloat16 and not any("gate" in n for n in codes)
    said = json.loads((place / "config.json").read_text())["quantization_config"]
    assert said["dequantize"] is True and len(said["config_groups"]) == 1
    assert "model.layers.0.mlp.gate" in said["ignore"] and "lm_head" in said["ignore"]


def test_an_expert_that_calibration_never_asked_is_rounded_to_the_nearest():
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(fresh()))
    coded, rounded_from = gptq(w, torch.zeros(64, 64), FORMATS["int4"])
    assert torch.equal(rounded_from, w)
    assert (decode(coded) - w).norm() <= (decode(encode(w, FORMATS["int4"])) - w).norm() * 1.001


def test_what_cannot_be_coded_or_opened_is_refused_with_the_reason(tmp_path):
    config = tf.GptOssConfig(num_hidden_layers=2, hidden_size=32, intermediate_size=32, num_local_experts=4)
    config.vocab_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim = 113, 4, 2, 8
    with pytest.raises(ModelError, match="GptOssForCausalLM are not three plain Linears each"):
        linears_of(tf.GptOssForCausalLM(config))
    with pytest.raises(ModelError, match="opens no experts stored in nvfp4; use int8, int4"):
        formats_of(make("mixtral-experts"), "nvfp4", 32)
    with pytest.raises(ModelError, match=r"no group from 16 to 64 divides every width of this mixture .*\(20, 136\)"):
        formats_of(wide({"hidden_size": 34 * 4, "intermediate_size": 20, "num_local_experts": 2}), "int4", 32)
    with pytest.raises(ModelError, match="in one format only; give a --format other than mixed"):
        candidates(make("mixtral-experts"), IN_A_MIXTURE, 32, "compressed-tensors")


def test_a_copy_is_no_parent_of_another(tmp_path):
    _, _, place = coded_copy("qwen3-moe", "int4", tmp_path)
    with pytest.raises(ModelError, match="low-bit copy already"):
        linears_of(load(str(place)).model)
