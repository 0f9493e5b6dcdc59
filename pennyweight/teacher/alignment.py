"""One text, cut by two tokenizers: where each position of the student stands among the teacher's tokens.

At a byte offset where both have a boundary a *way* begins: the nodes of the student's vocabulary that the teacher's own
tokens lead through, as long as there are tokens beyond. A position inside a teacher token has a *remainder* instead:
the teacher tokens that begin with what the student has of it already, and what would be left of each. docs/across.md
has the mathematics.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby

import numpy as np

from pennyweight.errors import DataError
from pennyweight.model.spelling import Spelling, joined
from pennyweight.records import Encoded
from pennyweight.teacher.vocabulary_trie import Place, Remainder, Trie, build_trie


@dataclass(frozen=True)
class Vocabularies:
    """Two tokenizers, and what each token of the one is to the other.

    ``first`` (V_teacher,) is the student token that comes first in what a teacher token spells, and the student's end
    of text for the teacher's ``ends``; -1 for all that spell nothing. ``ended`` (nodes,) is the student token of a text
    that leaves the trie at a node.
    """

    student: Spelling
    teacher: Spelling
    trie: Trie
    first: np.ndarray
    ended: np.ndarray
    student_ends: frozenset[int]
    teacher_ends: frozenset[int]
    _known: dict[tuple[bytes, bytes], list[tuple[tuple[int, ...], int]]] = field(default_factory=dict)

    def remainder(self, had: Sequence[int], skipped: bytes = b"", before: bytes = b"") -> Remainder:
        """Teacher tokens of which the student ``had`` these tokens, and goes on.

        Args:
            skipped: what they begin with that belongs to an earlier token of the student.
            before: what the student's tokens spell before any of it.
        """
        key, had = (skipped, before), tuple(had)
        if key not in self._known:
            pieces = [p if p and p.startswith(skipped) and len(p) > len(skipped) else None for p in self.teacher.pieces]
            cuts = _cut_all(self.student, [p and before + p[len(skipped) :] for p in pieces])
            self._known[key] = sorted((tuple(c), i) for i, c in enumerate(cuts) if c)
        known, n = self._known[key], len(had)
        a, b = bisect_left(known, (had,)), bisect_left(known, ((*had[:-1], had[-1] + 1),) if had else ((1 << 62,),))
        found = [(i, cut[n]) for cut, i in known[a:b] if len(cut) > n]
        both = np.array(found, np.int64).reshape(-1, 2)
        return Remainder(both[:, 0], both[:, 1])

    def with_actual(self, rest: Remainder, actual: int, had: int) -> Remainder:
        """``rest`` with the token that does come, of which the student has ``had`` bytes, where it cuts the text
        otherwise than that token by itself."""
        if actual in rest.teacher:
            return rest
        (cut,) = self.student.cut([(self.teacher.pieces[actual] or b"")[had:]])
        return Remainder(np.append(rest.teacher, actual), np.append(rest.student, cut[0])) if cut else rest


def compare(
    student: Spelling,
    teacher: Spelling,
    student_ends: Sequence[int],
    teacher_ends: Sequence[int],
    student_entries: int,
    teacher_entries: int,
) -> Vocabularies:
    """Two vocabularies, compared.

    Args:
        student_ends, teacher_ends: control tokens that end a text, the student's usual one first.
        student_entries, teacher_entries: entries of the models' heads, which may be more than the tokenizers'.
    """
    trie = build_trie(_cut_all(teacher, _in_use(student)), student_entries)
    first = np.full(teacher_entries, -1)
    for i, cut in enumerate(_cut_all(student, teacher.pieces)):
        first[i] = cut[0] if cut else -1
    if student_ends:
        first[list(teacher_ends)] = student_ends[0]
    ends = frozenset(student_ends), frozenset(teacher_ends)
    return Vocabularies(student, teacher, trie, first, _ended(student, teacher, trie), *ends)


def align(student: Encoded, teacher: Encoded, v: Vocabularies) -> list[Place]:
    """The student's loss positions of a sample, from two encodings of it: the same turns learnt, the same bytes spelt.

    A space that one of the tokenizers puts at the start of a text is no difference. Where one was cut to its context
    before the other, the text alone tells what the teacher does not have. ``check_same_text`` finds the rest.

    Raises:
        DataError: they spell other bytes.
    """
    places: list[Place] = []
    row = 0
    mine, theirs = list(_runs(student)), list(_runs(teacher))
    for ours, of_teacher in zip(mine, theirs, strict=False):
        places += _align_run(ours, of_teacher, row, v)
        row += len(of_teacher)
    return [*places, *(Place(u) for ours in mine[len(theirs) :] for u in ours)]


def check_same_text(student: Encoded, teacher: Encoded, spelling: Spelling, teachers: Spelling, whole: bool) -> None:
    """Raise DataError, as ``align`` does, for two encodings of a sample that it could not align; of ``whole`` ones also
    where one spells more than spaces beyond the other's end."""
    mine, theirs = list(_runs(student)), list(_runs(teacher))
    if whole and len(mine) != len(theirs):
        raise DataError(
            f"the student's chat template gives {len(mine)} turns of a sample to learn, and the teacher's "
            f"{len(theirs)}; give conversations of one turn"
        )
    for ours, of_teacher in zip(mine, theirs, strict=False):
        starts, their_starts = _starts(ours, of_teacher, spelling, teachers)
        n = min(starts[-1], their_starts[-1])
        more = joined(ours, spelling)[n - starts[0] :], joined(of_teacher, teachers)[n - their_starts[0] :]
        if whole and any(m.strip() for m in more):
            raise _otherwise(*more)


def _otherwise(one: bytes, other: bytes) -> DataError:
    """Of two spellings, from where they differ."""
    parts = [t[:20].decode(errors="replace") for t in (one, other)]
    return DataError(
        f"the student's tokenizer spells a text otherwise than the teacher's ({parts[0]!r} for {parts[1]!r}): one "
        "normalises it or does not know a character; normalise the data, or drop this sample"
    )


def _runs(encoded: Encoded) -> Iterator[list[int]]:
    """The learnt tokens, in runs without a gap."""
    for _, run in groupby(enumerate(encoded.loss_positions), key=lambda x: x[1] - x[0]):
        yield [encoded.ids[t + 1] for _, t in run]


def _align_run(mine: list[int], theirs: list[int], row: int, v: Vocabularies) -> Iterator[Place]:
    starts, their_starts = _starts(mine, theirs, v.student, v.teacher)
    end = their_starts.pop()
    at = {start: k for k, (start, t) in enumerate(zip(their_starts, theirs, strict=True)) if v.teacher.pieces[t]}
    before: list[tuple[int, tuple[int, ...]]] = []  # where earlier tokens began, and the nodes led through from there
    for i, (start, u) in enumerate(zip(starts, mine, strict=False)):
        spelt = v.student.pieces[u]
        if spelt is None and u in v.student_ends and theirs[-1] in v.teacher_ends:
            # By its role: the teacher's end of text is the student's, whatever they are called.
            k, nodes = len(theirs) - 1, ()
        elif spelt is None or start >= end:
            yield Place(u)
            continue
        elif start in at:
            k = at[start]
            nodes = _nodes(theirs[k:], v.trie)
        else:
            k = bisect_left(their_starts, max(start, 0) + 1) - 1
            since = bisect_left(starts, their_starts[k], hi=i) if start >= 0 else i
            skipped = (v.teacher.pieces[theirs[k]] or b"")[: max(0, starts[since] - their_starts[k])]
            rest = v.remainder(mine[since:i], skipped, spelt[: max(0, -start)])
            yield Place(
                u, row + k, theirs[k], remainder=v.with_actual(rest, theirs[k], max(start, 0) - their_starts[k])
            )
            continue
        way = tuple(n for n in nodes[: len(theirs) - k - 1] if v.trie.first_child[n] < v.trie.first_child[n + 1])
        before = [(began, passed) for began, passed in before if began + len(passed) >= k]
        barred = _barred(k, len(way), before, v.trie)
        yield Place(u, row + k, theirs[k], way, tuple(theirs[k + 1 : k + 1 + len(way)]), barred)
        if nodes:
            before.append((k, nodes))


def _nodes(theirs: list[int], trie: Trie) -> tuple[int, ...]:
    """The nodes that these teacher tokens lead through."""
    nodes: list[int] = []
    for t in theirs:
        node = trie.child.get((nodes[-1] if nodes else 0, t))
        if node is None:
            break
        nodes.append(node)
    return tuple(nodes)


def _barred(
    k: int, depth: int, before: Sequence[tuple[int, tuple[int, ...]]], trie: Trie
) -> tuple[tuple[int, int], ...]:
    """Where earlier tokens could have been longer, along a way of ``depth`` from the teacher's token ``k`` on."""
    reached = [
        (d, nodes[k + d - began - 1])
        for began, nodes in before
        for d in range(min(depth + 1, began + len(nodes) - k + 1))
    ]
    return tuple((d, node) for d, node in reached if trie.first_child[node] < trie.first_child[node + 1])


def _starts(mine: list[int], theirs: list[int], student: Spelling, teacher: Spelling) -> tuple[list[int], list[int]]:
    """Byte offsets of the tokens of both and of the ends, from the first byte that both have: a space that one put
    first is at -1.

    Raises:
        DataError: neither's text begins with the other's.
    """
    one, other = joined(mine, student), joined(theirs, teacher)
    n = min(len(one), len(other))
    spare = next((x for x in ((0, 0), (1, 0), (0, 1)) if _same(one, other, *x)), None)
    if spare is None:
        at = next((i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), n)
        raise _otherwise(one[at:], other[at:])
    sides = ((mine, student, spare[0]), (theirs, teacher, spare[1]))
    offsets = [list(accumulate((len(y.pieces[i] or b"") for i in x), initial=-first)) for x, y, first in sides]
    return offsets[0], offsets[1]


def _same(one: bytes, other: bytes, first: int, others_first: int) -> bool:
    """Whether two texts are the same as far as both go, without a space that one of them puts first."""
    if one[:first].strip(b" ") or other[:others_first].strip(b" "):
        return False
    n = min(len(one) - first, len(other) - others_first)
    return one[first : first + n] == other[others_first : others_first + n]


def _in_use(spelling: Spelling) -> list[bytes | None]:
    """What each token spells, but where several spell the same, only that which the tokenizer itself takes: a byte that
    has a token of its own is never written as <0xNN>."""
    pieces = list(spelling.pieces)
    count = Counter(pieces)
    several = [p for p in count if p and count[p] > 1]
    takes = {p: cut[0] for p, cut in zip(several, spelling.cut(several), strict=True) if cut and len(cut) == 1}
    return [p if p and takes.get(p, i) == i else None for i, p in enumerate(pieces)]


def _cut_all(spelling: Spelling, pieces: Sequence[bytes | None]) -> list[list[int] | None]:
    """How a tokenizer cuts each piece of another's vocabulary; None for what it would spell otherwise."""
    cuts = iter(spelling.cut([p for p in pieces if p]))
    found = [next(cuts) if p else None for p in pieces]
    return [c if c and joined(c, spelling) == p else None for c, p in zip(found, pieces, strict=True)]


def _ended(student: Spelling, teacher: Spelling, trie: Trie) -> np.ndarray:
    """The one student token that ends at each node; where none does, or several do, the first of what a text that ends
    there is cut into."""
    ended = trie.order[np.minimum(trie.low, len(trie.order) - 1)]
    unclear = [n for n in range(1, len(trie.low)) if trie.ends[n] != 1]
    cuts = student.cut([joined(trie.way(n), teacher) for n in unclear])
    for node, cut in zip(unclear, cuts, strict=True):
        if cut:
            ended[node] = cut[0]
    return ended
