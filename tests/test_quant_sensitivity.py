"""Predicted cost of rounding: borne out by measuring it; and the mixture that a byte budget buys."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from architectures import make
from truth import fresh

from pennyweight.model.head import forward_hidden, head_of
from pennyweight.quant.export import formats_of
from pennyweight.quant.formats import decode, encode
from pennyweight.quant.sensitivity import Costs, cheapest, costs
from pennyweight.records import Encoded


def samples(seed, count=64, length=24):
    ids = torch.randint(3, 113, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()
    return [Encoded(str(i), tuple(row), (False, *[True] * (length - 1))) for i, row in enumerate(ids)]


def log_probs(model, data):
    ids = torch.tensor([s.ids[:-1] for s in data])
    with torch.no_grad():
        hidden = forward_hidden(model, ids, torch.arange(ids.shape[1]).expand_as(ids))
        return torch.log_softmax(head_of(model).logits(hidden.flatten(0, 1)).double(), -1)


@pytest.mark.parametrize("name", ["llama-tied", "gemma2-softcap-and-window", "phi-head-bias"])
def test_predicted_kl_is_what_rounding_one_layer_and_all_of_them_costs(name):
    seed = fresh()
    model, data = make(name, seed % 1000), samples(seed)
    formats = {
        n: {"int8": f, "int4": formats_of(model, "int4", 32)[n]} for n, f in formats_of(model, "int8", 32).items()
    }
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = costs(model, formats, data, 0, seed)
    assert all(torch.equal(p, before[n]) and p.requires_grad for n, p in model.named_parameters())
    truth = log_probs(model, data)

    def measured(names):
        with torch.no_grad():
            for n in names:
                linear = model.get_submodule(n)
                linear.weight.copy_(decode(encode(linear.weight, formats[n]["int8"], search=True)))
        q = log_probs(model, data)
        with torch.no_grad():
            for n in names:
                model.get_submodule(n).weight.copy_(before[f"{n}.weight"])
        return float((truth.exp() * (truth - q)).sum(-1).mean())

    one = max(formats, key=lambda n: found.kl(n, "int8"))
    for names in ([one], list(formats)):
        told = found.of_all(dict.fromkeys(names, "int8"))
        real = measured(names)
        assert told.low <= told.mean <= told.high and 0.45 < told.mean / real < 2.2, f"seed {seed}: {told} {real:.2e}"
    assert sum(found.kl(n, "int4") for n in formats) > 20 * sum(found.kl(n, "int8") for n in formats)


def a_choice(seed, layers=5):
    g = np.random.default_rng(seed)
    names = [f"layer{i}" for i in range(layers)]
    bytes_, pulls = {}, {}
    for n in names:
        size, pull = int(g.integers(50, 500)), g.exponential(1.0)
        for label, share, factor in (("int8", 8, 0.05), ("int4", 4, 1.0), ("int3", 3, 2.3)):
            bytes_[n, label] = size * share
            pulls[n, label] = np.array([pull * factor * g.uniform(0.7, 1.4)])
    kept = {n: bytes_[n, "int8"] * 2 for n in names}
    return Costs(pulls, bytes_, np.ones(1)), kept


def spent(found, kept, chosen):
    size = sum(found.bytes[n, label] if label else kept[n] for n, label in chosen.items())
    return size, sum(found.kl(n, label) for n, label in chosen.items() if label)


def test_a_budget_buys_nearly_the_best_mixture_there_is():
    seed = fresh()
    found, kept = a_choice(seed)
    options = ("int8", "int4", "int3", "")
    every = [dict(zip(kept, labels, strict=True)) for labels in itertools.product(options, repeat=len(kept))]
    least = spent(found, kept, dict.fromkeys(kept, "int3"))[0]
    most_in_a_step = max(found.kl(n, "int3") for n in kept)
    for budget in (least, int(least * 1.2), int(least * 1.6), int(least * 3), sum(kept.values())):
        got = cheapest(found, kept, budget)
        size, kl = spent(found, kept, got)
        best = min(k for s, k in (spent(found, kept, c) for c in every) if s <= budget)
        assert size <= budget and best - 1e-12 <= kl <= best + most_in_a_step, f"seed {seed}, budget {budget}"
    assert cheapest(found, kept, least - 1) is None
    assert set(cheapest(found, kept, sum(kept.values())).values()) == {""}
