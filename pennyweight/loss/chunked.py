"""Output head and loss in tiles of positions, so that the full logits never exist.

A tile of (tile, V) float32 logits is made, its loss and gradient are taken, and only the gradients with respect to
the hidden states and the head are kept. Peak memory is one tile's logits, not N of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pennyweight.loss import divergence as div
from pennyweight.model.head import Head

_TILE_ENTRIES = 1 << 23  # float32 logits of one tile: 32 MiB


@dataclass(frozen=True, slots=True)
class Terms:
    """What the loss of N positions is made of. Weights are per position; a term with no weight is not computed.

    ``labels`` (N,) int64, ``ce_weight`` and ``kd_weight`` (N,) float32; ``target(a, b)`` gives the teacher at
    positions a to b, already on the right device.
    """

    labels: Tensor
    ce_weight: Tensor
    kd_weight: Tensor
    divergence: div.Divergence
    target: Callable[[int, int], div.Target] | None = None


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over positions: ``loss`` carries the gradient, the others are plain numbers for the log.

    ``cross_entropy`` and ``entropy`` (of the student) are summed over all positions, weighted or not, and are None
    unless they were asked for; ``divergence`` is None without a target. ``count`` is the number of positions.
    """

    loss: Tensor
    count: int
    cross_entropy: float | None
    divergence: float | None
    entropy: float | None


def tiled_loss(hidden_ND: Tensor, head: Head, terms: Terms, measure: bool = False, tile: int | None = None) -> Totals:
    """Sum over positions of ce_weight * cross-entropy + kd_weight * divergence.

    Args:
        hidden_ND: the student's last hidden states at the N positions that carry loss.
        head: the student's output head.
        terms: labels, weights and targets.
        measure: also sum the student's entropy and cross-entropy, for the log and the tripwires.
        tile: positions per tile; default: as many as keep a tile's logits near 32 MiB.
    """
    vocabulary = head.weight.shape[0]
    size = tile or max(16, min(4096, _TILE_ENTRIES // vocabulary))
    sums = torch.zeros(3, dtype=torch.float64)
    loss = _Tiled.apply(hidden_ND, head.weight, head.bias, head, terms, size, measure, sums)
    ce, kd, entropy = sums.tolist()
    has_kd = terms.target is not None
    return Totals(
        loss, len(terms.labels), ce if measure else None, kd if has_kd else None, entropy if measure else None
    )


class _Tiled(torch.autograd.Function):
    """Gradients are made in forward, tile by tile, and only scaled in backward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, head, terms, size, measure, sums):  # type: ignore[override]
        needs = ctx.needs_input_grad[:3]
        wide = torch.float32 if hidden.device.type == "mps" else torch.float64
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        d_hidden = torch.zeros_like(hidden) if needs[0] else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs[2] else None
        for a in range(0, len(hidden), size):
            b = min(a + size, len(hidden))
            wanted = [t for t, n in zip((hidden[a:b], weight, bias), needs, strict=True) if t is not None and n]
            with torch.set_grad_enabled(any(needs)):
                leaves = [t.detach().requires_grad_(True) for t in wanted]
                given = iter(leaves)
                h = next(given) if needs[0] else hidden[a:b]
                w = next(given) if needs[1] else weight
                c = (next(given) if needs[2] else bias) if bias is not None else None
                value = _tile_loss(replace(head, weight=w, bias=c).logits(h), terms, a, b, measure, sums)
                grads = iter(
                    torch.autograd.grad(value, leaves) if value.requires_grad else map(torch.zeros_like, leaves)
                )
            loss += value.detach().to(wide)
            for d, part in ((d_hidden, slice(a, b)), (d_weight, ...), (d_bias, ...)):
                if d is not None:
                    d[part] += next(grads)
        ctx.save_for_backward(*(d for d in (d_hidden, d_weight, d_bias) if d is not None))
        ctx.given = [d is not None for d in (d_hidden, d_weight, d_bias)]
        ctx.dtypes = [hidden.dtype, weight.dtype, None if bias is None else bias.dtype]
        return loss.float()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        saved = iter(ctx.saved_tensors)
        out = [
            (next(saved) * grad).to(dtype) if given else None
            for given, dtype in zip(ctx.given, ctx.dtypes, strict=True)
        ]
        return (*out, None, None, None, None, None)


def _tile_loss(logits: Tensor, terms: Terms, a: int, b: int, measure: bool, sums: Tensor) -> Tensor:
    """Weighted loss of one tile; adds cross-entropy, divergence and entropy to ``sums`` on the way."""
    ce_weight, kd_weight = terms.ce_weight[a:b], terms.kd_weight[a:b]
    wants_ce = bool(ce_weight.any())
    log_q = torch.log_softmax(logits, -1) if wants_ce or measure else None
    value = logits.new_zeros(())
    if log_q is not None:
        ce = div.cross_entropy(log_q, terms.labels[a:b])
        if wants_ce:
            value = value + (ce * ce_weight).sum()
        if measure:
            sums[0] += float(ce.detach().sum())
            detached = log_q.detach()
            sums[2] += float(-(detached.exp() * detached).sum())
    if terms.target is not None:
        kd = div.divergence(terms.divergence, logits, terms.target(a, b))
        value = value + (kd * kd_weight).sum()
        sums[1] += float(kd.detach().sum())
    return value
