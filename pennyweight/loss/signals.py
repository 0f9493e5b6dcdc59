"""What a teacher's distribution comes as, and the loss each kind carries: value and gradient, in place.

Shape letters: N positions, n of them in a block, V vocabulary, K kept entries, E entries of a sample in all. Each kind
can be cut to a run of positions (``span``) or to some of them (``take``), and has ``loss(spec, student, scratch)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.loss.divergence import Divergence, divergence, sums_of_rows

Rows = slice | Tensor

_HALF_STEP = 0.5 / 65535  # of the 16 bits that probabilities are stored in


@dataclass(frozen=True, slots=True)
class Dense:
    """The whole distribution: ``logits(rows, out)`` gives (n, V) float32 logits at temperature 1, in ``out`` if given.

    They may be made only when asked for (a live teacher's, from its hidden states), so they need never exist in full.
    ``states`` are these (N, D) last hidden states, where there are any.
    """

    logits: Callable[[Rows, Tensor | None], Tensor]
    states: Tensor | None = None

    @staticmethod
    def of(logits_NV: Tensor) -> Dense:
        """Logits that are there already; they are kept."""
        return Dense(lambda rows, out: logits_NV[rows].clone() if out is None else out.copy_(logits_NV[rows]))

    @staticmethod
    def live(states_ND: Tensor, logits: Callable[[Tensor, Tensor | None], Tensor]) -> Dense:
        """Made tile by tile from a teacher's last hidden states by its head: ``logits(states, out)``."""
        return Dense(lambda rows, out: logits(states_ND[rows], out), states_ND)

    def take(self, index: Tensor) -> Dense:
        return Dense(
            lambda rows, out: self.logits(index[rows], out), None if self.states is None else self.states[index]
        )


@dataclass(frozen=True, slots=True)
class TopK:
    """The K most probable tokens and, as one more outcome, all the others together: the mass that is left.

    ``ids`` (N, K) int64; ``probs`` (N, K) float32, which sum to at most 1, at the temperature of the loss.
    """

    ids: Tensor
    probs: Tensor

    def span(self, a: int, b: int) -> TopK:
        return TopK(self.ids[a:b], self.probs[a:b])

    def take(self, index: Tensor) -> TopK:
        return TopK(self.ids[index], self.probs[index])

    def loss(self, spec: Divergence, student: Tensor) -> tuple[Tensor, Tensor]:
        """The divergence between the two distributions over K + 1 outcomes: at most the full one (data processing)."""
        t = spec.temperature
        if t != 1.0:
            student.div_(t)
        kept = student.gather(-1, self.ids)
        # A probability that rounding has made zero is a zero to forward KL, which is linear in it; elsewhere, where a
        # zero would cost infinitely much, its id is one of the rest.
        rest = None if spec.kind == "forward_kl" else self.probs <= 0
        taken = torch.full_like(kept, -torch.inf) if rest is None else torch.where(rest, kept, -torch.inf)
        least = torch.finfo(student.dtype).min  # of no token at all, where K is the whole vocabulary
        top = student.scatter_(-1, self.ids, taken).amax(-1, keepdim=True).clamp_(min=least)
        e = student.sub_(top).exp_()
        mass = e.sum(-1, keepdim=True)
        if rest is not None:
            kept = kept.masked_fill(rest, -torch.inf)
        coarse = torch.cat([kept, mass.log() + top], -1)
        left = (1.0 - self.probs.sum(-1, keepdim=True)).clamp(min=0.0 if rest is None else _HALF_STEP)
        teacher = torch.cat([self.probs, torch.where(mass == 0, 0.0, left)], -1).to(coarse.dtype).log_()
        value, g = divergence(Divergence(spec.kind, spec.beta, 1.0, spec.alpha), teacher, coarse)
        e.mul_(g[:, -1:] / mass.clamp(min=torch.finfo(e.dtype).tiny))
        e.scatter_(-1, self.ids, g[:, :-1] if rest is None else torch.where(rest, e.gather(-1, self.ids), g[:, :-1]))
        return (value, e) if t == 1.0 else (value.mul_(t * t), e.mul_(t))


@dataclass(frozen=True, slots=True)
class Sparse:
    """An unbiased sample: E[weight of id i at a position] is the teacher's probability of i there, whatever i.

    Entries of all positions lie one after the other: ``starts`` (N + 1,) int64, always on the CPU, says where each
    position's begin; ``row`` (E,) int64 is the position of each; ``ids`` (E,) int64; ``weights`` (E,) float32, at the
    temperature of the loss. ``entropy`` (N,) float32 is the teacher's own, in nats: it turns the cross-entropy into KL.
    """

    starts: Tensor
    row: Tensor
    ids: Tensor
    weights: Tensor
    entropy: Tensor

    @staticmethod
    def of(counts: Tensor, ids: Tensor, weights: Tensor, entropy: Tensor) -> Sparse:
        """From the number of entries of each position, on any device; the rest are on the device of the loss."""
        starts = torch.zeros(len(counts) + 1, dtype=torch.long)
        torch.cumsum(counts.cpu(), 0, out=starts[1:])
        row = torch.repeat_interleave(torch.arange(len(counts)), counts.cpu()).to(ids.device)
        return Sparse(starts, row, ids, weights, entropy)

    def span(self, a: int, b: int) -> Sparse:
        i, j = int(self.starts[a]), int(self.starts[b])
        starts, row = self.starts[a : b + 1] - i, self.row[i:j] - a
        return Sparse(starts, row, self.ids[i:j], self.weights[i:j], self.entropy[a:b])

    def take(self, index: Tensor) -> Sparse:
        at = index.cpu()
        counts = self.starts.diff()[at]
        within = torch.arange(int(counts.sum())) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        entry = (torch.repeat_interleave(self.starts[at], counts) + within).to(self.ids.device)
        return Sparse.of(counts, self.ids[entry], self.weights[entry], self.entropy[index])

    def to(self, device: torch.device) -> Sparse:
        return Sparse(self.starts, *(x.to(device) for x in (self.row, self.ids, self.weights, self.entropy)))

    def loss(self, spec: Divergence, student: Tensor) -> tuple[Tensor, Tensor]:
        """Forward KL, estimated without bias: it is linear in the teacher's probabilities, as no other is.

        Raises:
            ValueError: another divergence was asked for; ``methods.check`` says so to the user before anything runs.
        """
        if spec.kind != "forward_kl":
            raise ValueError(f"{spec.kind} is not linear in the teacher's probabilities: a sample of them is biased")
        t, w = spec.temperature, self.weights.to(student.dtype)
        total = sums_of_rows(self.row, w, len(student))
        place = self.row * student.stride(0) + self.ids
        picked = _flat(student)[place] / t
        gradient, log_mass = softmax_(student, t, total.unsqueeze(-1))
        value = total * log_mass - sums_of_rows(self.row, w * picked, len(student)) - self.entropy
        _flat(gradient).index_add_(0, place, w, alpha=-1.0)
        return (value, gradient) if t == 1.0 else (value.mul_(t * t), gradient.mul_(t))


@dataclass(frozen=True, slots=True)
class Sets:
    """Sets of tokens as outcomes beside the tokens: outcome ``vocabulary + k`` is any of the tokens
    ``order[bounds[k, 0] : bounds[k, 1]]``. ``order`` (M,) and ``bounds`` (G, 2) int64."""

    vocabulary: int
    order: Tensor
    bounds: Tensor

    def to(self, device: torch.device) -> Sets:
        return Sets(self.vocabulary, self.order.to(device), self.bounds.to(device))

    def members(self, outcomes: Tensor) -> tuple[Tensor, Tensor]:
        """(E,) numbers of tokens in some outcomes, and all these tokens, one outcome's after the other's."""
        k = (outcomes - self.vocabulary).clamp(min=0)
        first, end = self.bounds[k].unbind(-1) if len(self.bounds) else (k, k + 1)
        one = outcomes < self.vocabulary
        counts = torch.where(one, 1, end - first)
        of = torch.repeat_interleave(counts)
        within = torch.arange(len(of), device=of.device) - (counts.cumsum(0) - counts)[of]
        tokens = self.order[torch.where(one, 0, first)[of] + within] if len(self.order) else within
        return counts, torch.where(one[of], outcomes[of], tokens)


@dataclass(frozen=True, slots=True)
class Grouped:
    """A teacher that tells some tokens apart only as sets: ids of ``sample`` are outcomes of ``sets``. Where several
    distributions speak at a position (docs/across.md), its outcomes may share tokens, and weights may be negative."""

    sample: Sparse
    sets: Sets

    def span(self, a: int, b: int) -> Grouped:
        return Grouped(self.sample.span(a, b), self.sets)

    def take(self, index: Tensor) -> Grouped:
        return Grouped(self.sample.take(index), self.sets)

    def to(self, device: torch.device) -> Grouped:
        return Grouped(self.sample.to(device), self.sets.to(device))

    def loss(self, spec: Divergence, student: Tensor) -> tuple[Tensor, Tensor]:
        """Forward KL between the outcomes' probabilities, linear in the weights, so that a sample estimates it without
        bias. Of one distribution over disjoint outcomes it is never above that of the tokens (data processing).

        A set's probability is a log-sum-exp of its own: one that the student holds for all but impossible still has a
        gradient.

        Raises:
            ValueError: another divergence was asked for, as in ``Sparse``.
        """
        if spec.kind != "forward_kl":
            raise ValueError(f"{spec.kind} is not linear in the teacher's probabilities: a sample of them is biased")
        x, t, w = self.sample, spec.temperature, self.sample.weights.to(student.dtype)
        counts, token = self.sets.members(x.ids)
        of, ends = torch.repeat_interleave(counts), torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        place = x.row[of] * student.stride(0) + token
        logit = _flat(student)[place] / t
        top = torch.segment_reduce(logit, "max", offsets=ends, unsafe=True, initial=-torch.inf)
        # Sets can have tens of thousands of tokens: added one after the other, float32 would lose digits.
        wide = torch.float32 if student.device.type == "mps" else torch.float64
        share = torch.exp(logit - top[of]).to(wide)
        mass = torch.segment_reduce(share, "sum", offsets=ends, unsafe=True, initial=0.0)
        share = (share / mass[of]).to(student.dtype)
        picked = top + mass.log().to(student.dtype)
        total = sums_of_rows(x.row, w, len(student))
        gradient, log_mass = softmax_(student, t, total.unsqueeze(-1))
        value = total * log_mass - sums_of_rows(x.row, w * picked, len(student)) - x.entropy
        _flat(gradient).index_add_(0, place, w[of] * share, alpha=-1.0)
        return (value, gradient) if t == 1.0 else (value.mul_(t * t), gradient.mul_(t))


Target = Dense | TopK | Sparse | Grouped


def joined(parts: Sequence[TopK | Sparse]) -> TopK | Sparse:
    """The positions of several targets of one kind, one part's after the other's."""
    both = lambda name: torch.cat([getattr(p, name) for p in parts])  # noqa: E731
    if isinstance(parts[0], TopK):
        return TopK(both("ids"), both("probs"))
    counts = torch.cat([p.starts.diff() for p in parts if isinstance(p, Sparse)])
    return Sparse.of(counts, both("ids"), both("weights"), both("entropy"))


def _flat(rows: Tensor) -> Tensor:
    """(n, V) as one line of memory, whatever lies between the rows: column v of row i is at i * stride + v."""
    return rows.as_strided(((len(rows) - 1) * rows.stride(0) + rows.shape[1],) if len(rows) else (0,), (1,))


def softmax_(logits: Tensor, temperature: float = 1.0, times: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """softmax(logits / temperature) in their place, ``times`` (n, 1) numbers, and (n,) log of its normaliser."""
    if temperature != 1.0:
        logits.div_(temperature)
    top = logits.amax(-1, keepdim=True)
    mass = logits.sub_(top).exp_().sum(-1, keepdim=True)
    return logits.mul_(times / mass), (mass.log_() + top).squeeze(-1)
