"""METHODS: what each training method makes of a batch, and which teacher signals it can use.

A new method is one file here and one row below. ``apply(batch, settings, signal)`` returns the batch with its
per-token weights and target; ``signals(settings)`` names the teacher signals that carry it (empty: none is needed).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pennyweight.data.pack import Batch
from pennyweight.errors import MethodError
from pennyweight.methods import grpo, kd, on_policy, sft


@dataclass(frozen=True)
class Method:
    """One row of METHODS. ``rolls``: it learns from what the student writes, and is handed that as signal; ``asks``: it
    asks the teacher about that."""

    apply: Callable[[Batch, Any, Any], Batch]
    signals: Callable[[Any], frozenset[str]]
    rolls: bool = False
    asks: bool = False


METHODS: dict[str, Method] = {
    "sft": Method(sft.sft, sft.signals),
    "kd": Method(kd.kd, kd.signals),
    "grpo": Method(grpo.grpo, grpo.signals, rolls=True),
    "on_policy": Method(on_policy.on_policy, on_policy.signals, rolls=True, asks=True),
    "offline": Method(on_policy.offline, kd.signals, rolls=True, asks=True),
}


def check(settings: Any, gives: frozenset[str]) -> None:
    """Refuse a method that the teacher's signals cannot carry.

    Raises:
        MethodError: with the reason and the cure.
    """
    wanted = METHODS[settings.kind].signals(settings)
    if not wanted or wanted & gives:
        return
    asked = f"method {settings.kind} with divergence={settings.divergence}"
    needs = f"needs {' or '.join(sorted(wanted))} targets, and the teacher gives {', '.join(sorted(gives))}"
    if settings.hidden:
        raise MethodError(
            f"{asked} and hidden={settings.hidden} {needs}: hidden states are matched with the teacher's own; set "
            f"targets.kind to dense or hidden, or method.hidden=0{_besides(settings, gives)}"
        )
    raise MethodError(
        f"{asked} {needs}: the divergence is not linear in the teacher's probabilities, so a sample of them would bias "
        "it; set targets.kind to dense, hidden or top_k, or method.divergence=forward_kl"
    )


def _besides(settings: Any, gives: frozenset[str]) -> str:
    """What else has to be set for these signals to carry the method, once it matches no hidden states."""
    other = settings.model_copy(update={"hidden": 0.0})
    return "" if METHODS[settings.kind].signals(other) & gives else " and method.divergence=forward_kl"
