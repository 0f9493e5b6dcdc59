"""What stops a run that is going wrong, in both directions: no number, a loss spike, entropy collapse or explosion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

NO_KL: Mapping[str, float] = MappingProxyType({})
_WHOM = {"kl_old": "the weights that wrote the rollouts", "kl_reference": "the start"}


class Watch:
    """What else may stop the loop, by what it sees of where batches come from. This one sees nothing.

    Attributes:
        armed: something is wrong but has not yet held long enough; no checkpoint counts as good meanwhile.
        tripped: the reason to stop and what to do next, or None. Asked once the batches of a step are there.
        passed: how many steps the weights had behind them that were looked at last and found good; None of none yet.
            A checkpoint of them is kept beside the newest, and it is the last good one.
    """

    armed: bool = False
    tripped: tuple[str, str] | None = None
    passed: int | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: plain JSON."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint kept; from nothing, where it is empty."""

    def shown(self) -> list[str]:
        """Once training is done: files that it leaves in the RUN folder, relative to it."""
        return []


UNWATCHED = Watch()


@dataclass
class Tripwire:
    """Watches measurements; ``check`` says what tripped once it has held ``patience`` times in a row.

    ``loss_spike`` is a multiple of the running mean of the loss (exponential, factor 0.9, over good steps only);
    ``entropy_low`` and ``entropy_high`` are multiples of the cross-entropy, which a calibrated model's entropy equals.
    ``kl_old`` and ``kl_reference`` are of a policy, in nats a token: to the weights that wrote what it learns from, and
    to its reference.
    """

    loss_spike: float
    entropy_low: float
    entropy_high: float
    patience: int
    kl_old: float = math.inf
    kl_reference: float = math.inf
    mean_loss: float | None = None
    bad: dict[str, int] = field(default_factory=dict)

    @property
    def armed(self) -> bool:
        """Something is wrong but has not yet held long enough; no checkpoint counts as good meanwhile."""
        return any(self.bad.values())

    def check(
        self,
        loss: float,
        grad_norm: float,
        cross_entropy: float | None,
        entropy: float | None,
        spikes: bool = True,
        kl: Mapping[str, float] = NO_KL,
    ) -> str | None:
        """The reason to stop, or None. Entropy is skipped at steps where it was not measured, and so is the loss's
        running mean where ``spikes`` is False. ``kl``: what was measured of ``kl_old`` and ``kl_reference``."""
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            return f"the loss is {loss} and the gradient norm {grad_norm}"
        spike = spikes and self.mean_loss is not None and loss > self.loss_spike * max(self.mean_loss, 1e-3)
        self._count("loss", spike)
        if not spike:
            self.mean_loss = loss if self.mean_loss is None else 0.9 * self.mean_loss + 0.1 * loss
        if cross_entropy is not None and entropy is not None:
            self._count("low", entropy < self.entropy_low * cross_entropy)
            self._count("high", entropy > self.entropy_high * cross_entropy)
        if self.bad.get("loss", 0) >= self.patience:
            return f"the loss {loss:.4g} stayed above {self.loss_spike} times its running mean {self.mean_loss:.4g}"
        if self.bad.get("low", 0) >= self.patience:
            return f"entropy collapsed: {entropy:.4g} nats against a cross-entropy of {cross_entropy:.4g}"
        if self.bad.get("high", 0) >= self.patience:
            return f"entropy exploded: {entropy:.4g} nats against a cross-entropy of {cross_entropy:.4g}"
        for name, value in kl.items():
            limit, whom = getattr(self, name), _WHOM[name]
            self._count(name, value > limit)
            if self.bad[name] >= self.patience:
                return f"the KL to {whom} stayed above {limit:.4g} nats a token: it is {value:.4g}"
        return None

    def state(self) -> dict:
        """What a checkpoint keeps."""
        return {"mean_loss": self.mean_loss, "bad": self.bad}

    def _count(self, name: str, wrong: bool) -> None:
        self.bad[name] = self.bad.get(name, 0) + 1 if wrong else 0
