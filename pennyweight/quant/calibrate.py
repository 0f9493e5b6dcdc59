"""Weights rounded with an eye on what goes through them: GPTQ, block by block of a decoder.

Shape letters: N rows (tokens), I input and O output features, G columns that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.model.trunk import trunk_of
from pennyweight.quant.blocks import adding_to, first_of, inputs_of
from pennyweight.quant.formats import Coded, Format, codes_of, decode, elements, encode, spread

_DAMPING = 0.01  # of the mean of the Hessian's diagonal, added to it: keeps its inverse from blowing up
_COLUMNS = 128  # worked on together; the rest of the weight is corrected once for all of them


@torch.no_grad()
def gptq(weight_OI: Tensor, hessian_II: Tensor, to: Format) -> tuple[Coded, Tensor]:
    """Codes of a weight that lose little of its output, made column by column (Frantar et al., arXiv 2210.17323); and
    (O, I) float32, what each of them was rounded from.

    What rounding a column leaves out is made up for by those after it, as the inputs' second moments say; the columns
    that matter most come first. Scales are chosen before that, so as to lose little of what matters.

    Args:
        hessian_II: the sum of x x^T over inputs x, float32 or float64; used up.
        to: a format whose scales are one for each row and a run of columns.
    """
    assert to.tile[0] == 1, "scales of single rows only"
    matters = hessian_II.diagonal().clone()
    hessian_II.diagonal()[matters == 0] = 1.0  # inputs never seen, as of an expert not asked: rounded to the nearest
    hessian_II.diagonal().add_(_DAMPING * hessian_II.diagonal().mean())
    first = encode(weight_OI, to, search=matters.float().clamp(min=float(matters.mean()) * 1e-6 or 1.0))
    order = matters.argsort(descending=True, stable=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian_II[order][:, order].double()))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    w = weight_OI.detach().float()[:, order]
    scale = spread(first.scale * first.whole, to.tile, weight_OI.shape)[:, order]
    values, rounded_from, columns = torch.empty_like(w), torch.empty_like(w), w.shape[1]
    for a in range(0, columns, _COLUMNS):
        b = min(a + _COLUMNS, columns)
        errors = torch.empty_like(w[:, a:b])
        for j in range(a, b):
            rounded_from[:, j] = w[:, j]
            values[:, j] = elements(w[:, j] / scale[:, j], to)
            errors[:, j - a] = (w[:, j] - values[:, j] * scale[:, j]) / upper[j, j]
            w[:, j:b] -= errors[:, j - a : j - a + 1] * upper[j, j:b]
        w[:, b:] -= errors @ upper[a:b, b:]
    back = order.argsort()
    return Coded(codes_of(values[:, back], to), first.scale, to, first.whole), rounded_from[:, back]


@torch.no_grad()
def calibrated(
    model: nn.Module,
    blocks: nn.ModuleList,
    batches: Iterable[dict[str, Any]],
    formats: dict[str, Format],
    progress: Callable[[int], None] = lambda n: None,
) -> tuple[dict[str, Coded], dict[str, Tensor]]:
    """GPTQ codes of the Linears named in ``formats``, and what they were rounded from; the model's weights become what
    the codes stand for.

    Each block sees what the blocks before it give once they are coded. Only one block's inputs are held, and the
    model runs each block twice.

    Args:
        blocks: the decoder's.
        batches: keyword arguments of the model's forward, few and without labels.
    """
    inputs, others = inputs_of(trunk_of(model), blocks, batches)
    names = {module: name for name, module in model.named_modules()}
    coded: dict[str, Coded] = {}
    rounded_from: dict[str, Tensor] = {}
    for i, block in enumerate(blocks):
        linears = {names[m]: m for m in block.modules() if names[m] in formats}
        widths: dict[str, Any] = {name: m.weight for name, m in linears.items()}
        hessians = {n: w.new_zeros((w.shape[1], w.shape[1]), dtype=torch.float32) for n, w in widths.items()}
        with ExitStack() as hooks:
            for name, m in linears.items():
                hooks.callback(m.register_forward_pre_hook(adding_to(hessians[name])).remove)
            for x, given in zip(inputs, others[i], strict=True):
                first_of(block(x, **given))
        for name, m in linears.items():
            coded[name], rounded_from[name] = gptq(m.weight, hessians[name], formats[name])  # type: ignore[arg-type]
            m.weight.copy_(decode(coded[name]))  # type: ignore[operator]
            progress(0)  # of a block one Linear more: who watches may stop it
        inputs = [first_of(block(x, **given)) for x, given in zip(inputs, others[i], strict=True)]
        progress(1)
    return coded, rounded_from
