"""Parameter groups, AdamW that stores little, and the learning-rate schedule: plain arguments in, plain numbers out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.errors import RecipeError
from pennyweight.quant.formats import FORMATS, Coded, decode, encode

_BLOCK = 128  # values that share a scale, in moments of 8 bits
_PART = 1 << 20  # values worked on at once: what a step holds in passing is as much, whatever the model


def adamw(
    model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float, moments: str = "float32"
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) that decays matrices and leaves norms and biases alone.

    ``moments``: what they are stored in: float32, bfloat16 or fp8. Where those or the weights are not float32, it is
    ``LowAdamW``. Parameters may be cut over processes (DTensors): each process updates its part.

    Raises:
        RecipeError: fp8 moments of parameters that are cut over processes.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if moments == "float32" and all(p.dtype == torch.float32 for p in trained):
        return torch.optim.AdamW(groups, lr=lr, betas=betas)
    if moments == "fp8" and any(_part_of(p) is not p for p in trained):
        raise RecipeError(NO_FP8_PARTS)
    return LowAdamW(groups, lr, betas, moments)


NO_FP8_PARTS = (
    "train.moments=fp8 is for one process, since values that share a scale would be cut apart; set "
    "train.moments=bfloat16, or leave out --processes"
)
"""Why moments in 8 bits are refused where parameters are cut over processes."""


def _part_of(t: Tensor) -> Tensor:
    """What this process holds of a tensor that is cut over several; of any other, the whole."""
    return t.to_local() if hasattr(t, "to_local") else t  # type: ignore[attr-defined]


class LowAdamW(torch.optim.Optimizer):
    """AdamW that computes in float32, with weights and moments stored in fewer bits.

    bfloat16 weights and moments are rounded stochastically, so that updates smaller than half a step are not lost
    (Zamirai et al., arXiv 2010.06192). Moments in fp8 are E4M3 with a float32 scale for 128 values, the second one by
    its root; a root is never less than the least number of its scale, since it divides.

    Args:
        groups: parameter groups, each with its ``weight_decay``; weights are float32 or bfloat16.
        moments: float32, bfloat16 or fp8.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], moments: str):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": 0.0})
        self.moments = moments

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            for name in ("exp_avg", "exp_avg_sq"):
                state.update(self._empty(name, p))
        state["step"] += 1
        if not p.is_contiguous():
            p.data = p.data.contiguous()
        assert p.grad is not None
        weight, grad = _part_of(p).view(-1), _part_of(p.grad)
        grad = grad.view(-1) if grad.is_contiguous() else grad.flatten()
        local = {k: v if v.ndim == 0 or self.moments == "fp8" else _part_of(v).view(-1) for k, v in state.items()}
        for a in range(0, len(weight), _PART):
            self._update_part(weight, grad, local, group, slice(a, min(a + _PART, len(weight))))

    def _update_part(
        self, weights: Tensor, grads: Tensor, state: dict[str, Any], group: dict[str, Any], part: slice
    ) -> None:
        (beta1, beta2), lr, step = group["betas"], group["lr"], float(state["step"])
        grad = grads[part].float()
        mean = self._stored(state, "exp_avg", part).lerp_(grad, 1 - beta1)
        square = self._stored(state, "exp_avg_sq", part).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        weight = weights[part].float() * (1 - lr * group["weight_decay"])
        weight.addcdiv_(mean, root, value=-lr / (1 - beta1**step))
        weights[part] = to_bfloat16(weight) if weights.dtype == torch.bfloat16 else weight
        self._store(state, "exp_avg", part, mean)
        self._store(state, "exp_avg_sq", part, square)

    def _empty(self, name: str, p: Tensor) -> dict[str, Tensor]:
        """A moment of zeros, as it is stored: in fp8 by rows of values that share a scale, else in p's shape."""
        if self.moments != "fp8":
            kept = getattr(torch, self.moments)
            return {name: torch.zeros_like(p, dtype=kept, memory_format=torch.contiguous_format)}
        rows = -(-p.numel() // _BLOCK)
        codes = torch.zeros((rows, _BLOCK), dtype=torch.uint8, device=p.device)
        return {name: codes, f"{name}_scale": torch.ones((rows, 1), device=p.device)}

    def _stored(self, state: dict[str, Any], name: str, part: slice) -> Tensor:
        """A part of a moment in float32, to be written to."""
        if self.moments != "fp8":
            return state[name][part].to(torch.float32, copy=True)
        rows, count = _rows(part), part.stop - part.start
        value = decode(Coded(state[name][rows], state[f"{name}_scale"][rows], FORMATS["fp8_act"])).flatten()[:count]
        return value.square_() if name == "exp_avg_sq" else value

    def _store(self, state: dict[str, Any], name: str, part: slice, value: Tensor) -> None:
        if self.moments != "fp8":
            state[name][part] = to_bfloat16(value) if self.moments == "bfloat16" else value
            return
        value = value.sqrt() if name == "exp_avg_sq" else value
        padded = nn.functional.pad(value, (0, -len(value) % _BLOCK)).view(-1, _BLOCK)
        coded = encode(padded, FORMATS["fp8_act"], torch.rand_like(padded))
        state[name][_rows(part)] = coded.codes.clamp(min=1) if name == "exp_avg_sq" else coded.codes
        state[f"{name}_scale"][_rows(part)] = coded.scale


def _rows(part: slice) -> slice:
    """Rows of ``_BLOCK`` values that hold a part of a moment."""
    return slice(part.start // _BLOCK, -(-part.stop // _BLOCK))


def to_bfloat16(x: Tensor) -> Tensor:
    """float32 -> bfloat16, up or down with the probability that makes the expectation ``x``; from torch's own draws."""
    bits = x.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=x.device)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


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
