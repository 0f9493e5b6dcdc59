"""Parameters counted from a config.json are those that transformers makes of it; and what is not understood is said."""

from __future__ import annotations

import json
import random

import pytest
import torch
import transformers as tf

from pennyweight.errors import ModelError
from pennyweight.plan.architectures import FAMILIES, read_shapes, shapes_of
from pennyweight.quant.linear import is_router

_SIZES = {
    "vocab_size": 113,
    "hidden_size": 48,
    "num_hidden_layers": 5,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {"vocab_size": 113, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 128, "bos_token_id": 1}
_LATENT = {
    **_SIZES, "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "qk_nope_head_dim": 16,
}  # fmt: skip
_SPARSE = {**_SIZES, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**_SIZES),
    "llama-tied-biases-and-a-head-width": lambda: tf.LlamaConfig(
        **_SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=20
    ),
    "llama-as-many-keys-as-queries": lambda: tf.LlamaConfig(**{**_SIZES, "num_key_value_heads": None}),
    "mistral": lambda: tf.MistralConfig(**_SIZES, sliding_window=8),
    "granite": lambda: tf.GraniteConfig(**_SIZES, attention_bias=True),
    "smollm3": lambda: tf.SmolLM3Config(**_SIZES, use_sliding_window=True, sliding_window=8),
    "phi3": lambda: tf.Phi3Config(**_SIZES, sliding_window=8),
    "qwen2": lambda: tf.Qwen2Config(**_SIZES),
    "qwen2-window": lambda: tf.Qwen2Config(**_SIZES, use_sliding_window=True, max_window_layers=2, sliding_window=8),
    "qwen3": lambda: tf.Qwen3Config(**_SIZES, head_dim=20, attention_bias=True),
    "gemma": lambda: tf.GemmaConfig(**_SIZES, head_dim=20),
    "gemma2": lambda: tf.Gemma2Config(**_SIZES, head_dim=20, sliding_window=8),
    "gemma3": lambda: tf.Gemma3TextConfig(**{**_SIZES, "num_hidden_layers": 7}, head_dim=20, sliding_window=8),
    "gpt2": lambda: tf.GPT2Config(**_GPT2),
    "gpt2-untied-inner": lambda: tf.GPT2Config(**_GPT2, n_inner=100, tie_word_embeddings=False),
    "mixtral": lambda: tf.MixtralConfig(**_SIZES, num_local_experts=6),
    "qwen2-moe": lambda: tf.Qwen2MoeConfig(
        **_SPARSE, shared_expert_intermediate_size=40, decoder_sparse_step=2, mlp_only_layers=[3]
    ),
    "qwen2-moe-window": lambda: tf.Qwen2MoeConfig(
        **_SPARSE, shared_expert_intermediate_size=40, use_sliding_window=True, max_window_layers=4, sliding_window=8
    ),
    "qwen3-moe": lambda: tf.Qwen3MoeConfig(**_SPARSE, head_dim=20, mlp_only_layers=[1]),
    "deepseek-v3": lambda: tf.DeepseekV3Config(
        **_LATENT, q_lora_rank=24, n_shared_experts=2, first_k_dense_replace=2, attention_bias=True
    ),
    "deepseek-v3-whole-queries": lambda: tf.DeepseekV3Config(**_LATENT, q_lora_rank=None),
}


def on_meta(config):
    """The model of a config, its parameters without memory."""
    with torch.device("meta"):
        return tf.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_has_the_shape_that_transformers_gives_it(name, tmp_path):
    config = CONFIGS[name]()
    model = on_meta(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(tmp_path)
    shapes = read_shapes(str(tmp_path))
    assert shapes.parameters == sum(p.numel() for p in model.parameters())
    assert sorted(t.shape for t in shapes.all_tensors) == sorted(tuple(p.shape) for p in model.parameters())
    head = model.get_output_embeddings()
    named = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]
    linears = [m.weight for n, m in named if not is_router(n)]
    assert sorted(t.shape for t in shapes.all_tensors if t.kind == "linear") == sorted(tuple(w.shape) for w in linears)
    assert shapes.tied == (head.weight is model.get_input_embeddings().weight)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_layer_looks_back_on_is_what_its_cache_keeps(name):
    config = CONFIGS[name]()
    layers = tf.DynamicCache(config=config).layers
    said = {**config.to_dict(), "architectures": None}
    for settings in (said, {**said, "layer_types": None}):  # which older files do not have
        windows = [b.attention.window for b in shapes_of(settings).blocks]
        assert windows == [getattr(x, "sliding_window", None) for x in layers]


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_config_json_leaves_out_is_what_transformers_assumes(kind):
    config = tf.AutoConfig.for_model(kind)
    aliases = {"sliding_window_pattern"}
    for name, value in FAMILIES[kind].defaults.items():
        if name not in aliases:
            assert getattr(type(config), name, getattr(config, name, None)) == value, name
    silent = {"model_type": kind, **{k: getattr(config, k) for k in ("vocab_size", *_NEEDED[kind == "gpt2"])}}
    assert shapes_of(silent).parameters == sum(p.numel() for p in on_meta(config).parameters())


_NEEDED = {
    True: ("n_embd", "n_layer", "n_head", "n_positions"),
    False: ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"),
}


def test_a_config_and_its_folder_give_the_same(tmp_path):
    CONFIGS["llama"]().save_pretrained(tmp_path)
    assert read_shapes(str(tmp_path)) == read_shapes(str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "mamba"}, "architecture 'mamba', whose parameters pennyweight cannot count"),
        ({"model_type": ["llama"]}, "whose parameters pennyweight cannot count"),
        ({"model_type": None}, "it knows llama, granite"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification, which is no causal"),
        ({"architectures": 3}, "architectures=3, which is no list"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"hidden_size": "64"}, "hidden_size='64', no whole number from 1"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000, no whole number from 1 to 10,000"),
        ({"vocab_size": -1}, "vocab_size=-1"),
        ({"num_attention_heads": 10**6, "head_dim": None}, "head_dim=0"),
        ({"attention_dropout": "a"}, "attention_dropout='a', which is no number from 0 to 1"),
        ({"layer_types": 5, "sliding_window": 4}, "layer_types=5, which is no list"),
    ],
)
def test_what_cannot_be_counted_is_said(change, said):
    config = {**CONFIGS["llama"]().to_dict(), "architectures": None, **change}
    with pytest.raises(ModelError, match=said.replace("(", r"\(")):
        shapes_of(config)


@pytest.mark.parametrize(
    ("content", "said"), [(None, "there is no"), ("{", "is not JSON"), ("[1]", "holds no settings")]
)
def test_a_file_that_is_none_is_said(content, said, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=said):
        read_shapes(str(tmp_path))


def test_no_broken_config_ends_in_a_traceback():
    rng = random.Random()
    for _ in range(300):
        config = CONFIGS[rng.choice(list(CONFIGS))]().to_dict() | {"architectures": None}
        key = rng.choice(list(config))
        config[key] = rng.choice([None, -3, 0, 1.5, "x", [], {}, [1], {"a": 1}, True, 10**12])
        try:
            shapes_of(json.loads(json.dumps(config)))
        except ModelError:
            pass
        except Exception as e:
            raise AssertionError(f"{config['model_type']} with {key}={config[key]!r}") from e
