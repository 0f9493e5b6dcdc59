"""Activation-aware scaling: channels that matter are made larger before they are rounded; the layer before makes up.

Lin et al. (AWQ, arXiv 2306.00978): where x W^T = (x / s) (W s)^T, a channel with large inputs gets a larger s, and so a
smaller share of the rounding error; 1 / s goes into the norm or the Linear that x comes from, so nothing is computed
that was not before. s = mean |x|^a, with the a of a grid that loses least of the output.

Shape letters: I input and O output features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.model.trunk import trunk_of
from pennyweight.quant.blocks import adding_to, first_of, inputs_of
from pennyweight.quant.formats import Format, decode, encode

_POWERS = [0.1 * i for i in range(1, 11)]
_UNCHANGED = 1e-3  # of what a block adds to a token
_PAIRS = (("up_proj", "down_proj"), ("v_proj", "o_proj"))  # where the first's rows are the second's columns


@dataclass
class _Group:
    """Linears that read the same ``source``'s output, by name; and the sum of |x| and x^T x over tokens."""

    source: nn.Module
    readers: dict[str, nn.Linear]
    size: Tensor = field(default_factory=lambda: torch.zeros(()))
    hessian: Tensor = field(default_factory=lambda: torch.zeros(()))


@torch.no_grad()
def scale_for_rounding(
    model: nn.Module,
    blocks: nn.ModuleList,
    batches: Iterable[dict[str, Any]],
    formats: dict[str, Format],
    progress: Callable[[int], None] = lambda n: None,
) -> int:
    """Scale the Linears named in ``formats``, in place, so that rounding loses less; how many were.

    A scaling that would change what a block computes, say because something else reads the same norm, is undone.
    """
    inputs, others = inputs_of(trunk_of(model), blocks, batches)
    names = {module: name for name, module in model.named_modules()}
    scaled = 0
    for i, block in enumerate(blocks):
        groups = _groups(block, {m: names[m] for m in block.modules() if names[m] in formats}, inputs[0], others[i][0])
        with ExitStack() as hooks:
            for group in groups:
                _watch(group, hooks)
            outputs = [first_of(block(x, **given)) for x, given in zip(inputs, others[i], strict=True)]
        again = partial(block, inputs[0], **others[i][0])
        for group in groups:
            scaled += _scale(group, formats, again, outputs[0], inputs[0])
        inputs = outputs
        progress(1)
    return scaled


def _groups(block: nn.Module, coded: dict[nn.Module, str], x: Tensor, given: dict[str, Any]) -> list[_Group]:
    """Norms with the coded Linears that read their output, and pairs of Linears with nothing but products between."""
    made: dict[int, nn.Module] = {}
    readers: dict[nn.Module, dict[str, nn.Linear]] = {}
    held: list[Any] = []  # so that no object takes another's identity

    def note_output(module: nn.Module, args: tuple, out: Any) -> None:
        made[id(out)] = module
        held.append(out)

    def note_input(module: nn.Module, args: tuple) -> None:
        if id(args[0]) in made:
            readers.setdefault(made[id(args[0])], {})[coded[module]] = module  # type: ignore[assignment]

    with ExitStack() as hooks:
        for m in block.modules():
            weight = getattr(m, "weight", None)
            if m in coded:
                hooks.callback(m.register_forward_pre_hook(note_input).remove)
            elif isinstance(weight, Tensor) and weight.ndim == 1:
                hooks.callback(m.register_forward_hook(note_output).remove)
        block(x, **given)
    groups = [_Group(source, linears) for source, linears in readers.items()]
    for parent in block.modules():
        for first, second in _PAIRS:
            a, b = getattr(parent, first, None), getattr(parent, second, None)
            if a in coded and b in coded and a.out_features == b.in_features:  # type: ignore[union-attr]
                groups.append(_Group(a, {coded[b]: b}))  # type: ignore[arg-type, index, dict-item]
    return groups


def _watch(group: _Group, hooks: ExitStack) -> None:
    linear = next(iter(group.readers.values()))
    group.size = torch.zeros(linear.in_features, device=linear.weight.device)
    group.hessian = torch.zeros(linear.in_features, linear.in_features, device=linear.weight.device)

    def add(module: nn.Module, args: tuple) -> None:
        group.size.add_(args[0].flatten(0, -2).float().abs().sum(0))

    hooks.callback(linear.register_forward_pre_hook(add).remove)
    hooks.callback(linear.register_forward_pre_hook(adding_to(group.hessian)).remove)


def _scale(group: _Group, formats: dict[str, Format], again: Callable[[], Any], want: Tensor, x: Tensor) -> int:
    """Scale a group by its best power; the number of its Linears, 0 where none helps or the block would change."""
    if not bool(group.size.min() > 0):
        return 0
    best, least = None, _lost(group, formats, torch.ones_like(group.size))
    for power in _POWERS:
        scale = group.size.pow(power)
        scale = scale / (scale.max() * scale.min()).sqrt()
        lost = _lost(group, formats, scale)
        if lost < least:
            best, least = scale, lost
    if best is None:
        return 0
    for shift in (0.0, 1.0):  # Gemma's norms multiply by 1 + weight
        kept = [p.clone() for p in _parts(group)]
        _apply(group, best, shift)
        # Token by token, against what the block adds: some tokens are enormous, and would hide all others.
        off, added = (first_of(again()) - want).norm(dim=-1), (want - x).norm(dim=-1)
        if bool((off <= _UNCHANGED * added).all()):
            return len(group.readers)
        for p, was in zip(_parts(group), kept, strict=True):
            p.copy_(was)
    return 0


def _lost(group: _Group, formats: dict[str, Format], scale: Tensor) -> float:
    """Squared error of the outputs, over the tokens seen, of rounding with the columns scaled."""
    total = 0.0
    for name, linear in group.readers.items():
        weight = linear.weight.float()
        off = decode(encode(weight * scale, formats[name], search=True)) / scale - weight
        total += float(((off @ group.hessian) * off).sum(dtype=torch.float64))
    return total


def _parts(group: _Group) -> list[Tensor]:
    source = [p for p in (group.source.weight, getattr(group.source, "bias", None)) if isinstance(p, Tensor)]
    return [*source, *(m.weight for m in group.readers.values())]


def _apply(group: _Group, scale: Tensor, shift: float) -> None:
    before: Any = group.source.weight
    before.add_(shift).div_(scale if before.ndim == 1 else scale.unsqueeze(-1)).sub_(shift)
    bias = getattr(group.source, "bias", None)
    if isinstance(bias, Tensor):
        bias.div_(scale)
    for linear in group.readers.values():
        linear.weight.mul_(scale)
