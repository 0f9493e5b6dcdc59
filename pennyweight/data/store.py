"""Samples on disk: JSON lines, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from pennyweight.atomic import write_whole
from pennyweight.errors import RunError
from pennyweight.records import Sample


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """One sample a line, in order; atomic."""
    write_whole(path, "".join(json.dumps(s.to_json(), ensure_ascii=False) + "\n" for s in samples))


def read_samples(path: Path) -> list[Sample]:
    """The samples of a file that ``write_samples`` wrote.

    Raises:
        RunError: it is damaged.
    """
    samples = []
    with open(path, encoding="utf-8", errors="replace") as f:
        for number, line in enumerate(f, 1):
            try:
                samples.append(Sample.from_json(json.loads(line)))
            except (ValueError, KeyError, TypeError):
                raise RunError(
                    f"{path} is damaged in line {number}; remove it and run the recipe again on that folder"
                ) from None
    return samples
