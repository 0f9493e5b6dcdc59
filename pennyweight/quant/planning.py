"""Which Linear gets which format, within a budget of bytes if there is one; and what a copy will take."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from pennyweight.errors import ModelError, RecipeError
from pennyweight.quant.experts import take_apart
from pennyweight.quant.export import formats_of, linears_of
from pennyweight.quant.footprint import near_divisor
from pennyweight.quant.formats import Format
from pennyweight.quant.sensitivity import Costs, cheapest

_ENTRY = 75  # bytes of a tensor's dtype, shape and place in the header of a safetensors file

IN_A_MIXTURE = {
    "int8": ("int8", 1.0),
    "int4 in half groups": ("int4", 0.5),
    "int4": ("int4", 1.0),
    "int4 in double groups": ("int4", 2.0),
    "int3": ("int3", 1.0),
}
"""What each Linear may get in a mixture: a format, and its group as a share of the one asked for, where that divides
its width."""


def candidates(
    model: nn.Module, labels: Mapping[str, tuple[str, float]], group: int, layout: str
) -> dict[str, dict[str, Format]]:
    """For each Linear the formats that it may get, by label.

    Args:
        labels: as ``IN_A_MIXTURE``.

    Raises:
        ModelError: a format fits none of them, or several are asked for of a mixture of experts.
    """
    if len(labels) > 1 and take_apart(model):
        raise ModelError(
            f"a {type(model).__name__} is a mixture of experts, of which transformers opens copies in one format only; "
            "give a --format other than mixed"
        )
    of = {label: formats_of(model, fmt, group, layout) for label, (fmt, share) in labels.items() if share == 1.0}
    linears = linears_of(model)
    found = {name: {label: f[name] for label, f in of.items() if name in f} for name in linears}
    others = [(label, fmt, max(1, int(share * group))) for label, (fmt, share) in labels.items() if share != 1.0]
    for label, fmt, near in others:
        for name, like in of[fmt].items():
            wide = near_divisor(linears[name].in_features, near)
            if wide and wide != like.tile[1]:
                found[name][label] = like.grouped(wide)
    return found


def planned(
    model: nn.Module, wanted: dict[str, dict[str, Format]], found: Costs, budget: int | None
) -> tuple[dict[str, Format], dict[str, Any]]:
    """The format of each Linear that is coded, and what the copy will be: ``bytes``, ``kl`` and number of ``linears``.

    Args:
        wanted: the formats that each Linear may get; the only one, where there is no ``budget``.
        budget: bytes of the weight file, at most.

    Raises:
        RecipeError: nothing fits the budget, or all does.
    """
    linears = linears_of(model)
    kept = {name: 2 * m.weight.numel() for name, m in linears.items()}
    others = 2 * sum(p.numel() for p in model.parameters()) - sum(kept.values()) + _index(model, linears)
    if budget is None:
        labels = {name: next(iter(of), "") for name, of in wanted.items()}
    else:
        labels = _within(budget - others, others, kept, found)
    chosen = {name: label for name, label in labels.items() if label}
    total = others + sum(found.bytes[n, label] if label else kept[n] for n, label in labels.items())
    counts = {label: list(chosen.values()).count(label) for label in sorted(set(chosen.values()))}
    facts = {"bytes": total, "kl": found.of_all(chosen).to_json(), "linears": counts}
    return {name: wanted[name][label] for name, label in chosen.items()}, facts


def _index(model: nn.Module, coded: Iterable[str]) -> int:
    """Bytes that name the tensors of a file, where a coded Linear has three for one; a little more than they take."""
    once = sum(len(name) + _ENTRY for name in model.state_dict())
    return once + sum(2 * (len(name) + len(".weight_packed") + _ENTRY) for name in coded)


def _within(left: int, others: int, kept: dict[str, int], found: Costs) -> dict[str, str]:
    labels = cheapest(found, kept, left)
    if labels is None:
        least = others + sum(min(b for (n, _), b in found.bytes.items() if n == name) for name in kept)
        raise RecipeError(
            f"the smallest copy takes {least:,} bytes, more than the budget of {left + others:,}; {others:,} of them "
            "are embeddings, output head and norms in 16 bits, and names; give a larger --budget"
        )
    if not any(labels.values()):
        raise RecipeError(
            f"in 16 bits this model takes {others + sum(kept.values()):,} bytes, within the budget of "
            f"{left + others:,}: there is nothing to quantise; give a smaller --budget"
        )
    return labels


def bytes_of(text: str | int) -> int:
    """``1.2GB`` -> 1,200,000,000; kB, MB, GB and TB are powers of 1,000, KiB and so on of 1,024.

    Raises:
        RecipeError: it cannot be read.
    """
    found = re.fullmatch(r"\s*([0-9.]+)\s*(?:([kKMGT])(i?)[bB]?|[bB])?\s*", str(text))
    try:
        number = float(found[1]) if found else math.nan
    except ValueError:
        number = math.nan
    if found is None or not number > 0:
        raise RecipeError(f"cannot read the budget {text!r}; write it like 1.2GB, 800MB or 5000000")
    power = " KMGT".index((found[2] or " ").upper())
    return int(number * (1024 if found[3] else 1000) ** power)
