"""The sparse sample: unbiased, exact where it says so, small where the teacher is sharp, and independent of company.

What is drawn at random is held against Chernoff's bound, over all counts of a test together: it fails by chance at most
once in a million runs.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from truth import bound, fresh, surprise, with_gradient

from pennyweight.loss.divergence import Divergence
from pennyweight.loss.signals import Sparse
from pennyweight.teacher import targets
from pennyweight.teacher.targets import (
    ENTROPY_STEP,
    Keep,
    Kept,
    bits_for,
    draw,
    expected_entries,
    join,
    predicted_bytes,
    restore,
    threshold_within,
    top,
    uniforms,
)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def drawn(logits, threshold, temperature=1.0, seed=0) -> Kept:
    return draw(logits.clone(), threshold, temperature, uniforms(len(logits), seed))


def expanded(kept: Kept, threshold: float, vocabulary: int, bits: int | None = None):
    """(N, V) float64 weights, (N, V) which are tails, (N,) entropy."""
    counts, ids, weights, entropy = restore(kept, threshold, bits or bits_for(threshold))
    row = torch.repeat_interleave(torch.arange(len(counts)), counts)
    place = torch.arange(len(ids)) - (counts.cumsum(0) - counts)[row]
    out = torch.zeros(len(counts), vocabulary, dtype=torch.float64)
    out[row, ids] = weights.double()
    tails = torch.zeros_like(out, dtype=torch.bool)
    tails[row, ids] = place >= kept.heads[row]
    return out, tails, entropy


def assert_alike(a: Kept, b: Kept, told: str):
    for name in ("heads", "tails", "ids", "probs", "entropy"):
        assert torch.equal(getattr(a, name), getattr(b, name)), f"{told}: {name}"


def distribution(name: str, seed: int, v: int):
    """(1, V) logits."""
    g = generator(seed)
    return {
        "random": lambda: torch.randn(1, v, generator=g) * 2,
        "uniform": lambda: torch.zeros(1, v),
        "sharp": lambda: torch.randn(1, v, generator=g) * 8,
        "few": lambda: torch.randn(1, v, generator=g).topk(min(5, v)).values.repeat(1, v)[:, :v] - 9.0,
    }[name]()


@pytest.mark.parametrize(
    ("name", "v", "threshold", "temperature"),
    [
        ("random", 400, 0.02, 1.0),
        ("random", 400, 0.025, 2.0),
        ("random", 4097, 0.01, 0.7),  # blocks of 256 ids, the last of one id
        ("uniform", 300, 0.025, 1.0),
        ("uniform", 30, 0.025, 1.0),  # heads only
        ("sharp", 64, 0.2, 1.5),
        ("few", 63, 0.05, 1.0),
        ("random", 7, 0.5, 1.0),
    ],
)
def test_every_id_is_kept_as_often_as_its_probability_says(name, v, threshold, temperature):
    """Many draws of one position. Tails come with p / t each; heads and entropy are rounded up with their remainder."""
    seed = fresh()
    draws = 3000 if v > 1000 else 12_000
    logits = distribution(name, seed, v)
    p = torch.softmax(logits[0].double() / temperature, -1)
    steps = (1 << bits_for(threshold)) - 1
    weights, tails, entropy = expanded(drawn(logits.expand(draws, v), threshold, temperature, seed + 1), threshold, v)
    is_head = ~tails & (weights > 0)
    heads = is_head.any(0)
    sure = (p - threshold).abs() > 1e-6 * threshold
    assert bool((heads == (p >= threshold))[sure].all()), f"seed {seed}: heads are the ids from the threshold up"
    assert not bool((tails.any(0) & heads).any()), f"seed {seed}: an id is a head or a tail, always the same"
    kept = (weights > 0).sum(0)
    counts, chances, slack = [kept[~heads]], [(p / threshold)[~heads]], [1e-6 * torch.ones(int((~heads).sum()))]
    in_steps = (weights[:, heads] * steps).round()
    least = (p[heads] * steps + 1e-3).floor() - (((p[heads] * steps) % 1) < 1e-3).double()
    assert bool(((in_steps - least >= 0) & (in_steps - least <= 2)).all()), f"seed {seed}: a head is within a step"
    counts.append((in_steps - least).sum(0) / 2)
    chances.append((p[heads] * steps - least) / 2)
    slack.append(1e-6 * p[heads] * steps + 1e-6)
    nats = -(p * p.log()).sum() / ENTROPY_STEP
    counts.append((entropy.double() / ENTROPY_STEP - nats.floor()).sum().clamp(0, draws).reshape(1))
    chances.append((nats % 1).reshape(1))
    slack.append(torch.tensor([1e-4]))
    found = surprise(torch.cat([c.double() for c in counts]), draws, torch.cat(chances), torch.cat(slack).double())
    worst = int(found.argmax())
    assert float(found.max()) < bound(len(found)), f"seed {seed}: count {worst} of {len(found)}, {found.max():.0f} nats"
    # And together, where counts of single ids are too small to show a shift between blocks of the vocabulary.
    for width in (8, 64):
        block = torch.arange(v) // width
        number = int(block[-1]) + 1
        tail_p = torch.where(p >= threshold, 0.0, p)
        got = torch.zeros(number, dtype=torch.float64).index_add_(0, block, (tails & (weights > 0)).double().sum(0))
        mean = torch.zeros(number, dtype=torch.float64).index_add_(0, block, tail_p) / threshold
        most = mean.ceil().clamp(min=1)
        found = surprise(got / most, draws, mean / most, 1e-5 * torch.ones(number))
        assert float(found.max()) < bound(number), f"seed {seed}: block {int(found.argmax())} of {width} ids"


def test_the_gradient_is_unbiased_and_top_k_rescaled_is_not():
    seed = fresh()
    v, n, t = 200, 6000, 0.05
    g = generator(seed)
    student, teacher = torch.randn(1, v, generator=g), torch.randn(1, v, generator=g) * 2
    kept = drawn(teacher.expand(n, v), t, seed=seed + 1)
    counts, ids, weights, entropy = restore(kept, t, bits_for(t))
    sample = Sparse.of(counts, ids, weights, entropy)
    value, gradient = sample.loss(Divergence(), student.expand(n, v).clone())
    p, log_q = torch.softmax(teacher.double(), -1), torch.log_softmax(student.double(), -1)
    want = log_q.exp() - p
    # Hoeffding: one draw's gradient is total * q - w, where the total is within t of 1 and a weight within t or a step.
    reach = (2 * t + 2 / 255) * log_q.exp() + torch.where(p < t, t, 2 / 255)
    limit = reach * math.sqrt(bound(v) / (2 * n))
    error = (gradient.double().mean(0) - want).abs()
    assert bool((error <= limit + 1e-6).all()), f"seed {seed}: {float((error / limit).max()):.1f} of what chance allows"
    k = len(kept.ids) // n
    most = torch.softmax(teacher.double(), -1).topk(k)
    rescaled = torch.zeros_like(p).scatter(1, most.indices, most.values / most.values.sum())
    assert float(error.norm()) < 0.2 * float((rescaled - p).norm()), f"seed {seed}"
    kl = float((p * (p.log() - log_q)).sum())
    spread = 2 * t * float(log_q.min().abs()) + ENTROPY_STEP
    assert abs(float(value.double().mean()) - kl) < spread * math.sqrt(bound(1) / (2 * n)), f"seed {seed}"


@pytest.mark.parametrize("v", [3, 64, 100, 4096, 5000])
@pytest.mark.parametrize("threshold", [0.3, 0.025, 0.003])
def test_heads_are_exact_to_a_step_and_tails_weigh_the_threshold(v, threshold):
    seed = fresh()
    logits = torch.randn(40, v, generator=generator(seed)) * 3
    p = torch.softmax(logits.double(), -1)
    kept = drawn(logits, threshold, seed=seed)
    steps = (1 << bits_for(threshold)) - 1
    weights, tails, _ = expanded(kept, threshold, v)
    assert bool(((weights - p).abs() < 1.01 / steps)[(p >= threshold) & ~tails].all()), f"seed {seed}"
    assert set(weights[tails].tolist()) <= {float(torch.tensor(threshold))}, f"seed {seed}"
    assert bool((p[tails] < threshold * (1 + 1e-6)).all()), f"seed {seed}: no head is a tail"
    # Systematic sampling: the number of tails is the floor or the ceiling of the tail's mass over t.
    of_heads = torch.where((p >= threshold * (1 - 1e-6)), p, 0.0).sum(-1)
    mass = (1 - of_heads) / threshold
    assert bool((kept.tails >= (mass - 1e-4).floor()).all() and (kept.tails <= (mass + 1e-4).ceil()).all()), (
        f"seed {seed}"
    )
    # A position's weights sum to 1 within the threshold, and a step of rounding.
    assert float((weights.sum(-1) - 1).abs().max()) < threshold + 1.01 / steps, f"seed {seed}"
    # Heads before tails; each in the order of ids, none twice.
    assert int((weights > 0).sum() + (kept.probs == 0).sum()) == len(kept.ids), f"seed {seed}"


def test_what_is_kept_is_small_numbers_on_the_cpu():
    kept = drawn(torch.randn(9, 50), 0.05)
    for name in ("heads", "tails", "ids", "probs"):
        assert getattr(kept, name).dtype == torch.int32 and getattr(kept, name).device.type == "cpu"
    assert kept.entropy.dtype == torch.uint8 and len(kept) == 9
    assert len(kept.ids) == int(kept.heads.sum() + kept.tails.sum()) and len(kept.probs) == int(kept.heads.sum())
    assert [x.dtype for x in restore(kept, 0.05, 8)] == [torch.int64, torch.int64, torch.float32, torch.float32]


@pytest.mark.parametrize("v", [2, 100, 5000])
def test_sharp_positions_cost_one_entry_and_uniform_ones_the_same_everywhere(v):
    for nothing in (-1e9, -200.0, -60.0):
        sharp = torch.full((4, v), nothing)
        sharp[range(4), [0, v - 1, v // 2, 1]] = 0.0
        kept = drawn(sharp, 0.05)
        assert kept.ids.tolist() == [0, v - 1, v // 2, 1] and kept.probs.tolist() == [255] * 4
        assert kept.tails.tolist() == [0] * 4 and kept.entropy.tolist() == [0] * 4
    flat = drawn(torch.zeros(50, v), 1.01 / v if v > 2 else 0.51)
    assert int(flat.heads.sum()) == 0 and bool(((flat.tails - v / 1.01).abs() <= 1).all() if v > 2 else True)
    all_heads = drawn(torch.full((5, v), 3.0), 0.99 / v)
    assert all_heads.heads.tolist() == [v] * 5 and all_heads.ids.tolist() == list(range(v)) * 5


def test_tails_that_only_just_fill_a_threshold_are_neither_lost_nor_doubled():
    """n equal probabilities that make up a whole number of thresholds: always exactly that many tails."""
    for v in (8, 64, 1024):
        kept = drawn(torch.zeros(2000, v), 4 / v, seed=v)
        assert int(kept.heads.sum()) == 0
        off_by_rounding = (kept.tails - v // 4).abs()
        assert int(off_by_rounding.max()) <= 1 and int(off_by_rounding.sum()) <= 2


@pytest.mark.parametrize(("v", "scale"), [(50, 2.0), (700, 3.0), (5000, 1.0), (300_000, 4.0)])
def test_rows_may_be_cut_in_any_way(v, scale, monkeypatch):
    """A position's entries do not depend on the company it is drawn in, nor on how many are looked at together."""
    seed = fresh()
    n = 13 if v < 100_000 else 3
    logits, u = torch.randn(n, v, generator=generator(seed)) * scale, uniforms(n, seed)
    whole = draw(logits.clone(), 0.02, 1.3, u)
    ends = [0, *sorted(torch.randint(1, n, (2,), generator=generator(seed)).unique().tolist()), n]
    cut = [draw(logits[a:b].clone(), 0.02, 1.3, u[a:b]) for a, b in pairwise(ends)]
    assert_alike(join(cut), whole, f"seed {seed}, cut at {ends}")
    assert_alike(join([top(logits[a:b].clone(), 3, 1.3, u[a:b], 16) for a, b in pairwise(ends)]),
                 top(logits.clone(), 3, 1.3, u, 16), f"seed {seed}, top, cut at {ends}")  # fmt: skip
    for rows in (1, 2, 5):
        monkeypatch.setattr(targets, "_BLOCK_ENTRIES", rows * v + 1)
        assert_alike(draw(logits.clone(), 0.02, 1.3, u), whole, f"seed {seed}, {rows} rows together")


def test_draws_are_a_function_of_the_seed():
    a, b = uniforms(5, 7), uniforms(5, 8)
    assert a.dtype == torch.float64 and a.shape == (5, 3) and torch.equal(a, uniforms(5, 7)) and not torch.equal(a, b)
    assert torch.equal(uniforms(9, 7)[:5], a) and float(a.min()) >= 0 and float(a.max()) < 1
    before = torch.random.get_rng_state()
    uniforms(3, 1)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("v", [131_073, 262_145, 300_000])
def test_wide_vocabularies_keep_their_ids(v):
    """Ids above 17 and 18 bits come back whole: other caches wrap them silently. Tails far out are found too."""
    seed = fresh()
    ids = sorted({0, 65_535, 65_536, 131_071, 131_072, min(262_143, v - 1), min(262_144, v - 1), v - 1})
    logits = torch.full((2, v), -30.0)
    logits[:, ids] = 5.0
    kept = drawn(logits, 0.05, seed=seed)
    assert kept.ids.tolist() == ids * 2 and kept.heads.tolist() == [len(ids)] * 2
    assert (
        top(logits.clone(), len(ids), 1.0, uniforms(2, seed), 16).ids.view(2, -1).sort(-1).values.tolist() == [ids] * 2
    )
    flat = torch.zeros(3, v)
    flat[:, : v // 2] = -40.0  # only the upper half is probable at all
    kept = drawn(flat, 0.01, seed=seed)
    assert int(kept.ids.min()) >= v // 2 and int(kept.ids.max()) < v and bool((kept.tails == 100).all()), f"seed {seed}"
    spacing = kept.ids.view(3, 100).diff(dim=-1)
    assert int(spacing.min()) > 0.98 * (v / 2) / 100 - 1, f"seed {seed}: systematic draws are evenly apart"


def test_heads_on_either_side_of_a_block_and_tails_between_are_told_apart():
    logits = torch.full((1, 640), -9.0)
    logits[0, [63, 64, 127, 128, 639]] = 4.0
    kept = drawn(logits, 0.1)
    assert kept.ids[: int(kept.heads)].tolist() == [63, 64, 127, 128, 639]


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_is_that_of_the_sampled_distribution(temperature):
    """As of logits that were divided before; also the entropy, and what top-k keeps."""
    seed = fresh()
    logits, u = torch.randn(20, 60, generator=generator(seed)), uniforms(20, seed)
    a, b = draw(logits.clone(), 0.05, temperature, u), draw(logits / temperature, 0.05, 1.0, u)
    assert_alike(a, b, f"seed {seed}")
    assert_alike(top(logits.clone(), 5, temperature, u, 16), top(logits / temperature, 5, 1.0, u, 16), f"seed {seed}")


@pytest.mark.parametrize("k", [1, 7, 60])
def test_top_k_keeps_the_most_probable_first_and_rounds_without_bias(k):
    seed = fresh()
    v, draws, bits = 60, 4000, 16
    logits = torch.randn(1, v, generator=generator(seed)) * 2
    kept = top(logits.repeat(draws, 1), k, 1.5, uniforms(draws, seed), bits)
    p, ids = torch.softmax(logits[0].double() / 1.5, -1).topk(k)
    assert kept.heads.tolist() == [k] * draws and not bool(kept.tails.any())
    assert torch.equal(kept.ids.view(draws, k), ids.int().expand(draws, k)), f"seed {seed}"
    stored, steps = kept.probs.view(draws, k).double(), float((1 << bits) - 1)
    assert float((stored - p * steps).abs().max()) < 1.1, f"seed {seed}"
    assert float((stored.sum(-1) - p.sum() * steps).abs().max()) < 1.1, (
        f"seed {seed}: a position's sum is off by a step"
    )
    least = (p * steps - 0.1).floor().clamp(min=0)
    found = surprise((stored - least).sum(0) / 2, draws, (p * steps - least) / 2, 2e-7 * p * steps + 1e-6)
    assert float(found.max()) < bound(k), f"seed {seed}: id {int(found.argmax())}, {float(found.max()):.0f} nats"


@pytest.mark.parametrize("v", [40, 900, 6000])
def test_expected_entries_are_what_draws_come_to(v):
    """Heads exactly; tails within Hoeffding's bound, since each position's number is within 1 of its expectation."""
    seed = fresh()
    n = 400 if v < 5000 else 60
    thresholds = [0.002, 0.02, 0.2]
    logits = torch.randn(n, v, generator=generator(seed)) * torch.linspace(0.2, 5, n).unsqueeze(-1)
    found = expected_entries(logits.clone(), thresholds, 1.4)
    for threshold, (heads, tails) in zip(thresholds, found, strict=True):
        kept = drawn(logits, threshold, 1.4, seed)
        assert float(kept.heads.float().mean()) == pytest.approx(heads, abs=1.5 / n), f"seed {seed}, {threshold}"
        limit = math.sqrt(bound(len(thresholds)) / (2 * n)) + 1e-3 * tails
        assert abs(float(kept.tails.float().mean()) - tails) < limit, f"seed {seed}, {threshold}"


def test_bits_grow_as_the_threshold_falls():
    assert [bits_for(t) for t in (0.9, 0.025, 0.0156, 0.01, 0.001, 1e-6)] == [8, 8, 9, 9, 12, 16]
    assert Keep().bits == 8 and Keep("sampled", 0.001).bits == 12 and Keep("top_k", 0.0, 5).bits == 16
    # A step is at most a quarter of the threshold, so that rounding adds little to the variance of a tail.
    assert all(1 / ((1 << bits_for(t)) - 1) <= t / 3.9 for t in (0.9, 0.5, 0.1, 0.03, 0.02, 0.005, 0.001, 1e-4))
    assert predicted_bytes(2.0, 10.0, 50_000, 0.025) == pytest.approx((12 * 16 + 2 * 8) / 8 + 2.5)


def test_split_and_join_round_trip():
    seed = fresh()
    kept = drawn(torch.randn(10, 80, generator=generator(seed)) * 2, 0.05, seed=seed)
    parts = kept.split([3, 0, 5, 2])
    assert [len(p) for p in parts] == [3, 0, 5, 2]
    assert_alike(join(parts), kept, f"seed {seed}")
    whole, last = expanded(kept, 0.05, 80)[0], expanded(parts[3], 0.05, 80)[0]
    assert torch.equal(whole[8:], last)


def test_a_sample_of_nearly_everything_has_the_dense_gradient():
    """At a threshold below every probability all ids are heads, at 16 bits each."""
    seed = fresh()
    g = generator(seed)
    teacher, student = torch.randn(6, 40, generator=g), torch.randn(6, 40, generator=g)
    counts, ids, weights, entropy = restore(drawn(teacher, 1e-5, 2.0, seed), 1e-5, 16)
    assert counts.tolist() == [40] * 6
    _, gradient = Sparse.of(counts, ids, weights, entropy).loss(Divergence(temperature=2.0), student.clone())
    p = torch.softmax(teacher.double() / 2, -1)
    _, want = with_gradient(lambda s: -4 * (p * torch.log_softmax(s / 2, -1)).sum(-1), student)
    assert float((gradient - want).abs().max()) < 1e-4, f"seed {seed}"


def test_no_positions_are_no_entries():
    kept = drawn(torch.zeros(0, 50), 0.05)
    assert len(kept) == 0 and len(kept.ids) == 0
    assert len(top(torch.zeros(0, 50), 3, 1.0, uniforms(0, 0), 16)) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused(bad):
    logits = torch.randn(5, 300, generator=generator(0))
    logits[3, 7] = bad
    with pytest.raises(FloatingPointError, match="no numbers .* try targets.precision=float32"):
        drawn(logits, 0.025)
    with pytest.raises(FloatingPointError, match="at 1 of 5 positions"):
        top(logits.clone(), 4, 1.0, uniforms(5, 0), 16)
    with pytest.raises(FloatingPointError, match="no numbers"):
        expected_entries(logits.clone(), [0.1], 1.0)


def test_a_logit_of_minus_infinity_is_a_token_that_never_comes():
    seed = fresh()
    logits = torch.randn(200, 300, generator=generator(seed))
    never = torch.rand(200, 300, generator=generator(seed + 1)) < 0.5
    without = logits.masked_fill(never, -math.inf)
    kept = drawn(without, 0.025, seed=seed)
    weights, _, entropy = expanded(kept, 0.025, 300)
    assert not weights[never].any(), f"seed {seed}"
    want = torch.distributions.Categorical(logits=logits.masked_fill(never, -1e9)).entropy()
    assert float((entropy - want).abs().max()) <= ENTROPY_STEP, f"seed {seed}"


@pytest.mark.parametrize(("asked", "budget", "settled"), [(0.9, 4.0, 0.9), (0.5, 4.0, 0.5), (0.01, 1e9, 0.01)])
def test_a_threshold_never_falls_to_keep_to_a_budget(asked, budget, settled):
    logits = torch.randn(20, 5000, generator=generator(0))
    expected = lambda tried: expected_entries(logits.clone(), tried, 1.0)  # noqa: E731
    assert threshold_within(budget, asked, 5000, expected) == settled
    assert 0.01 < threshold_within(20.0, 0.01, 5000, expected) < 0.5
    assert threshold_within(1.0, 0.01, 5000, expected) == 0.5
