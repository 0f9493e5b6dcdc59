"""Samples as two tokenizers cut them, for a student whose tokenizer is not its teacher's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from pennyweight.data.render import encode, encode_all
from pennyweight.errors import DataError
from pennyweight.model.loaded import Language
from pennyweight.model.spelling import Spelling
from pennyweight.model.token_bytes import spelling_of
from pennyweight.progress import say
from pennyweight.records import Encoded, Sample
from pennyweight.teacher.alignment import Vocabularies, check_same_text, compare

_LONG, _USUAL = 16, 4  # characters a token: of a text that surely does not fit, and of most texts


@dataclass(frozen=True)
class BothTokenizers:
    """The student's language and its teacher's, and the teacher's encodings of the samples that went through here.

    ``context`` is the student's, ``language.context`` of the teacher is its own.
    """

    student: Language
    teacher: Language
    context: int
    _theirs: dict[str, Encoded] = field(default_factory=dict)

    @cached_property
    def spellings(self) -> tuple[Spelling, Spelling]:
        """What the tokens of the student and of the teacher spell.

        Raises:
            ModelError: that of one of them is not understood.
        """
        return spelling_of(self.student.tokenizer, "the student's"), spelling_of(
            self.teacher.tokenizer, "the teacher's"
        )

    def theirs(self, sample: Encoded) -> Encoded:
        """The teacher's encoding of a sample of the student's that ``encode`` gave."""
        return self._theirs[sample.token_hash]

    def ends(self, encoded: Sequence[Encoded]) -> list[int]:
        """Control tokens that end what the student learns: the one that most samples end in, and its end of text."""
        pieces, eos = self.spellings[0].pieces, self.student.tokenizer.eos_token_id
        last = [e.ids[-1] for e in encoded if e.mask[-1] and pieces[e.ids[-1]] is None]
        found = sorted(set(last), key=lambda i: (-last.count(i), i))
        return [*found, *([eos] if eos is not None and eos not in found else [])]

    def vocabularies(self, encoded: Sequence[Encoded], teachers_ends: Iterable[int]) -> Vocabularies:
        """Both vocabularies, compared, for samples of ``encode``; the teacher's texts end in ``teachers_ends``."""
        ends = self.ends(encoded), sorted(teachers_ends)
        return compare(*self.spellings, *ends, self.student.vocabulary, self.teacher.vocabulary)

    def encode(self, samples: Sequence[Sample], too_long: str) -> list[Encoded]:
        """The student's encodings, as ``render.encode_all`` makes them, but that a plain text which is too long for one
        of the two is cut as a text, at a space where there is one; those that the tokenizers spell differently are left
        out.

        Raises:
            DataError: as ``encode_all``; or none is left.
        """
        asked = {s.id: s for s in samples if s.prompt}
        answers = encode_all(list(asked.values()), self.student.tokenizer, self.context, too_long) if asked else []
        pairs = [(mine, self._of_teacher(asked[mine.id])) for mine in answers]
        pairs += [pair for s in samples if not s.prompt for pair in self._parts(s)]
        refused = [told for told in (self._kept(*pair) for pair in pairs) if told]
        if len(refused) == len(pairs):
            raise DataError(f"none of {len(samples):,} samples can be used: {refused[0] if refused else 'no text'}")
        if refused:
            say(f"{len(refused):,} of {len(pairs):,} samples are left out; the first: {refused[0]}")
        return [mine for mine, _ in pairs if mine.token_hash in self._theirs]

    def _kept(self, mine: Encoded, theirs: Encoded) -> str:
        """Keep the teacher's encoding of a sample, or say why not."""
        if not theirs.loss_positions:
            return (
                f"its prompt leaves no room for a response in the teacher's context of {self.teacher.context:,} tokens"
            )
        try:
            whole = len(mine.ids) < self.context and len(theirs.ids) < self.teacher.context
            check_same_text(mine, theirs, *self.spellings, whole)
        except DataError as e:
            return str(e)
        self._theirs[mine.token_hash] = theirs
        return ""

    def _of_teacher(self, sample: Sample) -> Encoded:
        """As far as the teacher's context goes."""
        whole, most = _encoded(sample, self.teacher.tokenizer), self.teacher.context
        return Encoded(whole.id, whole.ids[:most], whole.mask[:most])

    def _parts(self, sample: Sample) -> Iterator[tuple[Encoded, Encoded]]:
        """A plain text in both, in parts that fit both."""
        rest, k = sample.response or "", 0
        while rest:
            mine, theirs, size = self._longest(sample, rest)
            name = sample.id if size == len(rest) and not k else f"{sample.id}:{k}"
            rest, k = rest[size:], k + 1
            if mine.loss_positions:
                yield replace(mine, id=name), theirs

    def _longest(self, sample: Sample, text: str) -> tuple[Encoded, Encoded, int]:
        """The beginning of a text that fits both, in both, and its length in characters."""
        most = min(self.context, self.teacher.context)
        size = len(text) if len(text) <= _LONG * most else _USUAL * most
        while True:
            whole = size == len(text)
            part = replace(sample, response=text[:size], complete=sample.complete and whole)
            mine, theirs = (_encoded(part, x.tokenizer) for x in (self.student, self.teacher))
            if (len(mine.ids) <= self.context and len(theirs.ids) <= self.teacher.context) or size == 1:
                return mine, theirs, size
            size = max(1, size * 3 // 4)
            space = max(text.rfind(" ", size // 2, size), text.rfind("\n", size // 2, size))
            size = space if space > 0 else size


def _encoded(sample: Sample, tokenizer: Any) -> Encoded:
    found = encode(sample, tokenizer)
    assert found is not None  # without a context nothing is dropped
    return found
