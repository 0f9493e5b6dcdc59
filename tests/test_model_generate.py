"""Generation against transformers' own, token by token; sampling against the distribution it claims to draw from."""

from __future__ import annotations

import pytest
import torch
from architectures import MAKERS, V, make

from pennyweight.errors import DataError
from pennyweight.model.generate import _pick, generate, stream

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
    token, _ = _pick(logits.expand(n, 12), temperature, top_p, g)
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
