"""Cross-entropy and divergences at each position: tensors in, one value per position out.

Everything is float32 (float64 when given it). N positions, V vocabulary, K kept entries. A teacher's distribution
comes as ``Dense`` (its logits) or ``Sparse`` (an unbiased sample: weights whose expectation is the probability).

Sources: forward and reverse KL, Kullback and Leibler (1951); temperature and its squared factor, Hinton et al.
(arXiv 1503.02531); generalised JSD, Agarwal et al. (arXiv 2306.13649); sampled targets, Anshumann et al.
(arXiv 2503.16870).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Dense:
    """Teacher logits (N, V) at temperature 1."""

    logits: Tensor


@dataclass(frozen=True, slots=True)
class Sparse:
    """Kept entries of the teacher: ``ids`` (N, K) int64, ``weights`` (N, K) float32, zero where unused.

    E[weight of id i] is the teacher's probability of i, so the weights of one position need not sum to 1.
    ``entropy`` (N,) is the teacher's own, in nats: it turns the estimated cross-entropy into an estimated KL.
    """

    ids: Tensor
    weights: Tensor
    entropy: Tensor


Target = Dense | Sparse


@dataclass(frozen=True, slots=True)
class Divergence:
    """Which divergence: ``forward_kl``, ``reverse_kl`` or ``jsd`` (with ``beta``), at a temperature."""

    kind: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0


def cross_entropy(log_probs: Tensor, labels: Tensor) -> Tensor:
    """-log q(label), (N,), from student log-probabilities (N, V) and labels (N,)."""
    return -log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q), (N,), from two (N, V) logits.

    Precise also where p and q nearly agree, by two equalities. The difference d = log p - log q is taken from the
    logits first, where close numbers subtract without error, and only then normalised. And p * d is summed as
    p * (d + expm1(-d)), the same because both sides sum to 1, whose terms are all non-negative: nothing cancels.
    """
    log_p, log_q, d = _aligned(p_logits, q_logits)
    terms = log_p.exp() * (d + torch.expm1(-d))
    return torch.where(torch.isneginf(log_p), log_q.exp(), terms).sum(-1)


def jsd(p_logits: Tensor, q_logits: Tensor, beta: float) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; p the teacher, q the student; (N,).

    Both logarithms of the mixture are taken relative to one side, log(m / q) = log(1 - beta + beta e^d), so that
    they vanish with d; each KL is summed with the non-negative terms of ``kl``.
    """
    log_p, log_q, d = _aligned(p_logits, q_logits)
    one_sided = torch.isneginf(log_p) | torch.isneginf(log_q)
    d = torch.where(one_sided, 0.0, d)
    from_p, from_q = -_log_mixture(-d, 1.0 - beta), -_log_mixture(d, beta)
    p, q = log_p.exp(), log_q.exp()
    terms = beta * p * (from_p + torch.expm1(-from_p)) + (1.0 - beta) * q * (from_q + torch.expm1(-from_q))
    alone = -beta * math.log(beta) * p - (1.0 - beta) * math.log1p(-beta) * q
    return torch.where(one_sided, alone, terms).sum(-1)


def _aligned(p_logits: Tensor, q_logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p, log q, and log p - log q; the difference is 0 where p is 0, which the callers treat apart."""
    log_p, log_q = torch.log_softmax(p_logits, -1), torch.log_softmax(q_logits, -1)
    shift = torch.logsumexp(p_logits, -1, keepdim=True) - torch.logsumexp(q_logits, -1, keepdim=True)
    impossible = torch.isneginf(p_logits)
    d = torch.where(impossible, 0.0, torch.where(impossible, 0.0, p_logits) - q_logits - shift)
    return log_p, log_q, d


def _log_mixture(d: Tensor, share: float) -> Tensor:
    """log(1 - share + share e^d), precise near d = 0 and without overflow far from it."""
    near = torch.log1p(share * torch.expm1(d.clamp(-1.0, 1.0)))
    far = torch.logaddexp(d + math.log(share), torch.full_like(d, math.log1p(-share)))
    return torch.where(d.abs() <= 1.0, near, far)


def sampled_kl(log_q: Tensor, target: Sparse) -> Tensor:
    """Unbiased estimate of KL(p || q), (N,): -sum of w log q over the kept entries, less the teacher's entropy."""
    return -(target.weights * log_q.gather(-1, target.ids)).sum(-1) - target.entropy


def divergence(spec: Divergence, student_logits: Tensor, target: Target) -> Tensor:
    """The divergence ``spec`` names at each position, (N,), times the squared temperature.

    Raises:
        ValueError: a divergence that is not linear in the teacher's probabilities, asked of a sample of them; its
            expectation would be another objective. ``methods.check`` says so to the user before anything runs.
    """
    student = student_logits / spec.temperature
    scale = spec.temperature**2
    if isinstance(target, Sparse):
        if spec.kind != "forward_kl":
            raise ValueError(f"{spec.kind} is not linear in the teacher's probabilities: a sample of them is biased")
        return scale * sampled_kl(torch.log_softmax(student, -1), target)
    teacher = target.logits / spec.temperature
    if spec.kind == "forward_kl":
        return scale * kl(teacher, student)
    if spec.kind == "reverse_kl":
        return scale * kl(student, teacher)
    if spec.kind == "jsd":
        return scale * jsd(teacher, student, spec.beta)
    raise ValueError(f"no divergence named {spec.kind!r}")
