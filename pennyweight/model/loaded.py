"""A model that has been opened: the noun that load makes and everybody else is handed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from pennyweight.errors import ModelError, RecipeError
from pennyweight.records import Lineage, sha256_json


@dataclass(frozen=True)
class Language:
    """What the students of a run share, and mostly their teacher: a tokenizer, the entries of the output head (at least
    as many as the tokenizer has), the longest sequence in tokens, and a token to fill rows with."""

    tokenizer: Any
    vocabulary: int
    context: int

    @staticmethod
    def of(tokenizer: Any, context: int) -> Language:
        """Of a tokenizer without a model."""
        return Language(tokenizer, len(tokenizer), context)

    @property
    def identity(self) -> str:
        """SHA-256 of what makes text into tokens, the chat template included, and of the context."""
        t = self.tokenizer
        cuts = json.loads(t.backend_tokenizer.to_str()) if t.is_fast else sorted(t.get_vocab().items())
        if isinstance(cuts, dict):  # which the last call of it has set
            cuts |= {"truncation": None, "padding": None}
        return sha256_json([cuts, t.chat_template, t.bos_token_id, t.eos_token_id, self.context])

    @property
    def pad_id(self) -> int:
        """Never learnt and never seen, so any will do where there is none."""
        for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if i is not None:
                return int(i)
        return 0


@dataclass(frozen=True)
class Loaded:
    """A causal language model in evaluation mode, with its tokenizer.

    ``fingerprint`` is the SHA-256 of its weights and architecture, ``identity`` that of these and its tokenizer;
    ``params`` counts tied weights once; ``bytes`` are those of its weight files; ``context`` is the longest sequence in
    tokens; ``shape`` is a short summary of sizes; ``writes`` is False of a mixture, which is only read; ``taught_by``
    says whose traces it was tuned on, where its folder does.
    """

    model: Any
    tokenizer: Any
    name: str
    fingerprint: str
    identity: str
    params: int
    bytes: int
    context: int
    shape: dict[str, Any] = field(default_factory=dict)
    writes: bool = True
    taught_by: Lineage = None

    @property
    def eos_ids(self) -> set[int]:
        """Tokens that end a response: those of the generation settings, and the tokenizer's."""
        asked = getattr(self.model.generation_config, "eos_token_id", None)
        listed = asked if isinstance(asked, list) else [asked]
        return {i for i in (*listed, self.tokenizer.eos_token_id) if i is not None}

    @property
    def ends(self) -> set[int]:
        """Tokens after which nothing of a text comes: those that end a response, and one that would begin another."""
        return self.eos_ids | ({self.tokenizer.bos_token_id} - {None})

    @property
    def vocabulary(self) -> int:
        """Entries of its output head; may be more than the tokenizer has."""
        return self.model.get_output_embeddings().weight.shape[0]

    @property
    def language(self) -> Language:
        return Language(self.tokenizer, self.vocabulary, self.context)

    @property
    def pad_id(self) -> int:
        return self.language.pad_id

    def facts(self) -> dict[str, Any]:
        """What the ledger and the report keep of it."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "identity": self.identity,
            "params": self.params,
            "bytes": self.bytes,
            "context": self.context,
            "shape": self.shape,
        }


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """What tokens spell, control tokens left out, but for the marks of a thought where they are some."""
    special = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    if not {"<think>", "</think>"} & set(special.values()):
        return tokenizer.decode(list(ids), skip_special_tokens=True)
    shown = [i for i in ids if special.get(i) in (None, "<think>", "</think>")]
    return tokenizer.decode(shown, skip_special_tokens=False)


def refuse_low_bit(model: Any) -> None:
    """Raise ModelError for a model whose folder holds quantised weights: there is nothing exact in it to go on from."""
    if getattr(model, "low_bit", False) or getattr(model.config, "quantization_config", None):
        raise ModelError(
            "this model is a low-bit copy already, which can be measured and talked to, but not cut, trained or "
            "quantised again; give the full-precision folder it was made from"
        )


def blocks_of(model: Any) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder's blocks: the longest ModuleList that is nobody's part."""
    depth = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return name, module
    raise RecipeError(
        f"the layers of a {type(model).__name__} could not be found; give a student folder instead of a cut"
    )
