"""The key-value cache of a model: what makes one, what models call it, and decoding on it by transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

NewCache = Callable[[Any], DynamicCache]
"""A model's config -> an empty key-value cache."""


def whole_cache(config: Any) -> DynamicCache:
    """Keys and values as they are computed."""
    return DynamicCache(config=config)


def cache_argument(model: Any) -> str:
    """What a model or trunk calls its key-value cache: ``cache`` since transformers 5.23; before, and in models that
    bring their own code, ``past_key_values``."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def prefilled(model: Any, ids_BT: Tensor) -> DynamicCache:
    """The cache of a model after (B, T) tokens, padded on the right; no logits are made."""
    cache, trunk = whole_cache(model.config), model.get_decoder()
    trunk(input_ids=ids_BT, use_cache=True, **{cache_argument(trunk): cache})
    return cache


class AnyRows:
    """Rows of any model in decoding: left-padded in transformers' own cache, none entering before all have left."""

    mixes = False

    def __init__(self, model: Any, pad_id: int, new_cache: NewCache):
        self.model, self.pad_id, self.new_cache = model, pad_id, new_cache
        self.argument, self.device = cache_argument(model), next(model.parameters()).device

    def admit(self, prompts: Sequence[Sequence[int]]) -> None:
        """The rows, when there are none; they are worked through with the first step."""
        width, device = max(map(len, prompts)), self.device
        self.cache = self.new_cache(self.model.config)
        self.ids = torch.tensor([[self.pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
        self.mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)

    def keep(self, order: np.ndarray) -> None:
        """The rows are now these of the old ones."""
        if len(order):
            of = torch.from_numpy(order).to(self.mask.device)
            self.cache.batch_select_indices(of)
            self.mask, self.positions = self.mask[of], self.positions[of]

    def step(self, tokens: Tensor, is_done: np.ndarray) -> Tensor:
        """(n,) tokens that the rows go on with -> (n, V) float32 logits of the next ones.

        A row that is done stays at its position, so that it never leaves the context while it waits to leave.
        """
        if self.ids is None:
            self.ids = tokens.unsqueeze(-1)
            self.mask = torch.cat([self.mask, torch.ones_like(self.ids)], -1)
            self.positions = self.positions[:, -1:] + torch.from_numpy(~is_done).long().to(tokens.device).unsqueeze(-1)
        given = {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": self.positions}
        made = self.model(**given, **{self.argument: self.cache}, use_cache=True, logits_to_keep=1)
        self.ids = None
        return made.logits[:, -1].float()
