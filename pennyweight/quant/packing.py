"""Encoded weights as compressed-tensors stores them: the tensors of one Linear, and what config.json says of them.

The layouts are those of the library of that name, which transformers and vLLM read. One thing is easily got wrong: the
scale over all of an NVFP4 weight divides there, and multiplies here and in ModelOpt.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import Tensor

from pennyweight.quant.footprint import near_divisor
from pennyweight.quant.formats import E2M1, FORMATS, Coded, Format

WRITTEN = ("int8", "int4", "int3", "ternary", "fp8_block", "fp8_row", "mxfp8", "mxfp4", "nvfp4")
"""Formats that compressed-tensors stores."""

IN_DEEPSEEKS = ("fp8_block", "fp8_block_pow2")
"""Formats that DeepSeek's layout stores."""


def storable(fmt: str, shape: tuple[int, int], group: int, scale: torch.dtype) -> Format | None:
    """The format of that name for a weight of that shape (rows, columns); None where its blocks do not divide it.

    Integers have a scale for as many columns as ``near_divisor`` says, or for each row. Scales that are not the
    format's own are of dtype ``scale``.
    """
    f = FORMATS[fmt]
    if f.scale in ("bfloat16", "float32"):
        f = replace(f, scale=str(scale).removeprefix("torch."))
    if isinstance(f.element, int):
        return f.grouped(near_divisor(shape[1], group))
    return None if any(part and whole % part for whole, part in zip(shape, f.tile, strict=True)) else f


def tensors_of(coded: Coded) -> dict[str, Tensor]:
    """Tensors of a Linear by the last part of their names, in place of ``weight``."""
    f = coded.format
    if isinstance(f.element, int):
        return {
            "weight_packed": pack_to_int32(coded.codes, f.element_bits).contiguous(),
            "weight_scale": coded.scale.to(getattr(torch, f.scale)).contiguous(),
            "weight_shape": torch.tensor(coded.codes.shape),
        }
    stored = {"weight_scale": _stored_scale(coded)}
    if f.element is E2M1:
        pairs = coded.codes.view(len(coded.codes), -1, 2)
        stored["weight_packed"] = (pairs[..., 0] | (pairs[..., 1] << 4)).contiguous()
    else:
        stored["weight"] = coded.codes.view(torch.float8_e4m3fn).contiguous()
    if f.scale == "e4m3":
        stored["weight_global_scale"] = torch.tensor([1.0 / coded.whole])
    return stored


def _stored_scale(coded: Coded) -> Tensor:
    f = coded.format
    if f.scale.startswith("pow2"):
        return torch.frexp(coded.scale).exponent.add(126).to(torch.uint8).contiguous()
    dtype = torch.float8_e4m3fn if f.scale == "e4m3" else getattr(torch, f.scale)
    return coded.scale.to(dtype).contiguous()


def scheme_of(f: Format, names: list[str]) -> dict[str, Any]:
    """A config group: the Linears of these names are stored in format ``f``."""
    weights: dict[str, Any] = {"symmetric": True, "dynamic": False, "observer": "minmax"}
    activations = None
    if isinstance(f.element, int):
        kind = "pack-quantized"
        weights |= {"num_bits": f.element_bits, "type": "int"} | _along_columns(f)
    elif f.element is E2M1:
        by_group = "tensor_group" if f.scale == "e4m3" else "group"
        kind = "nvfp4-pack-quantized" if f.scale == "e4m3" else "mxfp4-pack-quantized"
        scale = "torch.float8_e4m3fn" if f.scale == "e4m3" else "torch.uint8"
        weights |= {"num_bits": 4, "type": "float", "strategy": by_group, "group_size": f.tile[1], "scale_dtype": scale}
    elif f.scale == "pow2":
        kind = "mxfp8-quantized"
        weights |= {"num_bits": 8, "type": "float", "scale_dtype": "torch.uint8"} | _along_columns(f)
    else:
        kind = "float-quantized"
        blocks = {"strategy": "block", "block_structure": list(f.tile)}
        weights |= {"num_bits": 8, "type": "float"} | (blocks if f.tile[0] > 1 else {"strategy": "channel"})
        read = {"strategy": "group", "group_size": f.tile[1]} if f.tile[0] > 1 else {"strategy": "token"}
        activations = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, **read}
    group = {"targets": names, "weights": weights, "input_activations": activations, "output_activations": None}
    return {**group, "format": kind}


def _along_columns(f: Format) -> dict[str, Any]:
    return {"strategy": "group", "group_size": f.tile[1]} if f.tile[1] else {"strategy": "channel"}
