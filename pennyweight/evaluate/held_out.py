"""Held-out material, encoded once for all models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pennyweight.data.files import documents, read_text
from pennyweight.data.render import encode_all, learnt_bytes, prompt_ids
from pennyweight.data.split import overlap
from pennyweight.data.store import read_samples
from pennyweight.data.tasks import problems
from pennyweight.errors import DataError
from pennyweight.records import Encoded, Sample
from pennyweight.settings import Evaluate, TaskSource


@dataclass(frozen=True)
class HeldOut:
    """Token samples with the bytes their learnt tokens spell, and problems with their prompts as token ids.

    ``openings`` are token ids to write on from, and what a reader is shown of them, where there are no problems;
    ``harder`` are problems that nothing is trained on, again with their prompts.
    """

    encoded: list[Encoded]
    bytes: list[int]
    problems: list[Sample]
    prompts: list[list[int]]
    openings: list[tuple[list[int], str]] = field(default_factory=list)
    harder: list[tuple[Sample, list[int]]] = field(default_factory=list)

    def passes(self, samples: int, references: int) -> int:
        """Samples that an evaluation goes through: tokens once for each reference, greedy and sampled answers."""
        return len(self.encoded) * references + (len(self.problems) + len(self.harder)) * (1 + samples)


def hold_out(
    data: Path,
    wanted: Evaluate,
    seed: int,
    tokenizer: Any,
    context: int,
    encode: Callable[[list[Sample]], list[Encoded]],
) -> HeldOut:
    """The held-out samples and problems of the folder ``data``, as many as are ``wanted``; of a text, where one is
    named, its windows in place of the samples. Harder problems are drawn by ``seed``.

    Raises:
        DataError: the text is missing or empty, a harder task is unknown or refuses its settings, or none of its
            problems is new or fits.
    """
    samples = read_samples(data / "eval.jsonl")
    encoded = windows(wanted.text, tokenizer, context) if wanted.text else encode(samples)
    asked = _that_fit(samples, tokenizer, context)
    harder = _that_fit(_harder(wanted.harder, seed, data, samples), tokenizer, context)[: wanted.problems]
    if wanted.harder and not harder:
        raise DataError(
            f"none of the problems of evaluate.harder is new and fits into {context} tokens; ask for others, or raise "
            "data.context"
        )
    easy, prompts = [s for s, _ in asked[: wanted.problems]], [ids for _, ids in asked[: wanted.problems]]
    asked_of = {s.id: s.prompt[-1].content for s in samples if s.prompt}
    begun = [(x.id, _opening(x, x.id in asked_of)) for x in encoded[: wanted.shown]]
    openings = [(ids, asked_of.get(i) or tokenizer.decode(ids, skip_special_tokens=True)) for i, ids in begun]
    return HeldOut(encoded, learnt_bytes(encoded, tokenizer), easy, prompts, openings, harder)


def check_harder(wanted: Evaluate) -> None:
    """Raise DataError where a task of ``harder`` is unknown or refuses its settings: one problem of each is drawn."""
    for task in wanted.harder:
        problems(task.name, 1, 0, task.config)


def _that_fit(samples: list[Sample], tokenizer: Any, context: int) -> list[tuple[Sample, list[int]]]:
    """Problems with the token ids of their prompts, where these leave room for an answer."""
    return [(s, ids) for s in samples if s.task and len(ids := prompt_ids(s, tokenizer)) < context]


def _harder(tasks: list[TaskSource], seed: int, data: Path, held_out: list[Sample]) -> list[Sample]:
    """Problems of the tasks, in turn, without those that the run knows otherwise."""
    if not tasks:
        return []
    known = {s.prompt_hash for s in (*read_samples(data / "train.jsonl"), *held_out)}
    drawn = [problems(t.name, t.size, seed, t.config) for t in tasks]
    new = [[s for s in some if s.prompt_hash not in known] for some in drawn]
    return [s for some in zip_longest(*new) for s in some if s]


def _opening(sample: Encoded, has_prompt: bool) -> list[int]:
    """A sample up to its first learnt token, and of a text, which is learnt from its start, a few tokens."""
    first = sample.mask.index(True) if True in sample.mask else len(sample.ids)
    return list(sample.ids[: first if has_prompt else 1 + min(12, len(sample.ids) // 2)])


def windows(path: str | Path, tokenizer: Any, context: int) -> list[Encoded]:
    """A text file as windows of at most ``context`` tokens, for measuring; each token is learnt in one of them.

    Lines of ``<|endoftext|>`` stand between documents; without them the file is one document.

    Raises:
        DataError: the file is missing, empty, or not UTF-8.
    """
    file = Path(path).expanduser()
    found = documents(read_text(file, file.name), by_paragraph=False)
    if not found:
        raise DataError(f"{file.name} holds no text; give a file with text in it")
    return encode_all([Sample((), text, file.name) for text in found], tokenizer, context, "refuse")


def text_overlap(path: str | None, training: Path) -> dict[str, Any]:
    """How much of an evaluation text is in the ``training`` samples; nothing where there is no such text."""
    if not path:
        return {}
    texts = documents(read_text(Path(path).expanduser(), path), by_paragraph=False)
    found = overlap(read_samples(training), [Sample((), t, path) for t in texts])
    return {"text_overlap": {k: found[k] for k in ("eval", "normalised", "ngram")}}
