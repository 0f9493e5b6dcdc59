"""Low-bit folders: transformers opens them and computes with exactly the weights that were coded."""

from __future__ import annotations

import json

import pytest
import torch
from architectures import make, save_with_tokenizer
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pennyweight.errors import ModelError
from pennyweight.model.load import load
from pennyweight.model.student import cut
from pennyweight.quant.export import export, formats_of, linears_of, storage_dtype
from pennyweight.quant.linear import reading_in_codes
from pennyweight.quant.packing import WRITTEN
from pennyweight.quant.rounding import coded_for_storage
from pennyweight.recipe import CutStudent

NAMES = ["llama", "llama-tied", "qwen3-head-norms", "gemma2-softcap-and-window"]
MADE_IN_BFLOAT16 = {"nvfp4": 1.5e-2}
"""Formats whose weights the library makes in bfloat16, and how far that may take logits, as a share of them."""


def wide(seed=0):
    """Widths of 128 and more, so that blocks of 128 are whole, and ragged ones too."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 128, "intermediate_size": 160, "num_attention_heads": 4, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=113, **sizes))


def copied(parent, out, fmt, group=32):
    """(what was written, its codes, the model as it was meant to be)."""
    model = load(str(parent)).model
    codes = coded_for_storage(model, formats_of(model, fmt, group), torch.bfloat16)
    return export(model, codes, parent, out), codes, model


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 99).view(8, 12)).logits.float()


@pytest.mark.parametrize(
    ("name", "fmt"), [(n, f) for n in (*NAMES, "wide") for f in WRITTEN if not (n != "wide" and f == "fp8_block")]
)
def test_opened_again_it_computes_with_the_decoded_weights(name, fmt, tmp_path):
    parent = save_with_tokenizer(wide() if name == "wide" else make(name, 7), tmp_path / "parent")
    made, codes, meant = copied(parent, tmp_path / "copy", fmt)
    assert made.bytes == (tmp_path / "copy" / "model.safetensors").stat().st_size
    again = load(str(tmp_path / "copy"))  # by transformers; agreement and accuracy of a copy are measured through it
    got = logits(again.model)
    with reading_in_codes(meant, codes):
        want = logits(meant)
    error = float((got - want).norm() / want.norm())
    assert error < MADE_IN_BFLOAT16.get(fmt, 1e-5), f"{error:.2e}"
    assert float((got - logits(load(str(parent)).model)).norm()) > 0
    assert AutoTokenizer.from_pretrained(tmp_path / "copy")("ab")["input_ids"]
    assert again.bytes == made.bytes and again.params == load(str(parent)).params


def test_columns_that_do_not_divide_get_a_divisor_near_the_group_or_a_scale_for_each_row(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    for width, scales in ((44, (32, 1)), (86, (32, 2)), (74, (32, 2)), (131, (32, 1))):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=113, intermediate_size=width, **sizes))
        parent = save_with_tokenizer(model, tmp_path / f"parent-{width}")
        made, _, meant = copied(parent, tmp_path / f"copy-{width}", "int4")
        assert made.per_row == (width == 131)
        with safe_open(tmp_path / f"copy-{width}" / "model.safetensors", "pt") as f:
            assert f.get_tensor("model.layers.0.mlp.down_proj.weight_scale").shape == scales
        copy = AutoModelForCausalLM.from_pretrained(tmp_path / f"copy-{width}", dtype=torch.float32)
        torch.testing.assert_close(logits(copy), logits(meant), rtol=1e-4, atol=1e-5)


def test_a_mixture_of_formats_and_of_linears_left_alone(tmp_path):
    parent = save_with_tokenizer(wide(), tmp_path / "parent")
    model = load(str(parent)).model
    of = {fmt: formats_of(model, fmt, 32) for fmt in ("int8", "int4", "int3", "nvfp4", "mxfp4", "mxfp8")}
    labels = dict(zip(linears_of(model), ["int8", "int4", "int3", "nvfp4", "", "mxfp4", "mxfp8"] * 2, strict=True))
    codes = coded_for_storage(model, {n: of[label][n] for n, label in labels.items() if label}, torch.bfloat16)
    made = export(model, codes, parent, tmp_path / "copy")
    assert made.coded == 12 and len(made.kept) == 2
    got, want = logits(load(str(tmp_path / "copy")).model), logits(model)
    assert float((got - want).norm() / want.norm()) < MADE_IN_BFLOAT16["nvfp4"]
    config = json.loads((tmp_path / "copy" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision" and set(config["ignore"]) == {*made.kept, "lm_head"}


def test_the_config_says_what_is_inside(tmp_path):
    parent = save_with_tokenizer(make("llama-tied"), tmp_path / "parent")
    copied(parent, tmp_path / "copy", "int4", 16)
    config = json.loads((tmp_path / "copy" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and config["format"] == "pack-quantized"
    assert config["config_groups"]["group_0"]["weights"] | {"observer": 0} == {
        "num_bits": 4, "type": "int", "symmetric": True, "dynamic": False, "observer": 0,
        "strategy": "group", "group_size": 16,
    }  # fmt: skip
    assert config["ignore"] == ["lm_head"]


def test_the_scale_over_an_nvfp4_weight_divides(tmp_path):
    parent = save_with_tokenizer(wide(), tmp_path / "parent")
    copied(parent, tmp_path / "copy", "nvfp4")
    largest = float(load(str(parent)).model.model.layers[0].mlp.up_proj.weight.abs().max())
    with safe_open(tmp_path / "copy" / "model.safetensors", "pt") as f:
        whole = float(f.get_tensor("model.layers.0.mlp.up_proj.weight_global_scale"))
    assert whole == pytest.approx(6 * 448 / largest, rel=1e-6)


def test_a_model_without_linears_is_refused(tmp_path):
    parent = save_with_tokenizer(make("gpt2"), tmp_path / "parent")
    with pytest.raises(ModelError, match="no Linear layer to quantise"):
        copied(parent, tmp_path / "copy", "int4")
    assert not (tmp_path / "copy").exists()


def test_a_low_bit_copy_is_neither_coded_nor_cut_again(tmp_path):
    parent = save_with_tokenizer(make("llama"), tmp_path / "parent")
    copied(parent, tmp_path / "copy", "int4")
    with pytest.raises(ModelError, match="low-bit copy already"):
        copied(tmp_path / "copy", tmp_path / "twice", "int8")
    with pytest.raises(ModelError, match="low-bit copy already"):
        cut(load(str(tmp_path / "copy")).model, CutStudent(layers=1))


def test_what_fits_no_width_and_pickles_beside_the_weights(tmp_path):
    parent = save_with_tokenizer(make("llama"), tmp_path / "parent")
    (parent / "training_args.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match=r"groups of 200 divide none of the widths of this model \(32, 48\)"):
        copied(parent, tmp_path / "copy", "int4", 200)
    torch.manual_seed(0)
    narrow = LlamaConfig(
        vocab_size=99, hidden_size=24, intermediate_size=40, num_attention_heads=2, num_hidden_layers=1
    )
    with pytest.raises(ModelError, match=r"blocks of mxfp4 divide none of the widths of this model \(24, 40\)"):
        copied(save_with_tokenizer(LlamaForCausalLM(narrow), tmp_path / "narrow"), tmp_path / "copy", "mxfp4")
    copied(parent, tmp_path / "copy", "int4", 16)
    assert not (tmp_path / "copy" / "training_args.bin").exists()


def test_what_is_not_coded_stays_in_the_16_bits_that_it_came_in(tmp_path):
    parent = save_with_tokenizer(make("llama").half(), tmp_path / "parent")
    model = load(str(parent)).model
    assert next(model.parameters()).dtype == torch.float32
    codes = coded_for_storage(model, formats_of(model, "int4", 32), storage_dtype(model))
    export(model, codes, parent, tmp_path / "copy")
    with safe_open(tmp_path / "copy" / "model.safetensors", "pt") as f:
        kinds = {f.get_tensor(n).dtype for n in list(f.keys())}
        embedding = f.get_tensor("model.embed_tokens.weight")
    assert kinds == {torch.float16, torch.int32, torch.int64}
    assert torch.equal(embedding, make("llama").half().model.embed_tokens.weight)
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["dtype"] == "float16"
    x = torch.randint(3, 100, (1, 20))
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", dtype=torch.float32)(x).logits
    assert torch.allclose(got, model(x).logits, atol=1e-3)
