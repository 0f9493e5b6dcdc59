"""Answers that have been paid for: one JSON line each, on disk before anything else is made of them.

A file that is only ever added to. Every line holds the hash of the whole request (server, path, model, prompt, sampling
settings, seed, and which repeat it is), what is kept of the answer, and the usage that the server reported. A line that
a kill cut off is passed over, and its request is made again; every other answer is found by its hash.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pennyweight.records import canonical_json, json_safe


class Paid:
    """The file of answers at ``file``, made when there is a first one."""

    def __init__(self, file: Path):
        self.file = file
        self.usage = {"answers": 0, "prompt_tokens": 0, "completion_tokens": 0}
        self._place: dict[str, tuple[int, int]] = {}
        self._torn = False
        if not file.exists():
            return
        at = 0
        with open(file, "rb") as f:
            for line in f:
                self._note(line, at)
                at += len(line)
                self._torn = not line.endswith(b"\n")

    def __contains__(self, key: str) -> bool:
        return key in self._place

    def __getitem__(self, key: str) -> dict[str, Any]:
        """What was kept of the answer to a request."""
        at, size = self._place[key]
        with open(self.file, "rb") as f:
            f.seek(at)
            return json.loads(f.read(size))["answer"]

    def keep(self, key: str, answer: dict[str, Any], usage: Any = None) -> None:
        """Write an answer; it is on disk afterwards. What a server counts may be NaN, which becomes null."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        row = {"key": key, "at": now, "usage": usage if isinstance(usage, dict) else None, "answer": answer}
        # A lone surrogate, which JSON may hold and UTF-8 not, becomes the escape that stands for it.
        line = canonical_json(json_safe(row)).encode("utf-8", "backslashreplace") + b"\n"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "ab", buffering=0) as f:  # one write, so that lines of several processes stay apart
            before = b"\n" if self._torn else b""
            self._torn = True  # until the line is there whole
            if f.write(before + line) != len(before + line):
                raise OSError(28, "No space left on device", str(self.file))
            os.fsync(f.fileno())
            self._torn = False
            self._note(line, f.tell() - len(line))

    def _note(self, line: bytes, at: int) -> None:
        try:
            row = json.loads(line)
            key, usage = row["key"], row["usage"] or {}
            assert isinstance(row["answer"], dict)
        except (ValueError, KeyError, TypeError, AssertionError):
            return
        self._place[key] = (at, len(line))
        self.usage["answers"] += 1
        for name in ("prompt_tokens", "completion_tokens"):
            count = usage.get(name)
            self.usage[name] += count if isinstance(count, int) else 0
