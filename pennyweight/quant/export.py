"""Low-bit copies in the files that transformers and vLLM open: compressed-tensors, and DeepSeek's fp8.

Linears inside the decoder are coded, those of experts among them; embedding, output head, routers and norms keep 16
bits. Config, tokenizer, chat template and generation settings are copied from the parent.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pennyweight.errors import ModelError
from pennyweight.model.loaded import refuse_low_bit
from pennyweight.quant import deepseek
from pennyweight.quant.experts import Experts, as_in_a_checkpoint, in_experts, take_apart
from pennyweight.quant.footprint import OF_EXPERTS, near_divisor
from pennyweight.quant.formats import FORMATS, Coded, Format
from pennyweight.quant.linear import is_router, reading_in_codes
from pennyweight.quant.packing import scheme_of, storable, tensors_of

PROVENANCE = "pennyweight.json"
"""File of a low-bit copy that says what it was made from, how, and what it was found to be worth."""

LAYOUTS = ("compressed-tensors", "deepseek", "gguf")
"""File layouts: that of the library of this name, DeepSeek's own for fp8, and llama.cpp's (``gguf_file``)."""

_WEIGHTS = "model.safetensors"
_CARRIED = {".json", ".jinja", ".model", ".txt", ".py", ".md"}  # tokenizer, template, settings; never other weights


@dataclass(frozen=True)
class Exported:
    """What was written: bytes of the weights; Linears coded, those of them by row, and those left in 16 bits."""

    bytes: int
    coded: int
    per_row: int
    kept: tuple[str, ...]


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """The Linears that a low-bit copy codes, by name; fused experts are taken apart into such, in place.

    Raises:
        ModelError: there is none, they are coded already, or experts are no Linears.
    """
    refuse_low_bit(model)
    take_apart(model)
    linears = _linears(model)
    if not linears:
        raise ModelError(
            f"a {type(model).__name__} has no Linear layer to quantise (its weights are in another kind of module); "
            "use a Llama-like architecture, or in a recipe leave low-bit copies out with quantize.formats=[]"
        )
    return linears


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    head = model.get_output_embeddings()  # type: ignore[operator]
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    return {name: m for name, m in linears.items() if not is_router(name)}


def _is_apart(model: nn.Module) -> bool:
    return any(isinstance(m, Experts) for m in model.modules())


def _keeps_16_bits(name: str, module: nn.Module) -> bool:
    """Routers, which engines keep in a Linear though it may be none here."""
    return is_router(name) and not list(module.children()) and hasattr(module, "weight")


def formats_of(model: nn.Module, fmt: str, group: int, layout: str = "compressed-tensors") -> dict[str, Format]:
    """The format of each Linear that can be coded as ``fmt``, by name, and stored in ``layout``.

    Raises:
        ModelError: there is none, they are coded already, or ``fmt`` with that ``group`` fits the width of none.
    """
    linears = linears_of(model)
    shapes = {name: (m.out_features, m.in_features) for name, m in linears.items()}
    scale = {"deepseek": torch.float32, "gguf": torch.float16}.get(layout) or storage_dtype(model)
    if _is_apart(model) and layout == LAYOUTS[0]:
        if fmt not in OF_EXPERTS:
            raise ModelError(
                f"transformers opens no experts stored in {fmt}; use {', '.join(OF_EXPERTS)}, or --layout deepseek "
                "with fp8_block"
            )
        # It knows one scheme for all Linears of such a model, so one group must divide every width.
        common = group
        if isinstance(FORMATS[fmt].element, int):
            common = near_divisor(math.gcd(*(columns for _, columns in shapes.values())), group)
        if common is None:
            widths = ", ".join(str(w) for w in sorted({columns for _, columns in shapes.values()}))
            raise ModelError(
                f"no group from {-(-group // 2)} to {2 * group} divides every width of this mixture of experts "
                f"({widths}), as transformers needs it; give another --group, or fp8_row"
            )
        group = common
    found = {name: storable(fmt, shape, group, scale) for name, shape in shapes.items()}
    if layout == "gguf":
        found = {name: f if f is not None and f.tile == (1, 32) else None for name, f in found.items()}
    chosen = {name: f for name, f in found.items() if f is not None}
    by_row = [f for f in chosen.values() if isinstance(f.element, int) and not f.tile[1]]
    if not chosen or len(by_row) == len(linears):
        widths = ", ".join(str(w) for w in sorted({m.in_features for m in linears.values()}))
        raise ModelError(
            f"groups of {group} divide none of the widths of this model ({widths}); give another group"
            if by_row
            else f"the blocks of {fmt} divide none of the widths of this model ({widths}); choose another format"
        )
    return chosen


def storage_dtype(model: nn.Module) -> torch.dtype:
    """16 bits for what is not coded: the kind that its folder has, or it; bfloat16 where that is wider."""
    dtype = getattr(model, "stored_dtype", next(model.parameters()).dtype)
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.bfloat16


def export(
    model: nn.Module, codes: dict[str, Coded], parent: Path, out: Path, layout: str = "compressed-tensors"
) -> Exported:
    """Write a copy of ``model`` to ``out``, in place of what is there, whose Linears named in ``codes`` are those.

    Args:
        model: a Hugging Face causal LM; everything but the coded weights is taken from it.
        parent: the folder that it came from.
        layout: ``compressed-tensors`` or ``deepseek``.
    """
    storage, names = storage_dtype(model), _linears(model)
    making = out.with_name(f".making-{out.name}")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    for file in (*parent.iterdir(), *(parent / "additional_chat_templates").glob("*.jinja")):
        if file.suffix in _CARRIED and file.is_file() and not file.name.endswith(".index.json"):
            place = making / file.relative_to(parent)
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, place)
    of_linear = deepseek.tensors_of if layout == "deepseek" else tensors_of
    save_file(_tensors(model, codes, storage, of_linear), making / _WEIGHTS, metadata={"format": "pt"})
    (making / _WEIGHTS).chmod(0o644)
    head = model.get_output_embeddings()  # type: ignore[operator]
    kept = [name for name in names if name not in codes]
    ignore = [*kept, *(name for name, m in model.named_modules() if m is head or _keeps_16_bits(name, m))]
    config = json.loads((making / "config.json").read_text())
    pow2 = any(c.format.scale == "pow2" for c in codes.values())
    said = deepseek.config_of(ignore, pow2) if layout == "deepseek" else _config(codes, ignore)
    if _is_apart(model) and layout != "deepseek":
        said["dequantize"] = True  # transformers has its experts fused, which it can only read into 16 bits
    config |= {"dtype": str(storage).removeprefix("torch."), "quantization_config": said}
    (making / "config.json").write_text(json.dumps(config, indent=2))
    (making / PROVENANCE).unlink(missing_ok=True)  # the parent's own
    shutil.rmtree(out, ignore_errors=True)
    os.replace(making, out)
    per_row = sum(isinstance(c.format.element, int) and not c.format.tile[1] for c in codes.values())
    return Exported((out / _WEIGHTS).stat().st_size, len(codes), per_row, tuple(kept))


@contextmanager
def as_transformers_reads(model: nn.Module, codes: dict[str, Coded], layout: str = LAYOUTS[0]) -> Iterator[None]:
    """Within it, ``model`` computes what transformers does with the copy once it has read it into wider weights.

    It rounds activations in compressed-tensors' fp8 formats. Of a mixture of experts it rounds none, and multiplies
    scales out in 16 bits, but those of fp8 experts.
    """
    if layout != LAYOUTS[0]:
        yield
        return
    if not _is_apart(model):
        with reading_in_codes(model, codes):
            yield
        return
    rounded = [n for n, c in codes.items() if isinstance(c.format.element, int) or not in_experts(n)]
    weights: dict[str, Any] = {name: model.get_submodule(name).weight for name in rounded}
    kept = {name: weight.data for name, weight in weights.items()}
    try:
        for weight in weights.values():
            weight.data = weight.data.to(storage_dtype(model)).to(weight.dtype)
        yield
    finally:
        for name, weight in weights.items():
            weight.data = kept[name]


def _tensors(
    model: nn.Module, codes: dict[str, Coded], storage: torch.dtype, of_linear: Callable[[Coded], dict[str, Tensor]]
) -> dict[str, Tensor]:
    tensors = {f"{name}.{part}": t for name, coded in codes.items() for part, t in of_linear(coded).items()}
    replaced = {f"{name}.weight" for name in codes}
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()  # type: ignore[union-attr]
    for name, value in model.state_dict().items():
        if name not in replaced and name not in tied:
            kept = value.to(storage) if value.is_floating_point() else value
            tensors[name] = kept.contiguous().clone()
    return as_in_a_checkpoint(model, tensors)


def _config(codes: dict[str, Coded], ignore: list[str]) -> dict[str, Any]:
    """The quantization_config of config.json."""
    of_format: dict[Format, list[str]] = {}
    for name, coded in codes.items():
        of_format.setdefault(coded.format, []).append(name)
    whole = len(of_format) == 1
    groups = {
        f"group_{i}": scheme_of(f, ["Linear"] if whole else names) for i, (f, names) in enumerate(of_format.items())
    }
    kinds = {g["format"] for g in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
