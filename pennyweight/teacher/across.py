"""A teacher's distribution carried over to a student of another tokenizer, by the chain rule.

Shape letters: N positions of the student, R of the teacher, X outcomes (the student's tokens, then sets of them).
docs/across.md has the mathematics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from pennyweight.errors import ModelError
from pennyweight.loss.signals import Grouped, Sets, Sparse
from pennyweight.model.head import Head
from pennyweight.records import Encoded, sha256_json
from pennyweight.teacher.alignment import Vocabularies, align
from pennyweight.teacher.carry import Carry, levels
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
class Settled:
    """What a sample's text itself says at its N loss positions, as entries: ``counts`` (N,) int64 of them, ``ids`` and
    ``weights`` (E,) of outcomes, some negative. ``levels`` (N,) float32 is how many distributions speak besides."""

    levels: Tensor
    counts: Tensor
    ids: Tensor
    weights: Tensor


@dataclass(frozen=True)
class AcrossTeacher:
    """A teacher whose tokenizer is not the student's.

    ``theirs`` gives the teacher's encoding of a sample of the student's: the same turns learnt, the same text.
    ``reads`` names how the teacher reads texts: its tokenizer, chat template and context.
    """

    teacher: Labels
    vocabularies: Vocabularies
    theirs: Callable[[Encoded], Encoded]
    reads: str = ""
    _settled: dict[str, Settled] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that targets depend on besides the samples: the weights, how the teacher reads, and both
        vocabularies."""
        v = self.vocabularies
        made_from = [v.first.tolist(), v.ended.tolist(), v.trie.order.tolist(), v.trie.low.tolist(), v.trie.outcomes]
        return sha256_json([self.teacher.fingerprint, self.reads, made_from])

    @torch.no_grad()
    def targets(self, samples: Sequence[Encoded], keep: Keep) -> list[Kept]:
        """An unbiased sample of what the teacher tells at each position, for ``TargetCache``: ids are outcomes, the
        probabilities a mean over levels. Drawn by each sample's own seed; ``signal`` makes targets of it.

        Raises:
            DataError: the two encodings of a sample do not spell the same.
            ModelError: the teacher's numbers are none.
            ValueError: other targets than sampled ones are asked for, or a temperature: a product of tempered
                probabilities of pieces is not the tempered probability of the whole.
        """
        if keep.kind != "sampled" or keep.temperature != 1.0:
            raise ValueError(f"across tokenizers targets are sampled, at temperature 1, not {keep}")
        out: dict[str, Kept] = {}
        for student, told in self._told(samples):
            u = uniforms(len(student.loss_positions), int(student.token_hash[:15], 16))
            parts, at = [], 0
            for tile in told:
                parts.append(_drawn(tile, keep.threshold, u[at : at + len(tile)]))
                at += len(tile)
            out[student.token_hash] = join(parts)
        return [out[s.token_hash] for s in samples]

    def signal(self, samples: Sequence[Encoded], told: Sparse) -> Grouped:
        """The targets of the samples' loss positions, in their order, on the device of ``told``: that is what the
        teacher tells there, as ``targets`` drew it."""
        settled = [self.settled(s) for s in samples]
        device = told.ids.device
        times, counts, ids, weights = (
            torch.cat([getattr(x, name) for x in settled]).to(device) for name in ("levels", "counts", "ids", "weights")
        )
        row = torch.cat([told.row, torch.repeat_interleave(torch.arange(len(counts), device=device), counts)])
        order = torch.argsort(row, stable=True)
        both = torch.cat([told.weights * times[told.row], weights])[order]
        # Entropies of levels add up; that of their mean is about the mean of theirs and the logarithm of their number.
        entropy = times * told.entropy - torch.special.xlogy(times, times)
        all_counts = told.starts.diff() + counts.cpu()
        return Grouped(Sparse.of(all_counts, torch.cat([told.ids, ids])[order], both, entropy), self.sets.to(device))

    def settled(self, sample: Encoded) -> Settled:
        """What a sample's text itself says; found once, and kept, on the CPU."""
        if sample.token_hash not in self._settled:
            places = align(sample, self.theirs(sample), self.vocabularies)
            says = [self._carry.settled(x) for x in places]
            self._settled[sample.token_hash] = Settled(
                torch.tensor([float(levels(x)) for x in places]),
                torch.tensor([len(x) for x in says]),
                torch.tensor([outcome for x in says for outcome in x], dtype=torch.long),
                torch.tensor([float(w) for x in says for w in x.values()]),
            )
        return self._settled[sample.token_hash]

    @torch.no_grad()
    def exact(self, samples: Sequence[Encoded]) -> Grouped:
        """``signal`` of all that the teacher tells, nothing sampled."""
        of = {s.token_hash: torch.cat(list(told)) for s, told in self._told(samples)}
        told = torch.cat([of[s.token_hash] for s in samples])
        row, ids = told.nonzero(as_tuple=True)
        entropy = -torch.special.xlogy(told, told).sum(-1)
        return self.signal(samples, Sparse.of(torch.bincount(row, minlength=len(told)), ids, told[row, ids], entropy))

    @torch.no_grad()
    def expected(
        self, samples: Sequence[Encoded], thresholds: list[float], temperature: float = 1.0, positions: int = 1024
    ) -> list[tuple[float, float]]:
        """Heads and tails a position that each threshold would keep, on average, as ``LocalTeacher.expected``."""
        found: list[list[tuple[float, float]]] = []
        sizes: list[int] = []
        for tile in (tile for _, told in self._told(samples) for tile in told):
            sizes.append(len(tile))
            found.append(expected_entries(tile.log_(), thresholds, temperature))
            if sum(sizes) >= positions:
                break
        means = torch.einsum("i,ijk->jk", torch.tensor(sizes) / sum(sizes), torch.tensor(found))
        return [(heads, tails) for heads, tails in means.tolist()]

    @cached_property
    def sets(self) -> Sets:
        """What outcomes from the student's vocabulary on stand for, on the CPU."""
        trie = self.vocabularies.trie
        return Sets(trie.vocabulary, torch.from_numpy(trie.order), torch.from_numpy(trie.sets))

    def _told(self, samples: Sequence[Encoded]) -> Iterator[tuple[Encoded, Iterator[Tensor]]]:
        """Each sample once, in the teacher's order, with tiles (n, X) of what is told at its positions."""
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
            end = max(x.row + max(1, levels(x)) for x in some)
            yield self._carry.told(head.logits(states[first:end]), some, first)

    @cached_property
    def _carry(self) -> Carry:
        return Carry(self.vocabularies.trie, self.vocabularies.first, self.vocabularies.ended)


def _drawn(told: Tensor, threshold: float, u: Tensor) -> Kept:
    """As ``targets.draw`` draws from logits, of the outcomes that have any probability: the fewer, the faster."""
    some = told.any(0).nonzero().squeeze(-1)
    try:
        kept = draw(told[:, some].log_(), threshold, 1.0, u)
    except FloatingPointError as e:
        raise ModelError(str(e)) from None
    return replace(kept, ids=some.int().cpu()[kept.ids.long()])
