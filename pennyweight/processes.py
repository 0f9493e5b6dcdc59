"""Which of how many processes this one is, by what torchrun puts into the environment. Imports no torch."""

from __future__ import annotations

import os


def size() -> int:
    """Processes that work on this command together: 1, unless torchrun started it in more."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank() -> int:
    """The number of this one, from 0: the first owns the RUN folder, and speaks for all."""
    return int(os.environ.get("RANK", 0)) if size() > 1 else 0


def local_rank() -> int:
    """The number of this one among those of its machine: of its GPU, where there are any."""
    return int(os.environ.get("LOCAL_RANK", 0)) if size() > 1 else 0


def restarts() -> int:
    """How often all have been started again because one was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) if size() > 1 else 0


def threads() -> int:
    """CPU threads for each of several processes, as OMP_NUM_THREADS says; 0, one per core, for one alone."""
    return int(os.environ.get("OMP_NUM_THREADS", 1)) if size() > 1 else 0
