"""Bytes that a weight takes in a low-bit format, by arithmetic alone: what ``formats.size`` says, without torch."""

from __future__ import annotations

import math

_ROW = -1
_STORED: dict[str, tuple[int, tuple[int, int], int, int]] = {
    "mxfp8": (8, (1, 32), 1, 0),
    "int8": (8, (1, 0), 2, 0),
    "fp8_row": (8, (1, _ROW), 2, 0),
    "fp8_block": (8, (128, 128), 2, 0),
    "nvfp4": (4, (1, 16), 1, 4),
    "int4": (4, (1, 0), 2, 0),
    "mxfp4": (4, (1, 32), 1, 0),
    "int3": (3, (1, 0), 2, 0),
    "ternary": (2, (1, 0), 2, 0),
}
"""Bits of an element; rows and columns that share a scale (0: by ``group``); bytes of a scale, and of one over all."""

STORED = tuple(_STORED)
"""Names of the formats that a copy can be stored in."""

OF_EXPERTS = ("int8", "int4", "int3", "ternary", "fp8_row")
"""Those of them in which transformers opens a mixture of experts; in DeepSeek's layout fp8_block, too."""


def near_divisor(columns: int, group: int) -> int | None:
    """The divisor of ``columns`` that is nearest to ``group``, from half to twice as many; None where there is none."""
    if columns % group == 0:
        return group
    near = [d for d in range(-(-group // 2), min(columns, 2 * group) + 1) if columns % d == 0]
    return min(near, key=lambda d: max(d, group) / min(d, group), default=None)


def stored_bytes(fmt: str, rows: int, columns: int, group: int = 32, scale: int | None = None) -> int | None:
    """Bytes of a weight of that shape in a low-bit copy; None where the format's blocks do not divide it.

    ``scale``: bytes of a scale, where they are not those of compressed-tensors.
    """
    bits, (high, wide), of_scale, over_all = _STORED[fmt]
    of_scale = scale or of_scale
    if wide == 0:  # integers
        wide = near_divisor(columns, group) or columns
        codes = rows * math.ceil(columns * bits / 32) * 4  # each row in whole words
    elif wide == _ROW:
        wide, codes = columns, rows * columns * bits // 8
    elif rows % high or columns % wide:
        return None
    else:
        codes = rows * columns * bits // 8
    return codes + (rows // high) * (columns // wide) * of_scale + over_all
