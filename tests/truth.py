"""What numbers are held against: divergences as textbooks write them, and how far chance alone can carry a count."""

from __future__ import annotations

import math

import torch

from pennyweight.loss.divergence import Divergence

FALSE_ALARM = 1e-6
"""The chance that a test which draws at random fails although nothing is wrong with what it tests."""


def fresh() -> int:
    """A seed that no run has twice; a failing test prints it."""
    return torch.seed() % 10**6


def between(kind, log_p, log_q, beta=0.5, alpha=0.1):
    """(N,) divergence of two distributions, given as logarithms of probabilities, in their dtype."""
    p, q = log_p.exp(), log_q.exp()

    def kl(a, log_a, log_b):
        return torch.where(a > 0, a * (log_a - log_b), 0.0).sum(-1)

    def mixture(share):
        return (share * p + (1 - share) * q).log()

    return {
        "forward_kl": lambda: kl(p, log_p, log_q),
        "reverse_kl": lambda: kl(q, log_q, log_p),
        "jsd": lambda: beta * kl(p, log_p, mixture(beta)) + (1 - beta) * kl(q, log_q, mixture(beta)),
        "skew_kl": lambda: kl(p, log_p, mixture(alpha)),
        "skew_reverse_kl": lambda: kl(q, log_q, mixture(1 - alpha)),
        "tvd": lambda: 0.5 * (p - q).abs().sum(-1),
    }[kind]()


def textbook(spec: Divergence, teacher, student):
    """(N,) divergence of logits at temperature 1, times the squared temperature, in their dtype."""
    log_p, log_q = (torch.log_softmax(x / spec.temperature, -1) for x in (teacher, student))
    return spec.temperature**2 * between(spec.kind, log_p, log_q, spec.beta, spec.alpha)


def with_gradient(function, student, dtype=torch.float64):
    """Value (N,) and gradient with respect to ``student``, by autograd in ``dtype``, both as float64."""
    s = student.detach().to(dtype, copy=True).requires_grad_(True)
    value = function(s)
    (gradient,) = torch.autograd.grad(value.sum(), s)
    return value.detach().double(), gradient.double()


def off(got, want) -> float:
    """Size of the error over the size of the truth."""
    return float((got.double() - want).norm() / want.norm())


def uniform(g: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=g, dtype=torch.float64))


def surprise(counts, trials, probability, slack=0.0):
    """Nats against each count having come of ``trials`` draws at a probability within ``slack`` of the one given.

    Chernoff's bound: at most 2 exp(-nats) is the chance of so far a count.
    """
    share = counts.double() / trials
    p = torch.maximum(torch.minimum(share, probability + slack), probability - slack).clamp(0.0, 1.0)
    kl = torch.special.xlogy(share, share / p) + torch.special.xlogy(1 - share, (1 - share) / (1 - p))
    return trials * kl.nan_to_num(0.0, posinf=math.inf)


def bound(tests: int) -> float:
    """Nats that the most surprising of so many counts passes by chance with FALSE_ALARM at most."""
    return math.log(2 * tests / FALSE_ALARM)
