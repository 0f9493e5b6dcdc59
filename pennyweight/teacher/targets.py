"""What is kept of a teacher's distribution at each position, and back again: pure arrays.

Threshold sampling. With a threshold t, every probability p >= t is kept (a head), and each p < t is kept with
probability p / t and then weighs t (a tail). So E[weight] = p for every id: the sample is unbiased, sharp positions
cost few entries and diffuse ones more, and the tail's weights need no storing because they are all t. Among all
samples with as many entries on average it has the least variance, summed over ids: inclusion in proportion to p is
what minimises the sum of p^2 / inclusion. Tail entries are chosen systematically (one uniform draw a position; Madow,
1949), so their number is floor or ceil of tail mass / t, and a position's weights sum to 1 within t.

The idea of an unbiased sampled cache is Anshumann et al. (arXiv 2503.16870), who draw with replacement. docs/targets.md
has the mathematics, and what else was tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

ENTROPY_STEP = 1 / 16
"""Nats of one step of the stored entropy (one byte, at most 15.94), rounded without bias."""


@dataclass(frozen=True, slots=True)
class Keep:
    """What to keep: ``sampled`` with a threshold, ``top_k`` with k, or the last ``hidden`` states; at a temperature.

    ``precision`` is that of the forward pass that makes it: as the run computes, float32, bfloat16, int8 or fp8.
    """

    kind: str = "sampled"
    threshold: float = 0.025
    k: int = 0
    temperature: float = 1.0
    precision: str = "auto"

    @property
    def bits(self) -> int:
        """Bits of a stored probability."""
        return 16 if self.kind == "top_k" else bits_for(self.threshold)


_BLOCK_ENTRIES = 1 << 20  # logits looked at together on a CPU


@dataclass(frozen=True, slots=True)
class Kept:
    """Kept entries of N positions, one position after the other; each lists its heads first, then its tails.

    ``heads`` and ``tails`` (N,) int32 count them; ``ids`` (E,) int32; ``probs`` (H,) int32 are the heads' probabilities
    in steps of 1 / (2^bits - 1); ``entropy`` (N,) uint8 in steps of ENTROPY_STEP. All on the CPU.
    """

    heads: Tensor
    tails: Tensor
    ids: Tensor
    probs: Tensor
    entropy: Tensor

    def __len__(self) -> int:
        return len(self.heads)

    def split(self, sizes: list[int]) -> list[Kept]:
        """The same positions cut into consecutive runs of the given sizes."""
        of_entries = _ends(self.heads + self.tails)
        of_heads = _ends(self.heads)
        parts, a = [], 0
        for size in sizes:
            b = a + size
            entries, heads = slice(of_entries[a], of_entries[b]), slice(of_heads[a], of_heads[b])
            parts.append(
                Kept(self.heads[a:b], self.tails[a:b], self.ids[entries], self.probs[heads], self.entropy[a:b])
            )
            a = b
        return parts


def join(parts: list[Kept]) -> Kept:
    """Positions of several ``Kept``, one after the other."""
    return Kept(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Kept)))


def _ends(counts: Tensor) -> list[int]:
    return [0, *counts.long().cumsum(0).tolist()]


def bits_for(threshold: float) -> int:
    """Bits of a stored head probability: rounding it then adds little to the variance that the tail has anyway."""
    return min(16, max(8, math.ceil(math.log2(4 / threshold))))


def uniforms(positions: int, seed: int) -> Tensor:
    """(positions, 3) float64 draws that ``draw`` and ``top`` use up: a function of the seed, whatever the device."""
    return torch.rand((positions, 3), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def draw(logits_NV: Tensor, threshold: float, temperature: float, uniform_N3: Tensor) -> Kept:
    """An unbiased sparse sample of softmax(logits / temperature) at each of N positions.

    Only heads, and the few blocks of the vocabulary that a sampling point falls into, are looked at one by one; the
    rest costs a softmax and three sums over it.

    Args:
        logits_NV: teacher logits, float32; used up.
        threshold: t above, in (0, 1).
        temperature: of the distribution that is sampled.
        uniform_N3: from ``uniforms``, on the CPU.
    """
    n, vocabulary = logits_NV.shape
    if not n:
        none = torch.zeros(0, dtype=torch.int32)
        return Kept(none, none, none, none, none.to(torch.uint8))
    # Blocks cost by their number, points by a block's width: the best is near the root of the vocabulary.
    width = 1 << max(4, round(math.log2(math.sqrt(vocabulary) / 3)))
    rows = n if logits_NV.device.type != "cpu" else max(1, _BLOCK_ENTRIES // vocabulary)
    scratch = logits_NV.new_zeros((min(rows, n), vocabulary + -vocabulary % width))
    wide = torch.float32 if logits_NV.device.type == "mps" else torch.float64
    uniform, steps = uniform_N3.to(wide).to(logits_NV.device), (1 << bits_for(threshold)) - 1
    parts = []
    for a in range(0, n, rows):
        u = uniform[a : a + rows]
        parts.append(_draw_block(logits_NV[a : a + rows], threshold, temperature, u, steps, scratch[: len(u)], width))
    return join(parts)


def _draw_block(
    logits: Tensor, threshold: float, temperature: float, uniform: Tensor, steps: int, scratch: Tensor, width: int
) -> Kept:
    """``draw`` of a few rows, in memory that a CPU's cache holds and that is made once."""
    n = len(logits)
    mass, entropy = _exponentials(logits, temperature, scratch[:, : logits.shape[1]])
    blocks = scratch.view(n, -1, width)
    least = mass * threshold  # nothing is divided by its row's mass before it has to be
    head_row, head_block = (blocks.amax(-1) >= least).nonzero(as_tuple=True)
    found = (blocks[head_row, head_block] >= least[head_row]).nonzero(as_tuple=True)
    rows, ids = head_row[found[0]], head_block[found[0]] * width + found[1]
    probs = scratch[rows, ids] / mass[rows, 0]
    scratch[rows, ids] = 0.0
    tail_rows, tail_ids = _systematic(blocks, least, uniform[:, 0])
    heads, tails = (torch.bincount(r, minlength=n) for r in (rows, tail_rows))
    order = torch.argsort(torch.cat([rows * 2, tail_rows * 2 + 1]), stable=True)
    return Kept(
        heads.int().cpu(),
        tails.int().cpu(),
        torch.cat([ids, tail_ids])[order].int().cpu(),
        _rounded(probs, heads, steps, uniform[:, 1]).cpu(),
        _in_steps(entropy, uniform[:, 2]).cpu(),
    )


def top(logits_NV: Tensor, k: int, temperature: float, uniform_N3: Tensor, bits: int) -> Kept:
    """The k most probable ids of each position, most probable first, and their probabilities; arguments as ``draw``."""
    e = torch.empty_like(logits_NV)
    mass, entropy = _exponentials(logits_NV, temperature, e)
    probs, ids = e.topk(k, -1)
    return _top(ids.cpu(), (probs / mass).cpu(), entropy.cpu(), uniform_N3, bits)


def top_told(ids_NK: Tensor, probs_NK: Tensor, uniform_N3: Tensor, bits: int) -> Kept:
    """``top`` where somebody else tells the ids and their probabilities, most probable first.

    The entropy, which nothing is made of here, is that with all others as one outcome.
    """
    rest = (1.0 - probs_NK.sum(-1, keepdim=True)).clamp_min(0.0)
    entropy = torch.special.entr(torch.cat([probs_NK, rest], -1)).sum(-1)
    return _top(ids_NK, probs_NK, entropy, uniform_N3, bits)


def _top(ids: Tensor, probs: Tensor, entropy: Tensor, uniform: Tensor, bits: int) -> Kept:
    n, k = ids.shape
    heads = torch.full((n,), k, dtype=torch.int32)
    rounded = _rounded(probs.flatten(), heads, (1 << bits) - 1, uniform[:, 1])
    return Kept(heads, torch.zeros_like(heads), ids.flatten().int(), rounded, _in_steps(entropy, uniform[:, 2]))


def restore(kept: Kept, threshold: float, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(N,) int64 numbers of entries, (E,) int64 ids, (E,) float32 weights, (N,) float32 entropy in nats."""
    counts = (kept.heads + kept.tails).long()
    first = counts.cumsum(0) - counts
    place = torch.arange(len(kept.ids)) - torch.repeat_interleave(first, counts)
    is_head = place < torch.repeat_interleave(kept.heads.long(), counts)
    weights = torch.full((len(kept.ids),), threshold)
    weights[is_head] = kept.probs / float((1 << bits) - 1)
    return counts, kept.ids.long(), weights, kept.entropy.float() * ENTROPY_STEP


def expected_entries(logits_NV: Tensor, thresholds: list[float], temperature: float) -> list[tuple[float, float]]:
    """Heads and tails a position, on average, that each threshold would keep; nothing is drawn. Uses up the logits."""
    e = torch.empty_like(logits_NV)
    p = e.div_(_exponentials(logits_NV, temperature, e)[0])
    found = []
    for t in thresholds:
        is_head = p >= t
        heads, mass = is_head.sum(-1).float().mean(), (p * is_head).sum(-1).mean()
        found.append((float(heads), max(0.0, 1.0 - float(mass)) / t))
    return found


def predicted_bytes(heads: float, tails: float, vocabulary: int, threshold: float) -> float:
    """About the bytes of a position with so many heads and tails: ids at full width, without the sample's own 12."""
    id_bits = (vocabulary - 1).bit_length()
    counts_and_entropy = 2.5
    return ((heads + tails) * id_bits + heads * bits_for(threshold)) / 8 + counts_and_entropy


def threshold_within(
    budget: float, threshold: float, vocabulary: int, expected: Callable[[list[float]], list[tuple[float, float]]]
) -> float:
    """``threshold``, or the least of some above it, up to a half, that is expected to take ``budget`` bytes a position;
    the last where none is.

    ``expected`` gives heads and tails a position for some thresholds, as ``expected_entries`` does.
    """
    tried = [threshold, *(t for i in range(1, 33) if threshold < (t := min(0.5, threshold * 2 ** (i / 4))))]
    for some in (tried[:1], tried[1:]):  # the first mostly does, and each that is looked at costs a pass
        for t, (heads, tails) in zip(some, expected(some), strict=True):
            if predicted_bytes(heads, tails, vocabulary, t) <= budget:
                return t
    return tried[-1]


def _exponentials(logits: Tensor, temperature: float, out: Tensor) -> tuple[Tensor, Tensor]:
    """exp(logits / temperature - their maximum) in ``out``; its (n, 1) sum; (n,) entropy in nats. Uses up logits.

    Raises:
        FloatingPointError: a logit is NaN or positive infinity. Minus infinity is a probability of zero.
    """
    if temperature != 1.0:
        logits.div_(temperature)
    logits.sub_(logits.amax(-1, keepdim=True))
    torch.exp(logits, out=out)
    mass = out.sum(-1, keepdim=True)
    if not mass.isfinite().all():
        raise FloatingPointError(
            f"the teacher's logits are no numbers (NaN or infinity) at {int((~mass.isfinite()).sum())} of {len(mass)} "
            "positions; its precision may be too narrow for it: try targets.precision=float32 or compute.dtype=float32"
        )
    mean = torch.linalg.vecdot(out, logits)
    if not mean.isfinite().all():
        mean = torch.linalg.vecdot(out, logits.nan_to_num_(neginf=0.0))  # 0 log 0 is 0
    return mass, mass.log().squeeze(-1) - mean / mass.squeeze(-1)


def _systematic(blocks: Tensor, unit: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and ids of the sampled tails, in order; ``blocks`` (n, B, width) holds values below ``unit`` (n, 1).

    Laid one after the other, the values in units of ``unit`` make a line; its points 1 - u, 2 - u, ... each
    fall on one id. A point is first found among the blocks' sums, then inside its block.
    """
    width = blocks.shape[-1]
    wide = torch.float32 if blocks.device.type == "mps" else torch.float64
    unit = unit.to(wide)
    ends = blocks.sum(-1).to(wide).div_(unit).cumsum(-1)
    length, u = ends[:, -1:], u.to(wide).unsqueeze(-1)
    points = torch.arange(1, int(length.max().add(1)) + 1, device=u.device, dtype=wide) - u
    row, number = ((points <= length) & (points > 0)).nonzero(as_tuple=True)
    point = points[row, number]
    block = torch.searchsorted(ends, points)[row, number]
    before = torch.where(block > 0, ends[row, block - 1], 0.0)
    inside = blocks[row, block].to(wide).div_(unit[row]).cumsum(-1).add_(before.unsqueeze(-1))
    # A block's sum and the sums inside it may differ in the last digit; its last id with any mass takes such a point.
    last = (inside < inside[:, -1:]).sum(-1)
    place = torch.minimum((inside < point.unsqueeze(-1)).sum(-1), last)
    return row, block * width + place


def _rounded(probs: Tensor, heads: Tensor, steps: int, u: Tensor) -> Tensor:
    """Head probabilities in steps, rounded without bias and so that a position's sum is off by less than one step."""
    counts = heads.long()
    wide = torch.float32 if probs.device.type == "mps" else torch.float64
    line = torch.nn.functional.pad((probs.to(wide) * steps).cumsum(0), (1, 0))
    shift = torch.repeat_interleave(u.to(wide) - line[counts.cumsum(0) - counts], counts)
    return ((line[1:] + shift).floor() - (line[:-1] + shift).floor()).clamp_(0, steps).int()


def _in_steps(entropy: Tensor, u: Tensor) -> Tensor:
    return (entropy / ENTROPY_STEP + u.to(entropy.dtype)).floor().clamp(0, 255).to(torch.uint8)
