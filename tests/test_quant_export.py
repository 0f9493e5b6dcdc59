"""Low-bit folders: transformers opens them and computes with exactly the weights that were coded."""

from __future__ import annotations

import json

import pytest
import torch
from architectures import make, save_with_tokenizer
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from pennyweight.errors import ModelError
from pennyweight.model.load import load
from pennyweight.model.student import cut
from pennyweight.quant.export import WRITTEN, export
from pennyweight.quant.formats import FORMATS, decode, encode
from pennyweight.recipe import CutStudent

NAMES = ["llama", "llama-tied", "qwen3-head-norms", "gemma2-softcap-and-window"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fmt", WRITTEN)
def test_opened_again_it_computes_with_the_decoded_weights(name, fmt, tmp_path):
    parent = save_with_tokenizer(make(name, 7), tmp_path / "parent")
    made = export(load(str(parent)).model, parent, tmp_path / "copy", fmt, 32)
    assert made.bytes == (tmp_path / "copy" / "model.safetensors").stat().st_size
    copy = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", dtype=torch.float32)
    want = make(name, 7)
    head = want.get_output_embeddings()
    with torch.no_grad():
        for module in want.modules():
            if isinstance(module, torch.nn.Linear) and module is not head:
                group = 32 if module.in_features % 32 == 0 else None
                module.weight.copy_(decode(encode(module.weight, FORMATS[fmt].grouped(group), search=True)))
            else:
                for p in module.parameters(recurse=False):
                    p.copy_(p.bfloat16().float())
        ids = torch.randint(3, 100, (2, 12))
        torch.testing.assert_close(copy(input_ids=ids).logits.float(), want(input_ids=ids).logits, rtol=1e-3, atol=1e-3)
    assert AutoTokenizer.from_pretrained(tmp_path / "copy")("ab")["input_ids"]
    # And our own loader takes it: agreement and accuracy of a copy are measured through it.
    assert load(str(tmp_path / "copy")).bytes == made.bytes


def test_columns_that_do_not_divide_get_a_scale_for_each_row(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 44, "num_attention_heads": 4, "num_hidden_layers": 1}
    parent = save_with_tokenizer(LlamaForCausalLM(LlamaConfig(vocab_size=113, **sizes)), tmp_path / "parent")
    made = export(load(str(parent)).model, parent, tmp_path / "copy", "int4", 32)
    assert (made.grouped, made.per_row) == (6, 1)
    with safe_open(tmp_path / "copy" / "model.safetensors", "pt") as f:
        assert f.get_tensor("model.layers.0.mlp.down_proj.weight_scale").shape == (32, 1)
        assert f.get_tensor("model.layers.0.mlp.up_proj.weight_scale").shape == (44, 1)
    copy = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", dtype=torch.float32)
    original = load(str(parent)).model
    ids = torch.randint(3, 100, (2, 12))
    with torch.no_grad():
        a, b = copy(input_ids=ids).logits, original(input_ids=ids).logits
    assert 0 < float((a - b).norm() / b.norm()) < 0.5


def test_the_config_says_what_is_inside(tmp_path):
    parent = save_with_tokenizer(make("llama-tied"), tmp_path / "parent")
    export(load(str(parent)).model, parent, tmp_path / "copy", "int4", 16)
    config = json.loads((tmp_path / "copy" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and config["format"] == "pack-quantized"
    assert config["config_groups"]["group_0"]["weights"] | {"observer": 0} == {
        "num_bits": 4, "type": "int", "symmetric": True, "dynamic": False, "observer": 0,
        "strategy": "group", "group_size": 16,
    }  # fmt: skip
    assert config["ignore"] == ["lm_head"]


def test_a_model_without_linears_is_refused(tmp_path):
    parent = save_with_tokenizer(make("gpt2"), tmp_path / "parent")
    with pytest.raises(ModelError, match="no Linear layer to quantise"):
        export(load(str(parent)).model, parent, tmp_path / "copy", "int4", 32)
    assert not (tmp_path / "copy").exists()


def test_a_low_bit_copy_is_neither_coded_nor_cut_again(tmp_path):
    parent = save_with_tokenizer(make("llama"), tmp_path / "parent")
    export(load(str(parent)).model, parent, tmp_path / "copy", "int4", 32)
    again = load(str(tmp_path / "copy"))
    assert again.params == load(str(parent)).params
    with pytest.raises(ModelError, match="low-bit copy already"):
        export(again.model, tmp_path / "copy", tmp_path / "twice", "int8", 32)
    with pytest.raises(ModelError, match="low-bit copy already"):
        cut(again.model, CutStudent(layers=1))


def test_a_group_that_divides_nothing_and_pickles_beside_the_weights(tmp_path):
    parent = save_with_tokenizer(make("llama"), tmp_path / "parent")
    (parent / "training_args.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match=r"groups of 9 divide none of the widths of this model \(32, 48\)"):
        export(load(str(parent)).model, parent, tmp_path / "copy", "int4", 9)
    export(load(str(parent)).model, parent, tmp_path / "copy", "int4", 16)
    assert not (tmp_path / "copy" / "training_args.bin").exists()
