"""Which sampling design: the same inclusion probabilities, drawn in different ways.

    python -m benchmarks.target_designs

stories260K on 4,096 of its own tokens; students cut to 3 layers, untrained and after 60 steps. Heads above a threshold
of 1/40 are exact in all; below it an id is kept with probability p / t and weighs t. What differs is which ids are
kept together: by independent tosses; systematically within each position; along one line through all positions; or
across positions, ordered by id, so that every id is kept about as often as it should be over the whole chunk. Relative
error of the gradient: of all parameters, of the head alone, and of the mean of the logits' gradient; 8 draws. The last
row keeps ids in proportion to p times the length of their row of the head, which is what hidden states receive of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.bars import machine, real
from benchmarks.targets import real_case
from pennyweight.loss.signals import Sparse
from pennyweight.model.head import head_of
from pennyweight.model.load import load

T = 1 / 40
DRAWS = 8
Design = Callable[[Tensor, torch.Generator], Tensor]


def uniform(g: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=g)


def systematic(line: Tensor, u: Tensor) -> Tensor:
    """How often the points 1 - u, 2 - u, ... fall on each stretch of a line, along the last dimension."""
    steps = (line.cumsum(-1) + u).floor()
    return steps - torch.cat([u.floor(), steps[..., :-1]], -1)


def tosses(pi: Tensor, g: torch.Generator) -> Tensor:
    return (uniform(g, *pi.shape) < pi).double()


def within(pi: Tensor, g: torch.Generator) -> Tensor:
    return systematic(pi, uniform(g, len(pi), 1))


def within_spread(pi: Tensor, g: torch.Generator) -> Tensor:
    """Within each position, the uniforms of successive positions spread evenly by the golden ratio."""
    return systematic(pi, ((torch.arange(len(pi)) * 0.6180339887498949).unsqueeze(-1) + uniform(g, 1, 1)) % 1)


def one_line(pi: Tensor, g: torch.Generator) -> Tensor:
    return systematic(pi.flatten(), uniform(g, 1)).view(pi.shape)


def across(size: int) -> Design:
    def draw(pi: Tensor, g: torch.Generator) -> Tensor:
        parts = [systematic(part.T.flatten(), uniform(g, 1)).view(part.T.shape).T for part in pi.split(size)]
        return torch.cat(parts)

    return draw


BY_LENGTH = "within, by head's rows"
DESIGNS: dict[str, Design] = {
    "independent tosses": tosses,
    "within each position": within,
    "within, evenly spread": within_spread,
    "one line, by position": one_line,
    "across 256, by id": across(256),
    "across 4,096, by id": across(4096),
    BY_LENGTH: within,
}


def sparse(weights: Tensor) -> Sparse:
    rows, ids = weights.nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(weights))
    return Sparse.of(counts, ids, weights[rows, ids].float(), torch.zeros(len(weights)))


def relative(parts: list[Tensor], of: list[Tensor]) -> float:
    error = sum(float((a - b).double().square().sum()) for a, b in zip(parts, of, strict=True))
    return error / sum(float(b.double().square().sum()) for b in of)


def head_lengths() -> Tensor:
    """(V,) lengths of the rows of the teacher's head."""
    teacher = load(str(real("stories260K")), device=torch.device("cpu"), dtype=torch.float32)
    return head_of(teacher.model).weight.detach().double().norm(dim=1)


def main() -> None:
    print(machine())
    lengths = head_lengths()
    for steps in (0, 60):
        logits, gradient = real_case(steps)
        p = torch.softmax(logits.double(), -1)
        tail = torch.where(p < T, p, 0.0)
        by_length = tail * lengths  # scaled to as many entries on average
        by_length = (by_length * (tail.sum() / by_length.sum() / T)).clamp(max=1.0)
        dense = gradient(sparse(p))
        head = max(range(len(dense)), key=lambda i: len(dense[i]))
        print(f"\nstudent after {steps} steps\n{'design':<23} {'all':>8} {'head':>8} {'mean of logits':>15}")
        for name, design in DESIGNS.items():
            sums = [0.0, 0.0, 0.0]
            for seed in range(DRAWS):
                pi = by_length if name == BY_LENGTH else tail / T
                kept = design(pi, torch.Generator().manual_seed(seed))
                weights = torch.where(p < T, kept * tail / pi.clamp(min=1e-30), p)
                g = gradient(sparse(weights))
                off = (weights - p).mean(0)
                found = relative(g, dense), relative([g[head]], [dense[head]]), float(off.norm()) ** 2
                sums = [s + x / DRAWS for s, x in zip(sums, found, strict=True)]
            print(
                f"{name:<23} {math.sqrt(sums[0]):>8.4f} {math.sqrt(sums[1]):>8.4f} {math.sqrt(sums[2]):>15.6f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
