"""metrics.jsonl: one line per measurement, appended; lines after a resume point are dropped, never doubled."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pennyweight.atomic import write_whole


@dataclass(frozen=True)
class Journal:
    """The metrics file of a run, and whoever else wants each line (trackers)."""

    path: Path
    also: list[Callable[[dict], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.path.touch()

    def write(self, line: dict) -> None:
        """Append one line and hand it on."""
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")
        for take in self.also:
            take(line)

    def read(self) -> list[dict]:
        """All whole lines; a last one that a kill cut short is left out."""
        lines = []
        for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
        return lines

    def rewind(self, of: dict, step: int) -> None:
        """Drop the lines that carry all of ``of``'s values and a step above ``step``; atomic."""
        lines = self.read()
        kept = [x for x in lines if not (x.get("step", 0) > step and all(x.get(k) == v for k, v in of.items()))]
        write_whole(self.path, "".join(json.dumps(x) + "\n" for x in kept))
