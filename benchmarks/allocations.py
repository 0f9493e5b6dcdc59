"""Memory that tensors take on a CPU: what autograd keeps of a forward pass, and the most that is allocated at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from pennyweight.data.pack import Batch
from pennyweight.model.device import Compute
from pennyweight.model.head import forward_hidden


def kept(model: Any, batch: Batch, compute: Compute) -> int:
    """Bytes of what autograd keeps of a forward pass, each storage once, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, tuple[int, Tensor]] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes(), t  # held, so that no other takes its place
        return t

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", compute.autocast, enabled=compute.autocast is not None),
    ):
        hidden = forward_hidden(model, batch.ids, batch.positions)
    assert hidden.requires_grad, "autograd keeps nothing of it"
    return sum(n for n, _ in found.values())


def most_allocated(work: Callable[[], object]) -> int:
    """The most bytes that were allocated at once in it, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    events: list[Any] = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
