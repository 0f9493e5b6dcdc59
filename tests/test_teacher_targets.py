"""The sparse sample: unbiased, exact where it says so, small where the teacher is sharp, and independent of company."""

from __future__ import annotations

import pytest
import torch

from pennyweight.loss import divergence as div
from pennyweight.teacher.targets import draw, join, restore


def dense(sparse, vocabulary):
    out = torch.zeros(len(sparse.ids), vocabulary, dtype=torch.float64)
    return out.scatter_add_(1, sparse.ids, sparse.weights.double())


def generator(seed):
    return torch.Generator().manual_seed(seed)


def test_unbiased_at_every_id():
    """Mean weight over many draws against p: the largest of 400 z-scores, two-sided at the 1e-5 level."""
    seed = torch.seed() % 10**6
    v, draws, t = 400, 4000, 0.02
    logits = torch.randn(1, v, generator=generator(seed)) * 2
    p = torch.softmax(logits, -1).double()[0]
    weights = dense(restore(draw(logits.expand(draws, v), t, 1.0, generator(seed + 1)), t), v)
    # Variance of one draw: a tail id weighs t with probability p / t; heads are rounded to 1/65535 stochastically.
    spread = torch.where(p < t, p * (t - p), torch.full_like(p, (1 / 65535) ** 2)).clamp(min=1e-12)
    z = (weights.mean(0) - p) / (spread / draws).sqrt()
    assert float(z.abs().max()) < 6.0, f"seed {seed}: z {float(z.abs().max()):.1f} at id {int(z.abs().argmax())}"


def test_gradient_is_unbiased_and_far_less_biased_than_top_k():
    seed = torch.seed() % 10**6
    v, n, t = 200, 3000, 0.05
    g = generator(seed)
    student, teacher = torch.randn(1, v, generator=g), torch.randn(1, v, generator=g) * 2
    s = student.expand(n, v).clone().requires_grad_(True)
    kept = draw(teacher.expand(n, v), t, 1.0, g)
    (gradient,) = torch.autograd.grad(div.divergence(div.Divergence(), s, restore(kept, t)).sum(), s)
    want = torch.softmax(student, -1) - torch.softmax(teacher, -1)
    error = float((gradient.mean(0) - want).norm() / want.norm())
    k = max(1, int(len(kept.ids) / n))
    top = torch.softmax(teacher, -1).topk(k)
    biased = torch.softmax(student, -1) - torch.zeros(1, v).scatter(1, top.indices, top.values / top.values.sum())
    assert error < 0.02, f"seed {seed}: mean gradient off by {error:.3f}"
    assert error < 0.2 * float((biased - want).norm() / want.norm())


def test_heads_are_exact_and_tails_weigh_the_threshold():
    t = 0.03
    logits = torch.randn(50, 300, generator=generator(3)) * 3
    p = torch.softmax(logits, -1)
    sparse = restore(draw(logits, t, 1.0, generator(4)), t)
    weights = dense(sparse, 300)
    heads = p >= t
    assert float((weights[heads] - p[heads].double()).abs().max()) < 1.01 / 65535
    tails = weights[~heads]
    assert set(torch.unique((tails / t).round(decimals=5)).tolist()) <= {0.0, 1.0}
    # Systematic sampling: the number of tail entries is the floor or the ceiling of the tail's mass over t.
    mass = torch.where(heads, 0.0, p.double()).sum(-1) / t
    per_row = ((weights > 0) & ~heads).sum(-1)
    assert bool(((per_row - mass).abs() < 1 + 1e-6).all())


def test_sharp_positions_cost_one_entry_and_nothing_is_lost_at_the_extremes():
    sharp = torch.full((2, 100), -1e9)
    sharp[:, 7] = 0.0
    kept = draw(sharp, 0.05, 1.0, generator(0))
    assert kept.ids.tolist() == [7, 7] and kept.head_q.tolist() == [65535, 65535]
    assert kept.entropy.tolist() == [0.0, 0.0]
    uniform = draw(torch.zeros(3, 1000), 0.05, 1.0, generator(0))
    assert int(uniform.heads.sum()) == 0 and bool(((uniform.tails - 20).abs() <= 1).all())


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_is_that_of_the_sampled_distribution(temperature):
    logits = torch.randn(1, 60, generator=generator(5))
    kept = restore(draw(logits.expand(5000, 60), 0.05, temperature, generator(6)), 0.05)
    want = torch.softmax(logits / temperature, -1)[0].double()
    assert float((dense(kept, 60).mean(0) - want).abs().max()) < 0.005


def test_split_and_join_round_trip():
    kept = draw(torch.randn(10, 80, generator=generator(8)) * 2, 0.05, 1.0, generator(9))
    parts = kept.split([3, 0, 5, 2])
    assert [len(p) for p in parts] == [3, 0, 5, 2]
    again = join(parts)
    for name in kept.__dataclass_fields__:
        assert torch.equal(getattr(again, name), getattr(kept, name))
    whole, last = restore(kept, 0.05), restore(parts[3], 0.05)
    assert torch.allclose(dense(whole, 80)[8:], dense(last, 80))


def test_wide_vocabularies_keep_their_ids():
    """Ids above 17 and 18 bits come back whole: other caches wrap them silently."""
    v = 300_000
    logits = torch.full((1, v), -30.0)
    logits[0, [131_071, 131_072, 262_144, v - 1]] = 5.0
    assert restore(draw(logits, 0.05, 1.0, generator(0)), 0.05).ids[0].tolist() == [131_071, 131_072, 262_144, v - 1]
