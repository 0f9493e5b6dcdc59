"""Where a run happened: code version, packages, machine. Enough to explain a difference, nothing that names a person.

Host names, user names and paths are left out, because ledgers are published with models.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

PACKAGES = (
    "pennyweight",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "compressed-tensors",
    "datasets",
    "pyarrow",
    "numpy",
    "pydantic",
    "reasoning-gym",
    "math-verify",
)
"""Distributions whose versions can change a result."""

T = TypeVar("T")


def environment(device: str | None = None, threads: int | None = None) -> dict[str, Any]:
    """What is known about this machine and this code; never raises, and unknown things are None.

    Args:
        device: name of the device computed on, as the caller found it (``cpu``, ``NVIDIA H200``).
        threads: CPU threads used.

    Returns:
        ``git`` (``commit`` of the repository that holds the working directory, and whether tracked files are
        ``dirty``), ``python``, ``platform``, ``cpu``, ``cores``, ``cores_usable``, ``memory`` (bytes of main memory),
        ``packages`` (distribution name to version), ``device`` and ``threads``.
    """
    return {
        "git": {"commit": _known(_commit), "dirty": _known(_dirty)},
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": _known(lambda: f"{platform.system()} {platform.release()} {platform.machine()}"),
        "cpu": _known(_cpu),
        "cores": _known(os.cpu_count),
        "cores_usable": _known(lambda: len(os.sched_getaffinity(0))),
        "memory": _known(lambda: os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        "packages": {name: _known(lambda name=name: metadata.version(name)) for name in PACKAGES},
        "device": device,
        "threads": threads,
    }


def _known(ask: Callable[[], T]) -> T | None:
    """The answer, or None where this machine has none: a missing fact must not stop a run."""
    try:
        return ask()
    except Exception:
        return None


def _said(*command: str) -> str:
    """What a command printed.

    Raises:
        OSError, subprocess.SubprocessError: it is missing, failed, or took too long.
    """
    # GIT_OPTIONAL_LOCKS=0: `git status` would otherwise write to the repository it only looks at.
    quiet = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=10, stdin=subprocess.DEVNULL, env=quiet
    )
    return done.stdout.strip()


def _commit() -> str | None:
    return _said("git", "rev-parse", "--verify", "HEAD") or None


def _dirty() -> bool:
    return bool(_said("git", "status", "--porcelain", "--untracked-files=no"))


def _cpu() -> str | None:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        return _said("sysctl", "-n", "machdep.cpu.brand_string")
    return platform.processor() or None
