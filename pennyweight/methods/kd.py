"""Knowledge distillation: at every response token, the student matches the teacher's whole distribution.

Hinton et al. (arXiv 1503.02531) with forward KL; reverse KL and generalised JSD as in Agarwal et al. (arXiv
2306.13649), off-policy: on the given tokens. Forward KL is linear in the teacher's probabilities, so an unbiased
sample of them carries it; the others need the whole distribution, or the top K with the rest as one outcome.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pennyweight.data.pack import Batch
from pennyweight.loss.divergence import Divergence
from pennyweight.settings import KdMethod


def signals(settings: Any) -> frozenset[str]:
    """Dense, hidden states and top K; sampled for what is linear in the teacher's probabilities. Matching hidden states
    needs the teacher's."""
    if settings.hidden:
        return frozenset({"dense", "hidden"})
    whole = frozenset({"dense", "hidden", "top_k"})
    return whole | {"sampled"} if settings.divergence == "forward_kl" else whole


def kd(batch: Batch, settings: KdMethod, signal: Callable[[Batch], Any]) -> Batch:
    """``signal(batch)`` gives the teacher at the batch's loss positions; cross-entropy joins by its share."""
    s = settings
    return batch.weighted(
        ce=s.cross_entropy,
        kd=1.0 - s.cross_entropy,
        divergence=Divergence(s.divergence, s.beta, s.temperature, s.alpha),
        target=signal(batch),
        hidden=s.hidden,
    )
