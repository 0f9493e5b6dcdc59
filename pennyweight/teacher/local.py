"""Teacher: a causal language model in this process. It can write, and give its distribution dense or sampled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pennyweight.data.pack import Batch, collate
from pennyweight.data.render import opening
from pennyweight.errors import ModelError
from pennyweight.loss.signals import Dense
from pennyweight.model.device import Compute
from pennyweight.model.generate import generate
from pennyweight.model.head import Head, forward_hidden, head_of
from pennyweight.model.loaded import Loaded, text_of
from pennyweight.records import Encoded, Prompt
from pennyweight.teacher.targets import Keep, Kept, draw, expected_entries, join, top, uniforms

_TOKENS = {"cpu": 1 << 12, "cuda": 1 << 15}  # in one forward pass that labels
_TILE_ENTRIES = {"cpu": 1 << 22}  # logits labelled at once: 16 MiB of float32 on a processor, where more is slower
_MANY_ENTRIES = 1 << 24


@contextmanager
def _a_models_fault() -> Iterator[None]:
    """Numbers that are none, found in here, are a ModelError."""
    try:
        yield
    except FloatingPointError as e:
        raise ModelError(str(e)) from None


@dataclass(frozen=True)
class LocalTeacher:
    """A loaded model as teacher.

    ``rows`` is how many samples go through it at once; ``write_*`` are how it writes; ``output`` is a head to use in
    place of the model's own.
    """

    loaded: Loaded
    compute: Compute
    rows: int = 64
    write_temperature: float = 1.0
    write_top_p: float = 1.0
    write_tokens: int = 256
    context: int | None = None
    output: Head | None = None

    keeps = False

    @property
    def name(self) -> str:
        return self.loaded.name

    @property
    def fingerprint(self) -> str:
        return self.loaded.fingerprint

    @property
    def tokenizer(self) -> Any:
        return self.loaded.tokenizer

    def facts(self) -> dict[str, Any]:
        return self.loaded.facts()

    @property
    def head(self) -> Head:
        return self.output or head_of(self.loaded.model)

    def write(
        self, prompts: Sequence[Prompt], seed: int, progress: Callable[[int], None] = lambda n: None
    ) -> list[tuple[str, bool]]:
        """Responses: (text, whether it ended by itself).

        A beginning-of-text token ends a text too, since another one would start there, but is no end it was taught.
        """
        tokenizer, ends = self.loaded.tokenizer, self.loaded.eos_ids
        written = generate(
            self.loaded.model,
            [list(p.ids) for p in prompts],
            max_tokens=self.write_tokens,
            temperature=self.write_temperature,
            top_p=self.write_top_p,
            eos_ids=self.loaded.ends,
            pad_id=self.loaded.pad_id,
            seed=seed,
            batch=self.rows,
            context=self.context or self.loaded.context,
            progress=progress,
        )
        begun = [opening(p.messages, tokenizer) for p in prompts]
        return [(o + text_of(tokenizer, g.ids), g.end in ends) for o, g in zip(begun, written, strict=True)]

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        """(N, D) last hidden states at the batch's loss positions."""
        device = self.compute.device
        with torch.autocast(device.type, self.compute.autocast, enabled=self.compute.autocast is not None):
            states = forward_hidden(self.loaded.model, batch.ids.to(device), batch.positions.to(device))
        return states.flatten(0, 1)[batch.selected.to(device)]

    def dense(self, batch: Batch) -> Dense:
        """The whole distribution at the batch's loss positions, its logits made from the hidden states by tile."""
        return Dense.live(self.hidden(batch), self.head.logits)

    @torch.no_grad()
    @_a_models_fault()
    def targets(self, samples: Sequence[Encoded], keep: Keep) -> list[Kept] | list[Tensor]:
        """What ``keep`` says at each sample's loss positions: kept entries, or (P, D) hidden states on the CPU.

        What is drawn is drawn by each sample's own seed.
        """
        out: dict[str, Kept | Tensor] = {}
        for group, states in self.states(samples):
            sizes = [len(s.loss_positions) for s in group]
            if keep.kind == "hidden":
                if not states.isfinite().all():
                    raise FloatingPointError(
                        "the teacher's hidden states are no numbers (NaN or infinity) somewhere; its precision may be "
                        "too narrow for it: try targets.precision=float32 or compute.dtype=float32"
                    )
                parts: Sequence[Kept | Tensor] = states.cpu().split(sizes)
            else:
                seeds = [int(s.token_hash[:15], 16) for s in group]
                u = torch.cat([uniforms(n, seed) for n, seed in zip(sizes, seeds, strict=True)])
                parts = self._kept(states, keep, u).split(sizes)
            out.update(zip((s.token_hash for s in group), parts, strict=True))
        return [out[s.token_hash] for s in samples]  # type: ignore[return-value]

    def states(self, samples: Sequence[Encoded]) -> Iterator[tuple[list[Encoded], Tensor]]:
        """Samples in groups that go through together, and (N, D) last hidden states at each group's loss positions."""
        # Rows of like length go together: less padding, and the same grouping whenever the same samples come.
        for group in self._groups(sorted(samples, key=lambda s: (len(s.ids), s.token_hash))):
            yield group, self.hidden(collate([[s] for s in group], self.loaded.pad_id))

    def _groups(self, samples: list[Encoded]) -> Iterator[list[Encoded]]:
        """Runs of samples, sorted by length, that go through together: up to ``rows``, and few enough tokens to stay in
        a CPU's cache."""
        most = _TOKENS.get(self.compute.device.type, _TOKENS["cuda"])
        group: list[Encoded] = []
        for sample in samples:
            if group and (len(group) == self.rows or (len(group) + 1) * len(sample.ids) > most):
                yield group
                group = []
            group.append(sample)
        if group:
            yield group

    def _kept(self, states: Tensor, keep: Keep, u: Tensor) -> Kept:
        """Entries kept at (N, D) hidden states, tile by tile in one buffer."""
        head, parts = self.head, []
        tile = min(len(states), _tile(states, head))
        buffer = torch.empty((tile, head.weight.shape[0]), dtype=torch.float32, device=states.device)
        for a in range(0, len(states), tile):
            rows = states[a : a + tile]
            logits = head.logits(rows, buffer[: len(rows)])
            if keep.kind == "sampled":
                parts.append(draw(logits, keep.threshold, keep.temperature, u[a : a + tile]))
            else:
                parts.append(top(logits, keep.k, keep.temperature, u[a : a + tile], keep.bits))
        return join(parts)

    @torch.no_grad()
    @_a_models_fault()
    def expected(
        self, samples: Sequence[Encoded], thresholds: list[float], temperature: float, positions: int = 1024
    ) -> list[tuple[float, float]]:
        """Heads and tails a position that each threshold would keep, on average over some positions of the samples."""
        states = torch.cat([states for _, states in self.states(samples)])
        some = states[:: max(1, len(states) // positions)]
        parts = [
            (len(rows), expected_entries(self.head.logits(rows), thresholds, temperature))
            for rows in some.split(_tile(states, self.head))
        ]
        means = [[n / len(some) * torch.tensor(found[i]) for n, found in parts] for i in range(len(thresholds))]
        return [tuple(torch.stack(m).sum(0).tolist()) for m in means]  # type: ignore[misc]


def _tile(states: Tensor, head: Head) -> int:
    """Positions whose logits are made at once."""
    return max(16, _TILE_ENTRIES.get(states.device.type, _MANY_ENTRIES) // head.weight.shape[0])
