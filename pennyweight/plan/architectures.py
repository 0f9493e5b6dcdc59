"""config.json -> the shapes of a language model's parameters, exactly; no weights, no torch.

Counted are the parameters that transformers gives the architecture: embeddings, blocks, norms and the output head, once
where it is tied. What a released folder holds besides (DeepSeek-V3's multi-token prediction) is not loaded and so not
counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pennyweight.errors import ModelError
from pennyweight.plan.shapes import Attention, Block, Shapes, Tensor

_LAYERS, _MOST = 10_000, 1 << 31  # beyond these a setting is a mistake


@dataclass(frozen=True, slots=True)
class Family:
    """How an architecture differs from Llama.

    Attributes:
        defaults: of settings that config.json may leave out, where they are not those of Llama.
        qkv_bias, o_bias, mlp_bias: True, False, or the name of the setting that says.
        head_norms: queries and keys are normalised, head by head.
        norms, norm: how many a block has, and which.
        fused: queries, keys and values come out of one matrix, gate and up out of another.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    head_norms: bool = False
    norms: int = 2
    norm: str = "rms"
    fused: bool = False


_BY_SETTING: dict[str, Any] = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}
_GEMMA: dict[str, Any] = {"tie_word_embeddings": True, "head_dim": 256}
_WINDOW: dict[str, Any] = {"use_sliding_window": False, "sliding_window": 4096}
_WINDOWED: dict[str, Any] = {**_WINDOW, "max_window_layers": 28}

FAMILIES: dict[str, Family] = {
    "llama": Family(**_BY_SETTING, mlp_bias="mlp_bias"),
    "granite": Family(**_BY_SETTING, mlp_bias="mlp_bias"),
    "smollm3": Family(
        {"tie_word_embeddings": True, "num_key_value_heads": 4, "use_sliding_window": False}, **_BY_SETTING,
        mlp_bias="mlp_bias",
    ),
    "mistral": Family({"num_key_value_heads": 8, "sliding_window": 4096}),
    "phi3": Family(fused=True),
    "qwen2": Family({**_WINDOWED, "num_key_value_heads": 32}, qkv_bias=True),
    "qwen3": Family({**_WINDOWED, "num_key_value_heads": 32, "head_dim": 128}, **_BY_SETTING, head_norms=True),
    "gemma": Family({**_GEMMA, "num_key_value_heads": 16}, **_BY_SETTING, norm="rms32"),
    "gemma2": Family(
        {**_GEMMA, "num_key_value_heads": 4, "sliding_window": 4096, "sliding_window_pattern": 2,
         "attn_logit_softcapping": 50.0},
        **_BY_SETTING, norms=4, norm="rms32",
    ),
    "gemma3_text": Family(
        {**_GEMMA, "num_key_value_heads": 4, "sliding_window": 4096, "sliding_window_pattern": 6},
        **_BY_SETTING, head_norms=True, norms=4, norm="rms32",
    ),
    "mixtral": Family({"num_key_value_heads": 8, "num_experts": 8, "num_experts_per_tok": 2}),
    "qwen2_moe": Family(
        {**_WINDOWED, "num_key_value_heads": 16, "qkv_bias": True, "num_experts": 60, "num_experts_per_tok": 4,
         "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
        qkv_bias="qkv_bias",
    ),
    "qwen3_moe": Family(
        {**_WINDOW, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
         "moe_intermediate_size": 768},
        **_BY_SETTING, head_norms=True,
    ),
    "deepseek_v3": Family(
        {"moe_intermediate_size": 2048, "n_shared_experts": 1, "n_routed_experts": 256, "num_experts_per_tok": 8,
         "first_k_dense_replace": 3, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
         "qk_nope_head_dim": 128, "v_head_dim": 128},
        **_BY_SETTING,
    ),
    "gpt2": Family({"tie_word_embeddings": True, "attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1}),
}  # fmt: skip
"""Architectures whose parameters are counted, by ``model_type``."""


_ALIASES = {"num_local_experts": "num_experts"}  # transformers writes now this, now that


class _Given:
    """The settings of a config.json, with defaults where it is silent."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any], where: str):
        said = {_ALIASES.get(name, name): value for name, value in config.items()}
        self.config, self.where = {**defaults, **said}, where

    def __call__(self, name: str, default: Any = None) -> Any:
        found = self.config.get(name)
        return default if found is None else found

    def whole(self, name: str, default: int | None = None, least: int = 1, most: int = _MOST) -> int:
        """A number of things.

        Raises:
            ModelError: it is missing, or no such number.
        """
        found = self(name, default)
        if found is None:
            raise ModelError(
                f"{self.where} has no {name}, without which nothing can be counted; give the config.json of a model"
            )
        if isinstance(found, bool) or not isinstance(found, int) or not least <= found <= most:
            raise ModelError(f"{self.where} has {name}={found!r}, no whole number from {least} to {most:,}; correct it")
        return found

    def share(self, name: str) -> float:
        """A probability; 0 where nothing is said."""
        found = self(name, 0.0)
        if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found <= 1:
            raise ModelError(f"{self.where} has {name}={found!r}, which is no number from 0 to 1; correct it")
        return float(found)

    def listed(self, name: str) -> list[Any]:
        """A list; empty where nothing is said."""
        found = self(name, [])
        if not isinstance(found, list):
            raise ModelError(f"{self.where} has {name}={found!r}, which is no list; correct it")
        return found

    def bias(self, said: bool | str) -> bool:
        return bool(self(said, False)) if isinstance(said, str) else said


def read_shapes(path: str) -> Shapes:
    """The shapes of the model whose config.json, or whose folder, ``path`` is.

    Raises:
        ModelError: there is no such file, it cannot be read, or its architecture is none of ``FAMILIES``.
    """
    file = Path(path).expanduser()
    file = file / "config.json" if file.is_dir() else file
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"there is no {file}; give a Hugging Face model folder, or its config.json") from None
    except ValueError as e:
        raise ModelError(f"{file} is not JSON ({e}); give the config.json of a Hugging Face model folder") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file} holds no settings; give the config.json of a Hugging Face model folder")
    return shapes_of(config, str(file))


def shapes_of(config: Mapping[str, Any], where: str = "config.json") -> Shapes:
    """The same of settings that have been read from ``where``.

    Raises:
        ModelError: the architecture is not known, or a size is missing or wrong.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ModelError(
            f"{where} is of architecture {kind!r}, whose parameters pennyweight cannot count without its weights; it "
            f"knows {', '.join(FAMILIES)}"
        )
    given = _Given(config, FAMILIES[kind].defaults, where)
    named = [str(a) for a in given.listed("architectures")]
    if named and not any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in named):
        raise ModelError(f"{where} is of a {', '.join(named)}, which is no causal language model; give one")
    return _gpt2(given) if kind == "gpt2" else _decoder(given, kind, FAMILIES[kind])


def _decoder(c: _Given, kind: str, family: Family) -> Shapes:
    width, vocabulary = c.whole("hidden_size"), c.whole("vocab_size")
    tied = bool(c("tie_word_embeddings", False))
    tables = [Tensor("table", (vocabulary, width))] * (1 if tied else 2)
    blocks = tuple(_block(c, kind, family, i) for i in range(c.whole("num_hidden_layers", most=_LAYERS)))
    attention = blocks[0].attention
    return Shapes(
        architecture=kind,
        vocabulary=vocabulary,
        hidden=width,
        context=c.whole("max_position_embeddings", 1 << 20),
        tied=tied,
        tensors=(*tables, Tensor("vector", (width,))),
        blocks=blocks,
        norm=family.norm,
        activation=str(c("hidden_activation", c("hidden_act", "silu"))),
        rotary=(attention.latent[2] if attention.latent else attention.key) * (2 if kind == "gemma3_text" else 1),
        mtp=c.whole("num_nextn_predict_layers", 0, least=0),
    )


def _block(c: _Given, kind: str, family: Family, layer: int) -> Block:
    width = c.whole("hidden_size")
    latent, fused = kind == "deepseek_v3", family.fused
    attention = _latent_attention(c) if latent else _attention(c, kind, family, layer)
    tensors = _latent_tensors(c, attention) if latent else _attention_tensors(c, family, attention)
    first = 1 if fused else 3
    if attention.latent:
        first = 2
    ranks = [rank for rank in (attention.latent or ())[:2] if rank]
    norms = [Tensor("vector", (width,))] * family.norms
    inputs = [(width, first, 0), *((rank, 1, 0) for rank in ranks)]
    if not _is_sparse(c, kind, layer):
        inner = c.whole("intermediate_size")
        tensors += _mlp(width, inner, fused, c.bias(family.mlp_bias)) + norms
        inputs += [(width, 1 if fused else 2, 0), (inner, 1, 0)]
        return Block(tuple(tensors), attention, tuple(inputs), family.norms, gated=inner)
    shared, count, routed, of_experts = _experts(c, kind)
    weighed = kind == "qwen2_moe"
    tensors += of_experts + (_mlp(width, shared, False, False) if shared else [])
    inputs += [(width, 2 * (shared > 0), 1 + weighed), *([(shared, 1, 0)] if shared else [])]
    return Block((*tensors, *norms), attention, tuple(inputs), family.norms, shared, 0, count, routed, weighed=weighed)


def _linear(rows: int, columns: int, bias: bool = False) -> list[Tensor]:
    return [Tensor("linear", (rows, columns)), *([Tensor("vector", (rows,))] if bias else [])]


def _mlp(width: int, inner: int, fused: bool, bias: bool) -> list[Tensor]:
    first = _linear(2 * inner, width, bias) if fused else 2 * _linear(inner, width, bias)
    return first + _linear(width, inner, bias)


def _attention(c: _Given, kind: str, family: Family, layer: int) -> Attention:
    heads = c.whole("num_attention_heads")
    head = c.whole("head_dim", c.whole("hidden_size") // heads)
    return Attention(
        heads=heads,
        kv_heads=c.whole("num_key_value_heads", heads),
        key=head,
        value=head,
        window=_window(c, kind, layer),
        head_norms=family.head_norms,
        capped=bool(c("attn_logit_softcapping")),
        as_one=family.fused,
        dropout=c.share("attention_dropout"),
    )


def _window(c: _Given, kind: str, layer: int) -> int | None:
    """Tokens that the layer looks back on; None: all."""
    if c("sliding_window") is None or ("use_sliding_window" in c.config and not c("use_sliding_window")):
        return None
    if types := c.listed("layer_types"):
        slides = types[layer : layer + 1] == ["sliding_attention"]
    elif kind in ("qwen2", "qwen3"):
        slides = layer >= c.whole("max_window_layers", least=0)
    elif kind == "qwen2_moe":
        slides = layer % 2 == 0 and layer < c.whole("max_window_layers", least=0)
    elif kind.startswith("gemma"):
        slides = (layer + 1) % c.whole("sliding_window_pattern") != 0
    elif kind == "smollm3":
        slides = (layer + 1) % c.whole("no_rope_layer_interval", 4) == 0
    else:
        slides = kind in ("mistral", "mixtral", "phi3", "qwen3_moe")
    return c.whole("sliding_window") if slides else None


def _attention_tensors(c: _Given, family: Family, a: Attention) -> list[Tensor]:
    width, bias = c.whole("hidden_size"), c.bias(family.qkv_bias)
    rows = [a.heads * a.key, a.kv_heads * a.key, a.kv_heads * a.value]
    tensors = [t for n in ([sum(rows)] if family.fused else rows) for t in _linear(n, width, bias)]
    norms = [Tensor("vector", (a.key,))] * (2 if a.head_norms else 0)
    return tensors + _linear(width, a.heads * a.value, c.bias(family.o_bias)) + norms


def _latent_attention(c: _Given) -> Attention:
    heads, rotary = c.whole("num_attention_heads"), c.whole("qk_rope_head_dim")
    ranks = 0 if c.config.get("q_lora_rank") is None else c.whole("q_lora_rank"), c.whole("kv_lora_rank")
    key = c.whole("qk_nope_head_dim") + rotary
    return Attention(heads, heads, key, c.whole("v_head_dim"), latent=(*ranks, rotary))


def _latent_tensors(c: _Given, a: Attention) -> list[Tensor]:
    assert a.latent is not None
    width, bias, (queries, rank, rotary) = c.whole("hidden_size"), bool(c("attention_bias", False)), a.latent
    vector = lambda n: Tensor("vector", (n,))  # noqa: E731
    of_queries = (
        [*_linear(queries, width, bias), vector(queries), *_linear(a.heads * a.key, queries)]
        if queries
        else _linear(a.heads * a.key, width)
    )
    keys = [*_linear(rank + rotary, width, bias), vector(rank), *_linear(a.heads * (a.key - rotary + a.value), rank)]
    return of_queries + keys + _linear(width, a.heads * a.value, bias)


def _is_sparse(c: _Given, kind: str, layer: int) -> bool:
    """Whether the layer's MLP is a mixture of experts."""
    if kind == "deepseek_v3":
        return layer >= c.whole("first_k_dense_replace", least=0)
    if kind in ("qwen2_moe", "qwen3_moe"):
        dense = layer in c.listed("mlp_only_layers")
        return not dense and (layer + 1) % c.whole("decoder_sparse_step", 1) == 0
    return kind == "mixtral"


def _experts(c: _Given, kind: str) -> tuple[int, int, tuple[int, int], list[Tensor]]:
    """Inner width of what every token goes through; how many experts there are, how many a token goes to with their
    inner width, and tensors of these and their gates."""
    width = c.whole("hidden_size")
    inner = c.whole("intermediate_size" if kind == "mixtral" else "moe_intermediate_size")
    count = c.whole("n_routed_experts" if kind == "deepseek_v3" else "num_experts")
    shared, gate = 0, []
    if kind == "deepseek_v3":
        shared = inner * c.whole("n_shared_experts")
    elif kind == "qwen2_moe":
        shared, gate = c.whole("shared_expert_intermediate_size"), [Tensor("router", (1, width))]
    tensors = [Tensor("router", (count, width)), Tensor("experts", (count, 2 * inner, width))]
    tensors += [Tensor("experts", (count, width, inner)), *gate]
    return shared, count, (c.whole("num_experts_per_tok"), inner), tensors


def _gpt2(c: _Given) -> Shapes:
    width, vocabulary, places, heads = (c.whole(n) for n in ("n_embd", "vocab_size", "n_positions", "n_head"))
    inner, tied = c.whole("n_inner", 4 * width), bool(c("tie_word_embeddings"))
    sides = ((width, 3 * width), (width, width), (width, inner), (inner, width))
    tensors = [t for a, b in sides for t in (Tensor("conv1d", (a, b)), Tensor("vector", (b,)))]
    norm = [Tensor("vector", (width,))] * 2
    attention = Attention(heads, heads, width // heads, width // heads, dropout=c.share("attn_pdrop"))
    inputs = ((width, 0, 1), (width, 0, 1), (inner, 0, 1))
    block = Block((*tensors, *norm, *norm), attention, inputs, plain=inner)
    return Shapes(
        architecture="gpt2",
        vocabulary=vocabulary,
        hidden=width,
        context=places,
        tied=tied,
        tensors=(*[Tensor("table", (vocabulary, width))] * (1 if tied else 2), Tensor("table", (places, width)), *norm),
        blocks=(block,) * c.whole("n_layer", most=_LAYERS),
        norm="layer",
        activation=str(c("activation_function", "gelu_new")),
        rotary=0,
        dropout=(c.share("embd_pdrop"), c.share("resid_pdrop")),
    )
