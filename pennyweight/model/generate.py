"""Batched sampling with log-probabilities on a key-value cache: rows leave when they end, new ones take their place."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pennyweight.errors import DataError, ModelError
from pennyweight.model.cache import AnyRows, NewCache, prefilled, whole_cache
from pennyweight.model.llama import LlamaRows
from pennyweight.model.sampling import Choice, Ends, draws, pick, row_keys

_SMALL = 4_000_000  # parameters: up to here a step is many operations too small for a second thread to help with
_SHARE = 24  # rows that are worth a thread of their own


@dataclass(frozen=True, slots=True)
class Generated:
    """New tokens of one prompt, without the end token; the token the model ended with, or None when it was cut off or
    came to a stop string (``stopped``); and the log-probability of each token, and of the end token if there is one
    (``end_logprob``), under the model's own distribution (temperature 1, nothing cut), in nats."""

    ids: tuple[int, ...]
    end: int | None
    logprobs: tuple[float, ...]
    stopped: bool = False
    end_logprob: float | None = None


@torch.inference_mode()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int | Sequence[int],
    temperature: float,
    eos_ids: set[int],
    pad_id: int,
    seed: int,
    top_p: float = 1.0,
    top_k: int = 0,
    stops: Ends | None = None,
    batch: int = 64,
    context: int | None = None,
    new_cache: NewCache = whole_cache,
    progress: Callable[[int], None] = lambda n: None,
) -> list[Generated]:
    """Write on from each prompt; results come in the order of the prompts.

    Prompt i draws from a stream of its own, which ``seed`` and i decide; what is written does not depend on ``batch``.

    Args:
        max_tokens: of each response, or of each in the order of the prompts.
        temperature, top_p, top_k: see ``sampling.Choice``.
        stops: asked with a row's new tokens after each of them; True ends the row (``sampling.stop_at``).
        batch: most rows at once.
        context: prompt and response together never grow longer.
        new_cache: makes a batch's key-value cache.
        progress: called after each token of all rows with the number of responses that ended; may raise to stop.

    Raises:
        DataError: a prompt is empty or leaves no room in the context.
        ModelError: the model has no attention.
    """
    if not prompts:
        return []
    rooms = _rooms(prompts, max_tokens, context)
    most = min(batch, len(prompts), _fitting(model, int(max(rooms + [len(p) for p in prompts]))))
    rows = _rows_of(model, pad_id, new_cache, most)
    keys, waiting = row_keys(seed, len(prompts)), _in_line(prompts, rooms, rows.mixes)
    shared = _Pass(prompts, rooms, Choice(temperature, top_p, top_k), keys, eos_ids, stops, waiting, progress)
    _side_by_side(shared.write, rows, most)
    return [shared.out[i] for i in range(len(prompts))]


@dataclass(frozen=True)
class _Pass:
    """What the threads of one call share: prompts, how tokens are chosen, who is still waiting, and what is written."""

    prompts: Sequence[Sequence[int]]
    rooms: np.ndarray
    choice: Choice
    keys: np.ndarray
    eos_ids: set[int]
    stops: Ends | None
    waiting: list[int]
    progress: Callable[[int], None]
    out: dict[int, Generated] = field(default_factory=dict)
    told: threading.Lock = field(default_factory=threading.Lock)

    def write(self, rows: LlamaRows | AnyRows, most: int, stopped: Callable[[], bool]) -> None:
        """Take prompts that wait, up to ``most`` at once, until none is left."""
        live, device = _Live(self.rooms, self.eos_ids, self.stops), rows.device
        while (self.waiting or len(live)) and not stopped():
            free = most - len(live)
            if self.waiting and (not len(live) or (rows.mixes and free >= max(1, most // 8))):
                new = _taken(self.waiting, free)
                if new:  # others may have been quicker
                    rows.admit([self.prompts[i] for i in new])
                    live.admit(new, [self.prompts[i][-1] for i in new])
                elif not len(live):
                    return
            logits = rows.step(torch.from_numpy(live.tokens).to(device), live.done)
            u = draws(self.keys[live.prompt], live.made) if self.choice.temperature else None
            live.take(*pick(logits, self.choice, u))
            if live.done.all() or (live.done.any() and (rows.mixes or 2 * live.done.sum() >= len(live))):
                ended, order = live.let_go()
                self.out.update(ended)
                rows.keep(order)
                self.tell(len(ended))
            else:
                self.tell(0)

    def tell(self, ended: int) -> None:
        """Say how many responses have ended, which may be none: whoever hears it may stop the writing."""
        with self.told:
            self.progress(ended)


class _Live:
    """The rows being written: which prompt each answers, its tokens so far, and whether it has ended."""

    def __init__(self, rooms: np.ndarray, eos_ids: set[int], stops: Ends | None):
        self.rooms, self.stops, self.eos_ids = rooms, stops, np.array(sorted(eos_ids) or [-1])
        self.prompt = self.made = self.tokens = np.zeros(0, np.int64)
        self.done = self.stopped = np.zeros(0, bool)
        self.ids, self.logprobs = np.zeros((0, 64), np.int64), np.zeros((0, 64), np.float32)

    def __len__(self) -> int:
        return len(self.prompt)

    def admit(self, prompts: list[int], last: list[int]) -> None:
        """Rows for these prompts, behind the others; ``last`` are the tokens they go on from."""
        none = np.zeros(len(prompts), np.int64)
        self.prompt, self.tokens = np.append(self.prompt, prompts), np.append(self.tokens, last)
        self.made, self.done = np.append(self.made, none), np.append(self.done, none.astype(bool))
        self.stopped = np.append(self.stopped, none.astype(bool))
        self.ids, self.logprobs = (np.pad(x, ((0, len(prompts)), (0, 0))) for x in (self.ids, self.logprobs))

    def take(self, tokens: Tensor, logprobs: Tensor) -> None:
        """One token more for each row that has not ended."""
        self.tokens = tokens.cpu().numpy()
        at = np.flatnonzero(~self.done)
        if self.made.max() >= self.ids.shape[1]:
            self.ids, self.logprobs = (np.pad(x, ((0, 0), (0, x.shape[1]))) for x in (self.ids, self.logprobs))
        self.ids[at, self.made[at]] = self.tokens[at]
        self.logprobs[at, self.made[at]] = logprobs.cpu().numpy()[at]
        self.made[at] += 1
        if self.stops:
            self.stopped[at] = [self.stops(self.ids[i, : self.made[i]].tolist()) for i in at]
        self.done |= (
            (self.tokens[:, None] == self.eos_ids).any(1) | self.stopped | (self.made >= self.rooms[self.prompt])
        )

    def let_go(self) -> tuple[dict[int, Generated], np.ndarray]:
        """What the rows that have ended wrote, by prompt; and the others in their new order: the last ones take the
        places that have become free."""
        ended = {int(self.prompt[i]): self._written(int(i)) for i in np.flatnonzero(self.done)}
        order = np.arange(int((~self.done).sum()))
        order[self.done[: len(order)]] = np.flatnonzero(~self.done[len(order) :]) + len(order)
        for name in ("prompt", "made", "tokens", "done", "stopped", "ids", "logprobs"):
            setattr(self, name, getattr(self, name)[order])
        return ended, order

    def _written(self, i: int) -> Generated:
        ids = self.ids[i, : self.made[i]].tolist()
        end = ids.pop() if ids and ids[-1] in self.eos_ids else None
        logprobs = self.logprobs[i, : self.made[i]].tolist()
        last = logprobs.pop() if end is not None else None
        return Generated(tuple(ids), end, tuple(logprobs), bool(self.stopped[i]), last)


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device


def _fitting(model: Any, tokens: int) -> int:
    """Rows of so many tokens, at least one, whose keys and values take no more than half of a GPU's free memory, or a
    quarter of the machine's."""
    config, device = model.config.get_text_config(), _device(model)
    if not getattr(config, "num_attention_heads", None):
        raise ModelError(
            f"a {type(model).__name__} has no attention, and keeps a state in place of keys and values, which nothing "
            "here decodes with; use a model with attention, or let a server write (teacher.kind=endpoint)"
        )
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row = 2 * config.num_hidden_layers * heads * width * tokens * next(model.parameters()).element_size()
    if device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[0] // 2
    else:
        room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    return max(1, room // row)


def _rows_of(model: Any, pad_id: int, new_cache: NewCache, rows: int) -> LlamaRows | AnyRows:
    """The quickest there is for a model."""
    quick = LlamaRows.of(model, lambda ids: prefilled(model, ids), rows) if new_cache is whole_cache else None
    return quick or AnyRows(model, pad_id, new_cache)


def _in_line(prompts: Sequence[Sequence[int]], rooms: np.ndarray, mixes: bool) -> list[int]:
    """Prompts as they are taken, from the end: the longest first, so that few are left over; or like lengths together,
    so that little is padded."""
    first = rooms if mixes else [len(p) for p in prompts]
    return sorted(range(len(prompts)), key=lambda i: (first[i], len(prompts[i])), reverse=not mixes)


def _taken(waiting: list[int], most: int) -> list[int]:
    """Up to so many from the end, while others take from it, too."""
    new: list[int] = []
    with suppress(IndexError):
        while len(new) < most:
            new.append(waiting.pop())
    return new


def _side_by_side(
    write: Callable[[LlamaRows | AnyRows, int, Callable[[], bool]], None], rows: LlamaRows | AnyRows, most: int
) -> None:
    """``write`` with up to ``most`` rows; of a model so small that a step is many small operations, on one thread, and
    with rows enough for it, on as many threads as there are, each with a share of the rows."""
    before = torch.get_num_threads()
    if not isinstance(rows, LlamaRows) or not rows.plain or rows.work > _SMALL:
        return write(rows, most, lambda: False)
    at_once = max(1, min(before, most // _SHARE))
    share, stop = -(-most // at_once), threading.Event()

    @torch.inference_mode()
    def one(rows: LlamaRows) -> None:
        torch.set_num_threads(1)  # of the thread that this is
        try:
            write(rows, share, stop.is_set)
        except BaseException:
            stop.set()
            raise

    try:
        with ThreadPoolExecutor(at_once) as pool:
            try:
                for made in [pool.submit(one, r) for r in (rows, *(rows.another(share) for _ in range(at_once - 1)))]:
                    made.result()
            except BaseException:  # Ctrl-C, which the main thread alone hears of
                stop.set()
                raise
    finally:
        torch.set_num_threads(before)


def _rooms(prompts: Sequence[Sequence[int]], max_tokens: int | Sequence[int], context: int | None) -> np.ndarray:
    """(P,) most tokens that each prompt may be answered with."""
    for i, prompt in enumerate(prompts):
        if not prompt or (context and len(prompt) >= context):
            raise DataError(
                f"prompt {i} has {len(prompt):,} tokens and the context is {context:,}; shorten it"
                if prompt
                else f"prompt {i} is empty; a prompt needs at least one token"
            )
    asked = np.broadcast_to(np.asarray(max_tokens, np.int64), len(prompts))
    return asked if context is None else np.minimum(asked, context - np.array([len(p) for p in prompts], np.int64))


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
    top_k: int = 0,
    context: int | None = None,
    new_cache: NewCache = whole_cache,
) -> Iterator[int]:
    """The tokens of one response, each as soon as it is chosen; the end token is not given. They are those that
    ``generate`` gives for the same seed and this prompt alone."""
    if context and len(prompt) >= context:
        raise DataError(
            f"the prompt has {len(prompt):,} tokens and the context is {context:,}; shorten it, or start anew"
        )
    rows, choice, key = _rows_of(model, 0, new_cache, 1), Choice(temperature, top_p, top_k), row_keys(seed, 1)
    rows.admit([prompt])
    token, is_done = torch.tensor(prompt[-1:], device=_device(model)), np.zeros(1, bool)
    for made in range(min(max_tokens, context - len(prompt)) if context else max_tokens):
        token, _ = pick(rows.step(token, is_done), choice, draws(key, np.array([made])) if temperature else None)
        if int(token) in eos_ids:
            return
        yield int(token)
