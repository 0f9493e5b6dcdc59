"""A tokenizer of transformers -> what its tokens spell, found out and checked."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer

from pennyweight.errors import ModelError
from pennyweight.model.spelling import Spelling, is_byte_level, joined, spelt

_HARD = ["Hello, world!  12345 67.8\n\n\tx = y;", " naïve café – “quoted”", "안녕하세요 세계", "🙂👩‍👩‍👧 ½ 𝔘 한국어\n"]

_ALSO_HARD = [*_HARD, " 12345  67.8\n\tx=y", "<|endoftext|></s>[INST]"]


def difference(a: Any, b: Any) -> str:
    """The first difference between two tokenizers of transformers; empty where both give every text the same ids."""
    first, second = a.get_vocab(), b.get_vocab()
    if len(first) != len(second):
        return f"{len(first):,} and {len(second):,} entries"
    for token, i in first.items():
        if second.get(token) != i:
            return f"{token!r} is {i} in one and {second.get(token)} in the other"
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(a, name) != getattr(b, name):
            return f"{name} is {getattr(a, name)} and {getattr(b, name)}"
    texts = (text for text in _ALSO_HARD if a(text)["input_ids"] != b(text)["input_ids"])
    return next((f"they cut {text!r} differently" for text in texts), "")


def same_tokenizer(a: Any, b: Any) -> None:
    """Raise ModelError, naming the first difference, unless both give every text the same token ids."""
    found = difference(a, b)
    if found:
        raise ModelError(
            f"the tokenizers differ: {found}; what is compared here is compared token by token, so use models of one "
            "tokenizer"
        )


def spelling_of(tokenizer: Any, whose: str = "the model's") -> Spelling:
    """What the tokens of a tokenizer of transformers spell.

    Raises:
        ModelError: its tokens, joined, do not give back texts with spaces, digits, Korean and emoji (up to its own
            normaliser); texts that it says it does not know are passed over.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            f"{whose} tokenizer does not come as a tokenizer.json, so what its tokens spell is not known; save it as "
            "one with save_pretrained of a fast tokenizer"
        )
    added, by_byte = tokenizer.added_tokens_decoder, is_byte_level(tokenizer)
    names = {i: name for name, i in tokenizer.get_vocab().items()}
    pieces = [spelt(names[i], added.get(i), by_byte) if i in names else None for i in range(max(names) + 1)]
    by_bytes: dict[bytes, int] = {}
    for i, piece in enumerate(pieces):
        if piece:
            by_bytes.setdefault(piece, i)
    made = Spelling(tuple(p or None for p in pieces), _middle(tokenizer), by_bytes, tokenizer.unk_token_id)
    for text in _HARD:
        (ids,) = made.cut([text.encode()])
        normal = text if made.middle.normalizer is None else made.middle.normalizer.normalize_str(text)
        want = normal if by_byte else normal.replace("▁", " ")
        if ids is not None and joined(ids, made) != want.encode():
            raise ModelError(
                f"what the tokens of {whose} tokenizer spell is not understood: {text!r} comes back as "
                f"{joined(ids, made).decode(errors='replace')!r}; use a model with a byte-level or SentencePiece one"
            )
    return made


def _middle(tokenizer: Any) -> Tokenizer:
    """The tokenizer as it cuts the middle of a text: it puts no space before it and no control tokens around it."""
    made = json.loads(tokenizer.backend_tokenizer.to_str())
    made |= {"post_processor": None, "truncation": None, "padding": None}
    made["normalizer"] = _without_prefix(made["normalizer"])
    made["pre_tokenizer"] = _without_prefix(made["pre_tokenizer"])
    middle = Tokenizer.from_str(json.dumps(made))
    middle.encode_special_tokens = True
    return middle


def _without_prefix(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """A step of a tokenizer.json, or a sequence of them, that puts nothing before a text."""
    if step is None or step["type"] == "Prepend":
        return None
    for parts in ("normalizers", "pretokenizers"):
        if parts in step:
            kept = [x for s in step[parts] if (x := _without_prefix(s)) is not None]
            return {**step, parts: kept} if kept else None
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    return {**step, "add_prefix_space": False} if "add_prefix_space" in step else step
