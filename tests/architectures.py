"""Tiny random models of several architectures, for tests; each has something the plain Llama has not."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

V = 113

_SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

MAKERS: dict[str, Any] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_SIZES)),
    "llama-tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_SIZES, tie_word_embeddings=True)),
    "qwen2-biases": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_SIZES)),
    "qwen3-head-norms": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_SIZES, head_dim=16)),
    "gemma2-softcap-and-window": lambda: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(**_SIZES, head_dim=8, final_logit_softcapping=5.0, sliding_window=8, query_pre_attn_scalar=8)
    ),
    "gemma3-window": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(**_SIZES, head_dim=8, sliding_window=8, query_pre_attn_scalar=8)
    ),
    "granite-scaled": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**_SIZES, logits_scaling=4.0)),
    "cohere-scaled": lambda: tf.CohereForCausalLM(tf.CohereConfig(**_SIZES, logit_scale=0.25)),
    "phi-head-bias": lambda: tf.PhiForCausalLM(tf.PhiConfig(**_SIZES)),
    "mixtral-experts": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**_SIZES, num_local_experts=4)),
    "qwen3-moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**_SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    ),
    "deepseek-v3": lambda: tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(
            **{**_SIZES, "num_key_value_heads": 4},
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            n_shared_experts=1,
            moe_intermediate_size=32,
            first_k_dense_replace=1,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
        )
    ),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(
            vocab_size=V,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=128,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
}


def make(name: str, seed: int = 0) -> Any:
    """The model of that name, random but the same for a seed, in evaluation mode."""
    torch.manual_seed(seed)
    model = MAKERS[name]().eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith("bias") or "norm" in key or "ln_" in key:  # else biases are 0 and norms 1: no test at all
                p += 0.3 * torch.randn_like(p)
    return model


def save_with_tokenizer(model: Any, folder: Any, chat: bool = True) -> Any:
    """A Hugging Face folder of the model with a byte-level tokenizer of its size; returns the folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    merges = [("t", "h"), ("th", "e"), ("i", "n")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[
        : model.config.get_text_config().vocab_size - 4 - len(merges)
    ]
    names = ["<|pad|>", "<|bos|>", "<|eos|>", "<|unk|>", *alphabet, *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE({t: i for i, t in enumerate(names)}, merges, unk_token="<|unk|>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' else '\\n' }}{% endfor %}"  # noqa: E501
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        unk_token="<|unk|>",
        chat_template=template if chat else None,
        clean_up_tokenization_spaces=False,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
