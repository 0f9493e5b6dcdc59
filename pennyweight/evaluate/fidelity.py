"""How well a compressed teacher stands in for the whole one: bytes, mass kept, gradient error, calibration.

Ways of compressing are made from the same logits, and each one's gradient is compared with that of the dense teacher
on the same tokens. N positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pennyweight.loss.signals import Dense, Sparse, Target, TopK
from pennyweight.teacher.shards import as_stored, encode, encode_hidden
from pennyweight.teacher.targets import Keep, Kept, draw, restore, top, uniforms

Gradient = Callable[[Target], list[Tensor]]
"""target -> gradients of the student's loss on it, one tensor a parameter"""

_BINS = 15


@dataclass(frozen=True, slots=True)
class Stand:
    """A teacher compressed in one way: ``targets`` are as many independent draws of it as were asked for.

    ``weights`` (N,) is what the targets, on average over draws, give the teacher's most probable token; ``mass`` the
    share of probability that is told of exactly.
    """

    way: str
    setting: float
    targets: Sequence[Target]
    bytes_per_token: float
    ids_per_token: float
    mass: float
    weights: Tensor


def sampled(logits: Tensor, threshold: float, draws: int, seed: int = 0) -> Stand:
    """Ours: probabilities from the threshold up kept, below it sampled. Bytes are those of a real shard."""
    keep, n = Keep("sampled", threshold), len(logits)
    parts = [draw(logits.clone(), threshold, 1.0, uniforms(n, seed * 1_000_003 + i)) for i in range(draws)]
    targets = [_sparse(*restore(k, threshold, keep.bits), logits.device) for k in parts]
    heads = torch.cat([k.probs for k in parts]).double().sum() / ((1 << keep.bits) - 1) / (draws * n)
    size, ids = _stored(parts, logits.shape[1], keep)
    return Stand("sampled", threshold, targets, size, ids, float(heads), _of_top(targets, logits))


def top_k(logits: Tensor, k: int, tail: bool) -> Stand:
    """The k most probable, with the rest as one more outcome (``tail``), or rescaled to sum to 1 as is usual."""
    keep = Keep("top_k", k=k)
    kept = top(logits.clone(), k, 1.0, uniforms(len(logits), 0), keep.bits)
    counts, ids, weights, entropy = restore(kept, 0.0, keep.bits)
    size, per_token = _stored([kept], logits.shape[1], keep)
    probs = weights.view(-1, k)
    mass = probs.sum(-1, keepdim=True)
    if tail:
        target: Target = TopK(ids.view(-1, k).to(logits.device), probs.to(logits.device))
        return Stand("top-k + tail", k, [target], size, per_token, float(mass.mean()), probs[:, 0])
    scaled = probs / mass
    target = _sparse(counts, ids, scaled.flatten(), entropy, logits.device)
    return Stand("top-k, rescaled", k, [target], size, per_token, float(mass.mean()), scaled[:, 0])


def hidden_states(states: Tensor, logits_of: Callable[[Tensor, Tensor | None], Tensor]) -> Stand:
    """Last hidden states (N, D) in the 16 bits of a shard, of which the head ``logits_of`` makes (N, V) logits."""
    kept = as_stored(states)
    logits = logits_of(kept, None)
    size = len(encode_hidden([kept.cpu()])) / len(kept)
    confidence = torch.softmax(logits, -1).amax(-1).cpu()
    return Stand("hidden states", kept.shape[1], [Dense.live(kept, logits_of)], size, logits.shape[1], 1.0, confidence)


def drawn(logits: Tensor, count: int, draws: int, seed: int = 0) -> Stand:
    """Independent draws with replacement, as Anshumann et al. (arXiv 2503.16870) keep them: distinct ids and counts.

    An entry takes the bits of an id and of a count; a position one byte for their number.
    """
    p = torch.softmax(logits, -1)
    generator = torch.Generator(logits.device).manual_seed(seed)
    targets, distinct = [], 0
    for _ in range(draws):
        at = torch.multinomial(p, count, replacement=True, generator=generator)
        place = (at + torch.arange(len(p), device=p.device).unsqueeze(-1) * p.shape[1]).flatten()
        unique, times = place.unique(return_counts=True)
        counts = torch.bincount(unique // p.shape[1], minlength=len(p))
        weights = times.float() / count
        targets.append(_sparse(counts, unique % p.shape[1], weights, torch.zeros(len(p)), logits.device))
        distinct += len(unique)
    ids = distinct / (draws * len(p))
    bits = (logits.shape[1] - 1).bit_length() + count.bit_length()
    return Stand("i.i.d. draws", count, targets, 1 + ids * bits / 8, ids, 0.0, _of_top(targets, logits))


def compare(stand: Stand, dense: list[Tensor], gradient: Gradient, confidence: Tensor) -> dict[str, Any]:
    """Error and angle of a gradient against the ``dense`` one, which is not zero, its bias, and calibration.

    ``gradient_error`` is relative, root mean square over draws; ``gradient_bias`` that of the mean over draws, from
    which the share that the draws' scatter leaves has been taken off; ``calibration_error`` compares the weight of the
    most probable token with its probability, in 15 bins of it (Guo et al., arXiv 1706.04599).
    """
    norm = norm_of(dense)
    errors, angles = [], []
    total = [torch.zeros_like(d) for d in dense]
    for target in stand.targets:
        g = gradient(target)
        errors.append(norm_of([a - b for a, b in zip(g, dense, strict=True)]) / norm)
        dot = sum(float((a.double() * b.double()).sum()) for a, b in zip(g, dense, strict=True))
        angles.append(math.degrees(math.acos(max(-1.0, min(1.0, dot / (norm * max(norm_of(g), 1e-30)))))))
        for t, a in zip(total, g, strict=True):
            t += a / len(stand.targets)
    mean_square = sum(e * e for e in errors) / len(errors)
    of_mean = (norm_of([a - b for a, b in zip(total, dense, strict=True)]) / norm) ** 2
    n = len(errors)
    bias = max(0.0, (of_mean - mean_square / n) / (1 - 1 / n)) if n > 1 else of_mean
    return {
        "way": stand.way,
        "setting": stand.setting,
        "bytes_per_token": stand.bytes_per_token,
        "ids_per_token": stand.ids_per_token,
        "mass": stand.mass,
        "gradient_error": math.sqrt(mean_square),
        "gradient_angle": sum(angles) / n,
        "gradient_bias": math.sqrt(bias),
        "calibration_error": _calibration(stand.weights, confidence),
    }


def dense_of(logits: Tensor) -> tuple[Dense, Tensor]:
    """The whole teacher as a target, and (N,) the probability of its most probable token."""
    return Dense.of(logits), torch.softmax(logits, -1).amax(-1)


def k_for(bytes_per_token: float, vocabulary: int) -> int:
    """The largest k whose ids and 16-bit probabilities fit; at least 1."""
    bits = (vocabulary - 1).bit_length() + 16
    return max(1, int((bytes_per_token - 1) * 8 / bits))


def _sparse(counts: Tensor, ids: Tensor, weights: Tensor, entropy: Tensor, device: torch.device) -> Sparse:
    return Sparse.of(counts, ids.to(device), weights.to(device), entropy.to(device))


def _stored(parts: list[Kept], vocabulary: int, keep: Keep) -> tuple[float, float]:
    """Bytes and ids a token, of one draw as it would lie on disk in samples of 256 positions."""
    one = parts[0]
    sizes = [min(256, len(one) - a) for a in range(0, len(one), 256)]
    ids = sum(len(k.ids) for k in parts) / sum(map(len, parts))
    return len(encode(one.split(sizes), vocabulary, keep)) / len(one), ids


def _of_top(targets: Sequence[Target], logits: Tensor) -> Tensor:
    """(N,) mean over draws of the weight that the teacher's most probable token has."""
    best = logits.argmax(-1)
    found = torch.zeros(len(logits), device=logits.device)
    for t in targets:
        assert isinstance(t, Sparse)
        found.index_add_(0, t.row, t.weights * (t.ids == best[t.row]))
    return (found / len(targets)).cpu()


def _calibration(weights: Tensor, confidence: Tensor) -> float:
    bins = (confidence.cpu() * _BINS).long().clamp(max=_BINS - 1)
    gap = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, bins, (weights - confidence.cpu()).double())
    return float(gap.abs().sum()) / len(weights)


def norm_of(parts: list[Tensor]) -> float:
    """Euclidean length of several tensors taken as one."""
    return math.sqrt(sum(float(p.double().square().sum()) for p in parts))
