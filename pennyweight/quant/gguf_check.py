"""A GGUF opened again by others: by transformers, and by llama.cpp where that is installed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from pennyweight.errors import ModelError
from pennyweight.model.load import quiet
from pennyweight.model.loaded import Loaded, refuse_low_bit
from pennyweight.quant.formats import Coded
from pennyweight.quant.gguf_file import chat_template, check_architecture, library, write_gguf
from pennyweight.quant.gguf_tokenizer import vocabulary_of

HARD = (
    "Hello, world!",
    "  two  spaces,\ttab\nnew line\n\n\nmore   ",
    "1234567 89 3.14159 -42 1,000,000",
    "안녕하세요 세계, 한국어 문장입니다. 값은 12개예요.",
    "naïve café — “quotes” … €5 ½ ①",
    "🙂👩‍👩‍👧‍👦 🏳️‍🌈 é ﬁ",
    "def f(x):\n    return {'a': x**2, \"b\": [1, 2]}  # comment\n",
    "<html><body>&amp;</body></html> \\n \\u0041",
    "I'll, you've, she'd; DON'T CAN'T",
    "日本語とかな、中文字符；العربية עברית ไทย",
    "\u200b\ufeffzero width\u00a0nbsp \x07 bell",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa bbbbbbbbbbbbbbbb",
)
"""Texts on which tokenizers that are not quite the same give different ids."""


def check(parent: Loaded) -> None:
    """Raise ModelError or MissingExtra where there is no GGUF of a model."""
    library()
    refuse_low_bit(parent.model)
    check_architecture(parent.model)
    vocabulary_of(parent.tokenizer, parent.vocabulary)


def written(meant: Loaded, codes: dict[str, Coded], place: Path, fmt: str) -> tuple[Path, Loaded]:
    """The file in the folder ``place``, in place of what is there, and its model as transformers reads it."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    file = place / f"{meant.name}-{fmt}.gguf"
    about = {"pennyweight.parent": meant.fingerprint}
    write_gguf(meant.model, meant.tokenizer, codes, file, fmt, meant.name, about)
    copy = opened(file, meant, meant.model.device)
    _check_speech(file, meant.tokenizer)
    return file, copy


def _check_speech(file: Path, tokenizer: Any) -> None:
    """Raise ModelError unless the file holds the tokenizer's chat template and special tokens."""
    reader = library().GGUFReader(file)
    wanted = {f"tokenizer.ggml.{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos")}
    for key, want in {"tokenizer.chat_template": chat_template(tokenizer), **wanted}.items():
        field = reader.get_field(key)
        if (None if field is None else field.contents()) != want:
            raise ModelError(f"{file} has another {key} than its parent; it was not kept")


def opened(file: Path, parent: Loaded, device: torch.device) -> Loaded:
    """The model of a GGUF as transformers reads it, in float32, with its parent's tokenizer.

    Raises:
        ModelError: transformers does not open it.
    """
    try:
        with quiet():
            config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
            if hasattr(config, "head_dim"):  # which transformers does not read from the file of a Qwen3
                config.head_dim = parent.model.config.head_dim
            model: Any = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, config=config, dtype=torch.float32
            )
    except Exception as e:
        said = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
        raise ModelError(f"transformers does not open {file}: {said}; it was not kept") from None
    return replace(parent, model=model.to(device).eval(), bytes=file.stat().st_size)


def check_by_llama_cpp(file: Path, tokenizer: Any, ids: list[int], logits: Tensor, most: float) -> str:
    """What llama.cpp makes of a GGUF, in words; it is not asked where llama-cpp-python is not installed.

    Args:
        ids: tokens to read.
        logits: (T, V) of the same tokens, as meant.
        most: nats a token that it may be apart; it multiplies in 8 bits.

    Raises:
        ModelError: it gives a text of ``HARD`` other ids, or other logits.
    """
    try:
        import llama_cpp  # type: ignore
    except ImportError:
        return "not asked of llama.cpp: pip install 'pennyweight[llama]' has it checked, too"
    try:
        engine = llama_cpp.Llama(str(file), n_ctx=len(ids) + 8, logits_all=True, verbose=False)
    except ValueError as e:
        raise ModelError(
            f"llama.cpp does not open the GGUF ({e}); it was not kept; use --layout compressed-tensors"
        ) from None
    for text in HARD:
        want = tokenizer(text, add_special_tokens=False)["input_ids"]
        got = engine.tokenize(text.encode(), add_bos=False, special=False)
        if list(got) != list(want):
            raise ModelError(
                f"llama.cpp would cut {text!r} otherwise than the tokenizer does ({got[:12]} and {want[:12]}); the "
                "GGUF was not kept; use --layout compressed-tensors"
            )
    engine.eval(ids)
    found = torch.from_numpy(engine.scores[: len(ids), : logits.shape[1]].copy())
    p, q = torch.log_softmax(logits.float(), -1), torch.log_softmax(found.float(), -1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    if not kl <= most:
        raise ModelError(
            f"llama.cpp opens the GGUF and computes something else than was meant ({kl:.2g} nats a token); it was not "
            "kept; please report this with the model's architecture"
        )
    return f"llama.cpp gives the same ids on {len(HARD)} hard texts, and logits {kl:.2g} nats a token apart"
