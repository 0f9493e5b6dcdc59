"""What low-bit weights will cost in KL, told before anything is written, and the mixture of formats that costs least.

KL to the model itself is, to second order, half the square of the change of log-probabilities that the model itself
expects: for a sample of T tokens, labels y drawn from the model, and a change D of the weights,

    KL of the sample = 1/2 E <G, D>^2,   G = d/dW sum_t log p(y_t)

(the Fisher information; Martens, arXiv 1412.1193). One backward pass a sample gives G for every layer, and the inner
product with the change that each format makes of each layer is all that is kept of it. Rounding errors of different
layers have nothing to do with each other, so their costs add up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pennyweight.data.pack import Batch, collate
from pennyweight.model.head import forward_hidden, head_of
from pennyweight.quant.formats import Format, decode, encode, size
from pennyweight.records import Encoded, Interval

_TILE_ENTRIES = 1 << 24


@dataclass(frozen=True)
class Costs:
    """For each Linear and each of its formats: ``pulls`` (samples,) of <G, D>, and bytes; ``tokens`` (samples,)."""

    pulls: dict[tuple[str, str], np.ndarray]
    bytes: dict[tuple[str, str], int]
    tokens: np.ndarray

    def kl(self, name: str, fmt: str) -> float:
        """Nats a token that one Linear in one format costs."""
        return float(0.5 * np.square(self.pulls[name, fmt]).sum() / self.tokens.sum())

    def of_all(self, chosen: dict[str, str]) -> Interval:
        """Nats a token that all of them cost together, with a 95 % interval over samples (normal, of the mean)."""
        each = 0.5 * sum((np.square(self.pulls[item]) for item in chosen.items()), np.zeros_like(self.tokens))
        mean = each.sum() / self.tokens.sum()
        spread = 1.96 * np.std(each - mean * self.tokens, ddof=1) / np.sqrt(len(each)) / self.tokens.mean()
        return Interval(
            float(mean), float(max(0.0, mean - spread)), float(mean + spread), f"normal, {len(each)} samples"
        )


def costs(
    model: Any,
    formats: dict[str, dict[str, Format]],
    samples: Sequence[Encoded],
    pad_id: int,
    seed: int,
    progress: Callable[[int], None] = lambda n: None,
) -> Costs:
    """Measure what each Linear would cost in each of its ``formats`` (name -> format's name -> format).

    Args:
        model: a causal LM in float32; left as it was.
        samples: texts like those that it will see; its own are best. One backward pass each.
        seed: of the labels that are drawn from the model.
    """
    linears: dict[str, nn.Linear] = {name: model.get_submodule(name) for name in formats}
    changes = {  # in two bytes, since there are as many of them as formats
        (name, label): decode(encode(m := linears[name].weight, f, search=True)).sub_(m.detach()).bfloat16()
        for name, of_name in formats.items()
        for label, f in of_name.items()
    }
    pulls = {item: np.zeros(len(samples)) for item in changes}
    drawn = torch.Generator(device=next(model.parameters()).device).manual_seed(seed)
    wanted = {p: p.requires_grad for p in model.parameters()}
    for p in wanted:
        p.requires_grad_(False)
    for m in linears.values():
        m.weight.requires_grad_(True)
    try:
        for i, sample in enumerate(samples):
            grads = _grads(model, collate([[sample]], pad_id), [m.weight for m in linears.values()], drawn)
            of_name = dict(zip(linears, grads, strict=True))
            for (name, label), change in changes.items():
                pulls[name, label][i] = float((of_name[name].float() * change).sum(dtype=torch.float64))
            progress(1)
    finally:
        for p, was in wanted.items():
            p.requires_grad_(was)
    tokens = np.array([len(s.loss_positions) for s in samples], float)
    bytes_ = {
        (n, label): size(linears[n].out_features, linears[n].in_features, f)
        for n, of in formats.items()
        for label, f in of.items()
    }
    return Costs(pulls, bytes_, tokens)


def _grads(model: Any, batch: Batch, weights: list[Tensor], drawn: torch.Generator) -> tuple[Tensor, ...]:
    """d/dW of the log-probability of labels drawn from the model, at the batch's loss positions."""
    device = weights[0].device
    hidden = forward_hidden(model, batch.ids.to(device), batch.positions.to(device))
    rows = hidden.flatten(0, 1)[batch.selected.to(device)]
    head, slopes = head_of(model), []
    for part in rows.detach().split(max(16, _TILE_ENTRIES // head.weight.shape[0])):
        logits = head.logits(part)
        p = torch.softmax(logits, -1)
        labels = torch.multinomial(p, 1, generator=drawn)
        slope = p.neg_().scatter_add_(-1, labels, torch.ones_like(labels, dtype=p.dtype)) * head.slope(logits)
        slopes.append(slope @ head.weight.detach().to(slope.dtype))
    # Experts that no token went to have no gradient.
    return torch.autograd.grad(rows, weights, torch.cat(slopes).to(rows.dtype), materialize_grads=True)


def cheapest(found: Costs, kept: dict[str, int], budget: int) -> dict[str, str] | None:
    """A format for each Linear, of least KL in all, within ``budget`` bytes; None where nothing fits.

    Bytes are spent one step at a time where they buy most, along each Linear's lower convex hull: the optimum but for
    what is left at the end, which then goes to whatever still fits.

    Args:
        kept: bytes of each Linear left as it is, which costs no KL; its format is then "".
    """
    choices = {
        name: sorted(
            [(found.bytes[n, label], found.kl(n, label), label) for n, label in found.bytes if n == name]
            + [(whole, 0.0, "")]
        )
        for name, whole in kept.items()
    }
    at = {name: options[0] for name, options in choices.items()}
    left = budget - sum(o[0] for o in at.values())
    if left < 0:
        return None
    while True:
        steps = [
            ((now[1] - o[1]) / (o[0] - now[0]), name, o)
            for name, now in at.items()
            for o in choices[name]
            if o[0] > now[0] and o[1] < now[1] and o[0] - now[0] <= left
        ]
        if not steps:
            return {name: option[2] for name, option in at.items()}
        _, name, option = max(steps, key=lambda s: (s[0], s[1]))
        left -= option[0] - at[name][0]
        at[name] = option
