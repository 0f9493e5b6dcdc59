"""FLOPs counted from shapes are those that torch's own counter finds in transformers' models, to the last one."""

from __future__ import annotations

import math

import pytest
import torch
import transformers as tf
from test_plan_architectures import CONFIGS
from torch.utils.flop_counter import FlopCounterMode

from pennyweight.errors import RecipeError
from pennyweight.model.adapters import attach
from pennyweight.model.cache import cache_argument
from pennyweight.model.loaded import blocks_of
from pennyweight.model.options import checkpoint_gradients
from pennyweight.plan.architectures import shapes_of
from pennyweight.plan.flops import (
    Training,
    decode,
    forward,
    gating,
    generation,
    multiplied,
    prefill,
    training,
)
from pennyweight.plan.models import models
from pennyweight.settings import Lora

ROWS, LENGTH = 2, 12
ADAPTED = ("llama", "qwen3", "phi3", "mixtral", "granite")
WRITING = ("llama", "qwen3", "mixtral", "deepseek-v3", "deepseek-v3-whole-queries", "gpt2")


def made(name):
    """A model that computes attention and experts by plain products, which the counter sees; and its shapes."""
    config = CONFIGS[name]()
    config._attn_implementation = config._experts_implementation = "eager"
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(config), shapes_of(config.to_dict())


def counted(run):
    """FLOPs of ``run`` as torch counts them, without rotary positions, which are an outer product in transformers."""
    with FlopCounterMode(display=False) as counter:
        run()
    per = counter.get_flop_counts()
    rotary = sum(sum(ops.values()) for name, ops in per.items() if name.endswith("rotary_emb"))
    return counter.get_total_flops() - rotary


def ids(rows=ROWS, length=LENGTH):
    return torch.randint(3, 100, (rows, length))


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_and_training_are_what_torch_counts(name):
    model, shapes = made(name)
    batch = ids()
    assert counted(lambda: model(batch, use_cache=False)) == ROWS * LENGTH * forward(shapes, LENGTH, "full").total

    def step():
        model(batch, use_cache=False, labels=batch).loss.backward()

    assert counted(step) == ROWS * LENGTH * training(shapes, LENGTH, attention="full").total
    model.train()
    checkpoint_gradients(model)
    again = training(shapes, LENGTH, Training(recompute=True), "full")
    assert counted(step) == ROWS * LENGTH * again.total


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ADAPTED)
def test_training_of_factors_is_what_torch_counts(name, recompute):
    pytest.importorskip("peft")
    model, shapes = made(name)
    attach(model, blocks_of(model), Lora(rank=4), 0, lambda shape: None)
    model.train()
    if recompute:
        checkpoint_gradients(model)
    batch = ids()
    expected = training(shapes, LENGTH, Training(rank=4, recompute=recompute), "full")
    found = counted(lambda: model(batch, use_cache=False, labels=batch).loss.backward())
    assert found == ROWS * LENGTH * expected.total


@pytest.mark.parametrize("name", WRITING)
def test_prefill_decode_and_generation_are_what_torch_counts(name):
    model, shapes = made(name)
    prompt, new = ids(1), 6
    cache = model(prompt, use_cache=True).past_key_values
    after = {cache_argument(model): cache}
    step = counted(lambda: model(prompt[:, :1], **after, use_cache=True))
    assert step == decode(shapes, LENGTH + 1, absorbed=False).total
    found = counted(lambda: model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False))
    plain = forward(shapes, LENGTH, "full").times(LENGTH).attention - prefill(shapes, LENGTH).attention
    assert found == generation(shapes, LENGTH, new, absorbed=False).total + plain


def test_generation_is_its_steps():
    for name in ("llama", "mistral", "gemma3", "deepseek-v3"):
        shapes = shapes_of(CONFIGS[name]().to_dict())
        for absorbed in (True, False):
            for prompt, new in ((1, 1), (5, 1), (5, 9), (20, 30)):
                steps = sum(decode(shapes, prompt + i, absorbed).total for i in range(1, new))
                found = generation(shapes, prompt, new, absorbed).total
                assert math.isclose(found, prefill(shapes, prompt).total + steps, rel_tol=1e-12)


def test_exact_attention_is_a_sum_over_queries_and_their_keys():
    for name in ("llama", "mistral", "gemma2", "gemma3", "qwen2-window"):
        shapes = shapes_of(CONFIGS[name]().to_dict())
        for length in (1, 7, 8, 9, 40):
            total = 0
            for block in shapes.blocks:
                a = block.attention
                for query in range(length):
                    keys = sum(1 for key in range(query + 1) if a.window is None or query - key < a.window)
                    total += 2 * keys * a.heads * (a.key + a.value)
            assert math.isclose(forward(shapes, length).attention * length, total, rel_tol=1e-12)
            assert math.isclose(prefill(shapes, length).attention, total, rel_tol=1e-12)


def test_absorbed_latent_attention_is_what_torch_counts():
    """One step over cached latents, written out: the query goes into the latent space, the sum comes out of it."""
    shapes = shapes_of(CONFIGS["deepseek-v3"]().to_dict())
    a, context = shapes.blocks[0].attention, 20
    rank, rotary = a.latent[1:]
    plain = a.key - rotary
    query, expand = torch.randn(a.heads, 1, plain), torch.randn(a.heads, plain, rank)
    latents, places, values = (
        torch.randn(context, rank),
        torch.randn(context, rotary),
        torch.randn(a.heads, rank, a.value),
    )
    with FlopCounterMode(display=False) as counter:
        inside = torch.bmm(query, expand)[:, 0]
        scores = inside @ latents.T + torch.randn(a.heads, rotary) @ places.T
        torch.bmm((scores @ latents)[:, None], values)
    of_latents = 2 * rank * a.heads * (plain + a.value)  # in place of the latent's expansion, which a block has anyway
    found = decode(shapes, context)
    assert counter.get_total_flops() - of_latents == found.attention / len(shapes.blocks)
    assert found.blocks == decode(shapes, 1).blocks


def test_conventions_and_their_names():
    shapes = models()["llama-3-8b"]
    none, half, full, exact = (training(shapes, 8192, attention=c) for c in ("none", "half", "full", "exact"))
    assert none.total == 6 * multiplied(shapes) and none.attention == 0
    assert full.attention == 2 * half.attention
    assert math.isclose(exact.attention, half.attention * (1 + 1 / 8192), rel_tol=1e-12)
    with pytest.raises(RecipeError, match="none, half, full, exact.*causal"):
        training(shapes, 8192, attention="causal")


def test_multi_token_prediction_is_a_matrix_a_block_and_the_head():
    shapes = models()["deepseek-v3"]
    assert shapes.mtp == 1
    last = sum(t.count for t in shapes.blocks[-1].tensors if t.kind in ("linear", "router"))
    expected = 2 * 7168**2 + last + 3 * 8 * 7168 * 2048 + 129280 * 7168
    assert multiplied(shapes, 1) - multiplied(shapes) == expected
    more = training(shapes, 4096, Training(mtp=1), "half").total - training(shapes, 4096, attention="half").total
    attention = 6 * 128 * (192 + 128) * 4096 / 2
    assert math.isclose(more, 6 * expected + attention, rel_tol=1e-12)


def test_deepseek_v3_is_what_was_published():
    """260.0 GFLOP a token: Megatron-Bridge, which leaves routers out (``benchmarks/forecast.py`` has the others)."""
    shapes = models()["deepseek-v3"]
    whole = training(shapes, 4096, Training(mtp=1), "half").total
    assert round((whole - 6 * gating(shapes, 1)) / 1e9, 1) == 260.0
    assert abs(whole / 260.0e9 - 1) < 0.005


def test_logits_of_fewer_tokens_cost_less():
    shapes = models()["llama-3.2-1b"]
    whole, half = (training(shapes, 1024, Training(learnt=share)) for share in (1.0, 0.5))
    assert half.head == whole.head / 2 and half.blocks == whole.blocks
    assert prefill(shapes, 100).head == forward(shapes, 100).head
    assert prefill(shapes, 100, logits=100).head == 100 * forward(shapes, 100).head
