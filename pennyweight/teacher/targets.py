"""What is kept of a teacher's distribution at one position, and back again: pure arrays.

Threshold sampling. With a threshold t, every probability p >= t is kept exactly, and each p < t is kept with
probability p / t and then weighs t. So E[weight] = p for every id: the sample is unbiased, sharp positions cost few
entries and diffuse ones more, and the tail's weights need no storing because they are all t. Tail entries are
chosen by systematic sampling (one uniform draw per position), which makes their number floor or ceil of tail
mass / t: less variance than independent draws at the same inclusion probabilities (Madow, 1949). The idea of an
unbiased sampled cache is Anshumann et al. (arXiv 2503.16870), who draw with replacement.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.loss.divergence import Sparse

_HEAD_STEPS = 65535  # head probabilities are stored as multiples of 1/65535, rounded stochastically


@dataclass(frozen=True, slots=True)
class Kept:
    """Kept entries of N positions, concatenated; each position lists its exact heads first, then its tail.

    ``heads`` and ``tails`` (N,) int32 count them; ``ids`` (heads+tails summed,) int32; ``head_q`` (heads summed,)
    int32 in 0..65535 is the probability times 65535; ``entropy`` (N,) float32 nats.
    """

    heads: Tensor
    tails: Tensor
    ids: Tensor
    head_q: Tensor
    entropy: Tensor

    def __len__(self) -> int:
        return len(self.heads)

    def split(self, sizes: list[int]) -> list[Kept]:
        """The same positions cut into consecutive runs of the given sizes."""
        per_position = (self.heads + self.tails).long()
        firsts = torch.tensor([0, *sizes]).cumsum(0)
        ends = torch.cat([torch.zeros(1, dtype=torch.long), per_position.cumsum(0)])[firsts].tolist()
        head_ends = torch.cat([torch.zeros(1, dtype=torch.long), self.heads.long().cumsum(0)])[firsts].tolist()
        return [
            Kept(self.heads[a:b], self.tails[a:b], self.ids[i:j], self.head_q[h:g], self.entropy[a:b])
            for a, b, i, j, h, g in zip(
                firsts[:-1].tolist(), firsts[1:].tolist(), ends, ends[1:], head_ends, head_ends[1:], strict=False
            )
        ]


def join(parts: list[Kept]) -> Kept:
    """Positions of several ``Kept``, one after the other."""
    return Kept(*(torch.cat([getattr(p, f) for p in parts]) for f in ("heads", "tails", "ids", "head_q", "entropy")))


def draw(logits_NV: Tensor, threshold: float, temperature: float, generator: torch.Generator) -> Kept:
    """An unbiased sparse sample of softmax(logits / temperature) at each of N positions.

    Args:
        logits_NV: teacher logits, any float dtype; computed in float32, cumulated in float64 (on mps, float32).
        threshold: t above, in (0, 1).
        temperature: of the distribution that is sampled.
        generator: a CPU generator; two uniform draws a position, so the result depends on nothing else.
    """
    log_p = torch.log_softmax(logits_NV.float() / temperature, -1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
    is_head = p >= threshold
    wide = torch.float32 if p.device.type == "mps" else torch.float64
    u = torch.rand((len(p), 1), dtype=torch.float64, generator=generator).to(p.device, wide)
    reach = torch.where(is_head, 0.0, p.to(wide) / threshold).cumsum(-1) + u
    steps = reach.floor()
    is_tail = steps > torch.cat([torch.zeros_like(steps[:, :1]), steps[:, :-1]], -1)
    # Row-major nonzero gives ids in order within a position; heads are then moved before tails by a stable sort.
    rows, ids = (is_head | is_tail).nonzero(as_tuple=True)
    order = torch.argsort(rows * 2 + (~is_head[rows, ids]).long(), stable=True)
    rows, ids = rows[order], ids[order]
    head_p = p[rows, ids][is_head[rows, ids]].to(wide)
    noise = torch.rand(len(head_p), dtype=torch.float64, generator=generator).to(p.device, wide)
    head_q = (head_p * _HEAD_STEPS + noise).floor().clamp(max=_HEAD_STEPS)
    return Kept(
        is_head.sum(-1).int().cpu(), is_tail.sum(-1).int().cpu(), ids.int().cpu(), head_q.int().cpu(), entropy.cpu()
    )


def restore(kept: Kept, threshold: float) -> Sparse:
    """Padded (N, K) ids and weights, K the largest count of any position (at least 1)."""
    heads, counts = kept.heads.long(), (kept.heads + kept.tails).long()
    width = max(1, int(counts.max())) if len(counts) else 1
    column = torch.arange(width).unsqueeze(0)
    used, is_head = column < counts.unsqueeze(1), column < heads.unsqueeze(1)
    ids = torch.zeros(used.shape, dtype=torch.long)
    weights = torch.zeros(used.shape, dtype=torch.float32)
    ids[used] = kept.ids.long()
    weights[used] = threshold
    weights[is_head] = kept.head_q.float() / _HEAD_STEPS
    return Sparse(ids, weights, kept.entropy)
