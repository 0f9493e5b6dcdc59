"""What a teacher writes when it is given nothing: the data of last resort.

A base model writes texts from its beginning-of-text token. A chat model is handed its own template up to where the
user would speak, and writes the prompt itself (Xu et al., Magpie, arXiv 2406.08464); responses are asked for later.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pennyweight.atomic import write_whole
from pennyweight.data.render import unopened
from pennyweight.errors import DataError
from pennyweight.records import Message, Prompt, Sample, Teacher

_PART = 256
_MARK = "\u2063mark\u2063"


def own_samples(
    teacher: Teacher,
    tokenizer: Any,
    count: int,
    seed: int,
    folder: Path,
    licence: str,
    progress: Callable[[int], None] = lambda n: None,
) -> list[Sample]:
    """``count`` texts (base model) or prompts (chat model) by the teacher; empty ones are left out."""
    start, chat = _opening(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    part = count if teacher.keeps else _PART
    for number, first in enumerate(range(0, count, part)):
        size = min(part, count - first)
        path = folder / f"{number:06d}.{size}.json"
        if path.exists():
            pairs = json.loads(path.read_text(encoding="utf-8"))
            progress(size)
        else:
            pairs = teacher.write([start] * size, seed * 1_000_003 + number, progress)
            write_whole(path, json.dumps(pairs, ensure_ascii=False))
        for text, ended in pairs:
            source = f"samples of {teacher.name}"
            if chat and text.strip() and ended:
                out.append(Sample((Message("user", text.strip()),), None, source, licence))
            elif not chat and text.strip():
                out.append(Sample((), text, source, licence, author=teacher.name, complete=ended))
    return out


def _opening(tokenizer: Any) -> tuple[Prompt, bool]:
    """What to begin from, and whether what follows is a user's prompt."""
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False).split(_MARK)[0]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return Prompt((), unopened(text, tokenizer), tuple(ids)), True
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise DataError(
            "the teacher's tokenizer has neither a beginning-of-text nor an end-of-text token, so it cannot write "
            "samples from nothing; give prompts or texts with --data"
        )
    return Prompt((), unopened(tokenizer.decode([first]), tokenizer), (first,)), False
