"""What stops a run that is going wrong, in both directions: no number, a loss spike, entropy collapse or explosion."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Tripwire:
    """Watches measurements; ``check`` says what tripped once it has held ``patience`` times in a row.

    ``loss_spike`` is a multiple of the running mean of the loss (exponential, factor 0.9, over good steps only);
    ``entropy_low`` and ``entropy_high`` are multiples of the cross-entropy, which a calibrated model's entropy equals.
    """

    loss_spike: float
    entropy_low: float
    entropy_high: float
    patience: int
    mean_loss: float | None = None
    bad: dict[str, int] = field(default_factory=dict)

    @property
    def armed(self) -> bool:
        """Something is wrong but has not yet held long enough; no checkpoint counts as good meanwhile."""
        return any(self.bad.values())

    def check(
        self, loss: float, grad_norm: float, cross_entropy: float | None, entropy: float | None, spikes: bool = True
    ) -> str | None:
        """The reason to stop, or None. Entropy is skipped at steps where it was not measured, and so is the loss's
        running mean where ``spikes`` is False."""
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
        return None

    def state(self) -> dict:
        """What a checkpoint keeps."""
        return {"mean_loss": self.mean_loss, "bad": self.bad}

    def _count(self, name: str, wrong: bool) -> None:
        self.bad[name] = self.bad.get(name, 0) + 1 if wrong else 0
