"""Token strings, as servers write them -> token ids.

The same token is written by its name in the vocabulary (``▁the``, ``Ġthe``, ``<0x0A>``), as the text it stands for
(`` the``), as its bytes where these are no text by themselves (``bytes:\\xec\\x95``, or U+FFFD, or nothing at all), or
by its number (``token_id:42``). What could be several tokens is none.
"""

from __future__ import annotations

import re
from typing import Any

from pennyweight.model.spelling import is_byte_level, spelt

_NUMBER, _BYTE = re.compile(r"token_id:(\d+)"), re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenNames:
    """How a tokenizer's entries may be written."""

    def __init__(self, tokenizer: Any):
        size, added = len(tokenizer), tokenizer.added_tokens_decoder
        by_byte = is_byte_level(tokenizer)
        self._control = {i for i, t in added.items() if t.special}
        self._single: set[int] = set()  # entries that are a byte of any text
        self._of: dict[str, list[int]] = {}
        for i, name in enumerate(tokenizer.convert_ids_to_tokens(list(range(size)))):
            if name is None:
                continue
            if _BYTE.fullmatch(name):
                self._single.add(i)
            forms = {name, ""} if i in self._control else {name, *_texts(spelt(name, added.get(i), by_byte) or b"")}
            for form in forms:
                self._of.setdefault(form, []).append(i)

    def spells(self, text: str, token: int) -> bool:
        """Whether ``token`` may be written so."""
        number = _NUMBER.fullmatch(text)
        return int(number[1]) == token if number else token in self._of.get(text, ())

    def only(self, text: str) -> int | None:
        """The token that is written so; None where it is unknown or could be several.

        Between a piece of text and the single byte that would spell it as well, it is the piece, which is what a
        tokenizer uses; see ``twins``.
        """
        number = _NUMBER.fullmatch(text)
        if number:
            return int(number[1])
        found = self._of.get(text, [])
        pieces = [i for i in found if i not in self._single and i not in self._control] if len(found) > 1 else found
        return pieces[0] if len(pieces) == 1 else None

    def twins(self, text: str) -> bool:
        """Whether more than one token is written so: in a table by string, one would have hidden the other."""
        return not _NUMBER.fullmatch(text) and len(self._of.get(text, ())) > 1


def _texts(data: bytes) -> set[str]:
    """The ways in which servers write what a token spells."""
    try:
        return {data.decode()}
    except UnicodeDecodeError:
        escaped = "bytes:" + "".join(f"\\x{b:02x}" for b in data)
        return {escaped, data.decode(errors="ignore"), data.decode(errors="replace")}
