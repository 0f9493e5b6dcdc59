"""A sample as it is learnt, token by token, for people."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from pennyweight.model.spelling import is_byte_level
from pennyweight.records import Encoded


def shown(encoded: Encoded, tokenizer: Any) -> str:
    """The exact token stream for people, then a table of it.

    In the stream, tokens are parted by ``│`` and learnt ones stand in ``[[ ]]``; tokens that only together spell a
    character stand together. Each row of the table is position, id, token, and ``learnt`` where it is.
    """
    learnt = dict.fromkeys(range(len(encoded.ids)), False) | {t + 1: True for t in encoded.loss_positions}
    texts = [_piece(tokenizer, i) for i in encoded.ids]
    runs = [(yes, [encoded.ids[t] for t in run]) for yes, run in groupby(learnt, key=lambda t: learnt[t])]
    cells = [(yes, "│".join(_cells(tokenizer, ids))) for yes, ids in runs]
    stream = "│".join(f"[[{text}]]" if yes else text for yes, text in cells)
    width = max([5, *(len(repr(t)) for t in texts)])
    table = [f"{'pos':>6} {'id':>7} {'token':<{width}} learnt"]
    for t, (number, text) in enumerate(zip(encoded.ids, texts, strict=True)):
        table.append(f"{t:>6} {number:>7} {text!r:<{width}} {'learnt' if learnt[t] else ''}".rstrip())
    return f"{stream}\n\n" + "\n".join(table)


def _cells(tokenizer: Any, ids: list[int]) -> list[str]:
    """Token texts, with the tokens of a character that is spread over several taken together."""
    cells: list[str] = []
    parts: list[int] = []
    for number in ids:
        text = _piece(tokenizer, number)
        if not parts and text != tokenizer.convert_ids_to_tokens(number):
            cells.append(text)
            continue
        parts.append(number)
        text = text if parts == [number] else tokenizer.decode(parts)
        if "\ufffd" not in tokenizer.decode(parts):
            cells.append(text)
            parts = []
    return cells + [_piece(tokenizer, p) for p in parts]


def _piece(tokenizer: Any, number: int) -> str:
    """A token's text; of a token that is part of a character, its name in the vocabulary."""
    name = tokenizer.convert_ids_to_tokens(number)
    text = tokenizer.decode([number]) if is_byte_level(tokenizer) else name.replace("▁", " ")
    return name if "\ufffd" in text else text
