"""A teacher's distribution carried over to a student of another tokenizer, by the chain rule.

Shape letters: N positions of the student, R of the teacher, X outcomes (the student's tokens, then sets of them).
docs/across.md has the mathematics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from pennyweight.errors import ModelError
from pennyweight.loss.signals import Grouped, Sets, Sparse
from pennyweight.model.head import Head
from pennyweight.records import Encoded, sha256_json
from pennyweight.teacher.alignment import Vocabularies, align
from pennyweight.teacher.carry import Carry
from pennyweight.teacher.targets import Keep, Kept, draw, expected_entries, join, uniforms
from pennyweight.teacher.vocabulary_trie import Place

_TILE_ENTRIES = 1 << 24  # of the teacher's distributions and of outcomes, worked on at once: 64 MiB of float32


class Labels(Protocol):
    """A teacher that can be asked for hidden states: ``teacher.local.LocalTeacher``."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def head(self) -> Head: ...

    def states(self, samples: Sequence[Encoded]) -> Iterator[tuple[list[Encoded], Tensor]]:
        """Samples in groups, and the (R, D) last hidden states at each group's loss positions."""
        ...


@dataclass(frozen=True)
class AcrossTeacher:
    """A teacher whose tokenizer is not the student's.

    ``theirs`` gives the teacher's encoding of a sample of the student's: the same turns learnt, the same text.
    """

    teacher: Labels
    vocabularies: Vocabularies
    theirs: Callable[[Encoded], Encoded]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that targets depend on besides the samples: the weights and both vocabularies."""
        v = self.vocabularies
        made_from = [v.first.tolist(), v.ended.tolist(), v.trie.order.tolist(), v.trie.low.tolist(), v.trie.outcomes]
        return sha256_json([self.teacher.fingerprint, made_from])

    @torch.no_grad()
    def targets(self, samples: Sequence[Encoded], keep: Keep) -> list[Kept]:
        """An unbiased sample of each position's outcomes, for ``TargetCache``; drawn by each sample's own seed.

        Raises:
            DataError: the two encodings of a sample do not spell the same.
            ModelError: the teacher's numbers are none.
            ValueError: other targets than sampled ones are asked for, or a temperature: a product of tempered
                probabilities of pieces is not the tempered probability of the whole.
        """
        if keep.kind != "sampled" or keep.temperature != 1.0:
            raise ValueError(f"across tokenizers targets are sampled, at temperature 1, not {keep}")
        out: dict[str, Kept] = {}
        for student, masses in self._masses(samples):
            u = uniforms(len(student.loss_positions), int(student.token_hash[:15], 16))
            parts, at = [], 0
            for tile in masses:
                parts.append(_drawn(tile, keep.threshold, u[at : at + len(tile)]))
                at += len(tile)
            out[student.token_hash] = join(parts)
        return [out[s.token_hash] for s in samples]

    @torch.no_grad()
    def exact(self, samples: Sequence[Encoded]) -> Grouped:
        """All outcomes of the samples' loss positions with their probabilities, nothing sampled."""
        of: dict[str, Tensor] = {s.token_hash: torch.cat(list(masses)) for s, masses in self._masses(samples)}
        mass = torch.cat([of[s.token_hash] for s in samples])
        row, ids = mass.nonzero(as_tuple=True)
        entropy = -torch.special.xlogy(mass, mass).sum(-1)
        return Grouped(Sparse.of(torch.bincount(row, minlength=len(mass)), ids, mass[row, ids], entropy), self.sets)

    @torch.no_grad()
    def expected(
        self, samples: Sequence[Encoded], thresholds: list[float], temperature: float = 1.0
    ) -> list[tuple[float, float]]:
        """Heads and tails a position that each threshold would keep, on average, as ``LocalTeacher.expected``."""
        tiles = [tile for _, masses in self._masses(samples) for tile in masses]
        found = torch.tensor([expected_entries(tile.log_(), thresholds, temperature) for tile in tiles])
        sizes = torch.tensor([float(len(tile)) for tile in tiles])
        means = torch.einsum("i,ijk->jk", sizes / sizes.sum(), found)
        return [(heads, tails) for heads, tails in means.tolist()]

    @cached_property
    def sets(self) -> Sets:
        """What outcomes from the student's vocabulary on stand for, on the CPU."""
        trie = self.vocabularies.trie
        return Sets(trie.vocabulary, torch.from_numpy(trie.order), torch.from_numpy(trie.sets))

    def _masses(self, samples: Sequence[Encoded]) -> Iterator[tuple[Encoded, Iterator[Tensor]]]:
        """Each sample once, in the teacher's order, with tiles (n, X) of its positions' probabilities."""
        paired: dict[str, dict[str, Encoded]] = {}
        theirs: dict[str, Encoded] = {}
        for s in samples:
            other = self.theirs(s)
            theirs[other.token_hash] = other
            paired.setdefault(other.token_hash, {})[s.token_hash] = s
        for group, states in self.teacher.states(list(theirs.values())):
            sizes = [len(t.loss_positions) for t in group]
            for other, own in zip(group, states.split(sizes), strict=True):
                for s in paired[other.token_hash].values():
                    yield s, self._tiles(align(s, other, self.vocabularies), own)

    def _tiles(self, places: list[Place], states: Tensor) -> Iterator[Tensor]:
        head = self.teacher.head
        size = max(16, _TILE_ENTRIES // (len(head.weight) + self.vocabularies.trie.outcomes))
        for a in range(0, len(places), size):
            some = places[a : a + size]
            first = min((x.row for x in some if x.row >= 0), default=0)
            # Beyond the first distribution comes one after each token of the way that the text goes on after.
            end = max((x.row + 1 + sum(t >= 0 for t in x.then) for x in some), default=0)
            yield self._carry.masses(head.logits(states[first:end]), some, first)

    @cached_property
    def _carry(self) -> Carry:
        return Carry(self.vocabularies.trie, self.vocabularies.first)


def _drawn(mass: Tensor, threshold: float, u: Tensor) -> Kept:
    """As ``targets.draw`` draws from logits: what has no probability has the logit minus infinity."""
    try:
        return draw(mass.log_(), threshold, 1.0, u)
    except FloatingPointError as e:
        raise ModelError(str(e)) from None
