"""Why logits are float32: what rounding them to bfloat16 does to the gradient of a divergence.

    python -m benchmarks.logits_dtype

A head of 32,768 entries over 512 positions; the student's hidden states are the teacher's with noise, weaker from row
to row. Error of the gradient with respect to the student's hidden states, relative, against float64; three seeds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.bars import Bars, machine
from pennyweight.loss.divergence import Divergence, divergence, kl

N, V, D = 512, 32_768, 256
NOISE = (0.3, 0.1, 0.03)


def gradient(hidden: Tensor, weight: Tensor, teacher: Tensor, how: str) -> Tensor:
    """d sum KL(teacher || student) / d hidden in float64, with the student's and teacher's logits made as ``how``."""
    dtype = torch.float64 if how == "float64" else torch.float32
    weight = weight.to(dtype)
    student, other = hidden.to(dtype) @ weight.T, teacher.to(dtype) @ weight.T
    if how == "bfloat16":
        student, other = (x.bfloat16().to(dtype) for x in (student, other))
    of_logits = divergence(Divergence(), other, student)[1]
    return (of_logits @ weight).double()


def main() -> None:
    print(machine())
    print(f"{'KL':>9} {'float32 logits':>15} {'bfloat16 logits':>16}")
    bars, worst = Bars(), {"float32": 0.0, "bfloat16": 0.0}
    for noise in NOISE:
        errors: dict[str, list[float]] = {"float32": [], "bfloat16": []}
        distance = []
        for seed in range(3):
            g = torch.Generator().manual_seed(seed)
            weight = torch.randn(V, D, generator=g) / D**0.5
            teacher = 3 * torch.randn(N, D, generator=g)
            student = teacher + noise * torch.randn(N, D, generator=g)
            truth = gradient(student, weight, teacher, "float64")
            logits = (teacher.double() @ weight.double().T, student.double() @ weight.double().T)
            distance.append(float(kl(*logits).mean()))
            for how, found in errors.items():
                found.append(float((gradient(student, weight, teacher, how) - truth).norm() / truth.norm()))
        cells = [f"{100 * min(e):.3g} to {100 * max(e):.3g} %" for e in errors.values()]
        print(f"{sum(distance) / 3:>9.4f} {cells[0]:>15} {cells[1]:>16}", flush=True)
        worst = {how: max(worst[how], max(e)) for how, e in errors.items()}
    bars.check("logits_dtype.float32_error", worst["float32"], "<=1e-3", worst["float32"] <= 1e-3)
    bars.finish()


if __name__ == "__main__":
    main()
