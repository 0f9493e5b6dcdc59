"""A copy that was opened again, held against what was meant to be written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pennyweight.errors import ModelError
from pennyweight.model.loaded import Loaded

_SAME_KL = 1e-4  # nats a token between what was meant and what transformers computes; twice float32's own at most
_REPORT = "it was not kept; please report this with the model's architecture"


@torch.no_grad()
def check_same(meant: Loaded, opened: Loaded, texts: Sequence[Sequence[int]]) -> None:
    """Raise ModelError unless a copy computes on a few texts (token ids), in float32, what was meant, ends a response
    where its parent does, and speaks by the same chat template."""
    kl, tokens = 0.0, 0
    for ids in texts:
        row = torch.tensor([list(ids)], device=meant.model.device)
        p, q = (side.model(row, use_cache=False).logits[0].float().log_softmax(-1) for side in (meant, opened))
        kl += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        tokens += len(ids)
    if not kl / tokens <= _SAME_KL:
        raise ModelError(
            f"transformers opens the copy and computes something else than was meant ({kl / tokens:.2g} nats a token); "
            + _REPORT
        )
    for what, of in _SPOKEN.items():
        if of(meant) != of(opened):
            raise ModelError(f"the copy has another {what} than its parent; {_REPORT}")


_SPOKEN: dict[str, Any] = {
    "chat template": lambda side: side.tokenizer.chat_template,
    "set of special tokens": lambda side: side.tokenizer.special_tokens_map,
    "list of tokens that end a response": lambda side: side.eos_ids,
    "vocabulary": lambda side: side.tokenizer.get_vocab(),
}
