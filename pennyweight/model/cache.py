"""The key-value cache of a model: what makes one, and what models call it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

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
