"""Generation against transformers' own, token by token; sampling against the distribution it claims to draw from."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from architectures import MAKERS, V, make
from transformers import MambaConfig, MambaForCausalLM

import pennyweight.model.generate as generating
from pennyweight.errors import DataError, ModelError
from pennyweight.model.cache import AnyRows, prefilled, whole_cache
from pennyweight.model.generate import generate, stream
from pennyweight.model.llama import LlamaRows
from pennyweight.model.load import open_tokenizer
from pennyweight.model.sampling import Choice, before_stop, draws, pick, row_keys, stop_at

PROMPTS = [[5, 9, 11], [7], [3, 3, 8, 20, 40, 41, 17], [100, 90]]


@pytest.mark.parametrize("name", MAKERS)
def test_greedy_equals_transformers(name):
    """Batched, left-padded and cached, against one prompt at a time with transformers' own loop."""
    model = make(name, 4)
    ours = generate(model, PROMPTS, max_tokens=12, temperature=0, eos_ids={2}, pad_id=0, seed=0)
    for prompt, got in zip(PROMPTS, ours, strict=True):
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=0,
        )
        want = out[0, len(prompt) :].tolist()
        assert list(got.ids) == [t for t in want if t != 2], name
        told = list(stream(model, prompt, max_tokens=12, temperature=0, eos_ids={2}, seed=0))
        assert told == list(got.ids)


def test_logprobs_are_the_models_own_whatever_was_sampled_from():
    model = make("llama", 2)
    made = generate(model, PROMPTS, max_tokens=9, temperature=1.7, top_p=0.8, eos_ids=set(), pad_id=0, seed=5)
    for prompt, g in zip(PROMPTS, made, strict=True):
        ids = torch.tensor([[*prompt, *g.ids]])
        with torch.no_grad():
            log_p = torch.log_softmax(model(input_ids=ids).logits.float()[0], -1)
        want = [float(log_p[len(prompt) - 1 + i, t]) for i, t in enumerate(g.ids)]
        assert g.logprobs == pytest.approx(want, abs=1e-3)
        assert g.end is None and len(g.ids) == 9


def test_rows_that_end_early_change_nothing_for_the_others():
    model = make("llama", 2)
    alone = [
        generate(model, [p], max_tokens=20, temperature=0, eos_ids=set(range(3, 40)), pad_id=0, seed=0)[0]
        for p in PROMPTS
    ]
    together = generate(model, PROMPTS, max_tokens=20, temperature=0, eos_ids=set(range(3, 40)), pad_id=0, seed=0)
    assert [g.ids for g in together] == [g.ids for g in alone]
    assert all(g.end in range(3, 40) for g in together)


def test_a_seed_is_a_text_and_another_seed_another():
    model = make("llama", 2)

    def made(seed):
        return [g.ids for g in generate(model, PROMPTS, max_tokens=9, temperature=1, eos_ids={2}, pad_id=0, seed=seed)]

    assert made(1) == made(1) != made(2)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.3, 0.7)])
def test_tokens_are_drawn_from_the_distribution(temperature, top_p):
    """Chi-square over 40,000 draws; its 1 - 1e-5 quantile, so that chance fails once in 100,000 runs."""
    seed = torch.seed() % 10**6
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(12, generator=g) * 1.5
    n = 40_000
    u = draws(row_keys(seed, n), np.zeros(n, np.int64))
    token, _ = pick(logits.expand(n, 12), Choice(temperature, top_p), u)
    p = torch.softmax(logits.double() / temperature, -1)
    ranked, order = p.sort(descending=True)
    inside = torch.zeros(12, dtype=torch.bool)
    inside[order[ranked.cumsum(0) - ranked < top_p]] = True
    seen = torch.bincount(token, minlength=12).double()
    assert float(seen[~inside].sum()) == 0
    p, seen = p[inside] / p[inside].sum(), seen[inside]
    chi2 = float(((seen - n * p) ** 2 / (n * p)).sum())
    degrees = len(p) - 1
    # Wilson and Hilferty (1931): the cube root of chi-square over its degrees is nearly normal; 4.265 cuts off 1e-5.
    limit = degrees * (1 - 2 / (9 * degrees) + 4.265 * (2 / (9 * degrees)) ** 0.5) ** 3
    assert chi2 < limit, f"seed {seed}: chi-square {chi2:.1f} with {degrees} degrees of freedom"


def test_the_context_is_never_left():
    model = make("llama", 2)
    made = generate(model, PROMPTS, max_tokens=50, temperature=0, eos_ids=set(), pad_id=0, seed=0, context=10)
    assert [len(p) + len(g.ids) for p, g in zip(PROMPTS, made, strict=True)] == [10] * 4  # a long one cuts no other
    learned = make("gpt2", 2)  # positions are a table: one beyond the context would be out of range
    made = generate(learned, PROMPTS, max_tokens=200, temperature=0, eos_ids=set(), pad_id=0, seed=0, context=128)
    assert [len(p) + len(g.ids) for p, g in zip(PROMPTS, made, strict=True)] == [128] * 4
    assert len(list(stream(model, [5] * 8, max_tokens=50, temperature=0, eos_ids=set(), seed=0, context=10))) == 2
    for bad in ([], list(range(10)), [V - 1] * 11):
        with pytest.raises(DataError, match=r"prompt 0 (has 1\d tokens|is empty)"):
            generate(model, [bad], max_tokens=5, temperature=0, eos_ids={2}, pad_id=0, seed=0, context=10)


LIKE_LLAMA = {"llama", "llama-tied", "qwen2-biases", "qwen3-head-norms"}


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_built_like_a_llama_is_decoded_as_one_and_nothing_else(name):
    model = make(name, 5)
    rows = LlamaRows.of(model, lambda ids: prefilled(model, ids), 4)
    assert (rows is not None) == (name in LIKE_LLAMA)


def test_what_only_looks_like_a_llama_is_left_to_transformers():
    """A layer that computes something else, one that would do so beyond its window only, and one that is watched."""
    odd = make("llama", 5)
    odd.model.layers[1].self_attn.scaling *= 2
    windowed = make("qwen2-biases", 5)
    windowed.config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    hooked = make("llama", 5)
    hooked.model.layers[0].mlp.up_proj.register_forward_hook(lambda *given: given[-1])
    for model in (odd, windowed, hooked):
        assert LlamaRows.of(model, lambda ids, m=model: prefilled(m, ids), 4) is None


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(
            (n, t)
            for n in ("llama", "qwen2-biases", "qwen3-head-norms", "gpt2")
            for t in (torch.float32, torch.bfloat16)
        ),
        ("mixtral-experts", torch.float32),  # in 16 bits rounding alone may choose another expert
    ],
)
@torch.inference_mode()
def test_logits_are_the_models_own_at_every_step(name, dtype):
    """Rows that come and go between steps, beyond the room the cache begins with, against whole passes in float32.

    In bfloat16 a whole pass is off as well, by as much as happens to be lost: rows are off by at most twice that.
    """
    seed = torch.seed() % 10**6
    g = torch.Generator().manual_seed(seed)
    model = make(name, seed).to(dtype)
    exact, off = copy.deepcopy(model).float(), []
    made = LlamaRows.of(model, lambda ids: prefilled(model, ids), 3) or AnyRows(model, 0, whole_cache)
    texts = [torch.randint(3, V, (n,), generator=g).tolist() for n in (1, 40, 7)]
    late = torch.randint(3, V, (20,), generator=g).tolist()
    made.admit(texts)
    for step in range(60):
        got = made.step(torch.tensor([t[-1] for t in texts]), np.zeros(len(texts), bool))
        if step % 12 == 0:
            for text, row in zip(texts, got, strict=True):
                want, whole = (m(input_ids=torch.tensor([text])).logits[0, -1].float() for m in (exact, model))
                off.append([float((x - want).norm() / want.norm()) for x in (row, whole)])
                if dtype == torch.float32:
                    assert off[-1][0] < 1e-5, f"seed {seed}, step {step}, {len(text)} tokens"
        if step == 30:
            order = np.array([2, 1])  # the first has ended, the last takes its place
            made.keep(order)
            texts, got = [texts[i] for i in order], got[order]
        if step == 31 and made.mixes:
            made.admit([late])
            texts, got = (
                [*texts, late[:-1]],
                torch.cat([got, got.new_zeros(1, V).index_fill(1, torch.tensor(late[-1]), 1.0)]),
            )
        texts = [[*t, int(row.argmax())] for t, row in zip(texts, got, strict=True)]
    ours, rival = torch.tensor(off).square().mean(0).sqrt().tolist()
    assert ours < 2 * rival + 1e-5, f"seed {seed}: off by {ours:.1e}, a whole pass by {rival:.1e}"


def test_packed_weights_are_made_anew_when_the_models_change_and_go_with_it():
    """In bfloat16 on a CPU they are kept between calls; ``.data`` is where torch itself would not see a change."""
    model = make("qwen2-biases", 3).bfloat16()
    settings = {"max_tokens": 24, "temperature": 0, "eos_ids": set(), "pad_id": 0, "seed": 0}

    def texts(of: Any) -> list[tuple[int, ...]]:
        return [m.ids for m in generate(of, PROMPTS, **settings)]

    first = texts(model)
    assert first == texts(copy.deepcopy(model)) == texts(model)
    model.model.layers[1].mlp.down_proj.weight.data[3] += 20
    second = texts(model)
    assert second == texts(copy.deepcopy(model)) != first
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    assert texts(model) == texts(copy.deepcopy(model)) != second
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_prompts_text_is_the_same_whatever_the_batch(name, temperature):
    model, seed = make(name, 2), torch.seed() % 10**6
    g = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(3, V, (int(n),), generator=g).tolist() for n in torch.randint(1, 30, (21,), generator=g)]
    rooms = torch.randint(1, 90, (21,), generator=g).tolist()
    settings = {"temperature": temperature, "top_p": 0.9, "eos_ids": set(range(5)), "pad_id": 0, "seed": seed}
    settings["context"] = 100
    made = [
        [(m.ids, m.end) for m in generate(model, prompts, max_tokens=rooms, batch=batch, **settings)]
        for batch in (21, 8, 3, 1)
    ]
    assert made[0] == made[1] == made[2] == made[3], f"seed {seed}"
    assert all(len(ids) + (end is not None) <= room for (ids, end), room in zip(made[0], rooms, strict=True))
    assert len({len(ids) for ids, _ in made[0]}) > 3
    first = {**settings, "max_tokens": rooms[0]}
    assert tuple(stream(model, prompts[0], **{k: v for k, v in first.items() if k != "pad_id"})) == made[0][0][0]


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.5), (3, 1.0), (2000, 1.0), (2000, 0.99), (0, 0.9999), (1500, 0.2)])
def test_top_k_and_top_p_keep_what_a_plain_sort_keeps(top_k, top_p):
    """Wide vocabularies are ranked in part; a flat row needs all of it."""
    seed = torch.seed() % 10**6
    g = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(6000, generator=g) for _ in range(64)])  # of quantiles: no two alike
    logits = torch.erfinv((2 * order + 1) / 6000 - 1) * torch.tensor([7.0, 0.14]).repeat(32).unsqueeze(1)
    u = torch.rand(64, generator=g, dtype=torch.float64)
    token, _ = pick(logits, Choice(1.0, top_p, top_k), u)
    ranked, ids = torch.softmax(logits, -1).sort(-1, descending=True)
    outside = ranked.cumsum(-1) - ranked >= top_p
    outside[:, top_k or 6000 :] = True
    kept = torch.zeros_like(ranked).scatter_(-1, ids, ranked.masked_fill(outside, 0.0)).double()
    below = (kept.cumsum(-1) < u.unsqueeze(1) * kept.sum(-1, keepdim=True) - 1e-9).sum(-1)
    above = (kept.cumsum(-1) < u.unsqueeze(1) * kept.sum(-1, keepdim=True) + 1e-9).sum(-1)
    assert ((below <= token) & (token <= above)).all() and (kept.gather(1, token.unsqueeze(1)) > 0).all(), (
        f"seed {seed}"
    )


def test_draws_are_uniform_and_each_streams_own():
    seed = torch.seed() % 10**6
    keys = row_keys(seed, 400)
    u = torch.stack([draws(keys, np.full(400, i)) for i in range(250)])
    assert len(set(u.flatten().tolist())) == u.numel() and float(u.min()) >= 0 and float(u.max()) < 1
    assert torch.equal(u[7, 30:31], draws(keys[30:31], np.array([7])))
    counts = torch.histc(u.float(), 100, 0, 1)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 170.8, f"seed {seed}"  # 1 - 1e-5 of chi-square with 99 degrees
    centred = u - 0.5
    for product in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1]):  # next in a stream, same in the next
        assert abs(float(product.mean())) * 12 * product.numel() ** 0.5 < 4.5, f"seed {seed}"


def test_a_stop_string_ends_a_row(tmp_path):
    from pennyweight.model.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["the cat sat on the mat. END the dog 안녕하세요"] * 9, 300, 64)
    ends = stop_at(tokenizer, ["END", "녕하"])
    for text in ("the cat END the", "a 안녕하세요", "the dog"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        first = next((i for i in range(1, len(ids) + 1) if ends(ids[:i])), None)
        cut = before_stop(text, ["END", "녕하"])
        if first is None:
            assert text == cut == "the dog"
        else:
            assert cut != text and before_stop(tokenizer.decode(ids[:first]), ["END", "녕하"]) == cut
            assert not any(s in tokenizer.decode(ids[: first - 1]) for s in ("END", "녕하"))
    model = make("llama", 2)
    settings = {"max_tokens": 30, "temperature": 0, "eos_ids": set(), "pad_id": 0, "seed": 0}
    whole = generate(model, PROMPTS, **settings)
    third = whole[1].ids[2]
    cut = generate(model, PROMPTS, **settings, stops=lambda ids: ids[-1] == third)
    assert cut[1].ids == whole[1].ids[: whole[1].ids.index(third) + 1] and cut[1].stopped and cut[1].end is None
    assert all(c.stopped == (third in w.ids) for c, w in zip(cut, whole, strict=True))


def test_a_stop_string_may_end_in_the_space_that_a_token_begins_with(stories):
    tokenizer = open_tokenizer(str(stories))
    ids = tokenizer("Answer: the girl ran. It was", add_special_tokens=False)["input_ids"]
    for stop in ("Answer: ", "girl ", " ", "It ", "ran."):
        ends = stop_at(tokenizer, [stop])
        first = next(i for i in range(1, len(ids) + 1) if stop in tokenizer.decode(ids[:i]))
        assert [ends(ids[:i]) for i in range(1, first + 1)] == [False] * (first - 1) + [True], stop


def test_a_model_without_attention_is_refused():
    model = MambaForCausalLM(MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=1, state_size=4)).eval()
    with pytest.raises(ModelError, match="a MambaForCausalLM has no attention.*use a model with attention"):
        generate(model, PROMPTS, max_tokens=6, temperature=0, eos_ids=set(), pad_id=0, seed=0)


def test_threads_that_race_for_the_last_prompts_write_what_one_does(monkeypatch):
    model, before = make("llama"), torch.get_num_threads()
    prompts, rooms = [[3 + i] for i in range(11)], [1 + i % 3 for i in range(11)]
    how = {"max_tokens": rooms, "temperature": 1.0, "eos_ids": set(), "pad_id": 0, "seed": 3}
    want = generate(model, prompts, batch=1, **how)
    monkeypatch.setattr(generating, "_SHARE", 1)
    torch.set_num_threads(4)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(20):
            assert [g.ids for g in generate(model, prompts, batch=4, **how)] == [g.ids for g in want]
        assert torch.get_num_threads() == 4
    finally:
        sys.setswitchinterval(interval)
        torch.set_num_threads(before)
