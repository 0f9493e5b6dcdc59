"""How two models agree on given tokens, and how well one predicts them; before and after quantising.

Sums per sample come out, so that means, bootstrap intervals and paired differences can all be made from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pennyweight.data.pack import Batch, collate
from pennyweight.evaluate.intervals import calibration_error, ratio
from pennyweight.loss.divergence import cross_entropy, kl
from pennyweight.model.cache import NewCache
from pennyweight.model.device import Compute
from pennyweight.model.head import forward_hidden, head_of
from pennyweight.model.loaded import Loaded
from pennyweight.records import Encoded, Interval, Sample

_BINS = 15
_TILE_ENTRIES = {"cpu": 1 << 20}  # logits at once: 4 MiB stay in a processor's cache, elsewhere more is faster
_MANY_ENTRIES = 1 << 23

Hidden = Callable[[Batch], Tensor]
"""batch -> (N, D) last hidden states at its loss positions"""
Logits = Callable[[Tensor], Tensor]
"""(n, D) -> (n, V) float32 logits"""


def as_scorer(loaded: Loaded, compute: Compute, new_cache: NewCache | None = None) -> tuple[Hidden, Logits]:
    """Hidden states and float32 logits of a model, for ``agreement.score``; read through a cache where one is given."""
    head = head_of(loaded.model)
    device = compute.device

    def hidden(batch: Batch) -> Tensor:
        cache = new_cache(loaded.model.config) if new_cache else None
        states = forward_hidden(loaded.model, batch.ids.to(device), batch.positions.to(device), cache)
        return states.flatten(0, 1)[batch.selected.to(device)]

    return hidden, head.logits


@dataclass(frozen=True)
class Routed:
    """Several models of one tokenizer, each for samples of its own: ``owner`` names a sample's, and ``open`` opens the
    one of a name; nothing that was opened before is used after that."""

    owner: Callable[[Encoded | Sample], str]
    open: Callable[[str], Loaded]
    tokenizer: Any

    def parts(self, samples: Sequence[Encoded | Sample]) -> Iterator[tuple[Loaded, list[int]]]:
        """Each model that some samples have, and the places of these."""
        names = [self.owner(s) for s in samples]
        for name in sorted(set(names)):
            yield self.open(name), [i for i, of in enumerate(names) if of == name]


@dataclass(frozen=True)
class Scored:
    """Per-sample sums, one entry a sample: tokens, UTF-8 bytes, nats of cross-entropy, and against the reference
    KL both ways and top-1 matches (zeros without one). ``bins`` is (samples, 15, 3): tokens, confidence, hits by
    confidence.
    """

    tokens: np.ndarray
    bytes: np.ndarray
    nats: np.ndarray
    kl_to: np.ndarray
    kl_from: np.ndarray
    same: np.ndarray
    bins: np.ndarray

    @staticmethod
    def of(parts: Sequence[tuple[list[int], Scored]]) -> Scored:
        """Samples that were scored in parts, at their places."""
        order = np.argsort(np.concatenate([places for places, _ in parts]))
        return Scored(*(np.concatenate([getattr(s, f.name) for _, s in parts])[order] for f in fields(Scored)))

    def bits_per_byte(self, seed: int = 0) -> Interval:
        return ratio(self.nats / math.log(2), self.bytes, seed)

    def per_token(self, what: str, seed: int = 0) -> Interval:
        """Mean per token of ``kl_to`` (reference || model), ``kl_from`` (model || reference) or ``same``."""
        return ratio(getattr(self, what), self.tokens, seed)

    def ece(self, seed: int = 0) -> Interval:
        """Expected calibration error of the top-1 next token, 15 equal bins (Guo et al., arXiv 1706.04599)."""
        return calibration_error(self.bins, seed)


@torch.no_grad()
def score(
    samples: Sequence[Encoded],
    byte_counts: Sequence[int],
    model: tuple[Hidden, Logits],
    reference: tuple[Hidden, Logits] | None,
    pad_id: int,
    rows: int = 32,
    progress: Callable[[int], None] = lambda n: None,
) -> Scored:
    """Run ``model`` (and ``reference``) over the loss positions of ``samples``.

    Args:
        byte_counts: UTF-8 bytes of what each sample's loss tokens spell.
    """
    sums = np.zeros((len(samples), 4))
    bins = torch.zeros(len(samples), _BINS, 3, dtype=torch.float64)
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].ids))
    for a in range(0, len(order), rows):
        chosen = order[a : a + rows]
        batch = collate([[samples[i]] for i in chosen], pad_id)
        owner = np.repeat(chosen, [len(samples[i].loss_positions) for i in chosen])
        values = _values(batch, model, reference, bins, torch.from_numpy(owner))
        np.add.at(sums, owner, values)
        progress(len(chosen))
    tokens = np.array([len(s.loss_positions) for s in samples], float)
    nats, kl_to, kl_from, same = sums.T
    return Scored(tokens, np.asarray(byte_counts, float), nats, kl_to, kl_from, same, bins.numpy())


def _values(
    batch: Batch, model: tuple[Hidden, Logits], reference: tuple[Hidden, Logits] | None, bins: Tensor, owner: Tensor
) -> np.ndarray:
    """(N, 4) nats, KL to, KL from, same top-1; adds the top-1 confidences to ``bins`` of each position's ``owner``."""
    hidden, logits_of = model
    states = hidden(batch)
    theirs = reference[0](batch) if reference else None
    labels = batch.loss_labels.to(states.device)
    out = np.zeros((len(labels), 4))
    entries = _TILE_ENTRIES.get(states.device.type, _MANY_ENTRIES)
    tile = max(16, entries // max(1, logits_of(states[:1]).shape[-1]))
    for a in range(0, len(labels), tile):
        logits = logits_of(states[a : a + tile])
        log_q = torch.log_softmax(logits, -1)
        label = labels[a : a + tile]
        out[a : a + tile, 0] = cross_entropy(log_q, label).cpu()
        confidence, top = log_q.max(-1)
        confidence = confidence.exp().cpu().double()
        bin_of = (confidence * _BINS).long().clamp(max=_BINS - 1)
        hit = (top == label).cpu().double()
        place = owner[a : a + tile] * _BINS + bin_of
        bins.view(-1, 3).index_add_(0, place, torch.stack([torch.ones_like(hit), confidence, hit], -1))
        if reference is not None and theirs is not None:
            other = reference[1](theirs[a : a + tile])
            out[a : a + tile, 1] = kl(other, logits).cpu()
            out[a : a + tile, 2] = kl(logits, other).cpu()
            out[a : a + tile, 3] = (other.argmax(-1) == top).cpu()
    return out
