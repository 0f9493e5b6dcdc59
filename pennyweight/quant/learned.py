"""Weights that learn to be rounded: a Linear computes with what its weight is rounded to, and learns through it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.quant.formats import Coded, decode, elements, encode, over_tiles, spread, stored_scale


class RoundedLinear(nn.Linear):
    """An nn.Linear, of the same parameters, whose weight is rounded to its codes wherever it is used.

    The gradient goes straight through the rounding (Bengio et al., arXiv 1308.3432), so that training moves the weight
    until its codes do well. Scales are trained, too, as in learned step size quantisation (Esser et al., arXiv
    1902.08153), unless they are powers of two: ``stretch`` is the logarithm of what each has grown by.
    """

    start: Coded
    stretch: nn.Parameter | None
    rounded: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        weight = self.rounded
        if weight is None:
            weight = _Straight.apply(self.weight, self.stretch, self.start)
        return nn.functional.linear(input, weight.to(input.dtype), self.bias)

    @torch.no_grad()
    def pull(self, share: float) -> None:
        """Move the weight by ``share`` of the way to what it is rounded to."""
        self.weight.lerp_(decode(self.coded()), share)

    @torch.no_grad()
    def coded(self) -> Coded:
        """The weight as it would be written now."""
        scale = _stretched(self.start, self.stretch)
        return encode(self.weight, self.start.format, scale=scale, whole=self.start.whole)


def _stretched(start: Coded, stretch: Tensor | None) -> Tensor:
    return start.scale if stretch is None else stored_scale(start.scale * stretch.float().exp(), start.format)


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, stretch: Tensor | None, start: Coded) -> Tensor:
        f = start.format
        scale = spread(_stretched(start, stretch) * start.whole, f.tile, weight.shape)
        ratio = weight.float() / scale
        values = elements(ratio, f)
        rounded = values * scale
        if stretch is not None:  # d rounded / d log scale: what was rounded away, or all of it where it saturates
            inside = ratio.abs() <= f.largest * (1 + 2.0**-20)  # the largest of a tile is, whichever way it was divided
            ctx.save_for_backward(torch.where(inside, values - ratio, values).mul_(scale))
        ctx.tile = f.tile
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (g,) = grads
        of_scales = over_tiles(g * ctx.saved_tensors[0], ctx.tile, "sum") if ctx.needs_input_grad[1] else None
        return g, of_scales, None


def learn_to_be_rounded(model: nn.Module, starts: dict[str, Coded]) -> dict[str, RoundedLinear]:
    """Make the named Linears RoundedLinears, in place, with the scales of ``starts``; them by name."""
    swapped = {}
    for name, start in starts.items():
        module = model.get_submodule(name)
        assert type(module) is nn.Linear, f"{name} is no plain Linear"
        module.__class__ = RoundedLinear
        module.start = start  # type: ignore[assignment]
        fixed = start.format.scale.startswith("pow2")
        module.register_parameter("stretch", None if fixed else nn.Parameter(torch.zeros_like(start.scale)))
        swapped[name] = module
    return swapped


@contextmanager
def rounded_once(model: nn.Module) -> Iterator[None]:
    """Within it, weights that learn to be rounded are what they are rounded to now, and learn nothing."""
    layers = [m for m in model.modules() if isinstance(m, RoundedLinear)]
    for m in layers:
        m.rounded = decode(m.coded())
    try:
        yield
    finally:
        for m in layers:
            m.rounded = None


def settled(layers: dict[str, RoundedLinear]) -> dict[str, Coded]:
    """Codes of what has learnt to be rounded; the layers become plain Linears again, of the weights as they are."""
    codes = {name: layer.coded() for name, layer in layers.items()}
    for layer in layers.values():
        del layer.start, layer.stretch
        layer.__class__ = nn.Linear  # type: ignore[assignment]
    return codes
