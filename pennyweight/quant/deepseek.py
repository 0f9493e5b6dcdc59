"""DeepSeek's own fp8 layout, which transformers, vLLM and SGLang read: E4M3 with scales for blocks of 128 x 128.

A Linear has ``weight`` (float8_e4m3fn) and ``weight_scale_inv``, which multiplies in spite of its name: float32, as
DeepSeek-V3 has it (README_WEIGHTS.md there), or one byte, 2^(byte - 127), as its successors do. Ragged edges are part
of a smaller block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pennyweight.quant.formats import E2M1, FORMATS, Coded, decode, decode_float, encode, spread

WEIGHT, SCALE = "weight", "weight_scale_inv"
BLOCK = (128, 128)


def tensors_of(coded: Coded) -> dict[str, Tensor]:
    """Tensors of a Linear by the last part of their names; ``coded`` is fp8_block or fp8_block_pow2."""
    scale = coded.scale.float()
    if coded.format.scale == "pow2":
        scale = scale.to(torch.float8_e8m0fnu)  # exact: they are powers of two
    return {WEIGHT: coded.codes.view(torch.float8_e4m3fn).contiguous(), SCALE: scale.contiguous()}


def config_of(kept: list[str], pow2: bool) -> dict[str, Any]:
    """The quantization_config of config.json; ``kept`` are modules that are not coded."""
    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
    return {**config, "modules_to_not_convert": kept, **({"scale_fmt": "ue8m0"} if pow2 else {})}


def to_fp8(weight: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    """A weight (R, C) -> its fp8 codes and scales as they are stored."""
    stored = tensors_of(encode(weight, FORMATS["fp8_block_pow2" if pow2 else "fp8_block"]))
    return stored[WEIGHT], stored[SCALE]


def from_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    """(R, C) fp8 codes and the scales of their blocks -> float32.

    Raises:
        ValueError: the scales are not those of 128 x 128 blocks of that weight.
    """
    want = tuple(-(-n // b) for n, b in zip(weight.shape, BLOCK, strict=True))
    if scale.shape != want:
        raise ValueError(f"scales of shape {tuple(scale.shape)}, not {want}")
    return decode(Coded(weight.view(torch.uint8), _numbers(scale), FORMATS["fp8_block"]))


def fp4_to_fp8(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """MXFP4 experts of DeepSeek-V4 -> fp8 in blocks of 128 x 128 with power-of-two scales, losing nothing.

    Every number is a small integer times a power of two, with 2 digits; E4M3 holds 4 digits over 17 powers of two, its
    subnormals included, so a block goes over whole where the scales within it are not too far apart.

    Args:
        packed: (R, C / 2), two codes a byte, the lower half first.
        scale: (R, C / 32) powers of two, float8_e8m0fnu or bytes of exponents.

    Raises:
        ValueError: a block's scales are too far apart for E4M3 to hold every number of it.
    """
    bytes_ = packed.view(torch.uint8)
    codes = torch.stack([bytes_ & 15, bytes_ >> 4], -1).flatten(1)
    values = decode_float(codes, E2M1) * spread(_numbers(scale), (1, 32), codes.shape)
    coded = encode(values, FORMATS["fp8_block_pow2"])
    if not torch.equal(decode(coded), values):
        raise ValueError("scales within a block of 128 x 128 are too far apart for fp8 to hold all its numbers")
    stored = tensors_of(coded)
    return stored[WEIGHT], stored[SCALE]


def _numbers(scale: Tensor) -> Tensor:
    """float32 scales of stored ones."""
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return scale.view(torch.float8_e8m0fnu).float()  # 255 is NaN
    return scale.float()
