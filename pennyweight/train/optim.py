"""Parameter groups and the learning-rate schedule: plain arguments in, plain numbers out."""

from __future__ import annotations

import math

import torch
from torch import nn


def adamw(model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) that decays matrices and leaves norms and biases alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas)


def lr_at(step: int, steps: int, lr: float, shape: str, warmup: float, decay: float, floor: float) -> float:
    """Learning rate of step ``step`` (from 0) of ``steps``.

    Linear warm-up over the first ``warmup`` share; then ``cosine`` down to ``floor * lr`` at the last step, or
    ``wsd``: constant, then linear to ``floor * lr`` over the last ``decay`` share (Hu et al., arXiv 2404.06395).
    """
    warm = math.ceil(warmup * steps)
    if step < warm:
        return lr * (step + 1) / warm
    if shape == "cosine":
        progress = (step - warm) / max(1, steps - 1 - warm)
        return lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
    falling = max(1, math.ceil(decay * steps))
    left = steps - step
    return lr if left > falling else lr * (floor + (1 - floor) * (left - 1) / falling)
