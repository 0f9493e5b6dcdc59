"""Output head and loss in one pass over tiles of positions, so that the full logits never exist.

A tile of (tile, V) float32 logits is made in a buffer, overwritten with the gradient of its loss, and multiplied into
the gradients of the hidden states and the head, before the next tile takes the buffer. So each head is multiplied
once: N V (2 D_teacher + 6 D_student) floating-point operations, the least there can be, and memory for one tile of
each side's logits and the head's gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pennyweight.loss import fused
from pennyweight.loss.divergence import Divergence, divergence
from pennyweight.loss.signals import Dense, Grouped, Sparse, Target, TopK, softmax_
from pennyweight.model.head import Head

_TILE_ENTRIES = {"cpu": 1 << 27, "cuda": 1 << 28}  # float32 logits of one side's tile: 512 MiB, 1 GiB
_TILE_ROWS = {"cpu": 1024, "cuda": 4096}  # at most
_BLOCK_ENTRIES = {"cpu": 1 << 18}  # worked on at once within a tile, so that a CPU's cache holds them
_SETS_BLOCK_ENTRIES = 1 << 24  # where sets of tokens are listed beside the logits
_DENSE_BLOCK_ENTRIES = 1 << 16  # where a teacher's logits and room for both sides lie beside them


@dataclass(frozen=True, slots=True)
class Terms:
    """What the loss of N positions is made of. Weights are per position; positions without any are skipped.

    ``labels`` (N,) int64, ``ce_weight`` and ``kd_weight`` (N,) float32; ``target`` is the teacher at these positions,
    on the device of the hidden states.
    """

    labels: Tensor
    ce_weight: Tensor
    kd_weight: Tensor
    divergence: Divergence
    target: Target | None = None

    def take(self, index: Tensor) -> Terms:
        """The same of some positions."""
        target = None if self.target is None else self.target.take(index)
        return Terms(self.labels[index], self.ce_weight[index], self.kd_weight[index], self.divergence, target)


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over positions: ``loss`` carries the gradient, the others are plain numbers for the log.

    ``cross_entropy`` and ``entropy`` (of the student) are summed over all positions, weighted or not, and are None
    unless they were asked for; ``divergence`` is None without a target, ``hidden`` where no hidden states are matched;
    ``policy`` holds what ``PolicyTerms`` has for the log. ``count`` is the number of positions; ``weighed`` the part of
    ``loss`` that is cross-entropy.
    """

    loss: Tensor
    count: int
    cross_entropy: float | None
    divergence: float | None
    entropy: float | None
    hidden: float | None = None
    policy: dict[str, float] = field(default_factory=dict)
    weighed: float = 0.0

    def void(self) -> Totals:
        """The same of nothing: sums and gradient are 0."""
        zero = {
            k: None if getattr(self, k) is None else 0.0 for k in ("cross_entropy", "divergence", "entropy", "hidden")
        }
        return replace(self, loss=self.loss * 0.0, count=0, policy=dict.fromkeys(self.policy, 0.0), weighed=0.0, **zero)


def tiled_loss(hidden_ND: Tensor, head: Head, terms: Terms, measure: bool = False, tile: int | None = None) -> Totals:
    """Sum over positions of ce_weight * cross-entropy + kd_weight * divergence.

    Gradients are made in the forward pass; ``backward`` scales them, once.

    Args:
        hidden_ND: the student's last hidden states at the N positions that carry loss, any float dtype.
        head: the student's output head.
        terms: labels, weights and targets.
        measure: also sum the student's entropy and cross-entropy, for the log and the tripwires.
        tile: positions per tile; default: as many as keep a tile's logits near 512 MiB on a CPU, 1 GiB on a GPU,
            and at most 1,024 and 4,096.
    """
    count = len(terms.labels)
    weighed = (terms.ce_weight != 0) | (terms.kd_weight != 0)
    if not measure and not bool(weighed.all()):
        index = weighed.nonzero().squeeze(-1)
        hidden_ND, terms = hidden_ND[index], terms.take(index)
    size = tile or _tile_rows(hidden_ND, head)
    sums = torch.zeros(4, dtype=_wide(hidden_ND), device=hidden_ND.device)
    loss = _OnePass.apply(hidden_ND, head.weight, head.bias, head, terms, size, measure, sums)
    ce, kd, entropy, weighed = sums.tolist()
    told = (ce if measure else None, kd if terms.target is not None else None, entropy if measure else None)
    return Totals(loss, count, *told, weighed=weighed)


@torch.no_grad()
def label_logprobs(hidden_ND: Tensor, head: Head, labels: Tensor, tile: int | None = None) -> Tensor:
    """(N,) float32 log-probability of each position's label, in nats, without gradient."""
    out, size = torch.empty(len(labels), device=hidden_ND.device), tile or _tile_rows(hidden_ND, head)
    for a in range(0, len(labels), size):
        logits = head.logits(hidden_ND[a : a + size])
        of_label = logits.gather(-1, labels[a : a + size].unsqueeze(-1)).squeeze(-1)
        out[a : a + size] = of_label - torch.logsumexp(logits, -1)
    return out


def _tile_rows(hidden_ND: Tensor, head: Head) -> int:
    room = _TILE_ENTRIES.get(hidden_ND.device.type, _TILE_ENTRIES["cuda"])
    rows = _TILE_ROWS.get(hidden_ND.device.type, _TILE_ROWS["cuda"])
    return max(16, min(rows, room // head.weight.shape[0]))


class _OnePass(torch.autograd.Function):
    """Forward makes the gradients of a loss of 1 and keeps them; backward scales and hands them over."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, head, terms, size, measure, sums):  # type: ignore[override]
        needs = ctx.needs_input_grad[:3]
        low = hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16)
        # On a CPU nothing multiplies 16-bit numbers into float32 ones, so there they are widened first.
        h, w = (hidden, weight.to(hidden.dtype)) if low else (hidden.float(), weight.float())
        d_hidden = torch.empty_like(h, dtype=torch.float32) if needs[0] else None
        d_weight = torch.zeros_like(w, dtype=torch.float32) if needs[1] else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if needs[2] else None
        loss = torch.zeros((), dtype=sums.dtype, device=hidden.device)
        head = replace(head, weight=w, bias=bias)
        desk = _Desk(terms, head, min(size, len(h)), measure, sums)
        for a in range(0, len(h), size):
            x = h[a : a + size]
            g = desk.logits[: len(x)]
            head.logits(x, out=g)
            loss += desk.tile(a, a + len(x))
            if d_bias is not None:
                d_bias += g.sum(0)
            if low:
                g = g.to(h.dtype)
            if d_hidden is not None:
                _product(g, w, d_hidden[a : a + size])
            if d_weight is not None and low:
                d_weight += torch.mm(g.T, x, out_dtype=torch.float32)
            elif d_weight is not None:
                d_weight.addmm_(g.T, x)
        ctx.made = [d_hidden, d_weight, d_bias]
        ctx.dtypes = [hidden.dtype, weight.dtype, None if bias is None else bias.dtype]
        return loss.float()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        if ctx.made is None:
            raise RuntimeError("this loss keeps its gradients for one backward pass; take the loss again for another")
        made, ctx.made = ctx.made, None
        out = [None if d is None else d.mul_(grad).to(t) for d, t in zip(made, ctx.dtypes, strict=True)]
        return (*out, None, None, None, None, None)


class _Desk:
    """Memory for one tile, used again for each: ``logits`` (rows, V) of the student, which become their gradient."""

    def __init__(self, terms: Terms, head: Head, rows: int, measure: bool, sums: Tensor):
        self.terms, self.head, self.measure, self.sums = terms, head, measure, sums
        self.has_ce = measure or bool(terms.ce_weight.any())
        vocabulary, device = len(head.weight), head.weight.device
        self.dense = isinstance(terms.target, Dense)
        entries = _BLOCK_ENTRIES.get(device.type, _SETS_BLOCK_ENTRIES if isinstance(terms.target, Grouped) else None)
        if entries and self.dense:
            entries = min(entries, _DENSE_BLOCK_ENTRIES)
        self.step = rows if entries is None else min(rows, max(1, entries // vocabulary))
        self.logits = _rows_apart(rows, vocabulary, device)
        self.fused = fused.available(device) and not isinstance(terms.target, TopK | Grouped)
        self.teacher = _rows_apart(rows, vocabulary, device) if self.dense else None
        self.room = self.logits.new_empty((4 if self.dense and not self.fused else 0, self.step, vocabulary))

    def tile(self, a: int, b: int) -> Tensor:
        """Loss of positions a to b; ``logits`` become its gradient with respect to the head's product."""
        teacher, target = None, self.terms.target
        if self.teacher is not None and isinstance(target, Dense):
            teacher = target.logits(slice(a, b), self.teacher[: b - a])
        loss = torch.zeros((), dtype=self.sums.dtype, device=self.logits.device)
        for i in range(0, b - a, self.step):
            j = min(i + self.step, b - a)
            loss += self._block(self.logits[i:j], None if teacher is None else teacher[i:j], a + i, a + j)
        return loss

    def _block(self, s: Tensor, t: Tensor | None, a: int, b: int) -> Tensor:
        """Loss of positions a to b. Their student logits ``s`` become its gradient; ``t`` are a dense teacher's."""
        if self.fused:
            return self._block_fused(s, t, a, b)
        x, wide = self.terms, self.sums.dtype
        slope = self.head.slope(s)
        loss = torch.zeros((), dtype=wide, device=s.device)
        g = None
        if self.has_ce:
            ce, entropy, g = _cross_entropy(s, x.labels[a:b], x.target is not None, self.measure)
            weighed = (ce * x.ce_weight[a:b]).sum(dtype=wide)
            loss += weighed
            self.sums[3] += weighed
            self.sums[0] += ce.sum(dtype=wide)
            self.sums[2] += entropy.sum(dtype=wide)
            g.mul_(x.ce_weight[a:b].unsqueeze(-1))
        if x.target is not None:
            if isinstance(x.target, Dense):
                assert t is not None
                value, d = divergence(x.divergence, t, s, self.room[:, : b - a])
            else:
                value, d = x.target.span(a, b).loss(x.divergence, s)
            loss += (value * x.kd_weight[a:b]).sum(dtype=wide)
            self.sums[1] += value.sum(dtype=wide)
            torch.mul(d, x.kd_weight[a:b].unsqueeze(-1), out=s)
            if g is not None:
                s.add_(g)
        elif g is None:
            s.zero_()  # nothing that these positions weigh is there to pull
        if not isinstance(slope, float) or slope != 1.0:
            s.mul_(slope)
        return loss

    def _block_fused(self, s: Tensor, t: Tensor | None, a: int, b: int) -> Tensor:
        """The same by kernels that read each logit three times at most and write it once."""
        x, wide, kd = self.terms, self.sums.dtype, self.terms.kd_weight[a:b]
        slope = fused.Slope(self.head.scale, self.head.softcap)
        text = fused.Text(x.labels[a:b], x.ce_weight[a:b])
        if t is not None:
            made = fused.dense_(x.divergence, t, s, kd, text if self.has_ce else None, slope)
        elif isinstance(x.target, Sparse):
            y = x.target.span(a, b)
            sample = (y.row, y.ids, y.weights, y.entropy)
            made = fused.sampled_(x.divergence, sample, s, kd, text if self.has_ce else None, slope)
        else:
            made = fused.text_(s, text, slope)
        loss = torch.zeros((), dtype=wide, device=s.device)
        for i, (value, weight) in enumerate(((made.cross_entropy, text.weight), (made.divergence, kd))):
            if value is not None:
                weighed = (value * weight).sum(dtype=wide)
                loss += weighed
                self.sums[3] += 0 if i else weighed
                self.sums[i] += value.sum(dtype=wide)
        if made.entropy is not None:
            self.sums[2] += made.entropy.sum(dtype=wide)
        return loss


def _rows_apart(rows: int, columns: int, device: torch.device) -> Tensor:
    """(rows, columns) of float32. Rows a power of two apart would compete for the same places in a CPU's cache, which
    costs a product up to a fifth of its speed: they are moved apart by a little more."""
    spare = 64 if device.type == "cpu" and columns % 1024 == 0 else 0
    return torch.empty((rows, columns + spare), dtype=torch.float32, device=device)[:, :columns]


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a @ b in float32, whatever the factors."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def _cross_entropy(s: Tensor, labels: Tensor, keep: bool, measure: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(n,) cross-entropy, (n,) entropy (zero unless ``measure``), and the gradient: in the place of ``s``, or beside it
    with ``keep``."""
    place = labels.unsqueeze(-1)
    of_label = s.gather(-1, place).squeeze(-1)
    q, log_mass = softmax_(s.clone() if keep or measure else s)
    entropy = log_mass - (q * s).sum(-1) if measure else torch.zeros_like(log_mass)
    gradient = q.scatter_add_(-1, place, torch.full_like(place, -1, dtype=q.dtype))
    return log_mass - of_label, entropy, gradient if keep or not measure else s.copy_(gradient)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64
