"""What each token of a vocabulary spells, in bytes, and how its tokenizer cuts bytes.

Byte-level vocabularies (GPT-2, Llama 3, Qwen, SmolLM) write one character of an alphabet of 256 for each byte;
SentencePiece ones (Llama 2, Gemma) write ▁ for a space and <0xNN> for a byte that has no token of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

_BROKEN = re.compile("([\udc80-\udcff]+)")  # bytes that are no UTF-8, as surrogateescape reads them


def _alphabet() -> dict[str, int]:
    """Character -> byte of byte-level vocabularies: printable Latin-1 stands for itself, the rest for 256 and on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(plain)]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}


_ALPHABET = _alphabet()


def is_byte_level(tokenizer: Any) -> bool:
    """Whether a tokenizer of transformers writes its vocabulary in the alphabet of bytes."""
    return tokenizer.is_fast and "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)


def spelt(name: str, added: Any, byte_level: bool) -> bytes | None:
    """The bytes of a token, by its name in the vocabulary and its entry among the added tokens, if any; None for a
    control token, and for a name that is in no alphabet."""
    if added is not None:
        return None if added.special else added.content.encode()
    if byte_level:
        return bytes(_ALPHABET[c] for c in name) if all(c in _ALPHABET for c in name) else None
    if re.fullmatch(r"<0x[0-9A-F]{2}>", name):
        return bytes([int(name[3:5], 16)])
    return name.replace("▁", " ").encode()


@dataclass(frozen=True)
class Spelling:
    """``pieces[i]`` is what token i spells, None for control tokens and ids without a token. ``middle`` is the
    tokenizer without what it puts before or after a text, reading control tokens as the characters they are."""

    pieces: tuple[bytes | None, ...]
    middle: Tokenizer
    by_bytes: dict[bytes, int]
    unknown: int | None

    def cut(self, some: Sequence[bytes]) -> list[list[int] | None]:
        """Token ids of each of some byte strings, as the tokenizer cuts them in the middle of a text; None where it has
        no token for a byte.

        Bytes that are no UTF-8, parts of a character that is cut in two, take the longest token at each place.
        """
        texts = [s.decode("utf-8", "surrogateescape") for s in some]
        whole = [i for i, t in enumerate(texts) if not _BROKEN.search(t)]
        out: list[list[int] | None] = [None] * len(texts)
        for i, found in zip(whole, self._encoded([texts[i] for i in whole]), strict=True):
            out[i] = found if self.unknown not in found else None
        for i in sorted(set(range(len(texts))) - set(whole)):
            out[i] = self._pieced(texts[i])
        return out

    def _encoded(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self.middle.encode_batch_fast(texts, add_special_tokens=False)]

    def _pieced(self, text: str) -> list[int] | None:
        """Token ids of a text with bytes that are no UTF-8."""
        ids: list[int] = []
        for part in filter(None, _BROKEN.split(text)):
            found = self._longest(part) if _BROKEN.match(part) else self.cut([part.encode()])[0]
            if found is None:
                return None
            ids += found
        return ids

    def _longest(self, broken: str) -> list[int] | None:
        ids, some = [], broken.encode("utf-8", "surrogateescape")
        while some:
            size = next((n for n in range(len(some), 0, -1) if some[:n] in self.by_bytes), None)
            if size is None:
                return None
            ids.append(self.by_bytes[some[:size]])
            some = some[size:]
        return ids


def joined(ids: Iterable[int], spelling: Spelling) -> bytes:
    """What some tokens spell together; control tokens spell nothing."""
    return b"".join(spelling.pieces[i] or b"" for i in ids)
