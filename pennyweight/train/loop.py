"""The one training loop. It knows no method, no teacher, no ledger and no precision by name.

Its loss is a sum of cross-entropy and divergence terms whose per-token weights came with the batch, divided once by
the number of loss positions of the whole step, over all processes. So micro-batches, packing and the number of
processes change nothing but rounding.
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
from pennyweight.loss.chunked import Terms, Totals, label_logprobs, tiled_loss
from pennyweight.loss.divergence import hidden_error
from pennyweight.loss.policy import policy_terms
from pennyweight.model.device import Compute
from pennyweight.model.head import Head, forward_hidden, head_of
from pennyweight.model.projection import projected
from pennyweight.settings import Schedule, Tripwires
from pennyweight.train.checkpoint import Checkpoints
from pennyweight.train.group import ALONE, Group
from pennyweight.train.optim import adamw, lr_at
from pennyweight.train.sharding import clip, cut_over, gather
from pennyweight.train.tripwire import UNWATCHED, Tripwire, Watch


@dataclass(frozen=True)
class Outcome:
    """How a training run went: steps in all, tokens seen, seconds, interruptions left out."""

    steps: int
    tokens: int
    seconds: float

    @property
    def facts(self) -> dict[str, int]:
        """What the ledger keeps of it, beside the time it took."""
        return {"steps": self.steps, "tokens": self.tokens}


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
    group: Group = ALONE,
    watch: Watch = UNWATCHED,
) -> Outcome:
    """Train ``model`` in place, from its newest checkpoint if there is one. All processes of ``group`` call it, each
    with its share of every step; the first one logs, and gets the weights.

    Args:
        next_batch: step -> its micro-batches, the same every time it is asked; as many in every process.
        seed: of what the model itself draws (dropout, where its architecture has it).
        admit: raises for sample ids that the ledger does not know; called before a batch is used.
        log: takes one line of metrics, at the first, the last and every hundredth part of the steps.
        rewind: called with the step from which training goes on, to drop log lines written after it.
        progress: called with the number of finished steps and a note.
        should_stop: asked after each step; when True in any process a checkpoint is written and ``Stopped`` raised.
        watch: over what batches are made from; a checkpoint keeps its state, and is written of weights that passed.

    Raises:
        Tripped, Stopped: a tripwire held, or the user asked; the last good checkpoint is kept.
    """
    trained, loss_of, optimizer = _ready(model, schedule, compute, seed, group)
    facts, wire = _restored(checkpoints, trained, optimizer, group, tripwires, watch)
    start, tokens, began = facts["step"], facts["tokens"], time.monotonic() - facts["seconds"]
    log, rewind = (log, rewind) if group.first else (_silent, _silent)
    rewind(start)
    for step in range(start, schedule.steps):
        before, batches = _state(tokens, began, wire, watch), next_batch(step)
        if _passed(watch, wire, step, checkpoints, log):  # who goes on from here looks at these batches again
            checkpoints.save(step, trained, optimizer, before | {"seconds": time.monotonic() - began}, group, good=True)
        admit(sample.id for batch in batches for sample in batch.placed)
        last = step + 1 == schedule.steps
        measured = step == 0 or last or (step + 1) % max(1, schedule.steps // 100) == 0
        lr = _set_lr(optimizer, step, schedule)
        line, norm, seen = _step(trained, optimizer, batches, loss_of, schedule.clip, measured, group)
        tokens, seconds = tokens + seen, time.monotonic() - began
        _halt(_tripped(wire, line, norm, step >= schedule.warmup * schedule.steps), step + 1, checkpoints, log)
        if measured:
            log({"step": step + 1, **line, "lr": lr, "grad_norm": norm, "tokens": tokens, "seconds": round(seconds, 3)})
        stop = group.any(should_stop())  # the signal reaches some a step sooner than others
        if last or stop or ((step + 1) % schedule.checkpoint_every == 0 and not (wire.armed or watch.armed)):
            checkpoints.save(step + 1, trained, optimizer, _state(tokens, began, wire, watch), group)
        progress(step + 1, f"loss {line['loss']:.4f}")
        if stop:
            raise Stopped(step + 1)
    gather(trained, model, group)
    model.eval()
    return Outcome(schedule.steps, tokens, time.monotonic() - began)


def _ready(
    model: nn.Module, s: Schedule, compute: Compute, seed: int, group: Group
) -> tuple[nn.Module, Callable[[Batch, bool], Totals], torch.optim.Optimizer]:
    """The model to train (where it is cut over processes, not the given one), a micro-batch's loss, the optimizer."""
    torch.manual_seed(seed + 1_000_003 * group.rank)  # what is drawn for other rows, or another part, is drawn apart
    forward = lambda m, batch, measured: batch_loss(m, head_of(m), batch, compute, measured)  # noqa: E731
    trained, loss_of = cut_over(model.to(compute.device).train(), forward, group)
    return trained, loss_of, adamw(trained, s.lr, (s.beta1, s.beta2), s.weight_decay, s.moments)


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    loss_of: Callable[[Batch, bool], Totals],
    largest: float,
    measured: bool,
    group: Group,
) -> tuple[dict[str, Any], float, int]:
    """One optimizer step over its micro-batches; per-token means, the gradient norm before clipping, and tokens."""
    optimizer.zero_grad(set_to_none=True)
    mine = [b for b in batches if not b.spare]
    written = sum(b.count for b in mine if b.policy is not None)  # by the model, where some samples are the data's
    count, tokens, written = map(int, group.sum(sum(b.count for b in mine), sum(b.tokens for b in mine), written))
    count = max(1, count)
    sums = []
    for batch in batches:
        totals = loss_of(batch, measured)
        totals = totals.void() if batch.spare else totals
        (totals.loss / count).backward()
        sums.append(totals)
    norm = clip(model, largest)
    optimizer.step()
    return _means(sums, count, max(1, written), group), norm, tokens


def batch_loss(model: nn.Module, head: Head, batch: Batch, compute: Compute, measured: bool = False) -> Totals:
    """Forward pass of one micro-batch: the sum of its loss over the positions that carry loss."""
    assert batch.ce_weight is not None and batch.kd_weight is not None, "a method weighs a batch before the loop"
    device = compute.device
    with torch.autocast(device.type, compute.autocast, enabled=compute.autocast is not None):
        hidden = forward_hidden(model, batch.ids.to(device), batch.positions.to(device))
    selected: Tensor = hidden.flatten(0, 1)[batch.selected.to(device)]
    if device.type == "cuda" and compute.autocast is not None:
        selected = selected.to(compute.autocast)  # the head then multiplies in 16 bits, with float32 logits out
    labels, ce_weight = batch.loss_labels.to(device), batch.ce_weight.to(device)
    policy, logp = None, None
    if batch.policy is not None:
        if batch.policy.compares or bool(
            ce_weight.any()
        ):  # else the pull is known, and its value a sum of the one pass
            logp = label_logprobs(selected.detach(), head, labels)
        policy = policy_terms(logp, batch.policy.to(device))
        ce_weight = ce_weight + policy.pull  # its gradient is that of cross-entropy, so weighed
    terms = Terms(
        labels=labels,
        ce_weight=ce_weight,
        kd_weight=batch.kd_weight.to(device),
        divergence=batch.divergence,
        target=batch.target,
    )
    totals = tiled_loss(selected, head, terms, measure=measured)
    if policy is not None:  # its value in place of the cross-entropy that carried the gradient
        carried = totals.weighed if logp is None else -(policy.pull * logp).sum()
        value = policy.value.sum() - carried
        totals = replace(totals, loss=totals.loss + value, policy=policy.sums)
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


def _means(sums: list[Totals], count: int, written: int, group: Group) -> dict[str, float | None]:
    """Per-token means over the step and the processes, for the log, those of a policy over the tokens that the model
    wrote; None of what was not measured."""
    policy = dict.fromkeys(name for t in sums for name in t.policy)
    here = {
        "loss": [float(t.loss.detach()) for t in sums],
        "cross_entropy": [t.cross_entropy for t in sums],
        "divergence": [t.divergence for t in sums],
        "entropy": [t.entropy for t in sums],
        **({"hidden_error": [t.hidden for t in sums]} if sums[0].hidden is not None else {}),
        **{name: [t.policy.get(name, 0.0) for t in sums] for name in policy},
    }
    known = {name: sum(v for v in values if v is not None) for name, values in here.items() if None not in values}
    everywhere = dict(zip(known, group.sum(*known.values()), strict=True))
    over = {name: written if name in policy else count for name in here}
    return {name: everywhere[name] / over[name] if name in everywhere else None for name in here}


def _restored(
    checkpoints: Checkpoints,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    group: Group,
    limits: Tripwires,
    watch: Watch,
) -> tuple[dict[str, Any], Tripwire]:
    """Model, optimizer and watch as the newest checkpoint has them: its facts, and the tripwire."""
    facts = checkpoints.restore(model, optimizer, group) or {"step": 0, "tokens": 0, "seconds": 0.0}
    watch.restore(facts.get("watch") or {})
    alone = limits.model_dump(exclude={"rollouts"})
    return facts, Tripwire(**alone, mean_loss=facts.get("mean_loss"), bad=facts.get("bad", {}))


def _state(tokens: int, began: float, wire: Tripwire, watch: Watch) -> dict[str, Any]:
    """What a checkpoint keeps beside the tensors."""
    return {"tokens": tokens, "seconds": time.monotonic() - began, **wire.state(), "watch": watch.state()}


def _tripped(wire: Tripwire, line: dict[str, Any], norm: float, warm: bool) -> tuple[str, str] | None:
    """The reason to stop and what to do; entropy is watched from the end of the warm-up on."""
    watched = (line["cross_entropy"], line["entropy"]) if warm else (None, None)
    kl = {k: line[k] for k in ("kl_old", "kl_reference") if k in line}
    # A policy's loss is near 0 whether things go well or not, so that no multiple of it means anything.
    reason = wire.check(line["loss"], norm, *watched, spikes="clipped" not in line, kl=kl)
    return (reason, "lower train.lr, or loosen [tripwires] if this is right") if reason else None


def _passed(
    watch: Watch, wire: Tripwire, step: int, checkpoints: Checkpoints, log: Callable[[dict[str, Any]], None]
) -> bool:
    """Whether the weights after ``step`` steps were looked at just now and found good; raises as ``_halt`` does."""
    _halt(watch.tripped, step + 1, checkpoints, log)
    return watch.passed == step and not wire.armed


def _halt(
    tripped: tuple[str, str] | None, step: int, checkpoints: Checkpoints, log: Callable[[dict[str, Any]], None]
) -> None:
    """Raise Tripped where there is a reason to; the log has it, too. Of checkpoints the last good one is the newest."""
    if not tripped:
        return
    reason, cure = tripped
    good = checkpoints.back_to_good()
    kept = f"the last good checkpoint is {good}" if good else "no checkpoint had been written yet"
    log({"step": step, "tripped": reason, "cure": cure})
    raise Tripped(f"training stopped at step {step}: {reason}; {kept}; {cure}")


def _silent(what: Any) -> None:
    """Of several processes, the first one logs."""
