"""Batched sampling with log-probabilities, on a key-value cache; and token by token for a conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from pennyweight.errors import DataError
from pennyweight.model.cache import NewCache, cache_argument, whole_cache


@dataclass(frozen=True, slots=True)
class Generated:
    """New tokens of one prompt, without the end token; the token the model ended with, or None when it was cut off;
    and the log-probability of each token under the model's own distribution (temperature 1, nothing cut), in nats."""

    ids: tuple[int, ...]
    end: int | None
    logprobs: tuple[float, ...]


@torch.inference_mode()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float,
    eos_ids: set[int],
    pad_id: int,
    seed: int,
    top_p: float = 1.0,
    batch: int = 64,
    context: int | None = None,
    new_cache: NewCache = whole_cache,
    progress: Callable[[int], None] = lambda n: None,
) -> list[Generated]:
    """Write on from each prompt; results come in the order of the prompts.

    Prompts go in batches of like length. Each batch draws from a generator of its own, seeded by ``seed`` and the
    number of the batch, so the text depends on the prompts, the seed and ``batch``, and on nothing else.

    Args:
        temperature: 0 is greedy.
        top_p: smallest set of tokens with at least this mass (Holtzman et al., arXiv 1904.09751).
        context: prompt and response together never grow longer.
        new_cache: makes a batch's key-value cache.

    Raises:
        DataError: a prompt is empty or leaves no room in the context.
    """
    for i, prompt in enumerate(prompts):
        if not prompt or (context and len(prompt) >= context):
            raise DataError(
                f"prompt {i} has {len(prompt):,} tokens and the context is {context:,}; shorten it"
                if prompt
                else f"prompt {i} is empty; a prompt needs at least one token"
            )
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    out: list[Generated | None] = [None] * len(prompts)
    for number, a in enumerate(range(0, len(order), batch)):
        chosen = order[a : a + batch]
        random = torch.Generator().manual_seed((seed * 1_000_003 + number) % (1 << 62))
        rows = [list(prompts[i]) for i in chosen]
        rooms = [max_tokens if context is None else min(max_tokens, context - len(r)) for r in rows]
        written = _batch(model, rows, rooms, temperature, top_p, eos_ids, pad_id, random, new_cache(model.config))
        for i, made in zip(chosen, written, strict=True):
            out[i] = made
        progress(len(chosen))
    return [g for g in out if g is not None]


def _batch(
    model: Any,
    rows: list[list[int]],
    rooms: list[int],
    temperature: float,
    top_p: float,
    eos_ids: set[int],
    pad_id: int,
    random: torch.Generator,
    cache: DynamicCache,
) -> list[Generated]:
    """One batch, left-padded; row i gets at most ``rooms[i]`` tokens. Rows that have ended leave once they are half."""
    device = next(model.parameters()).device
    room, limits = max(rooms), torch.tensor(rooms, device=device)
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(r)) + r for r in rows], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
    ends = torch.tensor(sorted(eos_ids) or [-1], device=device)
    tokens = torch.full((len(rows), room), -1, device=device)
    logprobs = torch.zeros((len(rows), room), device=device)
    live = torch.arange(len(rows), device=device)
    done = torch.zeros(len(rows), dtype=torch.bool, device=device)
    step_ids, positions = ids, (mask.cumsum(-1) - 1).clamp(min=0)
    for step in range(room):
        logits = _next_logits(model, step_ids, mask, positions, cache)
        token, logprob = _pick(logits, temperature, top_p, random)
        open_rows = ~done[live]
        tokens[live[open_rows], step] = token[open_rows]
        logprobs[live[open_rows], step] = logprob[open_rows]
        done[live] |= torch.isin(token, ends) | (limits[live] <= step + 1)
        remaining = int((~done).sum())
        if remaining == 0:
            break
        if remaining <= len(live) // 2:
            keep = (~done[live]).nonzero().squeeze(-1)
            cache.batch_select_indices(keep)
            live, token, mask, positions = live[keep], token[keep], mask[keep], positions[keep]
        step_ids = token.unsqueeze(-1)
        mask = torch.cat([mask, torch.ones_like(step_ids)], -1)
        # An ended row stays where it is, so that it never leaves the context while it waits to leave the batch.
        positions = positions[:, -1:] + (~done[live]).long().unsqueeze(-1)
    return _collect(tokens, logprobs, eos_ids)


def _next_logits(model: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, cache_argument(model): cache}
    return model(**given, use_cache=True, logits_to_keep=1).logits[:, -1].float()


def _pick(logits: Tensor, temperature: float, top_p: float, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """(rows,) chosen tokens and their log-probabilities at temperature 1."""
    log_p = torch.log_softmax(logits, -1)
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        p = torch.softmax(logits / temperature, -1)
        if top_p < 1:
            ranked, ids = p.sort(-1, descending=True)
            ranked[ranked.cumsum(-1) - ranked >= top_p] = 0
            p = torch.zeros_like(p).scatter_(-1, ids, ranked)
        # Drawn on the CPU, where the generator lives, by inverting the cumulated probabilities: one draw a row.
        wide = torch.float32 if p.device.type == "mps" else torch.float64
        u = torch.rand((len(p), 1), generator=random, dtype=torch.float64).to(p.device, wide)
        reach = p.to(wide).cumsum(-1)
        token = torch.searchsorted(reach, u * reach[:, -1:], right=True).squeeze(-1).clamp(max=p.shape[-1] - 1)
    return token, log_p.gather(-1, token.unsqueeze(-1)).squeeze(-1)


def _collect(tokens: Tensor, logprobs: Tensor, eos_ids: set[int]) -> list[Generated]:
    out = []
    for ids, values in zip(tokens.tolist(), logprobs.tolist(), strict=True):
        new = ids[: ids.index(-1)] if -1 in ids else ids
        end = new[-1] if new and new[-1] in eos_ids else None
        new = new if end is None else new[:-1]
        out.append(Generated(tuple(new), end, tuple(values[: len(new)])))
    return out


@torch.inference_mode()
def stream(
    model: Any,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    temperature: float,
    eos_ids: set[int],
    seed: int,
    top_p: float = 1.0,
    context: int | None = None,
    new_cache: NewCache = whole_cache,
) -> Iterator[int]:
    """The tokens of one response, each as soon as it is chosen; the end token is not given."""
    if context and len(prompt) >= context:
        raise DataError(
            f"the prompt has {len(prompt):,} tokens and the context is {context:,}; shorten it, or start anew"
        )
    device = next(model.parameters()).device
    random = torch.Generator().manual_seed(seed)
    cache = new_cache(model.config)
    ids = torch.tensor([list(prompt)], device=device)
    seen = 0
    for _ in range(min(max_tokens, context - len(prompt)) if context else max_tokens):
        positions = torch.arange(seen, seen + ids.shape[1], device=device).unsqueeze(0)
        seen += ids.shape[1]
        logits = _next_logits(model, ids, torch.ones((1, seen), dtype=torch.long, device=device), positions, cache)
        token, _ = _pick(logits, temperature, top_p, random)
        if int(token) in eos_ids:
            return
        yield int(token)
        ids = token.unsqueeze(0)
