"""What a teacher's distributions over its own tokens tell of a student's next token: the arithmetic.

Shape letters: N positions of the student, R of the teacher, X outcomes (the student's tokens, then sets of them). Which
number goes where is settled on the CPU, from the texts alone; only probabilities are on the teacher's device. A *level*
is one asking of the teacher: at a common boundary, and again after each node of the way. docs/across.md has the
mathematics.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pennyweight.teacher.vocabulary_trie import Place, Trie


class Carry:
    """Carries probabilities over, by tables made once.

    Args:
        trie: the student's vocabulary in the order of the teacher's tokenizer.
        first: (V of the teacher,) the student token that comes first in what a teacher token spells; -1: it spells
            nothing, and is taken not to come.
        ended: (nodes,) the student token of a text that leaves the trie at a node.
    """

    def __init__(self, trie: Trie, first: np.ndarray, ended: np.ndarray):
        self.trie, self.ended = trie, ended
        self.root = first.copy()
        for (above, t), node in trie.child.items():
            if above == 0:
                self.root[t] = trie.outcome[node]
        self._silent, self._root = torch.from_numpy(self.root < 0), torch.from_numpy(np.maximum(self.root, 0))

    def told(self, logits: Tensor, places: Sequence[Place], row: int = 0) -> Tensor:
        """(N, X) probabilities of the outcomes at each position, the mean over its levels; all of the label's where no
        level is.

        Args:
            logits: (R, V of the teacher), float; used up. The first is the teacher's position ``row``.
            places: all that they name of the teacher's positions is among the R.
        """
        logits.masked_fill_(self._silent.to(logits.device), -torch.inf)
        p = torch.softmax(logits, -1)
        told = p.new_zeros((len(places), self.trie.outcomes))
        self._at_boundaries(told, p, places, row)
        self._along_ways(told, p, places, row)
        _inside(told, p, places, row)
        untold = np.array([i for i, x in enumerate(places) if x.row < 0], np.int64)
        _add(told, untold, np.array([places[i].label for i in untold], np.int64), p.new_ones(len(untold)))
        return told.div_(_on(np.array([max(1, levels(x)) for x in places]), p).unsqueeze(1))

    def settled(self, place: Place) -> dict[int, int]:
        """Outcome -> weight, of what the text itself says: the label, less what its own teacher tokens tell of it."""
        says = {place.label: 1}
        for outcome in self._of_actual(place):
            says[outcome] = says.get(outcome, 0) - 1
        return {outcome: weight for outcome, weight in says.items() if weight}

    def _of_actual(self, place: Place) -> list[int]:
        """What the text's own teacher token tells at each level."""
        if place.row < 0:
            return []
        if place.remainder is not None:
            return place.remainder.student[place.remainder.teacher == place.actual].tolist()
        out = [int(self.root[place.actual])]
        for node, t in zip(place.way, place.then, strict=True):
            child = self.trie.child.get((node, t))
            out.append(int(self.ended[node] if child is None else self.trie.outcome[child]))
        return out

    def _at_boundaries(self, told: Tensor, p: Tensor, places: Sequence[Place], row: int) -> None:
        """A teacher token tells that the student's begins with it; where none does, that its own first one comes."""
        levels = [(i, 0, x.row - row, x.actual) for i, x in enumerate(places) if x.row >= 0 and x.remainder is None]
        own, i = self._own(p, places, levels)
        everywhere = p.new_zeros((len(places), p.shape[1])).index_copy_(0, i, own)
        told.index_add_(1, self._root.to(p.device), everywhere)

    def _along_ways(self, told: Tensor, p: Tensor, places: Sequence[Place], row: int) -> None:
        """Once at a node: a child, or else the student's token has ended."""
        trie = self.trie
        levels = [(i, d + 1, x.row - row + d + 1, t) for i, x in enumerate(places) for d, t in enumerate(x.then)]
        own, _ = self._own(p, places, levels)
        i, node = (np.array(x, np.int64) for x in ([i for i, *_ in levels], [n for x in places for n in x.way]))
        of, at = _ragged(trie.first_child[node], trie.first_child[node + 1])
        child = trie.children[at]
        pairs = _on(of, p), _on(trie.token[child], p)
        _add(told, i[of], trie.outcome[child], own[pairs])
        own[pairs] = 0.0
        _add(told, i, self.ended[node], own.sum(-1))

    def _own(
        self, p: Tensor, places: Sequence[Place], levels: Sequence[tuple[int, int, int, int]]
    ) -> tuple[Tensor, Tensor]:
        """(L, V of the teacher) distributions at levels, each given as (place, how deep, row, actual token), without
        what is barred there; and (L,) places."""
        trie = self.trie
        number = {(i, d): n for n, (i, d, *_) in enumerate(levels)}
        bars = [(number[i, d], node) for i, x in enumerate(places) for d, node in x.barred if (i, d) in number]
        i, _, rows, actual = np.array(levels, np.int64).reshape(-1, 4).T
        level, node = np.array(bars, np.int64).reshape(-1, 2).T
        of, at = _ragged(trie.first_child[node], trie.first_child[node + 1])
        of, t = level[of], trie.token[trie.children[at]]
        cannot = t != actual[of]
        own = p[_on(rows, p)]
        own[_on(of[cannot], p), _on(t[cannot], p)] = 0.0
        return _shares(own, _on(actual, p)), _on(i, p)


def levels(place: Place) -> int:
    """How many distributions of the teacher speak at a position."""
    return 0 if place.row < 0 else 1 + len(place.way)


def _inside(told: Tensor, p: Tensor, places: Sequence[Place], row: int) -> None:
    """Positions inside a teacher token: one of those that begin with what is there and go on."""
    for i, x in enumerate(places):
        if x.remainder is not None and len(x.remainder.teacher):
            own = p[x.row - row, _on(x.remainder.teacher, p)].unsqueeze(0)
            place = _on(np.flatnonzero(x.remainder.teacher == x.actual), p)
            told[i].index_add_(0, _on(x.remainder.student, p), _shares(own, place)[0])


def _shares(own: Tensor, actual: Tensor) -> Tensor:
    """Rows that sum to 1; all is the actual token's where nothing is left that float32 can say."""
    total = own.sum(-1, keepdim=True)
    own = own / total.clamp(min=torch.finfo(own.dtype).tiny)
    return own.scatter_add_(1, actual.unsqueeze(1), (total <= 0).to(own.dtype))


def _ragged(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every number of each range, and which range it is of."""
    sizes = stop - start
    of = np.repeat(np.arange(len(sizes)), sizes)
    return of, np.arange(len(of)) - (np.cumsum(sizes) - sizes - start)[of]


def _add(told: Tensor, i: np.ndarray, outcome: np.ndarray, value: Tensor) -> None:
    told.view(-1).index_add_(0, _on(i * told.shape[1] + outcome, value), value)


def _on(x: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x)).to(like.device)
