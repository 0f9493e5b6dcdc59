"""The processes of a run as one group: sums over them, and words from the first one to the others.

Sums go over gloo on the CPU, whatever the device. Words go through the store that the processes met at, as JSON: who
waits for one looks now and then and sleeps in between, so that waiting takes no core and may take hours.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

import pennyweight.processes as processes
from pennyweight.errors import RecipeError

_PATIENCE = timedelta(hours=1)  # of a collective: how far one process may be ahead of another within training
_LONGEST_NAP = 0.5  # seconds


@dataclass(frozen=True)
class Group:
    """``size`` processes, of which this one is number ``rank``. Words are left in ``store``; one alone has none."""

    rank: int = 0
    size: int = 1
    store: Any = None
    _numbers: Iterator[int] = field(default_factory=count)
    _meetings: Iterator[int] = field(default_factory=count)

    @property
    def first(self) -> bool:
        """Whether this is the process that owns the RUN folder: the one that writes and prints."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the processes, in float64; the same numbers, bit for bit, in all of them."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def any(self, here: bool) -> bool:
        """Whether it is so in any process."""
        return self.sum(float(here))[0] > 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within it, all processes do the same at the same time, and can sum.

        Outside there is no process group to be seen: libraries that open and quantise models take one for a sign that
        every process does what this one does, and wait for the others.
        """
        if self.size == 1:
            yield
            return
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        meeting = PrefixStore(f"meeting/{next(self._meetings)}", self.store)
        dist.init_process_group(backend, store=meeting, rank=self.rank, world_size=self.size, timeout=_PATIENCE)
        yield
        dist.destroy_process_group()  # not after an error, when the others may be gone

    def wait(self) -> None:
        """Return once all processes have come here."""
        self.sum(0.0)

    def tell(self, word: dict[str, Any]) -> None:
        """Leave a word for the others; of the first process only."""
        if self.size > 1:
            self.store.set(f"word/{next(self._numbers)}", json.dumps(word))

    def hear(self) -> dict[str, Any]:
        """The next word of the first process, whenever that comes.

        Raises:
            SystemExit: the first process says that the command is over.
        """
        place, nap = f"word/{next(self._numbers)}", 0.01
        while not self.store.check([place]):
            time.sleep(nap)
            nap = min(_LONGEST_NAP, 1.5 * nap)
        word = json.loads(self.store.get(place))
        if "over" in word:
            sys.exit(1)
        return word

    def placed(self, compute: Any) -> Any:
        """``compute`` (of model.device) on a GPU of this process's own, where it is on GPUs.

        Its name, which the keys of stages and targets depend on, stays the same in all processes.

        Raises:
            RecipeError: there are fewer GPUs than processes, or the device takes only one process.
        """
        device: torch.device = compute.device
        if self.size == 1 or device.type == "cpu":
            return compute
        if device.type != "cuda":
            raise RecipeError(
                f"several processes train on cuda or on cpu, not on {device.type}; set compute.device=cpu, or leave "
                "out --processes"
            )
        index, there = processes.local_rank(), torch.cuda.device_count()
        if index >= there:
            raise RecipeError(
                f"process {index + 1} of this machine finds no GPU, of {there}; start one process a GPU, or set "
                "compute.device=cpu"
            )
        torch.cuda.set_device(index)
        return replace(compute, device=torch.device("cuda", index))


ALONE = Group()
"""One process."""


@cache
def join() -> Group:
    """The group that torchrun started this process in, met now; ``ALONE`` where there is none."""
    if processes.size() == 1:
        return ALONE
    store, rank, size = next(rendezvous("env://"))
    return Group(rank, size, PrefixStore("pennyweight", store))
