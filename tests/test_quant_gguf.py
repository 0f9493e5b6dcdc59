"""GGUF files, read again by the library of that format: blocks bit for bit, names, rotary order, tokenizers."""

from __future__ import annotations

import pytest
import torch
from architectures import make, save_with_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from truth import fresh

from pennyweight.errors import ModelError
from pennyweight.model.load import load
from pennyweight.quant.formats import decode, encode
from pennyweight.quant.gguf_file import check_architecture, gguf_format, packed, write_gguf
from pennyweight.quant.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, vocabulary_of

gguf = pytest.importorskip("gguf", reason='needs gguf; pip install -e ".[gguf]"')


@pytest.mark.parametrize(("fmt", "kind"), [("int8", "Q8_0"), ("int4", "Q4_0")])
def test_blocks_decode_to_the_same_numbers_in_the_library(fmt, kind):
    seed = fresh()
    w = torch.randn(24, 96, generator=torch.Generator().manual_seed(seed))
    coded = encode(w, gguf_format(fmt), search=True)
    data = packed(coded.codes, coded.scale, fmt).numpy()
    assert data.shape[1] == 3 * {"int8": 34, "int4": 18}[fmt]
    back = gguf.quants.dequantize(data, getattr(gguf.GGMLQuantizationType, kind))
    assert torch.equal(torch.from_numpy(back), decode(coded)), f"seed {seed}"


def written(name, fmt, tmp_path):
    parent = save_with_tokenizer(make(name, 3), tmp_path / "parent")
    loaded = load(str(parent))
    linears = {n: m for n, m in loaded.model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    codes = {}
    if fmt != "bf16":
        codes = {n: encode(m.weight, gguf_format(fmt)) for n, m in linears.items() if m.in_features % 32 == 0}
    write_gguf(loaded.model, loaded.tokenizer, codes, tmp_path / "x.gguf", fmt, "x", {"pennyweight.parent": "abc"})
    return loaded, codes, gguf.GGUFReader(tmp_path / "x.gguf")


def value(reader, key):
    return reader.get_field(key).contents()


def test_weights_names_and_settings_go_over(tmp_path):
    loaded, _, reader = written("qwen2-biases", "bf16", tmp_path)
    tensors = {t.name: t for t in reader.tensors}
    config = loaded.model.config
    assert value(reader, "general.architecture") == "qwen2" and value(reader, "pennyweight.parent") == "abc"
    assert value(reader, "qwen2.attention.head_count_kv") == config.num_key_value_heads
    assert value(reader, "qwen2.block_count") == config.num_hidden_layers
    q = torch.from_numpy(
        gguf.quants.dequantize(tensors["blk.0.attn_q.weight"].data, tensors["blk.0.attn_q.weight"].tensor_type)
    )
    want = loaded.model.model.layers[0].self_attn.q_proj
    assert torch.equal(q, want.weight.detach().bfloat16().float())
    assert torch.equal(torch.from_numpy(tensors["blk.0.attn_q.bias"].data.copy()), want.bias.detach())
    assert "output.weight" in tensors and "token_embd.weight" in tensors and "output_norm.weight" in tensors


def test_llamas_rotary_halves_become_pairs(tmp_path):
    loaded, _, reader = written("llama", "bf16", tmp_path)
    t = next(t for t in reader.tensors if t.name == "blk.1.attn_k.weight")
    got = torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type))
    want = loaded.model.model.layers[1].self_attn.k_proj.weight.detach().bfloat16().float()
    heads = loaded.model.config.num_key_value_heads
    width = len(want) // heads
    for h in range(heads):
        for i in range(width // 2):  # what is i of the first and of the second half lies at 2 i and 2 i + 1
            assert torch.equal(got[h * width + 2 * i], want[h * width + i])
            assert torch.equal(got[h * width + 2 * i + 1], want[h * width + width // 2 + i])


def test_byte_level_tokens_and_what_is_special(tmp_path):
    loaded, _, reader = written("llama", "bf16", tmp_path)
    assert value(reader, "tokenizer.ggml.model") == "gpt2"
    tokens = value(reader, "tokenizer.ggml.tokens")
    vocabulary = loaded.tokenizer.get_vocab()
    assert all(tokens[i] == t for t, i in vocabulary.items()) and len(tokens) == loaded.vocabulary
    v = vocabulary_of(loaded.tokenizer, loaded.vocabulary)
    assert all(v.types[i] in (CONTROL, UNKNOWN) for i in loaded.tokenizer.all_special_ids)
    assert all(kind == UNUSED for kind in v.types[len(loaded.tokenizer) :])
    assert value(reader, "tokenizer.ggml.eos_token_id") == loaded.tokenizer.eos_token_id


def test_pieces_with_bytes_to_fall_back_on(stories):
    v = vocabulary_of(AutoTokenizer.from_pretrained(stories), 512)
    assert v.kind == "llama" and v.adds_bos and v.adds_space and not v.merges
    assert v.types[:3] == [UNKNOWN, CONTROL, CONTROL] and v.types.count(BYTE) == 256 and v.types.count(NORMAL) == 253
    of = dict(zip(v.tokens, v.scores, strict=True))
    merged = [of[t] for t in v.tokens if len(t.decode()) > 1 and not t.startswith(b"<")]
    assert len(set(merged)) == len(merged) and min(merged) > -1e6  # every one is made by a merge, each by its own


def test_what_llama_cpp_has_no_name_for_is_refused():
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "<u>": 2}, merges=[], unk_token="<u>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ModelError, match="cuts text in a way that llama.cpp has no name for"):
        vocabulary_of(PreTrainedTokenizerFast(tokenizer_object=tokenizer), 3)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(ModelError, match="its tokenizer has no merges"):
        vocabulary_of(PreTrainedTokenizerFast(tokenizer_object=tokenizer), 3)
    tokenizer = Tokenizer(models.WordLevel(vocab={"a": 0, "<u>": 1}, unk_token="<u>"))
    with pytest.raises(ModelError, match="its tokenizer is a WordLevel"):
        vocabulary_of(PreTrainedTokenizerFast(tokenizer_object=tokenizer), 2)
    with pytest.raises(ModelError, match="Gemma2ForCausalLM is not written as GGUF"):
        check_architecture(make("gemma2-softcap-and-window"))
