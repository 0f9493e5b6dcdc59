"""Agreement, bits per byte and calibration against the plain computation on whole float64 logits."""

from __future__ import annotations

import math

import pytest
import torch
from architectures import V, make

from pennyweight.evaluate.agreement import score
from pennyweight.model.head import forward_hidden, head_of
from pennyweight.records import Encoded


def scorer(model):
    head = head_of(model)
    return (lambda b: forward_hidden(model, b.ids, b.positions).flatten(0, 1)[b.selected]), head.logits


def data(seed, count=11):
    g = torch.Generator().manual_seed(seed)
    out = []
    for i in range(count):
        length = int(torch.randint(3, 25, (1,), generator=g))
        ids = torch.randint(3, V, (length,), generator=g).tolist()
        out.append(Encoded(f"{i:064x}", tuple(ids), tuple(j >= min(2, length - 1) for j in range(length))))
    return out


def test_every_sum_is_that_of_whole_logits():
    seed = torch.seed() % 10**6
    model, other, samples = make("llama", seed % 100), make("llama", seed % 100 + 1), data(seed)
    spelt = [3 * len(s.loss_positions) for s in samples]
    found = score(samples, spelt, scorer(model), scorer(other), 0, rows=4)
    confidences, hits = [], []
    for i, s in enumerate(samples):
        ids = torch.tensor([s.ids])
        with torch.no_grad():
            q, p = (torch.log_softmax(m(input_ids=ids).logits[0].double(), -1) for m in (model, other))
        at = torch.tensor(s.loss_positions)
        labels = torch.tensor(s.ids)[at + 1]
        q, p = q[at], p[at]
        assert found.nats[i] == pytest.approx(float(-q[range(len(at)), labels].sum()), rel=1e-4), f"seed {seed}"
        assert found.kl_to[i] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4)
        assert found.kl_from[i] == pytest.approx(float((q.exp() * (q - p)).sum()), rel=1e-4)
        assert found.same[i] == int((q.argmax(-1) == p.argmax(-1)).sum())
        confidences += q.max(-1).values.exp().tolist()
        hits += (q.argmax(-1) == labels).tolist()
    assert found.bits_per_byte().mean == pytest.approx(found.nats.sum() / math.log(2) / sum(spelt))
    bins: dict[int, list[tuple[float, bool]]] = {}
    for c, h in zip(confidences, hits, strict=True):
        bins.setdefault(min(14, int(c * 15)), []).append((c, h))
    ece = sum(abs(sum(c for c, _ in b) - sum(h for _, h in b)) for b in bins.values()) / len(hits)
    assert found.ece().mean == pytest.approx(ece, rel=1e-3)


def test_a_model_agrees_with_itself_exactly():
    model, samples = make("llama"), data(2)
    found = score(samples, [1] * len(samples), scorer(model), scorer(model), 0)
    assert found.kl_to.sum() == 0 and found.kl_from.sum() == 0
    assert found.per_token("same").mean == 1


def test_a_calibrated_model_has_no_error_and_a_boastful_one_has():
    """Labels drawn from the model's own distribution: calibrated by construction; sharpened logits are not."""
    torch.manual_seed(0)
    head = torch.randn(7, 5)
    hidden = torch.randn(4000, 5)
    labels = torch.multinomial(torch.softmax(hidden @ head.T, -1), 1).squeeze(-1)
    samples = [Encoded(f"{i:064x}", (0, int(t)), (False, True)) for i, t in enumerate(labels)]

    def model(scale):
        where = iter(hidden.split(500))
        return (lambda b: next(where)), (lambda h: scale * h @ head.T)

    ece = [score(samples, [1] * 4000, model(scale), None, 0, rows=500).ece().mean for scale in (1.0, 3.0)]
    assert ece[0] < 0.03 and ece[1] > 0.1
