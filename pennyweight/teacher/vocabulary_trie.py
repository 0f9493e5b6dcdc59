"""A student's vocabulary in the order of another tokenizer: sorted by how the teacher's cuts each of its tokens.

Sorted so, the student's tokens whose cut begins with the same teacher tokens stand side by side: they are a node of a
trie, an interval of the sorted vocabulary. Node 0 is the root, the whole vocabulary. What a teacher token tells of the
student's next token is an *outcome*: one student token, by its id, or all tokens of a node, by V + k, where V is the
student's vocabulary and k counts the intervals of two tokens and more. docs/across.md has the mathematics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Trie:
    """``order`` (M,) are the student's ids that have a cut, sorted by it; ``rank`` (V,) is where each stands, -1 for
    the others.

    Of each node: ``low`` and ``high``, its interval of ``order``; ``ends``, how many tokens end there: the first ones
    of the interval; ``token``, the teacher token that leads to it; ``outcome``. The children of node v are
    ``children[first_child[v] : first_child[v + 1]]``, and ``child`` finds one by (node, teacher token). The nodes on
    the way to the token of rank r, the root left out, are ``ways[first_way[r] : first_way[r + 1]]``. ``sets`` (G, 2)
    are the intervals that outcomes V and up stand for. All int64.
    """

    vocabulary: int
    order: np.ndarray
    rank: np.ndarray
    low: np.ndarray
    high: np.ndarray
    ends: np.ndarray
    token: np.ndarray
    outcome: np.ndarray
    children: np.ndarray
    first_child: np.ndarray
    child: dict[tuple[int, int], int]
    ways: np.ndarray
    first_way: np.ndarray
    sets: np.ndarray

    @property
    def outcomes(self) -> int:
        """Ids of outcomes: of student tokens, then of sets."""
        return self.vocabulary + len(self.sets)

    def way(self, node: int) -> list[int]:
        """The teacher tokens that lead to a node."""
        through = self.ways[self.first_way[self.low[node]] :]
        return [int(self.token[v]) for v in through[: int(np.argmax(through == node)) + 1]] if node else []


def build_trie(cuts: Sequence[Sequence[int] | None], vocabulary: int) -> Trie:
    """The trie of a student's tokens by their cuts.

    Args:
        cuts: teacher ids of each student id; None or nothing for a token that none stand for.
        vocabulary: entries of the student's head, at least ``len(cuts)``.
    """
    sorted_ids = sorted((i for i, c in enumerate(cuts) if c), key=lambda i: (tuple(cuts[i] or ()), i))
    token, low, high, ends, parent = [-1], [0], [len(sorted_ids)], [0], [-1]
    ways: list[int] = []
    first_way, child = [0], {}
    path: list[int] = []  # nodes on the way to the token before
    for rank, i in enumerate(sorted_ids):
        cut = list(cuts[i] or ())
        same = 0
        while same < min(len(path), len(cut)) and token[path[same]] == cut[same]:
            same += 1
        for node in path[same:]:
            high[node] = rank
        path = path[:same]
        for t in cut[same:]:
            above = path[-1] if path else 0
            child[above, t] = len(token)
            path.append(len(token))
            for column, value in ((token, t), (low, rank), (high, len(sorted_ids)), (ends, 0), (parent, above)):
                column.append(value)
        ends[path[-1]] += 1
        ways += path
        first_way.append(len(ways))
    lows, highs = np.array(low), np.array(high)
    outcome, sets = _outcomes(lows, highs, np.array(sorted_ids, np.int64), vocabulary)
    children = np.argsort(np.array(parent), kind="stable")[1:]  # the root is nobody's child
    first_child = np.searchsorted(np.array(parent)[children], np.arange(len(token) + 1))
    rank_of = np.full(vocabulary, -1)
    rank_of[sorted_ids] = np.arange(len(sorted_ids))
    return Trie(
        vocabulary, np.array(sorted_ids, np.int64), rank_of, lows, highs, np.array(ends), np.array(token), outcome,
        children, first_child, child, np.array(ways, np.int64), np.array(first_way), sets,
    )  # fmt: skip


def _outcomes(low: np.ndarray, high: np.ndarray, order: np.ndarray, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """The outcome of each node, and the intervals of those with several tokens; nodes of one interval share one."""
    several = high - low > 1
    several[0] = False  # to land anywhere in the vocabulary says nothing
    sets, number = np.unique(np.stack([low, high], 1)[several], axis=0, return_inverse=True)
    outcome = np.full(len(low), -1)
    outcome[several] = vocabulary + number.reshape(-1)
    one = high - low == 1
    outcome[one] = order[low[one]]
    return outcome, sets.reshape(-1, 2)


@dataclass(frozen=True, slots=True, eq=False)
class Remainder:
    """Teacher tokens that begin with what the student has already, as the student cuts it, and go on: ``teacher`` (m,)
    ids, and for each the student token that goes on, ``student`` (m,)."""

    teacher: np.ndarray
    student: np.ndarray


@dataclass(frozen=True, slots=True)
class Place:
    """A student's position that carries loss, among the teacher's.

    ``label`` is the student's next token, ``row`` the teacher's position whose distribution speaks first, counted among
    its own that carry loss, and -1 where none does; ``actual`` the teacher token that follows it in the text. ``way``
    are the trie nodes after which the teacher is asked again, ``then`` the teacher token that follows each in the text.
    ``barred`` are pairs (d, node): the teacher token after d more does not lead on from that node (but for the actual
    one), or an earlier student token would be longer than it is. ``remainder`` is there inside a teacher token.
    """

    label: int
    row: int = -1
    actual: int = -1
    way: tuple[int, ...] = ()
    then: tuple[int, ...] = ()
    barred: tuple[tuple[int, int], ...] = ()
    remainder: Remainder | None = None
