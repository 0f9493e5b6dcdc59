"""Students made from nothing and cut from teachers."""

from __future__ import annotations

import pytest
import torch
from architectures import MAKERS, V, make

from pennyweight.errors import RecipeError
from pennyweight.model.head import check_head
from pennyweight.model.student import align_vocabulary, cut, from_shape
from pennyweight.model.tokenizer import train_tokenizer
from pennyweight.recipe import CutStudent
from pennyweight.settings import Shape


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


@pytest.mark.parametrize("name", MAKERS)
def test_all_layers_kept_is_the_teacher_and_fewer_keeps_theirs(name, tmp_path):
    teacher = make(name, 3)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    ids = torch.randint(0, V, (2, 15))
    assert torch.equal(logits(cut(teacher, CutStudent()), ids), logits(teacher, ids))
    student = cut(teacher, CutStudent(layers=[0, 2]))
    check_head(student)
    assert student.config.get_text_config().num_hidden_layers == 2
    depth = {"gpt2": "transformer.h"}.get(name, "model.layers")
    kept = {k: v for k, v in student.state_dict().items() if k.startswith(f"{depth}.1.")}
    assert kept
    for key, value in kept.items():
        assert torch.equal(value, before[key.replace(f"{depth}.1.", f"{depth}.2.", 1)])
    # It stands on its own feet: saved, opened again, the same; and the teacher was not touched.
    student.save_pretrained(tmp_path)
    assert torch.equal(logits(type(teacher).from_pretrained(tmp_path).eval(), ids), logits(student, ids))
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


@pytest.mark.parametrize(("asked", "kept"), [(1, [0]), (2, [0, 2]), (3, [0, 1, 2])])
def test_layers_are_spread_from_first_to_last(asked, kept):
    teacher = make("llama", 3)
    student = cut(teacher, CutStudent(layers=asked))
    for new, old in enumerate(kept):
        assert torch.equal(student.model.layers[new].mlp.up_proj.weight, teacher.model.layers[old].mlp.up_proj.weight)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2-biases", "qwen3-head-norms"])
def test_narrowed_widths_open_and_keep_what_carries_most(name, tmp_path):
    teacher = make(name, 5)
    with torch.no_grad():  # four channels nobody writes to and nobody reads
        for key, p in teacher.named_parameters():
            if key.endswith(
                ("embed_tokens.weight", "lm_head.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight")
            ):
                p[:, 5:9] = 0
            if key.endswith(("up_proj.weight", "gate_proj.weight")):
                p[:, 5:9] = 0
            if key.endswith(("o_proj.weight", "down_proj.weight")):
                p[5:9] = 0
    student = cut(teacher, CutStudent(hidden=28, intermediate=48))
    ids = torch.randint(0, V, (2, 15))
    with torch.no_grad():  # RMSNorm divides by the root of the mean, which 4 zero channels fewer make 32/28 as large
        for key, p in student.named_parameters():
            if key.endswith(("layernorm.weight", "model.norm.weight")):
                p *= (32 / 28) ** 0.5
    torch.testing.assert_close(logits(student, ids), logits(teacher, ids), rtol=1e-4, atol=1e-4)
    narrow = cut(teacher, CutStudent(layers=2, hidden=24, intermediate=32))
    assert narrow.model.embed_tokens.weight.shape == (V, 24)
    assert narrow.model.layers[1].mlp.down_proj.weight.shape == (24, 32)
    narrow.save_pretrained(tmp_path)
    assert torch.equal(logits(type(teacher).from_pretrained(tmp_path).eval(), ids), logits(narrow, ids))


def test_what_cannot_be_cut_is_said():
    teacher = make("llama")
    for settings, words in [
        ({"layers": 4}, "teacher of 3 layers; give 1 to 3"),
        ({"layers": [0, 3]}, "0 to 2"),
        ({"layers": [1, 1]}, "each once"),
        ({"hidden": 64}, "wider than the teacher's 32"),
    ]:
        with pytest.raises(RecipeError, match=words):
            cut(teacher, CutStudent(**settings))
    with pytest.raises(RecipeError, match="GPT2LMHeadModel cannot be narrowed"):
        cut(make("gpt2"), CutStudent(hidden=16))
    import transformers as tf

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    latent = tf.DeepseekV3Config(
        vocab_size=V, intermediate_size=48, kv_lora_rank=8, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=8, first_k_dense_replace=2, **sizes,
    )  # fmt: skip
    with pytest.raises(RecipeError, match="DeepseekV3ForCausalLM cannot be narrowed.*q_a_proj"):
        cut(tf.DeepseekV3ForCausalLM(latent), CutStudent(layers=1, hidden=16))


def test_what_is_said_layer_by_layer_follows_the_layers():
    import transformers as tf

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    config = tf.SmolLM3Config(vocab_size=V, num_hidden_layers=8, pad_token_id=0, **sizes)
    config.eos_token_id = [2, 3, 4, 5, 6, 7, 8, 9]  # as many as there are layers, and nothing to do with them
    student = cut(tf.SmolLM3ForCausalLM(config), CutStudent(layers=[0, 3, 7]))
    assert student.config.eos_token_id == config.eos_token_id
    assert student.config.no_rope_layers == [config.no_rope_layers[i] for i in (0, 3, 7)] == [1, 0, 0]


def test_a_vocabulary_that_differs_in_padding_is_aligned():
    for size in (V - 5, V + 7):
        model = make("llama-tied")
        before = model.get_input_embeddings().weight[: V - 5].clone()
        assert align_vocabulary(model, size) and not align_vocabulary(model, size)
        assert model.get_output_embeddings().weight.shape[0] == model.config.vocab_size == size
        assert torch.equal(model.get_input_embeddings().weight[: V - 5], before)


def test_a_shape_is_the_same_for_a_seed_and_leaves_the_random_state_alone():
    tokenizer = train_tokenizer(["1 + 2 = 3", "4 + 5 = 9"], 64, 32)
    shape = Shape(hidden=16, layers=2, heads=2, intermediate=24)
    state = torch.get_rng_state()
    a, b, c = (from_shape(shape, tokenizer, 32, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.model.layers[1].mlp.up_proj.weight, b.model.layers[1].mlp.up_proj.weight)
    assert not torch.equal(a.model.layers[1].mlp.up_proj.weight, c.model.layers[1].mlp.up_proj.weight)
    assert a.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_tokenizer_is_deterministic_and_gives_text_back():
    texts = ["Calculate 12 + 34.", "12 + 34 = 46", "The answer is 46."]
    a, b = (train_tokenizer(texts, 80, 64) for _ in range(2))
    assert a.get_vocab() == b.get_vocab() and len(a) <= 80
    for text in texts:
        ids = a(text)["input_ids"]
        assert a.decode(ids) == text
        assert len([i for i in ids if a.decode([i]).strip().isdigit()]) == sum(c.isdigit() for c in text)
