"""What servers tell of a text's tokens: for each position, the most probable ones with their log-probabilities.

Two ways are in use. vLLM and its kin take ``prompt_logprobs`` and answer by token id; others take the ``echo`` and
``logprobs`` of OpenAI's first completions and answer by string. A text of n tokens becomes n positions, or n - 1 where
the beginning-of-text token is passed over, and one more for the token that had to be generated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pennyweight.errors import EndpointError
from pennyweight.records import Encoded
from pennyweight.teacher.targets import Keep, Kept, top_told, uniforms

FORMS = ("prompt_logprobs", "echo")
"""Ways to ask, the more exact first."""

SENTENCES = (
    "Once upon a time, there was a little girl who had 3 red balls and 12 blue ones.",
    'She said: "It\'s nice!"\nThen  she left -- and came back at 10:45.',
    "naïve café, 안녕하세요 세계",
)
"""Texts on which a server's tokens are compared with a tokenizer's."""


class Names(Protocol):
    """How tokens may be written (``token_names.TokenNames``)."""

    def spells(self, text: str, token: int) -> bool: ...

    def only(self, text: str) -> int | None: ...

    def twins(self, text: str) -> bool: ...


Top = list[tuple[int | str, float]]
Line = list[tuple[int | str | None, Top | None]]
"""A text's positions: the token that stands there (None: not said), and the most probable ones (None: not said)."""


def asking(form: str, prompt: list[int] | str, k: int) -> dict[str, Any]:
    """The body of a completions request, less its model, that has the ``k`` most probable tokens told."""
    wanted = {"prompt_logprobs": k} if form == "prompt_logprobs" else {"echo": True, "logprobs": k}
    return {"prompt": prompt, "max_tokens": 1, "temperature": 0.0, **wanted}  # llama.cpp takes 0 tokens for all it can


def read_line(form: str, body: Any) -> Line:
    """The positions in an answer.

    Raises:
        ValueError, KeyError, TypeError, IndexError: it is not an answer in this form.
    """
    choice = body["choices"][0]
    if form == "prompt_logprobs":
        rows = choice.get("prompt_logprobs") or body["prompt_logprobs"]
        return [(None, _pairs({int(i): e["logprob"] for i, e in row.items()}) if row else None) for row in rows]
    told = choice["logprobs"]
    return [(t, _pairs(row) if row else None) for t, row in zip(told["tokens"], told["top_logprobs"], strict=True)]


def _pairs(row: dict[Any, float]) -> Top:
    """Entries, most probable first; a probability of zero is written as a very small one."""
    for value in row.values():
        if math.isnan(value) or value > 1e-3:
            raise ValueError("not a log-probability")
    return sorted(((t, round(max(v, -1e4), 6)) for t, v in row.items()), key=lambda e: -e[1])


Ask = Callable[[str, "list[int] | str", int], "Line | str"]
"""(form, prompt, k) -> its positions, none where the server passes over the question; or how it refuses."""

_MARGIN = 8  # entries asked for besides, where strings may hide each other


@dataclass(frozen=True)
class Telling:
    """How a server tells: the form, whether it takes token ids, how many entries are asked for, and whether it is
    silent on the first token of a text."""

    form: str
    by_ids: bool
    asked: int
    silent_first: bool


@dataclass(frozen=True)
class Aligned:
    """A text's positions beside our tokens: for each token the entries told where it stands, or None; and the entry of
    the token that was generated behind them, where it is told."""

    at: list[Top | None]
    after: tuple[int | str | None, Top | None] | None


def align(line: Line, ids: Sequence[int], names: Names) -> Aligned | None:
    """The positions of ``line`` beside ``ids``; None where the server's tokens are others."""
    for skipped in (0, 1):
        want = ids[skipped:]
        if len(want) <= len(line) <= len(want) + 1 and all(
            _is(token, entries, i, names, first=j == 0)
            for j, ((token, entries), i) in enumerate(zip(line, want, strict=False))
        ):
            after = line[len(want)] if len(line) > len(want) else None
            return Aligned([None] * skipped + [entries for _, entries in line[: len(want)]], after)
    return None


def _is(token: int | str | None, entries: Top | None, i: int, names: Names, first: bool) -> bool:
    """Whether ``i`` may be what the server says stands there."""
    if token is None:  # the token of the text is always among the entries
        return entries is None or any(t == i for t, _ in entries)
    text = str(token)
    return names.spells(text, i) or (first and names.spells(f" {text}", i))  # some trim the first space


def by_id(entries: Top, actual: int, asked: int, names: Names) -> list[tuple[int, float]]:
    """Entries by token id, most probable first, those left out of which that is not certain.

    Where fewer came than were ``asked`` for, tokens of one spelling have hidden each other, so all such are left out.
    (The text's own token comes besides where it is not among the most probable.)
    """
    besides = entries[-1][0] == actual or names.spells(str(entries[-1][0]), actual)
    hidden = len(entries) - besides < asked
    out: dict[int, float] = {}
    for token, value in entries:
        if isinstance(token, int):
            out[token] = value
        elif hidden and names.twins(token):
            continue
        elif (found := actual if names.spells(token, actual) else names.only(token)) is not None:
            out[found] = value
    return sorted(out.items(), key=lambda e: -e[1])


def kept(sample: Encoded, line: Line, asked: int, keep: Keep, names: Names) -> Kept:
    """What ``keep`` says (``top_k``) at a sample's loss positions.

    Raises:
        EndpointError: the server's tokens are others, it does not tell of a position, or of too few tokens there.
    """
    found = align(line, sample.ids, names)
    if found is None:
        raise EndpointError(
            f"the server cuts a sample of {len(sample.ids):,} tokens otherwise than teacher.tokenizer does; name the "
            "tokenizer of the model it serves, or set method.kind=sft"
        )
    rows = []
    for t in sample.loss_positions:
        entries = found.at[t + 1]
        row = by_id(entries, sample.ids[t + 1], asked, names) if entries else []
        if len(row) < keep.k:
            raise EndpointError(
                f"the server tells of only {len(row)} tokens for certain at position {t} of a sample, and "
                f"targets.k={keep.k}; set targets.k={max(1, len(row))} or method.kind=sft"
            )
        rows.append(row[: keep.k])
    ids, probs = _tensors(rows, keep.k)
    return top_told(ids, probs, uniforms(len(rows), int(sample.token_hash[:15], 16)), keep.bits)


def _tensors(rows: list[list[tuple[int, float]]], k: int) -> tuple[Tensor, Tensor]:
    """(N, K) int64 ids and float64 probabilities, whose rounding on the way must not sum to more than 1."""
    ids = torch.tensor([[i for i, _ in row] for row in rows], dtype=torch.long).view(-1, k)
    probs = torch.tensor([[v for _, v in row] for row in rows], dtype=torch.float64).view(-1, k).exp()
    total = probs.sum(-1, keepdim=True)
    if (total > 1.01).any():
        raise EndpointError(
            f"what the server gives as log-probabilities sums to {float(total.max()):.3f} at a position; it may have "
            "changed them (penalties, a temperature): ask it for the model's own, or set method.kind=sft"
        )
    return ids, probs / total.clamp_min(1.0)


def find_telling(ask: Ask, k: int, tokenizer: Any, names: Names, host: str) -> Telling:
    """How the server tells of the ``k`` most probable tokens, having compared its tokens with the tokenizer's.

    Raises:
        EndpointError: it does not tell, tells of fewer, cuts text otherwise, or what it tells does not line up.
    """
    said = ""
    for form in FORMS:
        lines: list[Line] = []
        for text in SENTENCES:
            line = ask(form, text, 1)
            if isinstance(line, str) or not line:
                said = line or said
                break
            lines.append(line)
        else:
            return _in_form(form, lines, ask, k, tokenizer, names, host)
    raise EndpointError(
        f"{host} tells no log-probabilities of a prompt{f' ({said})' if said else ''}; start it so that it does, or "
        "set method.kind=sft, which learns from its answers alone"
    )


def _in_form(form: str, lines: list[Line], ask: Ask, k: int, tokenizer: Any, names: Names, host: str) -> Telling:
    ids = [tokenizer(text)["input_ids"] for text in SENTENCES]
    beside = [_compared(line, i, names, host, form) for i, line in zip(ids, lines, strict=True)]
    line = ask(form, ids[0], 1)
    by_ids = not isinstance(line, str) and align(line, ids[0], names) is not None
    prompt = ids[0] if by_ids else SENTENCES[0]
    told = lambda n: _entries(form, ask(form, prompt, n))  # noqa: E731
    more = min(k + _MARGIN, len(tokenizer)) if form == "echo" else k
    return Telling(form, by_ids, more if told(more) >= k else _most(told, k, host), beside[0].at[1] is None)


def _compared(line: Any, ids: list[int], names: Names, host: str, form: str) -> Aligned:
    found = align(line, ids, names)
    if found is None:
        raise EndpointError(
            f"{host} cuts text into other tokens than teacher.tokenizer does; name the tokenizer of the model it "
            "serves, or set method.kind=sft, which compares no tokens"
        )
    # What was generated at temperature 0 must be the most probable token told for its place: some servers attach what
    # they tell of the next position to this one.
    if form == "echo" and (found.after is None or not found.after[1] or found.after[1][0][0] != found.after[0]):
        raise EndpointError(
            f"what {host} tells of a text's tokens does not line up with them (its most probable token is not the one "
            "it writes); set method.kind=sft, or use a server that takes prompt_logprobs"
        )
    return found


def _entries(form: str, line: Line | str) -> int:
    """How many of the most probable tokens came at a position, the text's own, which comes besides, not counted."""
    counts = [] if isinstance(line, str) else [len(entries) for _, entries in line if entries]
    if not counts:
        return 0  # it refuses, or passes over the question
    return counts[-1] if form == "echo" else min(counts)  # the token that was generated is the most probable itself


def _most(told: Callable[[int], int], k: int, host: str) -> int:
    """``k``, where the server tells of so many.

    Raises:
        EndpointError: with how many it tells of.
    """
    if told(k) >= k:
        return k
    low, high = 1, k
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if told(middle) >= middle else (low, middle)
    raise EndpointError(f"{host} tells of at most {low} tokens at a position, and targets.k={k}; set targets.k={low}")
