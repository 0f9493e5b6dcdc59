"""What every benchmark shares: the machine it ran on, its bars, and its exit code."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

REAL = Path(__file__).resolve().parents[2] / "shared" / "real"


@dataclass
class Bars:
    """Bars of one benchmark: ``check`` prints a line each, ``finish`` exits 1 when one was short."""

    short: list[str] = field(default_factory=list)

    def check(self, name: str, value: float, target: str, met: bool) -> None:
        print(f"bar {name} {value:.4g} {target} {'met' if met else 'short'}", flush=True)
        if not met:
            self.short.append(name)

    def finish(self) -> None:
        sys.exit(1 if self.short else 0)


def run_parts(known: Mapping[str, Callable[[Bars], None]], parts: Sequence[str]) -> None:
    """Say the machine, run the parts of a benchmark that are asked for (all of them, where none is), and finish."""
    print(machine())
    bars = Bars()
    for part in parts or known:
        known[part](bars)
    bars.finish()


def machine() -> str:
    """Processor, cores, and the libraries that decide speed."""
    import torch

    name = next(
        (
            line.partition(":")[2].strip()
            for line in _lines(Path("/proc/cpuinfo"))
            if line.lower().startswith("model name")
        ),
        platform.processor() or platform.machine(),
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    libraries = ", ".join(f"{n} {version(n)}" for n in ("torch", "transformers"))
    return f"{name}, {len(_usable())} cores, {device}; Python {platform.python_version()}, {libraries}"


def real(name: str) -> Path:
    """A real input, or exit 0 with the reason where the folder of real inputs is not there."""
    if not (REAL / name).exists():
        print(f"skipped: needs the real input {name}, which lies beside a full checkout only")
        sys.exit(0)
    return REAL / name


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _usable() -> range | set[int]:
    import os

    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
