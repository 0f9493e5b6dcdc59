"""Real tokenizers of the folder beside the checkout; a test that asks for one that is not there is skipped."""

from __future__ import annotations

from functools import cache

import pytest
from conftest import REAL
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pennyweight.model.token_bytes import spelling_of

REAL_ONES = ["stories260K", "tokenizers/gpt2", "tokenizers/smollm2"]


@cache
def tokenizer_of(name):
    """A real tokenizer of the folder beside the checkout."""
    path = REAL / name
    if not path.is_dir():
        pytest.skip(f"needs the real tokenizer {name}, which lies beside a full checkout only")
    if name == "tokenizers/gpt2":
        model = models.BPE.from_file(str(path / "vocab.json"), str(path / "merges.txt"))
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer, tokenizer.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    if name == "tokenizers/smollm2":
        return PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"), eos_token="<|endoftext|>")
    return AutoTokenizer.from_pretrained(path)


@cache
def real_spelling(name):
    return spelling_of(tokenizer_of(name))
