"""Supervised fine-tuning: cross-entropy on every response token, whoever wrote it."""

from __future__ import annotations

from pennyweight.data.pack import Batch
from pennyweight.loss.divergence import Divergence
from pennyweight.settings import SftMethod


def signals(settings: SftMethod) -> frozenset[str]:
    """None: the tokens are enough."""
    return frozenset()


def sft(batch: Batch, settings: SftMethod, signal: None = None) -> Batch:
    """Weight 1 on cross-entropy at every loss position."""
    return batch.weighted(ce=1.0, kd=0.0, divergence=Divergence(), target=None)
