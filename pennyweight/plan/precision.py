"""What products of a training are in: as the command line says, else as the recipe does. No torch."""

from __future__ import annotations

from pennyweight.errors import RecipeError

TRAINABLE = ("fp32", "bf16", "fp8", "fp4")
"""What products of a training may be in."""

_OF_LINEARS = {"fp8": "fp8", "fp8_v3": "fp8", "fp8_tensor": "fp8", "mxfp8": "fp8", "nvfp4": "fp4"}


def checked(precision: str) -> str:
    """The same.

    Raises:
        RecipeError: it is none that a training can be in.
    """
    if precision not in TRAINABLE:
        raise RecipeError(f"--precision {precision} is none of {', '.join(TRAINABLE)}; name one of them")
    return precision


def of_linears(setting: str) -> str:
    """Of a recipe's ``train.precision``; empty where that is ``full``, which leaves it to ``compute.dtype``."""
    return _OF_LINEARS.get(setting, "")


def plain(dtype: str, has_bfloat16: bool = True) -> str:
    """Of a recipe's ``compute.dtype``; ``has_bfloat16``: whether the machine multiplies it, which ``auto`` asks."""
    return "fp32" if dtype == "float32" or (dtype == "auto" and not has_bfloat16) else "bf16"
