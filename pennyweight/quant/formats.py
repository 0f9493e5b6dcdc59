"""Integer weight formats: encode, decode, size. Pure tensors.

Symmetric integers of b bits, codes -2**(b-1) .. 2**(b-1) - 1, one scale for each group of weights along the input
dimension (or for a whole output row). Rounded to nearest even; zero groups get scale 1 and codes 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = {"int8": 8, "int4": 4}

_CLIPS = [1.0 - 0.05 * i for i in range(9)]  # shares of the largest magnitude that a scale may reach


@dataclass(frozen=True, slots=True)
class Coded:
    """A quantised weight: ``codes`` (rows, columns) int8 and ``scale`` (rows, groups) in its storage dtype."""

    codes: Tensor
    scale: Tensor
    bits: int


def encode(weight: Tensor, bits: int, group: int | None, scale_dtype: torch.dtype) -> Coded:
    """Quantise ``weight`` (rows, columns) to ``bits`` with one scale per ``group`` columns (None: per row).

    The scale of each group is the one of a small grid, from the largest magnitude down to 0.6 of it, that leaves
    the least squared error once it is itself rounded to ``scale_dtype``.

    Raises:
        ValueError: columns are not a multiple of ``group``.
    """
    rows, columns = weight.shape
    width = group or columns
    if columns % width:
        raise ValueError(f"{columns} columns do not divide into groups of {width}")
    w = weight.detach().float().reshape(rows, columns // width, width)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    largest = w.abs().amax(-1, keepdim=True)
    best_error = torch.full_like(largest, float("inf"))
    best_codes = torch.zeros_like(w)
    best_scale = torch.ones_like(largest)
    for clip in _CLIPS:
        scale = (largest * clip / high).to(scale_dtype).float()
        scale = torch.where(scale > 0, scale, 1.0)
        codes = (w / scale).round().clamp(low, high)
        error = (codes * scale - w).square().sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_codes = torch.where(better, codes, best_codes)
        best_scale = torch.where(better, scale, best_scale)
    return Coded(best_codes.reshape(rows, columns).to(torch.int8), best_scale.squeeze(-1).to(scale_dtype), bits)


def decode(coded: Coded) -> Tensor:
    """The float32 weight that ``coded`` stands for."""
    rows, columns = coded.codes.shape
    groups = coded.scale.shape[1]
    w = coded.codes.float().reshape(rows, groups, columns // groups) * coded.scale.float().unsqueeze(-1)
    return w.reshape(rows, columns)


def size(rows: int, columns: int, bits: int, group: int | None, scale_bytes: int = 2) -> int:
    """Bytes of a coded weight: packed codes and scales."""
    return rows * (-(-columns * bits // 32) * 4 + (columns // group if group else 1) * scale_bytes)
