"""Train and evaluation sides, by the content of each prompt alone, and how much of one is found in the other.

A prompt's side depends on nothing but its hash: not on the order, not on other rows, so it survives added data and
holds for a teacher's own training too. The n-gram check is the one of Brown et al., arXiv 2005.14165, appendix C.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pennyweight.errors import DataError
from pennyweight.records import Sample

_WORDS = 13
_EXAMPLES = 3
_EXCERPT = 80  # characters

_NOISE = re.compile(r"[^\w\s.,+*/%=<>^-]|(?<!\d)[.,]|[.,](?!\d)")
"""Punctuation, but for arithmetic signs and what stands between digits: 5 - 3 and 5 + 3, 5.7 and 57 stay apart."""


@dataclass(frozen=True)
class Split:
    """Both sides, how many exact repeats were removed, how many samples are ``beyond`` the limit of train, and the
    overlap found between the sides.

    ``overlap`` holds ``eval`` (evaluation samples checked), ``normalised`` (of those, how many prompts are also in
    train once case, spacing and punctuation are evened out), ``ngram`` (how many share 13 words in a row with a
    train prompt; shorter ones count when they are in train as a whole), and ``examples`` (excerpts of up to 3).
    Wording that all prompts share counts as overlap where it is 13 words long.
    """

    train: list[Sample]
    evaluation: list[Sample]
    duplicates: int
    beyond: int = 0
    overlap: dict[str, Any] = field(default_factory=dict)


def is_held_out(prompt_hash: str, eval_fraction: float) -> bool:
    """Whether a prompt belongs to the evaluation side: its hash, read as a number in [0, 1), is below the fraction."""
    return int(prompt_hash[:15], 16) / 16**15 < eval_fraction


def split(samples: Iterable[Sample], eval_fraction: float, eval_limit: int, train_limit: int | None = None) -> Split:
    """Split samples by the content hash of their prompts.

    Exact repeats are removed, unless they are for different teachers. Train keeps its order and all responses to a
    prompt. Evaluation keeps one response a prompt (the one with the smallest id), in the order of prompt hashes, and of
    those the first ``eval_limit``; what is beyond is left out, never moved to train. Of train, too, only the first
    ``train_limit`` prompts in the order of their hashes are kept, so that fewer are always some of more.

    Raises:
        DataError: a side has no sample.
    """
    seen: set[tuple[str, str | None]] = set()
    train: list[Sample] = []
    held_out: dict[str, tuple[str, Sample]] = {}
    duplicates = 0
    for sample in samples:
        prompt, name = sample.prompt_hash, sample.id
        if (name, sample.teacher) in seen:
            duplicates += 1
            continue
        seen.add((name, sample.teacher))
        if not is_held_out(prompt, eval_fraction):
            train.append(sample)
        elif prompt not in held_out or name < held_out[prompt][0]:
            held_out[prompt] = (name, sample)
    all_of_them = len(train)
    if train_limit is not None:
        kept = set(sorted({s.prompt_hash for s in train})[:train_limit])
        train = [s for s in train if s.prompt_hash in kept]
    evaluation = [held_out[prompt][1] for prompt in sorted(held_out)[:eval_limit]]
    if not train or not evaluation:
        side, cure = ("train on", "a smaller") if not train else ("evaluate on", "a larger")
        raise DataError(
            f"of {len(seen):,} distinct samples, none is left to {side} with data.eval_fraction={eval_fraction:g}; "
            f"give more data or {cure} data.eval_fraction"
        )
    return Split(train, evaluation, duplicates, all_of_them - len(train), overlap(train, evaluation))


def overlap(train: Sequence[Sample], evaluation: Sequence[Sample]) -> dict[str, Any]:
    """What of the evaluation prompts is found in train; the keys are those of ``Split.overlap``."""
    whole: dict[str, set[int]] = {}
    grams: dict[str, set[int]] = {}
    for i, sample in enumerate(evaluation):
        text = normalised(_text(sample))
        whole.setdefault(text, set()).add(i)
        for gram in _grams(text):
            grams.setdefault(gram, set()).add(i)
    same: set[int] = set()
    shared: set[int] = set()
    for sample in train:
        text = normalised(_text(sample))
        same |= whole.get(text, set())
        for gram in _grams(text):
            shared |= grams.get(gram, set())
    found = sorted(same | shared, key=lambda i: (i not in same, i))[:_EXAMPLES]
    return {
        "normalised": len(same),
        "ngram": len(shared),
        "eval": len(evaluation),
        "examples": [_excerpt(_text(evaluation[i])) for i in found],
    }


def normalised(text: str) -> str:
    """Compatibility forms unified, case folded, punctuation dropped, single spaces; the text itself if none is left."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(_NOISE.sub(" ", folded).split()) or " ".join(folded.split())


def _text(sample: Sample) -> str:
    """What the split goes by, as text."""
    return "\n".join(m.content for m in sample.prompt) if sample.prompt else sample.response or ""


def _grams(text: str) -> Iterable[str]:
    """Every run of 13 words; of a shorter text, the whole."""
    words = text.split()
    if len(words) < _WORDS:
        return [text]
    return (" ".join(words[i : i + _WORDS]) for i in range(len(words) - _WORDS + 1))


def _excerpt(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _EXCERPT else line[: _EXCERPT - 1] + "…"
