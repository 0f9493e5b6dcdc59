"""Released shards from one precision to another without a GPU, one tensor in memory at a time.

A folder of safetensors shards goes over file by file: fp8 (DeepSeek's layout) or fp4 experts (DeepSeek-V4's) to
bfloat16, bfloat16 to fp8, and fp4 experts to fp8 without loss. Names and shards stay; scales come and go beside their
weights.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pennyweight.errors import ModelError, RecipeError, RunError
from pennyweight.quant.deepseek import SCALE, config_of, fp4_to_fp8, from_fp8, to_fp8

TARGETS = ("bf16", "fp8", "fp8_ue8m0")

_CODES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "F32": torch.float32, "BF16": torch.bfloat16}
_CODES |= {"F16": torch.float16, "I8": torch.int8, "U8": torch.uint8, "I32": torch.int32, "I64": torch.int64}
_NAMES = {dtype: name for name, dtype in _CODES.items()}
_SCALES = (f".{SCALE}", ".scale")
"""How scales are named: DeepSeek-V3's way and V4's, in place of ``.weight``."""
_KEPT = re.compile(r"(embed|lm_head|norm|\bgate\.weight|router|\bhead\.weight)")  # in bfloat16 in DeepSeek's own files
_CARRIED = {".json", ".jinja", ".model", ".txt", ".py", ".md"}


@dataclass(frozen=True)
class _Entry:
    """A tensor as its shard's header tells of it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def convert(
    folder: str, to: str, out: str, counting: Callable[[str, int, str], AbstractContextManager[Any]]
) -> dict[str, Any]:
    """Convert the shards in ``folder`` to ``bf16``, ``fp8`` or ``fp8_ue8m0`` and write them to ``out``.

    ``counting``: (label, total, unit) -> a context that shows progress. Finished shards are kept where a conversion is
    stopped, and the same call goes on with the others.

    Raises:
        RecipeError: no such target.
        ModelError: the folder, a shard or its scales cannot be used.
        RunError: ``out`` holds something else.
    """
    source, place = Path(folder).expanduser(), Path(out)
    if to not in TARGETS:
        raise RecipeError(f"nothing is converted to {to!r}; use {', '.join(TARGETS)}")
    shards = _shards(source)
    if place.exists() and not (place / ".converting").exists():
        raise RunError(f"{place} is there already; choose another --out, or remove it")
    place.mkdir(parents=True, exist_ok=True)
    (place / ".converting").touch()
    where = {name: shard for shard in shards for name in _header(shard)}
    index: dict[str, str] = {}
    size = 0
    with counting("converting", len(shards), "shards") as c:
        for shard in shards:
            done = place / shard.name
            if not done.exists():
                _convert_shard(shard, where, to, done)
            entries = _header(done)
            index |= dict.fromkeys(entries, shard.name)
            size += sum(e.bytes for e in entries.values())
            c.advance(1)
    _beside(source, place, to, index, size)
    (place / ".converting").unlink()
    return {"path": str(place), "to": to, "shards": len(shards), "tensors": len(index), "bytes": size}


def _convert_shard(shard: Path, where: dict[str, Path], to: str, done: Path) -> None:
    """Write a shard anew: its header first, since shapes tell it, then tensor by tensor."""
    header = _header(shard)
    plan: dict[str, _Entry] = {}
    for name in header:
        plan |= _becomes(name, header, where, to)
    making = done.with_name(f".making-{done.name}")
    with open(making, "wb") as f:
        f.write(_packed_header(plan))
        for name in header:
            wanted = _becomes(name, header, where, to)
            made = _made(shard, name, wanted, where, to) if wanted else {}
            for new, entry in wanted.items():
                value = made[new]
                assert value.dtype == entry.dtype and tuple(value.shape) == entry.shape, new
                f.write(value.contiguous().view(torch.uint8).numpy().tobytes())
    making.replace(done)


def _becomes(name: str, header: dict[str, _Entry], where: dict[str, Path], to: str) -> dict[str, _Entry]:
    """What is written in place of a tensor, by name, in the order in which it is written."""
    entry = header[name]
    if name.endswith(_SCALES) and _weight_of(name) in where:
        return {}
    matrix = len(entry.shape) == 2
    if _scale_of(name, where)[1] is not None:
        shape = entry.shape if entry.dtype == torch.float8_e4m3fn else (entry.shape[0], 2 * entry.shape[1])
        if to == "bf16":
            return {name: _Entry(torch.bfloat16, shape)}
        return _in_fp8(name, shape, to)
    if to != "bf16" and matrix and entry.dtype in (torch.bfloat16, torch.float16, torch.float32) and _coded(name):
        return _in_fp8(name, entry.shape, to)
    if entry.dtype in (torch.float16, torch.float32) and to == "bf16" and matrix:
        return {name: _Entry(torch.bfloat16, entry.shape)}
    return {name: entry}


def _in_fp8(name: str, shape: tuple[int, ...], to: str) -> dict[str, _Entry]:
    blocks = tuple(-(-n // 128) for n in shape)
    dtype = torch.float8_e8m0fnu if to == "fp8_ue8m0" else torch.float32
    return {name: _Entry(torch.float8_e4m3fn, shape), name.removesuffix("weight") + SCALE: _Entry(dtype, blocks)}


def _made(shard: Path, name: str, wanted: dict[str, _Entry], where: dict[str, Path], to: str) -> dict[str, Tensor]:
    """The tensors that are written in place of one."""
    value = _read(shard, name)
    scale_name, at = _scale_of(name, where)
    beside = name.removesuffix("weight") + SCALE
    if at is not None:
        scale = _read(at, scale_name)
        try:
            if value.dtype != torch.float8_e4m3fn:
                value, scale = fp4_to_fp8(value, scale)
                if to != "bf16":
                    return {name: value, beside: scale if to == "fp8_ue8m0" else scale.float()}
            value = from_fp8(value, scale)
        except ValueError as e:
            raise ModelError(f"{name} in {shard.name} cannot be converted: {e}; copy the shard again") from None
    if beside in wanted:
        codes, scale = to_fp8(value.float(), to == "fp8_ue8m0")
        return {name: codes, beside: scale}
    return {name: value.to(wanted[name].dtype)}


def _coded(name: str) -> bool:
    """Whether fp8 is for this weight: embeddings, head, norms and routers keep their 16 bits."""
    return name.endswith(".weight") and not _KEPT.search(name)


def _weight_of(scale: str) -> str:
    return scale.rsplit(".", 1)[0] + ".weight"


def _scale_of(name: str, where: dict[str, Path]) -> tuple[str, Path | None]:
    """Name and shard of the scales of a weight; None where it has none."""
    for end in _SCALES:
        scale = name.removesuffix(".weight") + end
        if name.endswith(".weight") and scale in where:
            return scale, where[scale]
    return "", None


def _shards(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}; give one with *.safetensors in it")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} holds no *.safetensors; copy the model again")
    return files


def _header(shard: Path) -> dict[str, _Entry]:
    """Every tensor of a shard, in the order of its data."""
    try:
        with open(shard, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if not 0 < length < 1 << 27:
                raise ValueError("no header")
            told = json.loads(f.read(length))
            size = shard.stat().st_size - 8 - length
        told.pop("__metadata__", None)
        if any(t["data_offsets"][1] > size for t in told.values()):
            raise ValueError("it is cut off")
        in_order = sorted(told.items(), key=lambda item: item[1]["data_offsets"])
        return {name: _Entry(_CODES[t["dtype"]], tuple(t["shape"])) for name, t in in_order}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ModelError(f"{shard} is not a whole safetensors file ({e}); copy or download it again") from None


def _packed_header(plan: dict[str, _Entry]) -> bytes:
    told: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, e in plan.items():
        told[name] = {"dtype": _NAMES[e.dtype], "shape": list(e.shape), "data_offsets": [at, at + e.bytes]}
        at += e.bytes
    text = json.dumps(told, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read(shard: Path, name: str) -> Tensor:
    with safe_open(shard, framework="pt") as f:
        return f.get_tensor(name)


def _beside(source: Path, place: Path, to: str, index: dict[str, str], size: int) -> None:
    """Config, tokenizer and the rest; the index as it is now."""
    for file in _others(source):
        shutil.copyfile(file, place / file.name)
    if len(set(index.values())) > 1:
        told = {"metadata": {"total_size": size}, "weight_map": index}
        (place / "model.safetensors.index.json").write_text(json.dumps(told, indent=2))
    config = place / "config.json"
    if not config.exists():
        return
    told = json.loads(config.read_text())
    told.pop("quantization_config", None)
    told.pop("expert_dtype", None)
    if to != "bf16":
        kept = sorted({n.removesuffix(".weight") for n in index if n.endswith(".weight") and _KEPT.search(n)})
        told["quantization_config"] = config_of(kept, to == "fp8_ue8m0")
    config.write_text(json.dumps(told, indent=2))


def _others(source: Path) -> Iterator[Path]:
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in _CARRIED and not file.name.endswith(".index.json"):
            yield file
