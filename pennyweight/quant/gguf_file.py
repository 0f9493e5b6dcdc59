"""GGUF files, which llama.cpp and Ollama open: Q8_0, Q4_0 and bfloat16, written by the library of that format.

Linears are Q4_0 or Q8_0: our int4 and int8 in groups of 32 with float16 scales, bit for bit. Embeddings and output head
are Q8_0 beside either; widths that 32 does not divide are bfloat16, norms and biases float32. llama.cpp pairs the
halves of a rotary head otherwise than transformers where the architecture is Llama's, so rows of queries and keys
change places there.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pennyweight.errors import MissingExtra, ModelError
from pennyweight.quant.formats import FORMATS, Coded, decode, encode
from pennyweight.quant.gguf_tokenizer import Vocabulary, vocabulary_of

IN_GGUF = ("int8", "int4", "bf16")
"""Formats of a GGUF: Q8_0, Q4_0 and bfloat16."""

_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_TYPES = {"int8": "Q8_0", "int4": "Q4_0", "bf16": "BF16"}
_GROUP = 32


def library() -> Any:
    """The ``gguf`` package.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise MissingExtra("gguf", "gguf", "writing a GGUF") from None
    return gguf


def check_architecture(model: Any) -> str:
    """llama.cpp's name for the architecture of ``model``.

    Raises:
        ModelError: it is none that is written here.
    """
    name, config = type(model).__name__, model.config
    if name not in _ARCHITECTURES:
        raise ModelError(
            f"a {name} is not written as GGUF; of {', '.join(_ARCHITECTURES)} it is: use --layout compressed-tensors"
        )
    scaled = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if scaled != "default":
        raise ModelError(
            f"rotary positions of kind {scaled!r} are not written as GGUF; use --layout compressed-tensors"
        )
    return _ARCHITECTURES[name]


def write_gguf(
    model: Any, tokenizer: Any, codes: dict[str, Coded], out: Path, fmt: str, name: str, about: dict[str, str]
) -> None:
    """Write ``model`` to the file ``out``, what ``codes`` names as that, other matrices in bfloat16.

    Args:
        codes: int8 and int4 as ``gguf_format`` has them, by name of the module.
        fmt: what most of it is, a row of ``IN_GGUF``.
        about: further metadata, by key.

    Raises:
        ModelError: architecture or tokenizer have no GGUF.
        MissingExtra: the library is not installed.
    """
    gguf = library()
    arch, config = check_architecture(model), model.config
    writer = gguf.GGUFWriter(out, arch)
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_width)
    writer.add_value_length(head_width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float((getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10_000.0)))
    writer.add_rope_dimension_count(head_width)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{_TYPES[fmt]}"))
    for key, value in about.items():
        writer.add_string(key, value)
    _add_vocabulary(writer, vocabulary_of(tokenizer, config.vocab_size), tokenizer)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), config.num_hidden_layers)
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        target = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ModelError(f"{key} has no name in a GGUF; use --layout compressed-tensors")
        heads = _heads(key, config) if arch == "llama" else 0
        _add_tensor(gguf, writer, target, value, codes.get(key.removesuffix(".weight")), heads)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tensor(gguf: Any, writer: Any, name: str, value: Tensor, coded: Coded | None, heads: int) -> None:
    value = value.cpu()
    if value.ndim < 2:
        writer.add_tensor(name, _turned(value.float(), heads).numpy())
        return
    if coded is None:
        bits = _turned(value.bfloat16(), heads).contiguous().view(torch.uint8)
        writer.add_tensor(name, bits.numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
        return
    kind = coded.format.name
    data = packed(_turned(coded.codes.cpu(), heads), _turned(coded.scale.cpu(), heads), kind)
    writer.add_tensor(name, data.numpy(), raw_dtype=getattr(gguf.GGMLQuantizationType, _TYPES[kind]))


def gguf_format(fmt: str) -> Any:
    """int8 or int4 as a GGUF has it: groups of 32, float16 scales."""
    return replace(FORMATS[fmt], tile=(1, _GROUP), scale="float16")


@torch.no_grad()
def code_embeddings(model: Any) -> dict[str, Coded]:
    """Codes of embedding and output head, Q8_0, by name; the model's become what these stand for. There are none where
    32 does not divide their width."""
    ends = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m.weight.shape[1] % _GROUP == 0]
    coded: dict[str, Coded] = {}
    for name, module in model.named_modules():
        if any(module is m for m in ends) and not any(model.get_submodule(n).weight is module.weight for n in coded):
            coded[name] = encode(module.weight, gguf_format("int8"), search=True)
            module.weight.copy_(decode(coded[name]))
    return coded


def packed(codes: Tensor, scale: Tensor, fmt: str) -> Tensor:
    """(R, C) int8 codes and (R, C / 32) scales -> (R, bytes) as Q8_0 or Q4_0: scale, then codes, group by group.

    Q4_0 holds codes + 8, two a byte: the first half of a group in the lower bits, the second in the upper.
    """
    rows, groups = scale.shape
    parts = codes.view(rows, groups, _GROUP)
    if fmt == "int4":
        low, high = (parts + 8).to(torch.uint8).chunk(2, -1)
        parts = low | (high << 4)
    stored = scale.to(torch.float16).unsqueeze(-1).contiguous().view(torch.uint8)
    return torch.cat([stored, parts.contiguous().view(torch.uint8)], -1).flatten(1).contiguous()


def _heads(key: str, config: Any) -> int:
    """Heads whose rows change places, of queries and keys; else 0."""
    if ".q_proj." in key:
        return config.num_attention_heads
    return config.num_key_value_heads if ".k_proj." in key else 0


def _turned(x: Tensor, heads: int) -> Tensor:
    """Rows of each head: halves side by side -> pairs side by side."""
    if not heads:
        return x
    return x.view(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


def _add_vocabulary(writer: Any, v: Vocabulary, tokenizer: Any) -> None:
    writer.add_tokenizer_model(v.kind)
    writer.add_tokenizer_pre(v.pre)
    writer.add_token_list(v.tokens)
    writer.add_token_scores(v.scores)
    writer.add_token_types(v.types)
    if v.merges:
        writer.add_token_merges(v.merges)
    for name in ("bos", "eos", "unk", "pad"):
        i = getattr(tokenizer, f"{name}_token_id")
        if i is not None:
            getattr(writer, f"add_{name}_token_id")(i)
    writer.add_add_bos_token(v.adds_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(v.adds_space)
    if template := chat_template(tokenizer):
        writer.add_chat_template(template)


def chat_template(tokenizer: Any) -> str | None:
    """The chat template that a GGUF holds: the default one, where a tokenizer has several."""
    told = tokenizer.chat_template
    return told.get("default") if isinstance(told, dict) else told
