"""Samples -> fixed-shape batches. A batch is a pure function of the step, so the whole state is that number.

Letters: B rows, T positions in a row, N positions that carry loss (row-major over the batch).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pennyweight.loss.divergence import Divergence
from pennyweight.records import Encoded
from pennyweight.settings import Schedule

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """One forward pass. ``placed`` lists its samples in the row-major order of their loss positions.

    ``ids``, ``positions``, ``labels`` are (B, T) int64; labels are next tokens, -100 where nothing is learnt.
    A method fills in the (N,) weights, the divergence, and ``target``, a teacher (of loss.signals) at the N positions;
    or ``policy`` (of loss.policy), what the tokens are worth, where the model wrote them itself.
    ``spare``: it is there only so that a process with less to do takes part as often as the others; nothing of it
    counts.
    """

    ids: Tensor
    positions: Tensor
    labels: Tensor
    placed: tuple[Encoded, ...]
    ce_weight: Tensor | None = None
    kd_weight: Tensor | None = None
    hidden_weight: Tensor | None = None
    divergence: Divergence = field(default_factory=Divergence)
    target: Any = None
    policy: Any = None
    spare: bool = False

    @property
    def selected(self) -> Tensor:
        """(N,) flat indices of the positions that carry loss."""
        return (self.labels.flatten() != IGNORE).nonzero().squeeze(-1)

    @property
    def loss_labels(self) -> Tensor:
        """(N,) labels at those positions."""
        flat = self.labels.flatten()
        return flat[flat != IGNORE]

    @property
    def count(self) -> int:
        """N."""
        return int((self.labels != IGNORE).sum())

    @property
    def tokens(self) -> int:
        """Tokens of the samples, without padding."""
        return sum(len(s.ids) for s in self.placed)

    def weighted(self, ce: float, kd: float, divergence: Divergence, target: Any, hidden: float = 0.0) -> Batch:
        """This batch with the same weights at every loss position."""
        ones = torch.ones(self.count)
        weights = {"ce_weight": ce * ones, "kd_weight": kd * ones, "hidden_weight": hidden * ones if hidden else None}
        return replace(self, **weights, divergence=divergence, target=target)


def collate(rows: list[list[Encoded]], pad_id: int, length: int | None = None) -> Batch:
    """Rows of samples -> one batch, padded on the right to ``length``, or to the longest row and a little more
    (``round_width``).

    A sample's last token is only ever a label, so it takes no position. Positions restart at 0 with each sample; a
    model that is given them and no mask keeps samples of one row blind to each other. In a row of one sample the
    padding continues its positions, which no earlier token can see.
    """
    width = length or round_width(_width(rows))
    ids = torch.full((len(rows), width), pad_id)
    positions = torch.zeros((len(rows), width), dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORE)
    for r, row in enumerate(rows):
        start = 0
        for sample in row:
            end = start + len(sample.ids) - 1
            tokens = torch.tensor(sample.ids)
            ids[r, start:end] = tokens[:-1]
            positions[r, start:end] = torch.arange(end - start)
            learnt = torch.tensor(sample.mask[1:], dtype=torch.bool)
            labels[r, start:end][learnt] = tokens[1:][learnt]
            start = end
        positions[r, start:] = torch.arange(width - start) + (start if len(row) == 1 else 0)
    return Batch(ids, positions, labels, tuple(s for row in rows for s in row))


def _width(rows: list[list[Encoded]]) -> int:
    """Positions of the longest row."""
    return max(1, *(sum(len(s.ids) - 1 for s in row) for row in rows))


def round_width(width: int, widths: int = 16) -> int:
    """The next of sixteen widths to each doubling: 6 % more at the most. ``widths``: a power of two, where it is not
    sixteen.

    Libraries keep kernels for every shape they have met, about 9 MB for each of a small model in bfloat16 on a CPU, and
    let none of them go; widths that differ by a token each would fill the memory with them.
    """
    step = max(1, (1 << (width.bit_length() - 1)) // widths)
    return -(-width // step) * step


def first_fit(samples: list[Encoded], length: int) -> list[list[Encoded]]:
    """Samples laid into as few rows of ``length`` tokens as first-fit by falling length finds."""
    rows: list[list[Encoded]] = []
    room: list[int] = []
    for sample in sorted(samples, key=lambda s: -len(s.ids)):
        for r, free in enumerate(room):
            if len(sample.ids) <= free:
                rows[r].append(sample)
                room[r] -= len(sample.ids)
                break
        else:
            rows.append([sample])
            room.append(length - len(sample.ids))
    return rows


def dealt(rows: list[list[Encoded]], ranks: int) -> list[list[list[Encoded]]]:
    """Each process's share of the rows of a step: dealt out there and back, the longest first.

    So all get as many rows, give or take one, of about as many tokens.
    """
    longest = sorted(range(len(rows)), key=lambda r: -sum(len(s.ids) for s in rows[r]))
    hands: list[list[int]] = [[] for _ in range(ranks)]
    for i, r in enumerate(longest):
        lap, place = divmod(i, ranks)
        hands[ranks - 1 - place if lap % 2 else place].append(r)
    return [[rows[r] for r in sorted(hand)] for hand in hands]


@dataclass(frozen=True)
class Packer:
    """Batches of ``batch`` samples, epoch after epoch, each epoch in its own seeded order.

    Calling it with a step gives that step's micro-batches of at most ``micro`` rows. With ``pack`` samples share
    rows of ``context`` tokens; without, each has a row of its own, and rows of like length go together.

    Where a step is shared by ``ranks`` processes, it gives the share of number ``rank``: as many micro-batches in all
    of them, some of which may be spare.
    """

    samples: list[Encoded]
    batch: int
    micro: int
    seed: int
    pad_id: int
    pack: bool = False
    context: int = 512
    rank: int = 0
    ranks: int = 1

    def __call__(self, step: int) -> list[Batch]:
        chosen = [self._at(i) for i in range(step * self.batch, (step + 1) * self.batch)]
        if self.pack:
            rows = first_fit(chosen, max(self.context, *(len(s.ids) for s in chosen)))
        else:
            rows = [[s] for s in sorted(chosen, key=lambda s: len(s.ids))]
        mine = rows if self.ranks == 1 else dealt(rows, self.ranks)[self.rank]
        batches = [self._laid(mine[a : a + self.micro]) for a in range(0, len(mine), self.micro)]
        most = -(-len(rows) // self.ranks)  # rows of a process
        spare = -(-most // self.micro) - len(batches)
        return batches + [replace(self._laid(rows[:1]), spare=True)] * spare

    def _laid(self, rows: list[list[Encoded]]) -> Batch:
        """Rows as a batch. Packed batches already differ in their number of rows, so that they have fewer widths; none
        is filled up past the context."""
        if not self.pack:
            return collate(rows, self.pad_id)
        width = _width(rows)
        filled = round_width(width, 4)
        return collate(rows, self.pad_id, min(filled, self.context) if width <= self.context else filled)

    def _at(self, index: int) -> Encoded:
        epoch, place = divmod(index, len(self.samples))
        return self.samples[int(order(len(self.samples), self.seed, epoch)[place])]


@lru_cache(maxsize=4)
def order(count: int, seed: int, epoch: int) -> Tensor:
    """(count,) int64: the permutation of one epoch; cached, since steps walk through it in order."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def packer(samples: list[Encoded], schedule: Schedule, seed: int, pad_id: int, context: int) -> Packer:
    """Batches as a schedule wants them."""
    s = schedule
    return Packer(samples, s.batch, s.micro_batch or s.batch, seed, pad_id, s.pack, context)
