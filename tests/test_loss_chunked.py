"""Head and loss in tiles: the same number and gradient as whole logits, whatever the tile, against float64."""

from __future__ import annotations

import pytest
import torch

from pennyweight.loss.chunked import Terms, tiled_loss
from pennyweight.loss.divergence import Dense, Divergence, Sparse
from pennyweight.model.head import Head

N, D, V = 37, 16, 83


def inputs(seed):
    g = torch.Generator().manual_seed(seed)
    r = lambda *s: torch.randn(*s, generator=g)  # noqa: E731
    return {
        "hidden": r(N, D),
        "weight": r(V, D),
        "bias": r(V),
        "teacher": 2 * r(N, V),
        "labels": torch.randint(0, V, (N,), generator=g),
        "ce": torch.rand(N, generator=g),
        "kd": torch.rand(N, generator=g),
    }


def whole(x, kind, head):
    """Textbook, float64, all logits at once."""
    hidden, weight, bias = (x[k].double().requires_grad_(True) for k in ("hidden", "weight", "bias"))
    logits = head["scale"] * (hidden @ weight.T + bias)
    logits = head["cap"] * torch.tanh(logits / head["cap"]) if head["cap"] else logits
    log_q = torch.log_softmax(logits, -1)
    log_p = torch.log_softmax(x["teacher"].double(), -1)
    p, q = log_p.exp(), log_q.exp()
    m = (0.4 * p + 0.6 * q).log()
    kd = {
        "forward_kl": (p * (log_p - log_q)).sum(-1),
        "reverse_kl": (q * (log_q - log_p)).sum(-1),
        "jsd": 0.4 * (p * (log_p - m)).sum(-1) + 0.6 * (q * (log_q - m)).sum(-1),
    }[kind]
    ce = -log_q[range(N), x["labels"]]
    loss = (x["ce"].double() * ce + x["kd"].double() * kd).sum()
    return loss, torch.autograd.grad(loss, (hidden, weight, bias)), ce.sum(), kd.sum(), -(q * log_q).sum()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("head", [{"scale": 1.0, "cap": None}, {"scale": 0.5, "cap": 6.0}])
@pytest.mark.parametrize("tile", [1, 10, N, None])
def test_any_tile_is_the_whole(kind, head, tile):
    seed = torch.seed() % 10**6
    x = inputs(seed)
    want, want_grads, ce, kd, entropy = whole(x, kind, head)
    leaves = [x[k].clone().requires_grad_(True) for k in ("hidden", "weight", "bias")]
    terms = Terms(x["labels"], x["ce"], x["kd"], Divergence(kind, 0.4), lambda a, b: Dense(x["teacher"][a:b]))
    found = tiled_loss(leaves[0], Head(leaves[1], leaves[2], head["scale"], head["cap"]), terms, True, tile)
    (2 * found.loss).backward()
    assert float(found.loss.detach()) == pytest.approx(float(want), rel=1e-5), f"seed {seed}"
    for leaf, grad in zip(leaves, want_grads, strict=True):
        assert float((leaf.grad.double() / 2 - grad).norm() / grad.norm()) < 1e-5, f"seed {seed}"
    assert found.count == N
    assert (found.cross_entropy, found.divergence, found.entropy) == pytest.approx(
        (float(ce), float(kd), float(entropy)), rel=1e-5
    )


def test_sparse_targets_go_through_tiles_too():
    x = inputs(torch.seed() % 10**6)
    log_p = torch.log_softmax(x["teacher"], -1)
    ids = torch.arange(V).expand(N, V)
    entropy = -(log_p.exp() * log_p).sum(-1)

    def loss(target, tile):
        hidden = x["hidden"].clone().requires_grad_(True)
        terms = Terms(x["labels"], torch.zeros(N), torch.ones(N), Divergence(), target)
        value = tiled_loss(hidden, Head(x["weight"]), terms, tile=tile).loss
        return float(value.detach()), torch.autograd.grad(value, hidden)[0]

    sparse, g1 = loss(lambda a, b: Sparse(ids[a:b], log_p[a:b].exp(), entropy[a:b]), 5)
    dense, g2 = loss(lambda a, b: Dense(x["teacher"][a:b]), None)
    assert sparse == pytest.approx(dense, rel=1e-5)
    torch.testing.assert_close(g1, g2, rtol=1e-4, atol=1e-5)


def test_a_frozen_head_gets_no_gradient_and_a_frozen_trunk_none_either():
    x = inputs(1)
    terms = Terms(x["labels"], x["ce"], torch.zeros(N), Divergence())
    hidden, weight = x["hidden"].clone().requires_grad_(True), x["weight"].clone()
    tiled_loss(hidden, Head(weight), terms).loss.backward()
    assert hidden.grad is not None and weight.grad is None
    hidden, weight = x["hidden"].clone(), x["weight"].clone().requires_grad_(True)
    tiled_loss(hidden, Head(weight), terms).loss.backward()
    assert hidden.grad is None and weight.grad is not None


def test_positions_that_weigh_nothing_pull_nothing():
    x = inputs(2)
    x["ce"][::2] = 0
    hidden = x["hidden"].clone().requires_grad_(True)
    terms = Terms(x["labels"], x["ce"], torch.zeros(N), Divergence())
    tiled_loss(hidden, Head(x["weight"]), terms, tile=3).loss.backward()
    assert bool((hidden.grad[::2] == 0).all()) and bool((hidden.grad[1::2] != 0).any())
    nothing = Terms(x["labels"], torch.zeros(N), torch.zeros(N), Divergence())
    value = tiled_loss(hidden, Head(x["weight"]), nothing)
    value.loss.backward()
    assert float(value.loss.detach()) == 0.0
