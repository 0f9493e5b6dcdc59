"""Knowledge distillation: at every response token, the student matches the teacher's whole distribution.

Hinton et al. (arXiv 1503.02531) with forward KL; reverse KL and generalised JSD as in Agarwal et al. (arXiv
2306.13649), off-policy: on the given tokens. Forward KL is linear in the teacher's probabilities, so an unbiased
sample of them carries it; the other two need the dense distribution.
"""

from __future__ import annotations

from collections.abc import Callable

from pennyweight.data.pack import Batch
from pennyweight.loss.divergence import Divergence, Target
from pennyweight.recipe import KdMethod


def signals(settings: KdMethod) -> frozenset[str]:
    """Dense always; sampled for what is linear in the teacher's probabilities."""
    return frozenset({"dense", "sampled"}) if settings.divergence == "forward_kl" else frozenset({"dense"})


def kd(batch: Batch, settings: KdMethod, signal: Callable[[Batch], Callable[[int, int], Target]]) -> Batch:
    """``signal(batch)`` gives the teacher at the batch's loss positions; cross-entropy joins by its share."""
    return batch.weighted(
        ce=settings.cross_entropy,
        kd=1.0 - settings.cross_entropy,
        divergence=Divergence(settings.divergence, settings.beta, settings.temperature),
        target=signal(batch),
    )
