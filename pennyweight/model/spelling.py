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

        What is no text, since it begins or ends within a character, takes the longest token at each place.
        """
        texts = [_text(s) for s in some]
        encoded = iter(self.middle.encode_batch_fast([t for t in texts if t is not None], add_special_tokens=False))
        cuts = [self._longest(s) if t is None else next(encoded).ids for s, t in zip(some, texts, strict=True)]
        return [None if c is None or self.unknown in c else c for c in cuts]

    def _longest(self, some: bytes) -> list[int] | None:
        ids = []
        while some:
            size = next((n for n in range(len(some), 0, -1) if some[:n] in self.by_bytes), None)
            if size is None:
                return None
            ids.append(self.by_bytes[some[:size]])
            some = some[size:]
        return ids


def _text(some: bytes) -> str | None:
    try:
        return some.decode()
    except UnicodeDecodeError:
        return None


def joined(ids: Iterable[int], spelling: Spelling) -> bytes:
    """What some tokens spell together; control tokens spell nothing."""
    return b"".join(spelling.pieces[i] or b"" for i in ids)
