"""Losses and gradients against float64 from unrounded mathematics, a naive rival, and their properties."""

from __future__ import annotations

import pytest
import torch

from pennyweight.loss import divergence as div

KINDS = ["forward_kl", "reverse_kl", "jsd"]


def inputs(seed: int, near: float | None = None, n: int = 64, v: int = 301):
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(n, v, generator=g, dtype=torch.float64) * 3
    teacher = torch.randn(n, v, generator=g, dtype=torch.float64) * 3
    if near is not None:
        teacher = student + near * torch.randn(n, v, generator=g, dtype=torch.float64)
    return student, teacher


def truth(kind: str, student, teacher, beta=0.3, temperature=1.0):
    """Textbook definitions in float64, through probabilities."""
    p, q = (torch.softmax(x / temperature, -1) for x in (teacher, student))
    m = beta * p + (1 - beta) * q

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    value = {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": beta * kl(p, m) + (1 - beta) * kl(q, m)}[kind]
    return temperature**2 * value


def naive(kind: str, student, teacher, beta=0.3, temperature=1.0):
    """The usual float32 code: log-probabilities subtracted and summed."""
    log_p, log_q = (torch.log_softmax(x / temperature, -1) for x in (teacher, student))
    log_m = torch.log(beta * log_p.exp() + (1 - beta) * log_q.exp())
    kl = lambda a, b: (a.exp() * (a - b)).sum(-1)  # noqa: E731
    value = {
        "forward_kl": kl(log_p, log_q),
        "reverse_kl": kl(log_q, log_p),
        "jsd": beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m),
    }[kind]
    return temperature**2 * value


def value_and_gradient(function, student, teacher, dtype, **kw):
    s = student.to(dtype).requires_grad_(True)
    value = function(s, teacher.to(dtype), **kw).sum()
    (gradient,) = torch.autograd.grad(value, s)
    return float(value.detach()), gradient.double()


def ours(kind):
    def apply(s, t, beta=0.3, temperature=1.0):
        return div.divergence(div.Divergence(kind, beta, temperature), s, div.Dense(t))

    return apply


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("near", [None, 0.05])
def test_float32_against_float64_truth(kind, temperature, near):
    seed = torch.seed() % 10**6
    student, teacher = inputs(seed, near)
    # The truth is taken at the rounded inputs: rounding them is not the loss's error.
    student, teacher = student.float().double(), teacher.float().double()
    kw = {"temperature": temperature}
    want, want_grad = value_and_gradient(
        lambda s, t, **k: truth(kind, s, t, **k), student, teacher, torch.float64, **kw
    )
    got, got_grad = value_and_gradient(ours(kind), student, teacher, torch.float32, **kw)
    rival, rival_grad = value_and_gradient(
        lambda s, t, **k: naive(kind, s, t, **k), student, teacher, torch.float32, **kw
    )
    relative = abs(got - want) / abs(want)
    error = float((got_grad - want_grad).norm() / want_grad.norm())
    assert relative < 1e-5 and error < 1e-5, f"seed {seed}: loss off by {relative:.1e}, gradient by {error:.1e}"
    assert relative <= abs(rival - want) / abs(want) + 1e-6, f"seed {seed}: the naive loss is better"
    assert error <= float((rival_grad - want_grad).norm() / want_grad.norm()) * 1.5 + 1e-6, f"seed {seed}"


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_equal_to_student_gives_exactly_nothing(kind):
    student, _ = inputs(torch.seed() % 10**6)
    value, gradient = value_and_gradient(ours(kind), student, student, torch.float32)
    assert value == 0.0
    assert float(gradient.abs().max()) < 1e-7


@pytest.mark.parametrize("kind", KINDS)
def test_never_negative(kind):
    for near in (1e-4, 1e-2, 1.0):
        student, teacher = inputs(torch.seed() % 10**6, near)
        values = ours(kind)(student.float(), teacher.float())
        assert float(values.min()) >= -1e-9


def test_jsd_is_symmetric_at_one_half_and_bounded_by_ln_2():
    student, teacher = inputs(torch.seed() % 10**6)
    a = div.divergence(div.Divergence("jsd", 0.5), student, div.Dense(teacher))
    b = div.divergence(div.Divergence("jsd", 0.5), teacher, div.Dense(student))
    assert torch.allclose(a, b, rtol=1e-10)
    assert float(a.max()) <= 0.693148


def test_impossible_tokens_are_handled():
    """A probability of exactly zero on either side is no NaN."""
    none = float("-inf")
    teacher, student = torch.tensor([[0.0, 1.0, none, none]]), torch.tensor([[0.5, 0.2, -1.0, none]])
    p, q = torch.softmax(teacher, -1), torch.softmax(student, -1)
    want = float((p[0, :2] * (p[0, :2] / q[0, :2]).log()).sum())
    assert float(div.kl(teacher, student)) == pytest.approx(want, abs=1e-6)
    assert float(div.kl(student, teacher)) == float("inf")
    m = 0.3 * p + 0.7 * q
    xlogy = lambda a, b: torch.where(a > 0, a * (a / b).log(), 0.0).nansum()  # noqa: E731
    want = float(0.3 * xlogy(p, m) + 0.7 * xlogy(q, m))
    assert float(div.jsd(teacher, student, 0.3)) == pytest.approx(want, abs=1e-6)
    assert float(div.jsd(student, teacher, 0.7)) == pytest.approx(want, abs=1e-6)
    student.requires_grad_(True)
    div.jsd(teacher, student, 0.3).sum().backward()
    assert bool(torch.isfinite(student.grad[0, :3]).all())


def test_sampled_kl_is_exact_when_everything_is_kept():
    student, teacher = inputs(torch.seed() % 10**6, n=8, v=50)
    log_p = torch.log_softmax(teacher, -1)
    ids = torch.arange(50).expand(8, 50)
    entropy = -(log_p.exp() * log_p).sum(-1)
    got = div.divergence(div.Divergence(), student, div.Sparse(ids, log_p.exp(), entropy))
    assert torch.allclose(got, truth("forward_kl", student, teacher), rtol=1e-9)


def test_a_sample_is_refused_where_it_would_be_biased():
    sparse = div.Sparse(torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1), torch.zeros(2))
    for kind in ("reverse_kl", "jsd"):
        with pytest.raises(ValueError, match="biased"):
            div.divergence(div.Divergence(kind), torch.zeros(2, 5), sparse)
