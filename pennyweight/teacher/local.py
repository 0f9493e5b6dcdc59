"""Teacher: a causal language model in this process. It can write, and give its distribution dense or sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.data.pack import Batch, collate
from pennyweight.loss.divergence import Dense
from pennyweight.model.device import Compute
from pennyweight.model.generate import generate
from pennyweight.model.head import Head, forward_hidden, head_of
from pennyweight.model.loaded import Loaded
from pennyweight.records import Encoded
from pennyweight.teacher.targets import Kept, draw, join

_TILE_ENTRIES = 1 << 24  # logits labelled at once: 64 MiB of float32


@dataclass(frozen=True)
class LocalTeacher:
    """A loaded model as teacher.

    ``rows`` is how many samples go through it at once; ``write_*`` are how it writes.
    """

    loaded: Loaded
    compute: Compute
    rows: int = 64
    write_temperature: float = 1.0
    write_top_p: float = 1.0
    write_tokens: int = 256
    context: int | None = None

    @property
    def name(self) -> str:
        return self.loaded.name

    @property
    def fingerprint(self) -> str:
        return self.loaded.fingerprint

    @property
    def gives(self) -> frozenset[str]:
        return frozenset({"text", "dense", "sampled"})

    @property
    def head(self) -> Head:
        return head_of(self.loaded.model)

    def write(self, prompts: Sequence[Sequence[int]], seed: int) -> list[tuple[str, bool]]:
        """Responses to prompts of token ids: (text, whether it ended by itself).

        A beginning-of-text token ends a text too, since another one would start there, but is no end it was taught.
        """
        tokenizer, ends = self.loaded.tokenizer, self.loaded.eos_ids
        written = generate(
            self.loaded.model,
            [list(p) for p in prompts],
            max_tokens=self.write_tokens,
            temperature=self.write_temperature,
            top_p=self.write_top_p,
            eos_ids=ends | ({tokenizer.bos_token_id} - {None}),
            pad_id=self.loaded.pad_id,
            seed=seed,
            batch=self.rows,
            context=self.context or self.loaded.context,
        )
        return [(tokenizer.decode(list(g.ids), skip_special_tokens=True), g.end in ends) for g in written]

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        """(N, D) last hidden states at the batch's loss positions."""
        device = self.compute.device
        with torch.autocast(device.type, self.compute.autocast, enabled=self.compute.autocast is not None):
            states = forward_hidden(self.loaded.model, batch.ids.to(device), batch.positions.to(device))
        return states.flatten(0, 1)[batch.selected.to(device)]

    def dense(self, batch: Batch) -> Callable[[int, int], Dense]:
        """The whole distribution at the batch's loss positions, its logits made from the hidden states by tile."""
        hidden, head = self.hidden(batch), self.head

        def tile(a: int, b: int) -> Dense:
            with torch.no_grad():
                return Dense(head.logits(hidden[a:b]))

        return tile

    @torch.no_grad()
    def targets(self, samples: Sequence[Encoded], threshold: float, temperature: float) -> list[Kept]:
        """A sparse sample of the distribution at each sample's loss positions, drawn by the sample's own seed."""
        out: dict[str, Kept] = {}
        head = self.head
        tile = max(16, _TILE_ENTRIES // head.weight.shape[0])
        # Rows of like length go together: less padding, and the same grouping whenever the same samples come.
        by_length = sorted(samples, key=lambda s: (len(s.ids), s.token_hash))
        for a in range(0, len(by_length), self.rows):
            group = by_length[a : a + self.rows]
            hidden = self.hidden(collate([[s] for s in group], self.loaded.pad_id))
            start = 0
            for sample in group:
                end = start + len(sample.loss_positions)
                generator = torch.Generator().manual_seed(int(sample.token_hash[:15], 16))
                pieces = [
                    draw(head.logits(hidden[i : min(i + tile, end)]), threshold, temperature, generator)
                    for i in range(start, end, tile)
                ]
                out[sample.token_hash] = join(pieces)
                start = end
        return [out[s.token_hash] for s in samples]
