"""The one training loop. It knows no method, no teacher, no ledger and no precision by name.

Its loss is a sum of cross-entropy and divergence terms whose per-token weights came with the batch, divided once by
the number of loss positions of the whole step. So micro-batches and packing change nothing but rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.data.pack import Batch
from pennyweight.errors import Stopped, Tripped
from pennyweight.loss.chunked import Terms, Totals, tiled_loss
from pennyweight.loss.divergence import hidden_error
from pennyweight.model.device import Compute
from pennyweight.model.head import Head, forward_hidden, head_of
from pennyweight.model.projection import projected
from pennyweight.settings import Schedule, Tripwires
from pennyweight.train.checkpoint import Checkpoints
from pennyweight.train.optim import adamw, lr_at
from pennyweight.train.tripwire import Tripwire


@dataclass(frozen=True)
class Outcome:
    """How a training run went: steps in all, tokens seen, seconds, interruptions left out."""

    steps: int
    tokens: int
    seconds: float


def train(
    model: nn.Module,
    next_batch: Callable[[int], list[Batch]],
    *,
    schedule: Schedule,
    tripwires: Tripwires,
    compute: Compute,
    checkpoints: Checkpoints,
    seed: int,
    admit: Callable[[Iterable[str]], None],
    log: Callable[[dict], None],
    rewind: Callable[[int], None] = lambda step: None,
    progress: Callable[[int, str], None] = lambda step, note: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train ``model`` in place, from its newest checkpoint if there is one.

    Args:
        next_batch: step -> its micro-batches, the same ones every time it is asked.
        seed: of what the model itself draws (dropout, where its architecture has it).
        admit: raises for sample ids that the ledger does not know; called before a batch is used.
        log: takes one line of metrics, at the first, the last and every hundredth part of the steps.
        rewind: called with the step from which training goes on, to drop log lines written after it.
        progress: called with the number of finished steps and a short note.
        should_stop: asked after each step; when True a checkpoint is written and ``Stopped`` raised.

    Raises:
        Tripped, Stopped: a tripwire held, or the user asked; the last good checkpoint is kept.
    """
    torch.manual_seed(seed)
    model.to(compute.device).train()
    optimizer = adamw(model, schedule.lr, (schedule.beta1, schedule.beta2), schedule.weight_decay, schedule.moments)
    facts = checkpoints.restore(model, optimizer) or {"step": 0, "tokens": 0, "seconds": 0.0}
    wire = Tripwire(**tripwires.model_dump(), mean_loss=facts.get("mean_loss"), bad=facts.get("bad", {}))
    start, tokens = facts["step"], facts["tokens"]
    rewind(start)
    every = max(1, schedule.steps // 100)
    began = time.monotonic() - facts["seconds"]
    for step in range(start, schedule.steps):
        batches = next_batch(step)
        for batch in batches:
            admit(sample.id for sample in batch.placed)
        last = step + 1 == schedule.steps
        measured = step == 0 or last or (step + 1) % every == 0
        lr = _set_lr(optimizer, step, schedule)
        line, norm = _step(model, optimizer, batches, compute, schedule.clip, measured)
        tokens += sum(b.tokens for b in batches)
        warm = step >= schedule.warmup * schedule.steps
        _trip(wire, line, norm, warm, step + 1, checkpoints)
        seconds = time.monotonic() - began
        if measured:
            log({"step": step + 1, **line, "lr": lr, "grad_norm": norm, "tokens": tokens, "seconds": round(seconds, 3)})
        stop = should_stop()
        if last or stop or ((step + 1) % schedule.checkpoint_every == 0 and not wire.armed):
            checkpoints.save(step + 1, model, optimizer, {"tokens": tokens, "seconds": seconds, **wire.state()})
        progress(step + 1, f"loss {line['loss']:.4f}")
        if stop:
            raise Stopped(step + 1)
    model.eval()
    return Outcome(schedule.steps, tokens, time.monotonic() - began)


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    compute: Compute,
    clip: float,
    measured: bool,
) -> tuple[dict[str, Any], float]:
    """One optimizer step over its micro-batches; per-token means, and the gradient norm before clipping."""
    head = head_of(model)
    optimizer.zero_grad(set_to_none=True)
    count = max(1, sum(b.count for b in batches))
    sums = []
    for batch in batches:
        totals = batch_loss(model, head, batch, compute, measured)
        (totals.loss / count).backward()
        sums.append(totals)
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip))
    optimizer.step()
    return _means(sums), norm


def batch_loss(model: nn.Module, head: Head, batch: Batch, compute: Compute, measured: bool = False) -> Totals:
    """Forward pass of one micro-batch: the sum of its loss over the positions that carry loss."""
    assert batch.ce_weight is not None and batch.kd_weight is not None, "a method weighs a batch before the loop"
    device = compute.device
    with torch.autocast(device.type, compute.autocast, enabled=compute.autocast is not None):
        hidden = forward_hidden(model, batch.ids.to(device), batch.positions.to(device))
    selected: Tensor = hidden.flatten(0, 1)[batch.selected.to(device)]
    if device.type == "cuda" and compute.autocast is not None:
        selected = selected.to(compute.autocast)  # the head then multiplies in 16 bits, with float32 logits out
    terms = Terms(
        labels=batch.loss_labels.to(device),
        ce_weight=batch.ce_weight.to(device),
        kd_weight=batch.kd_weight.to(device),
        divergence=batch.divergence,
        target=batch.target,
    )
    totals = tiled_loss(selected, head, terms, measure=measured)
    if batch.hidden_weight is None:
        return totals
    error = hidden_error(projected(model, selected), batch.target.states)
    loss = totals.loss + (error * batch.hidden_weight.to(device)).sum()
    return replace(totals, loss=loss, hidden=float(error.detach().sum()))


def _set_lr(optimizer: torch.optim.Optimizer, step: int, s: Schedule) -> float:
    lr = lr_at(step, s.steps, s.lr, s.shape, s.warmup, s.decay, s.floor)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def _means(sums: list[Totals]) -> dict[str, float | None]:
    """Per-token means over the step, for the log."""
    count = max(1, sum(t.count for t in sums))

    def mean(values: list[float | None]) -> float | None:
        return None if any(v is None for v in values) else sum(v for v in values if v is not None) / count

    return {
        "loss": sum(float(t.loss.detach()) for t in sums) / count,
        "cross_entropy": mean([t.cross_entropy for t in sums]),
        "divergence": mean([t.divergence for t in sums]),
        "entropy": mean([t.entropy for t in sums]),
        **({"hidden_error": mean([t.hidden for t in sums])} if sums[0].hidden is not None else {}),
    }


def _trip(wire: Tripwire, line: dict[str, Any], norm: float, warm: bool, step: int, checkpoints: Checkpoints) -> None:
    """Raise Tripped when a tripwire has held; entropy is watched from the end of the warm-up on."""
    watched = (line["cross_entropy"], line["entropy"]) if warm else (None, None)
    tripped = wire.check(line["loss"], norm, *watched)
    if not tripped:
        return
    newest = checkpoints.newest()
    kept = f"the last good checkpoint is {newest}" if newest else "no checkpoint had been written yet"
    raise Tripped(
        f"training stopped at step {step}: {tripped}; {kept}; lower train.lr, or loosen [tripwires] if this is right"
    )
