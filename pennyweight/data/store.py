"""Samples on disk: JSON lines, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from pennyweight.records import Sample


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """One sample a line, in order; atomic."""
    path.parent.mkdir(parents=True, exist_ok=True)
    making = path.with_name(f".making-{path.name}")
    with open(making, "w", encoding="utf-8") as f:
        for sample in samples:
            f.write(json.dumps(sample.to_json(), ensure_ascii=False) + "\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(making, path)


def read_samples(path: Path) -> list[Sample]:
    """The samples of a file that ``write_samples`` wrote."""
    with open(path, encoding="utf-8") as f:
        return [Sample.from_json(json.loads(line)) for line in f]
