"""Low-bit copies in the files that transformers and vLLM open: compressed-tensors, pack-quantized, weight only.

Every Linear inside the decoder is coded; the embedding, the output head and the norms keep 16 bits. A Linear whose
input width is no multiple of the group gets one scale per output row instead.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import save_file
from torch import Tensor, nn

from pennyweight.errors import ModelError
from pennyweight.model.loaded import refuse_low_bit
from pennyweight.quant.formats import FORMATS, encode

WRITTEN = ("int8", "int4")
"""Formats that ``export`` writes."""

_WEIGHTS = "model.safetensors"
_CARRIED = {".json", ".jinja", ".model", ".txt", ".py", ".md"}  # tokenizer, template, settings; never other weights


@dataclass(frozen=True)
class Exported:
    """What was written: bytes of the weights, Linears coded by group and by row."""

    bytes: int
    grouped: int
    per_row: int


def export(model: nn.Module, parent: Path, out: Path, fmt: str, group: int) -> Exported:
    """Write the ``fmt`` copy of ``model`` to ``out``; config, tokenizer and the rest are copied from ``parent``.

    Args:
        model: a Hugging Face causal LM with full-precision Linears.
        parent: its folder.
        fmt: int8 or int4.
        group: input weights that share a scale.

    Raises:
        ModelError: the model holds no Linear that can be coded.
    """
    bits = int(FORMATS[fmt].element_bits)
    head = model.get_output_embeddings()  # type: ignore[operator]
    linears = codable(model, group)
    storage = _storage_dtype(model)
    tensors, by_row = _tensors(model, linears, fmt, group, storage)
    making = out.with_name(f".making-{out.name}")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    for file in parent.iterdir():
        if file.suffix in _CARRIED and file.is_file() and not file.name.endswith(".index.json"):
            shutil.copyfile(file, making / file.name)
    save_file(tensors, making / _WEIGHTS, metadata={"format": "pt"})
    (making / _WEIGHTS).chmod(0o644)
    ignore = [name for name, m in model.named_modules() if m is head]
    config = json.loads((making / "config.json").read_text())
    config |= {
        "dtype": str(storage).removeprefix("torch."),
        "quantization_config": _config(linears, by_row, bits, group, ignore),
    }
    (making / "config.json").write_text(json.dumps(config, indent=2))
    shutil.rmtree(out, ignore_errors=True)
    os.replace(making, out)
    return Exported((out / _WEIGHTS).stat().st_size, len(linears) - len(by_row), len(by_row))


def codable(model: nn.Module, group: int) -> dict[str, nn.Linear]:
    """The Linears that a low-bit copy codes, by name.

    Raises:
        ModelError: there is none, they are coded already, or ``group`` divides the width of none of them.
    """
    refuse_low_bit(model)
    head = model.get_output_embeddings()  # type: ignore[operator]
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    if not linears:
        raise ModelError(
            f"a {type(model).__name__} has no Linear layer to quantise (its weights are in another kind of module); "
            "use a Llama-like architecture, or in a recipe leave low-bit copies out with quantize.formats=[]"
        )
    if not any(m.in_features % group == 0 for m in linears.values()):
        widths = ", ".join(str(w) for w in sorted({m.in_features for m in linears.values()}))
        raise ModelError(f"groups of {group} divide none of the widths of this model ({widths}); give another group")
    return linears


def _storage_dtype(model: nn.Module) -> torch.dtype:
    """16 bits for what is not coded: the model's own kind, bfloat16 where it is wider."""
    dtype = next(model.parameters()).dtype
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.bfloat16


def _tensors(
    model: nn.Module, linears: dict[str, nn.Linear], fmt: str, group: int, storage: torch.dtype
) -> tuple[dict[str, Tensor], list[str]]:
    """All tensors of the file, and the names of the Linears that got one scale per row."""
    tensors: dict[str, Tensor] = {}
    by_row, stored = [], replace(FORMATS[fmt], scale=str(storage).removeprefix("torch."))
    for name, linear in linears.items():
        own = group if linear.in_features % group == 0 else None
        if own is None:
            by_row.append(name)
        coded = encode(linear.weight, stored.grouped(own), search=True)
        tensors[f"{name}.weight_packed"] = pack_to_int32(coded.codes, int(stored.element_bits)).contiguous()
        tensors[f"{name}.weight_scale"] = coded.scale.to(storage).contiguous()
        tensors[f"{name}.weight_shape"] = torch.tensor(linear.weight.shape)
    coded_names = {f"{name}.weight" for name in linears}
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()  # type: ignore[union-attr]
    for name, value in model.state_dict().items():
        if name not in coded_names and name not in tied:
            kept = value.to(storage) if value.is_floating_point() else value
            tensors[name] = kept.contiguous().clone()
    return tensors, by_row


def _config(
    linears: dict[str, nn.Linear], by_row: list[str], bits: int, group: int, ignore: list[str]
) -> dict[str, Any]:
    """The quantization_config of config.json."""

    def scheme(targets: list[str], size: int | None) -> dict[str, Any]:
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, "observer": "minmax"}
        weights |= {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
        return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}

    grouped = [name for name in linears if name not in set(by_row)]
    groups = {}
    if grouped:
        groups["group_0"] = scheme(["Linear"] if not by_row else grouped, group)
    if by_row:
        groups["group_1"] = scheme(["Linear"] if not grouped else by_row, None)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
