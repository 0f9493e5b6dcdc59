"""A fast tokenizer as llama.cpp keeps it: byte-level BPE (``gpt2``) or pieces with bytes to fall back on (``llama``).

llama.cpp knows ways to cut text before BPE by name. Where a tokenizer cuts in none of them, its GGUF would give other
ids, so it is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from pennyweight.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CUTS = {_WORD + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORD + r"\p{N}" + _REST: "qwen2"}


@dataclass(frozen=True)
class Vocabulary:
    """``kind``: gpt2 or llama; ``pre``: llama.cpp's name for the way it cuts text, of gpt2 only; ``types`` and
    ``scores`` of every token; ``merges``, of gpt2; whether a beginning-of-text token and a space are put in front."""

    kind: str
    pre: str
    tokens: list[bytes]
    types: list[int]
    scores: list[float]
    merges: list[str] = field(default_factory=list)
    adds_bos: bool = False
    adds_space: bool = False


def vocabulary_of(tokenizer: Any, size: int) -> Vocabulary:
    """What a GGUF holds of a Hugging Face fast tokenizer, for a model of ``size`` embeddings.

    Raises:
        ModelError: llama.cpp has no such tokenizer.
    """
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    model = told["model"]
    if model.get("type") != "BPE":
        raise _refused(f"its tokenizer is a {model.get('type')}")
    tokens: list[str | None] = [None] * max(size, len(tokenizer))
    for token, i in tokenizer.get_vocab().items():
        tokens[i] = token
    added = {a["id"]: a for a in told["added_tokens"]}
    by_pieces = bool(model.get("byte_fallback"))
    types = [_type(i, t, added, model, by_pieces) for i, t in enumerate(tokens)]
    names = [(f"[PAD{i}]" if t is None else t).encode() for i, t in enumerate(tokens)]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    adds_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    pre = "default" if by_pieces else _pre(told)
    if not merges:
        raise _refused("its tokenizer has no merges")
    if not by_pieces:
        return Vocabulary("gpt2", pre, names, types, [0.0] * len(names), merges, adds_bos)
    rank = {m.replace(" ", ""): i for i, m in reversed(list(enumerate(merges)))}
    scores = [-float(rank[t]) if t in rank else 0.0 if t is None or len(t) == 1 else -1e6 for t in tokens]
    prepends = "Prepend" in json.dumps(told.get("normalizer")) or "always" in json.dumps(told.get("pre_tokenizer"))
    return Vocabulary("llama", pre, names, types, scores, [], adds_bos, prepends)


def _type(i: int, token: str | None, added: dict[int, Any], model: dict[str, Any], by_pieces: bool) -> int:
    if token is None:
        return UNUSED
    if token == model.get("unk_token"):
        return UNKNOWN
    if i in added:
        return CONTROL if added[i]["special"] else USER_DEFINED
    is_byte = by_pieces and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return BYTE if is_byte else NORMAL


def _pre(told: dict[str, Any]) -> str:
    """llama.cpp's name for the way a byte-level tokenizer cuts text."""
    cut = told.get("pre_tokenizer") or {}
    steps = cut.get("pretokenizers", [cut])
    kinds = [s.get("type") for s in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space"):
        return "gpt-2"
    digits_apart = kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits")
    if digits_apart and steps[1].get("use_regex", True) and not steps[1].get("add_prefix_space"):
        return "smollm"
    pattern = steps[0].get("pattern", {}).get("Regex") if kinds == ["Split", "ByteLevel"] else None
    if pattern in _CUTS and not steps[1].get("use_regex", True):
        return _CUTS[pattern]
    raise _refused("its tokenizer cuts text in a way that llama.cpp has no name for")


def _refused(reason: str) -> ModelError:
    return ModelError(f"this model cannot become a GGUF: {reason}; use --layout compressed-tensors")
