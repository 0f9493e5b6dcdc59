"""Where and in which precision to compute, chosen by themselves unless they are set."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

import pennyweight.processes as processes
from pennyweight.errors import RecipeError


@dataclass(frozen=True)
class Compute:
    """The device; the autocast dtype (None: float32 throughout); and both in words, for people and stage keys."""

    device: torch.device
    autocast: torch.dtype | None
    name: str

    @property
    def hardware(self) -> str:
        """The name with that of the GPU, where it is one: for the ledger and for people."""
        return f"{torch.cuda.get_device_name(self.device)}, {self.name}" if self.device.type == "cuda" else self.name

    @property
    def measuring(self) -> Compute:
        """How evaluation computes: as training does on a GPU, in float32 elsewhere."""
        return self if self.device.type == "cuda" else replace(self, autocast=None)


def choose(device: str, dtype: str) -> Compute:
    """Resolve ``auto``: cuda, then mps, then cpu; bfloat16 where the processor multiplies it natively.

    Raises:
        RecipeError: the device is not known or not there.
    """
    place = _device(device)
    wants = {"float32": False, "bfloat16": True}.get(dtype)
    autocast = torch.bfloat16 if (_has_bfloat16(place) if wants is None else wants) else None
    return Compute(place, autocast, f"{place} {'bfloat16' if autocast else 'float32'}")


def set_threads(threads: int) -> int:
    """Use ``threads`` CPU threads, 0 being one per usable core, or this process's share of them; how many that is."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    used = threads or processes.threads() or usable or 1
    torch.set_num_threads(used)
    return used


def _device(name: str) -> torch.device:
    there = ["cpu"]
    if torch.backends.mps.is_available():
        there.insert(0, "mps")
    if torch.cuda.is_available():
        there = [*(f"cuda:{i}" for i in range(torch.cuda.device_count())), *there]
    if name == "auto":
        return torch.device(there[0])
    try:
        place = torch.device(name)
    except RuntimeError:
        raise RecipeError(f"no device named {name!r}; here are {', '.join(there)}") from None
    asked = f"cuda:{place.index or 0}" if place.type == "cuda" else place.type
    if asked not in there:
        raise RecipeError(f"device {name!r} is not here; here are {', '.join(there)}")
    return torch.device(asked)


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def peak(device: torch.device, anew: bool) -> int | None:
    """Most bytes that tensors took on a CUDA device since the count was last started ``anew``; None elsewhere."""
    if device.type != "cuda":
        return None
    if anew:
        torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.max_memory_allocated(device)


def gpu_of(device: torch.device) -> str | None:
    """UUID of a CUDA device, by which its energy is counted; empty of another GPU, None of a processor."""
    if device.type != "cuda":
        return None if device.type == "cpu" else ""
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
