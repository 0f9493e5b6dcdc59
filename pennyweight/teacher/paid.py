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

_COUNTED = ("prompt_tokens", "completion_tokens")
_CHARACTERS = 4  # of a token, where a server counts none


def answers_of(member: str) -> str:
    """The file of a RUN folder that has every answer of an endpoint, as it was paid for; of several teachers, each
    ``member`` has its own."""
    return f"{member}-answers.jsonl" if member else "answers.jsonl"


def about(what: Any) -> int:
    """Tokens of what a request asks: of ids as many, of a text a fourth of its characters."""
    if isinstance(what, str):
        return -(-len(what) // _CHARACTERS)
    if isinstance(what, dict):
        return about(what.get("prompt") or what.get("messages") or what.get("content") or "")
    return sum(1 if isinstance(x, int) else about(x) for x in what) if isinstance(what, list) else 0


class Paid:
    """The file of answers at ``file``, made when there is a first one.

    ``usage`` is what the server has counted: how many answers it gave, and tokens of both sides. Of ``estimated``
    answers it said nothing (or not all), and their tokens are told from their text.
    """

    def __init__(self, file: Path):
        self.file = file
        self.usage = {"answers": 0, **dict.fromkeys(_COUNTED, 0), "estimated": 0}
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

    def keep(self, key: str, answer: dict[str, Any], usage: Any = None, asked: Any = None) -> None:
        """Write an answer; it is on disk afterwards. What a server counts may be NaN, which becomes null.

        ``asked`` is the request's body; without one nothing was asked for that costs.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        row = {"key": key, "at": now, "usage": usage if isinstance(usage, dict) else None, "answer": answer}
        if asked is not None and None in _counts(row["usage"]):
            row["asked"] = about(asked)
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
            key, counts, answer = row["key"], _counts(row["usage"]), row["answer"]
            assert isinstance(answer, dict)
        except (ValueError, KeyError, TypeError, AssertionError):
            return
        self._place[key] = (at, len(line))
        if not any(counts) and not {"text", "line"} & set(answer):
            return  # something found out about the server, which costs nothing
        told = answer.get("text")
        guesses = (row.get("asked", 0), about(told) if isinstance(told, str) else 1)
        self.usage["answers"] += 1
        self.usage["estimated"] += None in counts
        for name, count, guess in zip(_COUNTED, counts, guesses, strict=True):
            self.usage[name] += guess if count is None else count


def _counts(usage: Any) -> tuple[int | None, ...]:
    """Tokens that a server counts of both sides, None where it says none that can be."""
    said = [usage.get(name) if isinstance(usage, dict) else None for name in _COUNTED]
    return tuple(x if isinstance(x, int) and not isinstance(x, bool) and x >= 0 else None for x in said)
