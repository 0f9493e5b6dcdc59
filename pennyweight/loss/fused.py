"""The losses of ``loss/divergence.py`` and ``loss/signals.py`` in one kernel each, for GPUs.

Written with tensor operations a divergence passes over the logits again and again, each pass as slow as memory; here
they are read three times and written once. The same definitions; cross-entropy on the text, the rows' weights and the
slope of a capped or scaled head are part of it. ``loss/kernels.py`` has the arithmetic. On a GPU these need no memory
beside the logits. Nothing here has a gradient of its own: it is what the student's logits become.

Shape letters: n rows, V vocabulary, E entries of a sample in all.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pennyweight.errors import first_line
from pennyweight.loss.divergence import DIVERGENCES, Divergence, sums_of_rows

try:
    from pennyweight.loss import kernels
except ImportError:  # no Triton, as beside a torch without CUDA: ``available`` says so
    kernels = None  # type: ignore


@dataclass(frozen=True, slots=True)
class Losses:
    """(n,) float32 of each row, unweighted; ``entropy`` is the student's. None is what was not asked for."""

    divergence: Tensor | None
    cross_entropy: Tensor | None
    entropy: Tensor | None


@dataclass(frozen=True, slots=True)
class Text:
    """Cross-entropy on the text itself: ``labels`` (n,) int64, ``weight`` (n,) float32."""

    labels: Tensor
    weight: Tensor


@dataclass(frozen=True, slots=True)
class Slope:
    """The derivative of logits with respect to the head's product: scale (1 - (logit / cap)^2), or scale alone."""

    scale: float = 1.0
    cap: float | None = None

    @property
    def factor(self) -> float:
        """What is the same at all logits: the scale, or with a cap what multiplies (cap - logit) (cap + logit)."""
        return float(self.scale if self.cap is None else self.scale / self.cap**2)

    def at(self, logits: Tensor) -> Tensor | float:
        """At some logits."""
        return self.factor if self.cap is None else (self.cap - logits).mul_(self.cap + logits).mul_(self.factor)


@cache
def available(device: torch.device) -> bool:
    """Whether these kernels run on ``device``: a GPU on which a small one does, or a CPU with TRITON_INTERPRET=1 set
    before Triton is first imported, which is for tests."""
    if kernels is None:
        return False
    compiled = kernels.COMPILED
    if device.type != "cuda" or not compiled:
        return device.type == "cpu" and not compiled
    try:
        one = torch.zeros(1, device=device)
        text_(torch.zeros((1, 8), device=device), Text(one.long(), one))
    except Exception as error:  # no C compiler, too old a chip: whatever it is, the eager loss does the same
        told = first_line(error)
        warnings.warn(f"Triton does not run on {device} ({told}); the loss works without, but slower", stacklevel=2)
        return False
    return True


def dense_(
    spec: Divergence,
    teacher: Tensor,
    student: Tensor,
    kd_weight: Tensor,
    text: Text | None = None,
    slope: Slope = Slope(),
) -> Losses:
    """``divergence(spec, teacher, student)``, and cross-entropy on ``text`` beside it, for weighted rows.

    Args:
        teacher, student: (n, V) float32 logits at temperature 1, each row without gaps. ``student`` becomes the
            gradient of sum(kd_weight * divergence + text.weight * cross-entropy) times the slope; ``teacher`` is kept.
        kd_weight: (n,) float32.
        slope: of the student's head.

    Raises:
        ValueError: the logits are not float32, or the elements of a row do not lie side by side.
    """
    DIVERGENCES[spec.kind]
    _check(teacher, student)
    t, made = spec.temperature, student.new_empty((3, len(student)))
    a = spec.beta if spec.kind == "jsd" else spec.alpha
    factor = {"jsd": a - 1.0, "skew_kl": a - 1.0, "tvd": -0.5}.get(spec.kind, -1.0) * t * slope.factor
    picked = None if text is None else _picked(student, text)
    weight = _vector(kd_weight)
    _launch(
        "dense_kernel", student,
        teacher, student, weight, weight if text is None else _vector(text.weight), *made, student.shape[1],
        teacher.stride(0), student.stride(0), 1.0 / t, a, 1.0 - a, factor, slope.factor, float(slope.cap or 0),
        spec.kind, slope.cap is not None, text is not None,
    )  # fmt: skip
    value = made[0] if t == 1.0 else made[0].mul_(t * t)
    if text is None or picked is None:
        return Losses(value, None, None)
    _off_labels(student, text, picked, slope)
    return Losses(value, made[1] - picked, made[2])


def text_(student: Tensor, text: Text, slope: Slope = Slope()) -> Losses:
    """Cross-entropy on ``text``. ``student``, (n, V) float32 logits, becomes its weighted gradient; see ``dense_``."""
    _check(student)
    picked = _picked(student, text)
    log_mass, entropy = _softmax(student, student, text.weight, 1.0, slope)
    _off_labels(student, text, picked, slope)
    return Losses(None, log_mass - picked, entropy)


def sampled_(
    spec: Divergence,
    sample: tuple[Tensor, Tensor, Tensor, Tensor],
    student: Tensor,
    kd_weight: Tensor,
    text: Text | None = None,
    slope: Slope = Slope(),
) -> Losses:
    """Forward KL from an unbiased sample of the teacher's distribution, as ``signals.Sparse.loss``; see ``dense_``.

    Args:
        sample: as ``Sparse`` has them, row (E,) int64 in order, ids (E,) int64, weights (E,) and entropy (n,) float32.

    Raises:
        ValueError: another divergence was asked for, or as ``dense_``.
        RuntimeError: there are gaps between the rows of ``student``.
    """
    if spec.kind != "forward_kl":
        raise ValueError(f"{spec.kind} is not linear in the teacher's probabilities: a sample of them is biased")
    _check(student)
    (row, ids, w, of_teacher), t, n = sample, spec.temperature, len(student)
    total = sums_of_rows(row, w, n)
    flat, place = student.view(-1), row * student.shape[1] + ids
    logit, picked = flat[place], None if text is None else _picked(student, text)
    scale, beside = kd_weight * total * t, None
    ce, entropy = None, None
    if text is not None and t == 1.0:
        scale = scale + text.weight
    elif text is not None:
        beside = torch.empty_like(student)
        ce, entropy = _softmax(student, beside, text.weight, 1.0, slope)
    log_mass, its_entropy = _softmax(student, student, scale, t, slope)
    if beside is not None:
        student.add_(beside)
    flat.index_add_(0, place, kd_weight[row] * w * slope.at(logit), alpha=-t)
    value = (total * log_mass).sub_(sums_of_rows(row, w * logit / t, n)).sub_(of_teacher).mul_(t * t)
    if text is None or picked is None:
        return Losses(value, None, None)
    _off_labels(student, text, picked, slope)
    ce, entropy = (log_mass, its_entropy) if ce is None else (ce, entropy)
    return Losses(value, ce - picked, entropy)


def _softmax(logits: Tensor, out: Tensor, weight: Tensor, t: float, slope: Slope) -> tuple[Tensor, Tensor]:
    """weight * slope * softmax(logits / t) in ``out``; (n,) log-normalisers and entropies."""
    made = logits.new_empty((2, len(logits)))
    _launch(
        "softmax_kernel", logits,
        logits, out, _vector(weight), *made, logits.shape[1], logits.stride(0), out.stride(0),
        1.0 / t, slope.factor, float(slope.cap or 0), slope.cap is not None,
    )  # fmt: skip
    return made[0], made[1]


def _launch(name: str, rows: Tensor, *arguments: Any) -> None:
    """One program a row, on the rows' device."""
    if len(rows):
        block = max(128, min(2048, 1 << (rows.shape[1] - 1).bit_length()))
        with torch.cuda.device_of(rows):
            getattr(kernels, name)[(len(rows),)](
                *arguments, BLOCK=block, num_warps=max(1, block // 256), enable_fp_fusion=True
            )  # fmt: skip


def _check(*logits: Tensor) -> None:
    for x in logits:
        if x.dtype != torch.float32 or x.stride(1) != 1:
            raise ValueError(f"the fused loss takes float32 logits, a row's side by side, not {x.dtype}, {x.stride()}")


def _vector(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()


def _picked(student: Tensor, text: Text) -> Tensor:
    return student.gather(1, text.labels.unsqueeze(1)).squeeze(1)


def _off_labels(student: Tensor, text: Text, picked: Tensor, slope: Slope) -> None:
    """What the label itself adds to the gradient; ``picked`` are its logits."""
    student.scatter_add_(1, text.labels.unsqueeze(1), (-text.weight * slope.at(picked)).unsqueeze(1))
