"""The most main memory that this process has taken."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from pathlib import Path


def give_back() -> None:
    """Give the system what is no longer used, where it can take it (glibc).

    What an allocator keeps for later would else be part of the peak of everything that comes after.
    """
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # malloc_trim(3)


def start_peak() -> None:
    """Give back what is no longer used, and start the peak anew, where the system can (Linux)."""
    give_back()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Largest resident size since the last start, in bytes (since the start of the process where it cannot be)."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
