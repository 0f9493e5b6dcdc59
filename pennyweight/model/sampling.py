"""One token from each row's logits: temperature, top-k, top-p, and draws that belong to a row and not to its batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_FEW = 1024  # entries that are ranked at first: what top-p keeps is nearly always among them


@dataclass(frozen=True, slots=True)
class Choice:
    """How tokens are chosen.

    Attributes:
        temperature: 0 is greedy.
        top_p: smallest set of tokens with at least this mass (Holtzman et al., arXiv 1904.09751).
        top_k: only this many most probable tokens (Fan et al., arXiv 1805.04833); 0 is all.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


def row_keys(seed: int, rows: int) -> np.ndarray:
    """(rows,) uint64: the key of each row's own stream of draws."""
    first = _mixed(np.array([seed], np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return _mixed(first + _step(np.arange(rows)))


def draws(keys: np.ndarray, numbers: np.ndarray) -> Tensor:
    """(n,) float64 in [0, 1): draw ``numbers[i]`` of the stream of key ``keys[i]``.

    SplitMix64 (Steele, Lea and Flood, 2014), which gives any draw of a stream at once.
    """
    bits = _mixed(keys + _step(numbers + 1)) >> np.uint64(11)
    return torch.from_numpy(bits.astype(np.float64) * 2.0**-53)


def _step(numbers: np.ndarray) -> np.ndarray:
    return numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def _mixed(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def pick(logits: Tensor, choice: Choice, u: Tensor | None) -> tuple[Tensor, Tensor]:
    """(n, V) float32 logits -> (n,) tokens, and their log-probabilities at temperature 1 with nothing cut, in nats.

    Args:
        u: (n,) float64 in [0, 1) on the CPU, one draw a row; not needed at temperature 0.
    """
    if choice.temperature == 0:
        token = logits.argmax(-1)
    else:
        assert u is not None
        t = choice.temperature
        p = _cut(torch.softmax(logits if t == 1.0 else logits / t, -1), choice)
        # The cumulated probabilities inverted. Where they end a little below 1, so does what is looked up in them.
        wide = torch.float32 if p.device.type == "mps" else torch.float64
        reach = p.cumsum(-1, dtype=wide)
        at = u.to(p.device, wide).unsqueeze(-1) * reach[:, -1:]
        token = torch.searchsorted(reach, at, right=True).squeeze(-1).clamp_(max=p.shape[-1] - 1)
    of_token = logits.gather(-1, token.unsqueeze(-1)).squeeze(-1)
    return token, of_token - torch.logsumexp(logits, -1)


def _cut(p: Tensor, choice: Choice) -> Tensor:
    """(n, V) probabilities with those of tokens outside top-k or top-p set to zero."""
    size = p.shape[-1]
    most = min(choice.top_k or size, size)
    if most == size and choice.top_p >= 1:
        return p
    looked_at = min(most, size if size <= 4 * _FEW else _FEW)
    while True:
        ranked, ids = p.topk(looked_at, -1)
        before = ranked.cumsum(-1) - ranked
        if looked_at == most or bool((before[:, -1] >= choice.top_p).all()):
            break
        looked_at = most
    kept = ranked.masked_fill_(before >= choice.top_p, 0.0) if choice.top_p < 1 else ranked
    return torch.zeros_like(p).scatter_(-1, ids, kept)


Ends = Callable[[Sequence[int]], bool]
"""A row's new tokens so far -> whether its last one completes a stop string"""


def stop_at(tokenizer: Any, strings: Sequence[str]) -> Ends:
    """Ends a row at the token with which its text comes to hold one of ``strings``; ``before_stop`` cuts the text."""
    longest = max(len(s.encode()) for s in strings) + 8  # tokens of one byte, and some for a character cut in two
    last = {s[-1] for s in strings}
    may_complete: dict[int, bool] = {}

    def ends(ids: Sequence[int]) -> bool:
        token = ids[-1]
        if token not in may_complete:
            piece = tokenizer.decode([token, token])  # twice, since a first space may be left out of a text
            may_complete[token] = "\ufffd" in piece or bool(last & set(piece))
        if not may_complete[token]:
            return False
        text = tokenizer.decode(list(ids[-longest:]))
        return any(s in text for s in strings)

    return ends


def before_stop(text: str, strings: Sequence[str]) -> str:
    """``text`` up to where the first of ``strings`` begins in it."""
    return text[: min((i for s in strings if (i := text.find(s)) >= 0), default=len(text))]
