"""A teacher that tells some tokens apart only as sets, against float64, and as the coarser view of a whole one."""

from __future__ import annotations

import pytest
import torch
from truth import between, fresh, off, textbook, uniform, with_gradient

from pennyweight.loss.divergence import Divergence
from pennyweight.loss.signals import Grouped, Sets, Sparse

N, V = 20, 4001


def a_partition(g):
    """The vocabulary in another order, cut at random into some 40 runs, of one token or of thousands."""
    order = torch.randperm(V, generator=g)
    cuts = torch.randperm(V - 1, generator=g)[:40].sort().values + 1
    cuts = torch.cat([cuts[:30], cuts[:10] + 1, cuts[30:]]).unique().clamp(max=V - 1).unique()
    ends = torch.tensor([0, *cuts.tolist(), V])
    return order, torch.stack([ends[:-1], ends[1:]], 1)


def sums(log_q, order, bounds):
    """Log-probabilities of the runs."""
    return torch.stack([log_q[:, order[a:b]].logsumexp(-1) for a, b in bounds.tolist()], -1)


def inputs(seed, distance):
    g = torch.Generator().manual_seed(seed)
    student = 3 * torch.randn(N, V, generator=g)
    noise = torch.randn(N, V, generator=g)
    teacher = 3 * noise if distance is None else student + distance * noise
    return teacher, student, *a_partition(g)


def target(log_p, order, bounds, temperature=1.0):
    """All runs of a teacher's float64 log-probabilities; those of one token by its id."""
    coarse = sums(log_p, order, bounds)
    single = bounds[:, 1] - bounds[:, 0] == 1
    ids = torch.where(single, order[bounds[:, 0]], V + torch.arange(len(bounds)))
    entropy = -(coarse.exp() * coarse).sum(-1)
    counts = torch.full((N,), len(bounds))
    weights = coarse.exp().flatten().float()
    return Grouped(Sparse.of(counts, ids.repeat(N), weights, entropy.float()), Sets(V, order, bounds))


@pytest.mark.parametrize("distance", [None, 1.0, 0.1])
@pytest.mark.parametrize("temperature", [1.0, None])
def test_against_float64_over_the_runs(distance, temperature):
    seed = fresh()
    spec = Divergence(temperature=temperature or uniform(torch.Generator().manual_seed(seed + 1), 0.5, 4.0))
    teacher, student, order, bounds = inputs(seed, distance)
    log_p = torch.log_softmax(teacher.double() / spec.temperature, -1)
    made = target(log_p, order, bounds)

    def truth(s):
        log_q = torch.log_softmax(s / spec.temperature, -1)
        p, log_coarse = sums(log_p, order, bounds).exp(), sums(log_q, order, bounds)
        return spec.temperature**2 * ((p * p.log()).sum(-1) - (p * log_coarse).sum(-1))

    want, want_gradient = with_gradient(truth, student)
    value, gradient = made.loss(spec, student.clone())
    worst = float((value.double() - want).abs().max())
    # A small difference of numbers near 10 / T, of which float32 has seven digits, times T squared.
    assert worst < 2e-5 * (spec.temperature + spec.temperature**2) + 1e-5 * float(want.max()), (
        f"seed {seed}, {spec}: value off by {worst:.1e}"
    )
    error = float((gradient.double() - want_gradient).norm() / torch.softmax(student.double(), -1).norm())
    assert error < 3e-6 * spec.temperature, f"seed {seed}, {spec}: gradient off by {error:.1e}"


def test_never_above_the_whole_and_nothing_at_the_teacher():
    seed = fresh()
    teacher, student, order, bounds = inputs(seed, None)
    made, spec = target(torch.log_softmax(teacher.double(), -1), order, bounds), Divergence()
    coarse = made.loss(spec, student.clone())[0]
    assert bool((coarse <= textbook(spec, teacher.double(), student.double()) + 1e-5).all()), f"seed {seed}"
    value, gradient = made.loss(spec, teacher.clone())
    assert float(value.abs().max()) < 1e-5 and float(gradient.abs().max()) < 1e-6, f"seed {seed}"
    inside = teacher.clone()  # whatever is moved within a run, as long as the run keeps its probability
    p = torch.softmax(teacher, -1)
    for a, b in bounds.tolist():
        inside[:, order[a:b]] = (p[:, order[a:b]].mean(-1, keepdim=True)).log()
    assert float(made.loss(spec, inside)[0].abs().max()) < 1e-5, f"seed {seed}"


def test_runs_of_one_token_are_the_dense_forward_kl():
    seed = fresh()
    teacher, student, order, _ = inputs(seed, None)
    bounds = torch.arange(V)[:, None] + torch.tensor([0, 1])
    want, want_gradient = with_gradient(
        lambda s: between("forward_kl", torch.log_softmax(teacher.double(), -1), torch.log_softmax(s, -1)), student
    )
    value, gradient = target(torch.log_softmax(teacher.double(), -1), order, bounds).loss(Divergence(), student.clone())
    assert off(value, want) < 1e-5 and off(gradient, want_gradient) < 1e-5, f"seed {seed}"


def test_a_set_that_the_student_thinks_next_to_impossible_still_pulls():
    """Its probability is e^-300, no float32: the gradient is still its weight, shared as the student shares it."""
    student = torch.zeros(1, 6)
    student[0, 2:4] = torch.tensor([-300.0, -301.0])
    sets = Sets(6, torch.tensor([2, 3, 0, 1, 4, 5]), torch.tensor([[0, 2], [2, 6]]))
    made = Grouped(Sparse.of(torch.tensor([2]), torch.tensor([6, 7]), torch.tensor([0.25, 0.75]), torch.zeros(1)), sets)
    value, gradient = made.loss(Divergence(), student.clone())
    share = torch.softmax(torch.tensor([0.0, -1.0]), 0)
    assert torch.allclose(gradient[0, 2:4], -0.25 * share, rtol=1e-5)
    assert float(value[0]) == pytest.approx(
        0.25 * (300 - float(torch.log1p(torch.exp(torch.tensor(-1.0)))) + 1.3862944), rel=1e-5
    )
    assert torch.allclose(gradient.sum(), torch.zeros(()), atol=1e-6)


def test_positions_of_any_number_of_entries_are_cut_and_picked():
    seed = fresh()
    g = torch.Generator().manual_seed(seed)
    order, bounds = a_partition(g)
    counts = torch.tensor([3, 0, 1, 5, 0, 2])
    ids = torch.cat([torch.randperm(V + len(bounds), generator=g)[:n] for n in counts.tolist()])
    made = Grouped(
        Sparse.of(counts, ids, torch.rand(len(ids), generator=g), torch.rand(6, generator=g)), Sets(V, order, bounds)
    )
    student = torch.randn(6, V, generator=g)
    value, gradient = made.loss(Divergence(), student.clone())
    assert float(gradient[1].abs().max()) == 0.0 and float(value[1]) == -float(made.sample.entropy[1])
    index = torch.tensor([5, 3, 1, 3])
    again, moved = made.take(index).loss(Divergence(), student[index])
    assert torch.allclose(again, value[index]) and torch.allclose(moved, gradient[index], atol=1e-7), f"seed {seed}"
    part, cut = made.span(2, 5).loss(Divergence(), student[2:5].clone())
    assert torch.allclose(part, value[2:5]) and torch.allclose(cut, gradient[2:5], atol=1e-7), f"seed {seed}"


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
def test_what_a_sample_would_bias_is_refused(kind):
    made = Grouped(
        Sparse.of(torch.zeros(1).long(), torch.zeros(0).long(), torch.zeros(0), torch.zeros(1)),
        Sets(3, torch.zeros(0).long(), torch.zeros(0, 2).long()),
    )
    with pytest.raises(ValueError, match="not linear"):
        made.loss(Divergence(kind), torch.zeros(1, 3))
