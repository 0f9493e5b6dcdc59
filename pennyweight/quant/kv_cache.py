"""Keys and values of past tokens in 8 bits: int8 or E4M3, with a bfloat16 scale for every head of every token.

A head of D numbers takes D + 2 bytes instead of 2 D, and lies in the cache as these bytes, so whatever the cache does
with rows and tokens (a window that slides, rows that leave) it does to codes and scales together. What attention reads
is decoded at every step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from pennyweight.errors import ModelError, RecipeError
from pennyweight.quant.formats import E4M3, Coded, Format, decode, encode

KV_FORMATS = {"int8": Format("int8", 8, (1, 0), "bfloat16"), "fp8": Format("fp8", E4M3, (1, 0), "bfloat16")}


def packed(x: Tensor, to: Format) -> Tensor:
    """(..., D) numbers -> (..., D + 2) bytes: codes, then their scale."""
    coded = encode(x.flatten(0, -2), to)
    scale = coded.scale.bfloat16().view(torch.uint8)
    return torch.cat([coded.codes.view(torch.uint8), scale], -1).view(*x.shape[:-1], -1)


def unpacked(x: Tensor, of: Format, dtype: torch.dtype) -> Tensor:
    """(..., D + 2) bytes -> (..., D) numbers."""
    rows = x.flatten(0, -2)
    scale = rows[:, -2:].contiguous().view(torch.bfloat16).float()
    codes = rows[:, :-2].contiguous()
    codes = codes.view(torch.int8) if isinstance(of.element, int) else codes
    return decode(Coded(codes, scale, of)).to(dtype).view(*x.shape[:-1], -1)


class _Packed:
    """What a layer of a cache keeps are bytes, and what it gives are numbers."""

    format: Format

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        given = packed(key_states, self.format), packed(value_states, self.format)
        keys, values = super().update(*given, *args, **kwargs)  # type: ignore[misc]
        return unpacked(keys, self.format, key_states.dtype), unpacked(values, self.format, value_states.dtype)


class _Growing(_Packed, DynamicLayer):
    pass


class _Sliding(_Packed, DynamicSlidingWindowLayer):
    pass


_KINDS: dict[type, type] = {DynamicLayer: _Growing, DynamicSlidingWindowLayer: _Sliding}


def low_cache(config: Any, fmt: str) -> DynamicCache:
    """An empty cache for a model of that ``config``, in ``int8`` or ``fp8``.

    Raises:
        RecipeError: no such format.
        ModelError: the model remembers something else than keys and values.
    """
    if fmt not in KV_FORMATS:
        raise RecipeError(f"no format of a KV cache is named {fmt!r}; use {' or '.join(KV_FORMATS)}")
    cache = DynamicCache(config=config)
    cache.layers = [_kept_low(layer, config, fmt) for layer in cache.layers]
    return cache


def _kept_low(layer: Any, config: Any, fmt: str) -> Any:
    """An empty layer of the same kind that keeps bytes."""
    kind = _KINDS.get(type(layer))
    if kind is None:
        raise ModelError(
            f"a {config.model_type} remembers more than keys and values ({type(layer).__name__}), which are not kept "
            "in 8 bits; leave --kv-cache out"
        )
    low: Any = object.__new__(kind)
    low.__dict__.update(layer.__dict__, format=KV_FORMATS[fmt])
    return low


def bytes_of(cache: Any) -> int:
    """Bytes of the keys and values that it holds now."""
    held = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.numel() * t.element_size() for t in held)
