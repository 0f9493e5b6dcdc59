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
        one, other = self.student.tokenizer, self.teacher.tokenizer
        return spelling_of(one, "the student's"), spelling_of(other, "the teacher's")

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
        """The student's encodings, as ``encode_answered`` makes them, but that a plain text too long for one of the two
        is cut as a text, at a space where there is one. Samples that cannot be aligned are left out, and told.

        Raises:
            DataError: as ``encode_all``; or none is left.
        """
        asked = {s.id: s for s in samples if s.prompt}
        answers = encode_answered(list(asked.values()), self.student.tokenizer, self.context, too_long) if asked else []
        pairs = [(mine, asked[mine.id]) for mine in answers]
        kept, refused = [], []
        for mine, theirs in (*pairs, *(pair for s in samples if not s.prompt for pair in self._parts(s))):
            told = self._kept(mine, theirs)
            (refused.append(told) if told else kept.append(mine))
        if not kept:
            raise DataError(f"none of {len(samples):,} samples can be used: {refused[0] if refused else 'no text'}")
        if refused:
            say(f"{len(refused):,} of {len(refused) + len(kept):,} samples are left out; the first: {refused[0]}")
        return kept

    def _kept(self, mine: Encoded, sample: Sample | Encoded) -> str:
        """Keep the teacher's encoding of a sample, or say why not."""
        try:
            theirs = self._of_teacher(sample) if isinstance(sample, Sample) else sample
            if not theirs.loss_positions:
                return f"nothing of it is left to learn in the teacher's context of {self.teacher.context:,} tokens"
            whole = len(mine.ids) < self.context and len(theirs.ids) < self.teacher.context
            check_same_text(mine, theirs, *self.spellings, whole)
        except DataError as e:
            return str(e)
        known = self._theirs.get(mine.token_hash)  # two texts may be one to the student: whichever came first
        if known is None or theirs.token_hash < known.token_hash:
            self._theirs[mine.token_hash] = theirs
        return ""

    def _of_teacher(self, sample: Sample) -> Encoded:
        """As far as the teacher's context goes."""
        try:
            whole, most = _encoded(sample, self.teacher.tokenizer), self.teacher.context
        except DataError as e:
            raise DataError(f"for the teacher, {e}") from None
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
            mine, theirs = (self._opened(_encoded(part, x.tokenizer), x) for x in (self.student, self.teacher))
            if (len(mine.ids) <= self.context and len(theirs.ids) <= self.teacher.context) or size == 1:
                return mine, theirs, size
            size = max(1, size * 3 // 4)
            space = max(text.rfind(" ", size // 2, size), text.rfind("\n", size // 2, size))
            size = space if space > 0 else size

    def _opened(self, text: Encoded, language: Language) -> Encoded:
        """A plain text behind a token that opens it, so that both learn it from its first byte: where a tokenizer has
        none, its end of text, which stands between texts."""
        pieces, eos = self.spellings[language is self.teacher].pieces, language.tokenizer.eos_token_id
        if not text.ids or pieces[text.ids[0]] is None or eos is None:
            return text
        return Encoded(text.id, (eos, *text.ids), (False, *[True] * len(text.ids)))


def encode_answered(samples: Sequence[Sample], tokenizer: Any, context: int, too_long: str) -> list[Encoded]:
    """``render.encode_all`` where a teacher wrote in tokens of its own, whose number was bounded and not that of the
    student's: what it wrote too long is left out, and told, rather than refused once it is written.

    Raises:
        DataError: as ``encode_all``.
    """
    written = [s for s in samples if s.prompt and s.author != "given"] if too_long == "refuse" else []
    longer = {s.id for s in written if len(_encoded(s, tokenizer).ids) > context}
    if longer:
        say(
            f"{len(longer):,} of {len(written):,} answers are longer than {context:,} of the student's tokens: left out"
        )
    return encode_all([s for s in samples if s.id not in longer], tokenizer, context, too_long)


def _encoded(sample: Sample, tokenizer: Any) -> Encoded:
    found = encode(sample, tokenizer)
    assert found is not None  # without a context nothing is dropped
    return found
