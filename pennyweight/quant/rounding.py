"""Weights to codes: to the nearest, or with an eye on what goes through the model; and recovered by training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.model.loaded import blocks_of
from pennyweight.quant.awq import scale_for_rounding
from pennyweight.quant.calibrate import calibrated
from pennyweight.quant.formats import FORMATS, Coded, Format, decode, encode
from pennyweight.quant.learned import learn_to_be_rounded, settled
from pennyweight.records import ROUNDED
from pennyweight.settings import Quantize, Schedule

METHODS = ("absmax", "nearest", "awq", "gptq")


@dataclass(frozen=True)
class Recovery:
    """How a copy is taught: steps, samples a step and in one forward pass, learning rate (None: by the codes' scales),
    seed of the order.

    ``live``: the parent stays in memory and gives its whole distribution at every step; otherwise an unbiased sample of
    it is kept beforehand, in a few dozen bytes a token. ``on_policy``: share of the steps whose texts the copy writes
    itself, as it is by then; with a live parent only.
    """

    steps: int
    batch: int
    micro_batch: int | None = None
    lr: float | None = None
    seed: int = 0
    live: bool = False
    on_policy: float = 0.0


def copies_of(q: Quantize, s: Schedule) -> list[str]:
    """Names of the low-bit copies: one a format, and one that is rounded only beside each that is taught."""
    return [*q.formats, *(f"{fmt}{ROUNDED}" for fmt in q.formats if recovery_of(fmt, q, s, 0))]


def recovery_of(name: str, q: Quantize, s: Schedule, seed: int) -> Recovery | None:
    """How a copy of this name is taught beside a student of this schedule; None where it is not: 8 bits lose next to
    nothing."""
    taught = not name.endswith(ROUNDED) and FORMATS[name].element_bits < 8
    steps = round(q.recover * s.steps) if taught else 0
    return Recovery(steps, s.batch, s.micro_batch, q.lr, seed) if steps else None


@torch.no_grad()
def rounded_to(
    model: nn.Module,
    formats: dict[str, Format],
    method: str = "nearest",
    batches: Iterable[dict[str, Any]] = (),
    progress: Callable[[int], None] = lambda n: None,
) -> tuple[dict[str, Coded], dict[str, Tensor]]:
    """Codes of the Linears named in ``formats``, and what they were rounded from, by name; the model's weights become
    what the codes stand for.

    Args:
        method: ``absmax``: each weight by itself, scales from the largest magnitudes. ``nearest``: likewise, with
            scales of the least squared error. ``awq``: that, of weights scaled first by ``awq.scale_for_rounding``.
            ``gptq``: as ``calibrate.gptq``, where a format has scales for single rows; the others to the nearest.
        batches: keyword arguments of the model's forward, for ``awq`` and ``gptq``.
    """
    if method == "awq":
        scale_for_rounding(model, blocks_of(model)[1], batches, formats, progress)
    by_row = {name: f for name, f in formats.items() if f.tile[0] == 1} if method == "gptq" else {}
    codes: dict[str, Coded] = {}
    rounded_from: dict[str, Tensor] = {}
    for name, f in formats.items():
        if name not in by_row:
            module = model.get_submodule(name)
            rounded_from[name] = module.weight.detach().clone()  # type: ignore[operator]
            codes[name] = encode(module.weight, f, search=method != "absmax")  # type: ignore[arg-type]
            module.weight.copy_(decode(codes[name]))  # type: ignore[operator]
    if by_row:
        calibrated_codes, before = calibrated(model, blocks_of(model)[1], batches, by_row, progress)
        codes |= calibrated_codes
        rounded_from |= before
    return {name: codes[name] for name in formats}, rounded_from


def coded_for_storage(
    model: nn.Module,
    formats: dict[str, Format],
    storage: torch.dtype,
    method: str = "nearest",
    batches: Iterable[dict[str, Any]] = (),
    recover: Callable[[dict[str, Coded]], object] | None = None,
    vectors: torch.dtype | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> dict[str, Coded]:
    """As ``rounded_to``; afterwards the model, in its own dtype, is what will be read from the file.

    Args:
        storage: dtype of what is not coded; ``vectors`` of what is no matrix, where that is another.
        recover: trains the model in place, given the codes that it begins with; its Linears then compute with rounded
            weights (``RoundedLinear``), which start from what was rounded.
    """
    codes, rounded_from = rounded_to(model, formats, method, batches, progress)
    if recover is not None:
        with torch.no_grad():
            for name, weight in rounded_from.items():
                model.get_submodule(name).weight.copy_(weight)  # type: ignore[operator]
        rounded_from.clear()
        layers = learn_to_be_rounded(model, codes)
        recover(codes)
        codes = settled(layers)
        model.eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            linear = name.removesuffix(".weight")
            dtype = storage if p.ndim >= 2 or vectors is None else vectors
            p.copy_(decode(codes[linear]) if linear in codes and linear != name else p.to(dtype))
    return codes
