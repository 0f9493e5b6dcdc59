"""What a model is worth when it reads past tokens from a key-value cache in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pennyweight.evaluate.agreement import as_scorer, score
from pennyweight.model.cache import whole_cache
from pennyweight.model.device import Compute
from pennyweight.model.head import forward_hidden
from pennyweight.model.loaded import Loaded
from pennyweight.quant.kv_cache import bytes_of, low_cache
from pennyweight.records import Encoded


@torch.no_grad()
def remembering(
    model: Loaded, parent: Loaded, samples: Sequence[Encoded], spelt: Sequence[int], compute: Compute, fmt: str
) -> dict[str, Any]:
    """KL to ``parent`` with the cache in ``fmt``, and bytes that a token takes in it, and in 16 bits."""
    low = lambda config: low_cache(config, fmt)  # noqa: E731
    kl = score(samples, spelt, as_scorer(model, compute, low), as_scorer(parent, compute), parent.pad_id)
    token, sizes = torch.zeros(1, 1, dtype=torch.long, device=compute.device), []
    for cache in (low(model.model.config), whole_cache(model.model.config)):
        forward_hidden(model.model, token, token, cache)
        sizes.append(bytes_of(cache))
    in_16_bits = 2 * sizes[1] // next(model.model.parameters()).element_size()
    return {"format": fmt, "bytes": sizes[0], "bytes_in_16_bits": in_16_bits, "kl": kl.per_token("kl_to").to_json()}
