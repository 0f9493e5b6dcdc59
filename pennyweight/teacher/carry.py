"""What a teacher's distributions over its own tokens tell of a student's next token: the arithmetic.

Shape letters: N positions of the student, R of the teacher, X outcomes (the student's tokens, then sets of them), P
pairs of a position and a node of its way. Which number goes where is settled on the CPU, from the texts alone; only the
probabilities are on the teacher's device. docs/across.md has the mathematics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    """

    def __init__(self, trie: Trie, first: np.ndarray):
        self.trie, self.first = trie, first
        root = np.full(len(first), -1)
        for (above, t), node in trie.child.items():
            if above == 0:
                root[t] = trie.outcome[node]
        # A token that leads to no node tells the student's first token in it, as far as the root tells tokens apart.
        strays = np.flatnonzero((root < 0) & (first >= 0))
        ranks = trie.rank[first[strays]]
        below = np.where(ranks >= 0, trie.ways[trie.first_way[np.maximum(ranks, 0)]], 0)
        root[strays] = np.where(ranks >= 0, trie.outcome[below], first[strays])
        by_node = np.argsort(below, kind="stable")
        self._strays = strays[by_node]
        self._first_stray = np.searchsorted(below[by_node], np.arange(len(trie.low) + 1))
        self._silent, self._root = torch.from_numpy(root < 0), torch.from_numpy(np.maximum(root, 0))

    def masses(self, logits: Tensor, places: Sequence[Place], row: int = 0) -> Tensor:
        """(N, X) probabilities of each position's outcomes; a row sums to 1.

        Args:
            logits: (R, V of the teacher), float; used up. The first is the teacher's position ``row``.
            places: all that they name of the teacher's positions is among the R.
        """
        logits.masked_fill_(self._silent.to(logits.device), -torch.inf)
        p = torch.softmax(logits, -1)
        walk = _Walk.of(places, row, self.trie)
        mass = p.new_zeros((len(places), self.trie.outcomes))
        self._from_the_root(mass, p, walk, np.flatnonzero([x.row >= 0 and x.remainder is None for x in places]))
        _along(mass, p, walk)
        _inside(mass, p, places, walk)
        total = mass.clamp_(min=0.0).sum(-1, keepdim=True)
        # What no distribution tells, or only in numbers too small for it, is left to the text itself.
        mass.div_(total.clamp(min=torch.finfo(p.dtype).tiny))
        untold = np.flatnonzero((total.squeeze(-1) <= 0).cpu().numpy())
        _add(mass, untold, walk.label[untold], p.new_ones(len(untold)))
        return mass

    def _from_the_root(self, mass: Tensor, p: Tensor, walk: _Walk, at: np.ndarray) -> None:
        """What each teacher token tells by itself, but for the one that the text goes on with."""
        own = p[_on(walk.rows[at], p)]
        of, t = walk.barred(at, 0, walk.actual[at])
        own[_on(of, p), _on(t, p)] = 0.0
        actual = _on(walk.actual[at], p).unsqueeze(1)
        taken = own.gather(1, actual).squeeze(1)
        others = own.scatter(1, actual, 0.0)
        mass[_on(at, p)] = own.new_zeros((len(at), mass.shape[1])).index_add_(1, self._root.to(p.device), others)
        pathless = np.flatnonzero(walk.depth[at] == 0)
        i = at[pathless]
        _add(mass, i, walk.outcome(i, walk.label[i]), taken[_on(pathless, p)])
        # Below the first node of a way tokens are told apart further, so what was put together there is undone.
        on_way = np.flatnonzero(walk.depth[at] > 0)
        node = walk.way[at[on_way], 0] if len(on_way) else on_way
        mass[_on(at[on_way], p), _on(self.trie.outcome[node], p)] = 0.0
        of, stray = _ragged(self._first_stray[node], self._first_stray[node + 1])
        of, t = on_way[of], self._strays[stray]
        _add(mass, at[of], walk.outcome(at[of], self.first[t]), own[_on(of, p), _on(t, p)])


def _along(mass: Tensor, p: Tensor, walk: _Walk) -> None:
    """What the teacher tells once it is at a node of a way: longer tokens by its children, the end of this one by all
    else. Beyond the way's last node the text itself tells the rest: its own next piece is the label's."""
    trie, i, node, then = walk.trie, walk.pair_place, walk.node, walk.then
    after = walk.rows[i] + walk.pair_depth
    reached = p[_on(after - 1, p), _on(trie.token[node], p)]
    for d in range(2, int(walk.depth.max(initial=0)) + 1):
        pairs = _on(np.flatnonzero(walk.pair_depth == d), p)
        reached[pairs] *= reached[pairs - 1]
    is_open = (trie.first_child[node] < trie.first_child[node + 1]) & (then >= 0)
    shut = np.flatnonzero(~is_open)
    _add(mass, i[shut], walk.outcome(i[shut], walk.label[i[shut]]), reached[_on(shut, p)])
    pairs = np.flatnonzero(is_open)
    i, node, then, after, reached = i[pairs], node[pairs], then[pairs], after[pairs], reached[_on(pairs, p)]
    own = p[_on(after, p)] * reached.unsqueeze(1)
    of, t = walk.barred(i, walk.pair_depth[pairs], then)
    own[_on(of, p), _on(t, p)] = 0.0
    of, place = _ragged(trie.first_child[node], trie.first_child[node + 1])
    child = trie.children[place]
    longer = own[_on(of, p), _on(trie.token[child], p)]
    off = np.flatnonzero(trie.token[child] != then[of])
    _add(mass, i[of[off]], trie.outcome[child[off]], longer[_on(off, p)])
    actual = own.gather(1, _on(then, p).unsqueeze(1)).squeeze(1)
    at_last = _on(walk.pair_depth[pairs] == walk.depth[i], p)
    actual = torch.where(at_last, actual, 0.0)
    _add(mass, i, walk.outcome(i, walk.label[i]), actual)
    own[_on(of, p), _on(trie.token[child], p)] = 0.0
    _add(mass, i, walk.outcome(i, walk.ended[pairs]), own.sum(-1) - actual)


def _inside(mass: Tensor, p: Tensor, places: Sequence[Place], walk: _Walk) -> None:
    """Positions inside a teacher token: one of those that begin with what is there and go on; the actual one among
    them, also where the student cuts the text otherwise than that token by itself."""
    found = [(i, x.remainder) for i, x in enumerate(places) if x.remainder is not None]
    if not found:
        return
    lacking = np.array([i for i, r in found if walk.actual[i] not in r.teacher], np.int64)
    _add(mass, lacking, walk.label[lacking], p[_on(walk.rows[lacking], p), _on(walk.actual[lacking], p)])
    sizes = np.array([len(r.teacher) for _, r in found])
    token, t = (np.concatenate([getattr(r, n) for _, r in found]) for n in ("student", "teacher"))
    i = np.repeat([i for i, _ in found], sizes)
    token = np.where(t == walk.actual[i], walk.label[i], token)
    _add(mass, i, token, p[_on(walk.rows[i], p), _on(t, p)])


@dataclass(frozen=True)
class _Walk:
    """Places as arrays: ``rows``, ``actual``, ``label`` and ``depth`` (of the way) (N,); ``way`` (N, depth) padded with
    0; and by pair, position after position: ``pair_place``, ``pair_depth`` (from 1), ``node``, ``then``, ``ended``; and
    ``bars`` (3, B): places, how deep, nodes."""

    trie: Trie
    rows: np.ndarray
    actual: np.ndarray
    label: np.ndarray
    depth: np.ndarray
    way: np.ndarray
    pair_place: np.ndarray
    pair_depth: np.ndarray
    node: np.ndarray
    then: np.ndarray
    ended: np.ndarray
    bars: np.ndarray

    @staticmethod
    def of(places: Sequence[Place], row: int, trie: Trie) -> _Walk:
        depth = np.array([len(x.way) for x in places], np.int64)
        rows, actual, label = (np.array([getattr(x, n) for x in places], np.int64) for n in ("row", "actual", "label"))
        node, then, ended = (
            np.array([y for x in places for y in getattr(x, n)], np.int64) for n in ("way", "then", "ended")
        )
        pair_place = np.repeat(np.arange(len(places)), depth)
        pair_depth = np.arange(len(pair_place)) - (np.cumsum(depth) - depth)[pair_place] + 1
        way = np.zeros((len(places), int(depth.max(initial=0))), np.int64)
        way[pair_place, pair_depth - 1] = node
        bars = np.array([(i, *bar) for i, x in enumerate(places) for bar in x.barred], np.int64).reshape(-1, 3).T
        return _Walk(trie, rows - row, actual, label, depth, way, pair_place, pair_depth, node, then, ended, bars)

    def barred(self, i: np.ndarray, depth: np.ndarray | int, then: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Teacher tokens that cannot come at places ``i`` after ``depth`` tokens of their ways, where the text has
        ``then``; as numbers into ``i``, and tokens."""
        number = np.full((len(self.label), self.way.shape[1] + 1), -1)
        number[i, depth] = np.arange(len(i))
        place, deep, node = self.bars
        of, child = _ragged(self.trie.first_child[node], self.trie.first_child[node + 1])
        of, t = number[place, deep][of], self.trie.token[self.trie.children[child]]
        barred = (of >= 0) & (t != then[of])
        return of[barred], t[barred]

    def outcome(self, i: np.ndarray, token: np.ndarray) -> np.ndarray:
        """What student tokens count as at positions ``i``: where a way goes on with them, themselves if they end on it,
        else the node that they leave it by."""
        trie, rank = self.trie, self.trie.rank[token]
        depth = np.zeros(len(i), np.int64)
        for d in range(self.way.shape[1]):
            node = self.way[i, d]
            depth += (self.depth[i] > d) & (trie.low[node] <= rank) & (rank < trie.high[node])
        node = np.where(depth > 0, self.way[i, np.maximum(depth - 1, 0)], 0) if self.way.shape[1] else depth
        itself = (rank < 0) | (rank < trie.low[node] + trie.ends[node])
        left_by = trie.ways[np.minimum(trie.first_way[np.maximum(rank, 0)] + depth, len(trie.ways) - 1)]
        return np.where(itself, token, trie.outcome[left_by])


def _ragged(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every number of each range, and which range it is of."""
    sizes = stop - start
    of = np.repeat(np.arange(len(sizes)), sizes)
    return of, np.arange(len(of)) - (np.cumsum(sizes) - sizes - start)[of]


def _add(mass: Tensor, i: np.ndarray, outcome: np.ndarray, value: Tensor) -> None:
    mass.view(-1).index_add_(0, _on(i * mass.shape[1] + outcome, value), value)


def _on(x: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x)).to(like.device)
