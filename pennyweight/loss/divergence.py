"""Cross-entropy and divergences at each position: tensors in, one value per position out.

Everything is float32 (float64 when given it). N positions, V vocabulary, K kept entries. A teacher's distribution
comes as ``Dense`` (its logits) or ``Sparse`` (an unbiased sample: weights whose expectation is the probability).

Sources: forward and reverse KL, Kullback and Leibler (1951); temperature and its squared factor, Hinton et al.
(arXiv 1503.02531); generalised JSD, Agarwal et al. (arXiv 2306.13649); sampled targets, Anshumann et al.
(arXiv 2503.16870).
"""

from __future__ import annotations

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


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q), (N,), from two (N, V) log-probabilities.

    Summed as p * (d + expm1(-d)) with d = log p - log q: equal to p * d because both sides sum to 1, but every
    term is non-negative, so nothing cancels when p and q nearly agree. Entries with p = 0 contribute q, which is
    what the other form leaves to normalisation.
    """
    delta = log_p - log_q
    terms = log_p.exp() * (delta + torch.expm1(-delta))
    return torch.where(torch.isneginf(log_p), log_q.exp(), terms).sum(-1)


def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q; p the teacher, q the student."""
    weights = torch.tensor([beta, 1.0 - beta], dtype=log_p.dtype, device=log_p.device).log()
    log_m = torch.logaddexp(log_p + weights[0], log_q + weights[1])
    return beta * kl(log_p, log_m) + (1.0 - beta) * kl(log_q, log_m)


def sampled_kl(log_q: Tensor, target: Sparse) -> Tensor:
    """Unbiased estimate of KL(p || q), (N,): -sum of w log q over the kept entries, less the teacher's entropy."""
    return -(target.weights * log_q.gather(-1, target.ids)).sum(-1) - target.entropy


def divergence(spec: Divergence, student_logits: Tensor, target: Target) -> Tensor:
    """The divergence ``spec`` names at each position, (N,), times the squared temperature.

    Raises:
        ValueError: a divergence that is not linear in the teacher's probabilities, asked of a sample of them; its
            expectation would be another objective. ``methods.check`` says so to the user before anything runs.
    """
    log_q = torch.log_softmax(student_logits / spec.temperature, -1)
    scale = spec.temperature**2
    if isinstance(target, Sparse):
        if spec.kind != "forward_kl":
            raise ValueError(f"{spec.kind} is not linear in the teacher's probabilities: a sample of them is biased")
        return scale * sampled_kl(log_q, target)
    log_p = torch.log_softmax(target.logits / spec.temperature, -1)
    if spec.kind == "forward_kl":
        return scale * kl(log_p, log_q)
    if spec.kind == "reverse_kl":
        return scale * kl(log_q, log_p)
    if spec.kind == "jsd":
        return scale * jsd(log_p, log_q, spec.beta)
    raise ValueError(f"no divergence named {spec.kind!r}")


def total(values: Tensor, weights: Tensor) -> tuple[Tensor, int]:
    """(sum of weight times value, number of positions that weigh anything). Only the loop divides."""
    return (values * weights).sum(), int(torch.count_nonzero(weights))
