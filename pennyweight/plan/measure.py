"""``--on this``: what this machine's products and memory give, in seconds. The one file of ``plan`` with torch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import date

import torch

from pennyweight.plan.hardware import Chip, Figure

SECONDS = 0.6
"""For each figure; the best of what fits in counts, since whatever disturbs a measurement makes it slower."""

_SIDE = {"cpu": 1024, "cuda": 8192}  # of the matrices
_BYTES = {"cpu": 1 << 27, "cuda": 1 << 31}  # read or copied, well beyond any cache


def measure(device: str | None = None, seconds: float = SECONDS) -> Chip:
    """The device that this process trains on, as a chip: TFLOP/s in float32 and bfloat16 (fp8 where there are tensor
    cores for it), GB/s of a copy and of a product of a matrix with one vector, microseconds of a small operation, GB
    of memory. Its power is not measured.

    Args:
        device: ``cpu`` or ``cuda``; default: the GPU, if there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = {"fp32": _product(device, torch.float32, seconds), "bf16": _product(device, torch.bfloat16, seconds)}
    if device == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
        found["fp8"] = _fp8_product(seconds)
    found["bandwidth"] = _copy(device, seconds)
    found["generation"] = _vector(device, seconds)
    found["operation"] = _operation(device)
    found["memory"] = _memory(device) / 1e9
    name = torch.cuda.get_device_name() if device == "cuda" else f"this machine, {torch.get_num_threads()} threads"
    today = date.today().isoformat()
    return Chip("this", name, {k: Figure(v, "measured here", today) for k, v in found.items()})


def _best(work: Callable[[], object], device: str, seconds: float) -> float:
    """Seconds of the fastest round; at least three after one to warm up."""
    rounds, began = [], time.perf_counter()
    work()
    while len(rounds) < 3 or time.perf_counter() - began < seconds:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        rounds.append(time.perf_counter() - start)
    return min(rounds)


def _product(device: str, dtype: torch.dtype, seconds: float) -> float:
    """TFLOP/s of a product of two square matrices."""
    side = _SIDE[device]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _best(lambda: a @ b, device, seconds) / 1e12


def _fp8_product(seconds: float) -> float:
    """The same of E4M3 codes with one scale each, in bfloat16."""
    side, one = _SIDE["cuda"], torch.ones((), device="cuda")
    a, b = (torch.randn(side, side, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    work = lambda: torch.ops.aten._scaled_mm(a, b.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)  # noqa: E731
    return 2 * side**3 / _best(work, "cuda", seconds) / 1e12


def _copy(device: str, seconds: float) -> float:
    """GB/s of a copy, what is read and what is written."""
    source = torch.ones(_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * _BYTES[device] / _best(lambda: target.copy_(source), device, seconds) / 1e9


def _vector(device: str, seconds: float) -> float:
    """GB/s of weights that a product with one vector reads, in the faster of float32 and bfloat16: what writing a text
    one token after another is bound by."""
    best = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        size = torch.finfo(dtype).bits // 8
        rows = _BYTES[device] // 4096 // size
        weight = torch.ones(rows, 4096, device=device, dtype=dtype)
        vector = torch.ones(4096, device=device, dtype=dtype)
        took = _best(lambda w=weight, v=vector: w @ v, device, seconds / 2)
        best = max(best, size * weight.numel() / took / 1e9)
    return best


def _operation(device: str) -> float:
    """Microseconds in which a small operation is started: what layers of small models are bound by."""
    few, many = torch.ones(8, device=device), 500

    def work() -> None:
        for _ in range(many):
            torch.mul(few, 1.0)

    return 1e6 * _best(work, device, 0.1) / many


def _memory(device: str) -> float:
    """Bytes there are."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
