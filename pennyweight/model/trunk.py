"""A causal language model without its head."""

from __future__ import annotations

from typing import Any


def trunk_of(model: Any) -> Any:
    """The decoder: token ids to hidden states."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return model.base_model if decoder is None else decoder
