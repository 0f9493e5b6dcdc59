"""Divergences between a teacher's and a student's next-token distributions: value and gradient, in place.

Shape letters: N positions, V vocabulary, K kept entries. p is the teacher, q the student, d = log p - log q, and
m_a = a p + (1 - a) q. Everything is computed in the dtype of the logits (float32; float64 when given it).

Precision where p and q nearly agree. d is taken from the logits first, where close numbers subtract without error,
and only then normalised. p - q is max(p, q) (1 - e^-|d|) with the sign of d, never the difference of two rounded
exponentials. And every KL is summed with terms that are non-negative, as sum of p d - (p - q): the same number, since
both sides sum to 1, but a rounding error in a normaliser then enters squared.

Sources: forward and reverse KL, Kullback and Leibler (1951); temperature and its squared factor, Hinton et al. (arXiv
1503.02531); generalised JSD, Agarwal et al. (arXiv 2306.13649); skew KL, Lee (1999) and Ko et al. (arXiv 2402.03898);
total variation distance, Wen et al. (arXiv 2307.15190). docs/losses.md has the mathematics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_FAR = 1e30  # stands for an infinite log-ratio: finite, so that 0 * d is 0


@dataclass(frozen=True, slots=True)
class Divergence:
    """Which divergence (a row of DIVERGENCES), at a temperature.

    ``beta`` is the weight of the teacher in jsd's mixture; ``alpha`` is the share of the first argument that the skew
    divergences mix into the second.
    """

    kind: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    alpha: float = 0.1


class _Sides:
    """p, q, d and what is made from them, for one block of rows; takes the two logits' memory as its own.

    ``room`` is memory for four more blocks. ``gap`` is p - q, ``near`` is expm1(-|d|).
    """

    def __init__(self, teacher: Tensor, student: Tensor, temperature: float, room: Tensor):
        self.p, log_p_mass = _softmax(teacher, temperature, room[0])
        self.q, log_q_mass = _softmax(student, temperature, room[1])
        shift = (log_q_mass - log_p_mass).to(teacher.dtype)
        self.d = teacher.sub_(student)
        if temperature != 1.0:
            self.d.div_(temperature)
        self.d.add_(shift).nan_to_num_(nan=0.0, posinf=_FAR, neginf=-_FAR)
        self.near = torch.abs(self.d, out=room[2]).neg_().expm1_()
        self.free, self.spare = student, room[3]

    def gap(self) -> Tensor:
        """p - q in ``free``, exact in relative terms also where p and q nearly agree."""
        gap = torch.maximum(self.p, self.q, out=self.free).mul_(self.near)
        return torch.copysign(gap, self.d, out=gap)

    def logs_of_mixture(self, a: float) -> tuple[Tensor, Tensor]:
        """log(m_a / q) = log(1 - a + a e^d) in place of ``near``, and log(p / m_a) in place of ``d``.

        Exact near d = 0; far from it, neither overflows or is a difference of large numbers.
        """
        share = a if a == 0.5 else torch.where(self.d > 0, self.d.new_tensor(1.0 - a), self.d.new_tensor(a))
        w = self.near.mul_(share).log1p_()
        above = torch.clamp(self.d, min=0, out=self.spare)
        over_m = self.d.clamp_(max=0).sub_(w)
        return w.add_(above), over_m

    def through_softmax(self, k: Tensor, factor: float) -> Tensor:
        """factor * q (k - sum of q k), in place of k: a gradient with respect to probabilities, taken to logits."""
        mean = torch.mul(self.q, k, out=self.spare).sum(-1, keepdim=True)
        return k.sub_(mean).mul_(self.q).mul_(factor)


def _softmax(logits: Tensor, temperature: float, out: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(logits / temperature) in ``out``, and (n, 1) log of its normaliser, in float64 where that exists."""
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    top = logits.amax(-1, keepdim=True)
    torch.sub(logits, top, out=out)
    if temperature != 1.0:
        out.div_(temperature)
    mass = out.exp_().sum(-1, keepdim=True)
    return out.div_(mass), mass.to(wide).log_().add_(top.to(wide) / temperature)


def _forward_kl(x: _Sides, spec: Divergence) -> tuple[Tensor, Tensor]:
    gap = x.gap()
    value = x.p.mul_(x.d).sub_(gap).sum(-1)
    # p - q sums to zero; what it sums to here is the rounding of d's normaliser, which q carries.
    return value, gap.sub_(x.q.mul_(gap.sum(-1, keepdim=True))).neg_()


def _reverse_kl(x: _Sides, spec: Divergence) -> tuple[Tensor, Tensor]:
    gap = x.gap()
    value = gap.addcmul_(x.q, x.d, value=-1.0).sum(-1)
    return value, x.through_softmax(x.d, -1.0)


def _jsd(x: _Sides, spec: Divergence) -> tuple[Tensor, Tensor]:
    b = spec.beta
    u, over_m = x.logs_of_mixture(b)
    # b p log(p/m) + (1 - b) q log(q/m): of second order in d term by term, so nothing cancels between terms.
    terms = over_m.mul_(x.p).mul_(b).addcmul_(x.q, u, value=b - 1.0)
    return terms.sum(-1), x.through_softmax(u, b - 1.0)


def _skew_kl(x: _Sides, spec: Divergence) -> tuple[Tensor, Tensor]:
    """KL(p || m_a); the gradient's ratio p / m is at most 1 / a, which is what the skew is for."""
    a, gap = spec.alpha, x.gap()
    _, over_m = x.logs_of_mixture(a)
    value = x.p.mul_(over_m).sub_(gap, alpha=1.0 - a).sum(-1)
    return value, x.through_softmax(over_m.expm1_(), a - 1.0)


def _skew_reverse_kl(x: _Sides, spec: Divergence) -> tuple[Tensor, Tensor]:
    """KL(q || a q + (1 - a) p)."""
    a, gap = spec.alpha, x.gap()
    u, _ = x.logs_of_mixture(1.0 - a)
    value = gap.mul_(1.0 - a).addcmul_(x.q, u, value=-1.0).sum(-1)
    ratio = torch.neg(u, out=x.d).expm1_()
    return value, x.through_softmax(u.add_(ratio, alpha=a), -1.0)


def _tvd(x: _Sides, spec: Divergence) -> tuple[Tensor, Tensor]:
    gap = x.gap()
    sign = torch.sign(x.d, out=x.d)
    return gap.abs_().sum(-1).mul_(0.5), x.through_softmax(sign, -0.5)


DIVERGENCES = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "tvd": _tvd,
}
"""Name -> function of the two sides giving ((n,) value, (n, V) gradient with respect to the student's logits)."""


def divergence(spec: Divergence, teacher: Tensor, student: Tensor, room: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Value (n,) and gradient (n, V) with respect to ``student`` of a divergence times its squared temperature.

    Args:
        teacher, student: (n, V) logits at temperature 1, of one float dtype. Both are used up.
        room: (4, n, V) memory to work in, for callers that have it.
    """
    t = spec.temperature
    value, gradient = DIVERGENCES[spec.kind](
        _Sides(teacher, student, t, teacher.new_empty((4, *teacher.shape)) if room is None else room), spec
    )
    return (value, gradient) if t == 1.0 else (value.mul_(t * t), gradient.mul_(t))


def kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q), (N,), from two (N, V) logits, which are kept."""
    return divergence(Divergence(), p_logits.clone(), q_logits.clone())[0]


def cross_entropy(log_probs: Tensor, labels: Tensor) -> Tensor:
    """-log q(label), (N,), from student log-probabilities (N, V) and labels (N,)."""
    return -log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def hidden_error(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Squared distance of hidden states relative to the teacher's squared length, (N,); autograd takes its gradient."""
    teacher = teacher_ND.to(student_ND.dtype)
    return (student_ND - teacher).square().sum(-1) / teacher.square().sum(-1).clamp(min=1e-12)


def sums_of_rows(row: Tensor, x: Tensor, n: int) -> Tensor:
    """(n,) sums of x (E,) over its rows, ``row`` (E,) int64, which are in order. On a GPU ``index_add_`` adds in any
    order, so that no run would equal another."""
    ends = torch.searchsorted(row, torch.arange(n + 1, device=row.device))
    return torch.segment_reduce(x, "sum", offsets=ends, unsafe=True, initial=0.0)
