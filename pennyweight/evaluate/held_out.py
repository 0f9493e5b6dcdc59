"""Held-out material, encoded once for all models."""

from __future__ import annotations

from dataclasses import dataclass, field

from pennyweight.records import Encoded, Sample


@dataclass(frozen=True)
class HeldOut:
    """Token samples with the bytes their learnt tokens spell, and problems with their prompts as token ids.

    ``openings`` are token ids to write on from, and what a reader is shown of them, where there are no problems.
    """

    encoded: list[Encoded]
    bytes: list[int]
    problems: list[Sample]
    prompts: list[list[int]]
    openings: list[tuple[list[int], str]] = field(default_factory=list)

    def passes(self, samples: int, references: int) -> int:
        """Samples that an evaluation goes through: tokens once for each reference, greedy and sampled answers."""
        return len(self.encoded) * references + len(self.problems) * (1 + samples)
