"""The meter of a RUN folder: seconds and joules of every stage, in a file that is only ever added to.

``meter.jsonl`` gets a line when a stage begins and ends, and every ``INTERVAL`` seconds between. A line holds what its
stretch (one stage in one process, or what is between stages) has taken so far, so the last whole line of a stretch
counts, and a kill loses what came after it: one interval at most. A stage that goes on after a kill has stretches in
several processes, which add up. A line's ``longest`` is what became longer in its stretch of that by which a budget
looks ahead (``allowance.py``), so that a later try knows it.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pennyweight.meter.counters import Counters
from pennyweight.meter.taken import Taken, clock

INTERVAL = 5.0
"""Seconds between two lines: what a kill loses at most."""

BETWEEN = "between stages"
"""Of time in which no stage is at work: opening models, hashing, waiting, drawing the report."""

METER = "meter.jsonl"

_Clock = Callable[[], float]


class Meter:
    """Meters from when it is made until it is closed. One process of a run has one.

    Args:
        file: is made, or added to.
        devices: held by the run.
        on: ``cpu`` or ``gpu``, where the work is done.
        joules: since some beginning, by counter.
        interval: seconds between lines.
    """

    def __init__(
        self,
        file: Path,
        devices: int = 1,
        on: str = "cpu",
        joules: Callable[[], dict[str, float]] = dict,
        interval: float = INTERVAL,
    ):
        self._file, self._devices, self.on, self._joules = file, devices, on, joules
        self._process = f"{os.getpid()}-{time.time_ns()}"
        self._lock, self._closed, self._number = threading.RLock(), threading.Event(), -1
        self._torn = file.exists() and not file.read_bytes().endswith(b"\n")
        self._before = list(last_lines(file))
        self._mine: dict[int, dict[str, Any]] = {}
        self.longest = longest_of(self._before)
        self._opened = clock()
        self._begin(BETWEEN, "")
        self._ticking = threading.Thread(target=self._tick, args=(interval,), daemon=True)
        self._ticking.start()

    def begin(self, stage: str, key: str) -> None:
        """From now on, time is this stage's."""
        self._turn(stage, key)

    def end(self) -> None:
        """The stage is over."""
        self._turn(BETWEEN, "")

    def close(self) -> None:
        """Write the last line; nothing is metered any more."""
        if self._closed.is_set():
            return
        self._closed.set()
        with self._lock:
            self._write()

    def forget(self) -> None:
        """Meter nothing more, and leave nothing of this process behind: of a try that was refused before it began."""
        self._closed.set()

    def of(self, stage: str, key: str) -> Taken:
        """What a stage has taken on these inputs, in all processes."""
        return taken(line for line in self._lines() if line["stage"] == stage and line["key"] == key)

    def whole(self) -> Taken:
        """All that was metered in the folder, as ``whole_of`` has it."""
        return whole_of(list(self._lines()))

    def by_stage(self) -> dict[tuple[str, str], Taken]:
        """What was taken by (stage, key)."""
        out: dict[tuple[str, str], Taken] = {}
        for line in self._lines():
            out.setdefault((line["stage"], line["key"]), Taken()).add(line)
        return out

    def _lines(self) -> Iterable[dict[str, Any]]:
        with self._lock:
            if not self._closed.is_set():
                self._note()
            return [*self._before, *self._mine.values()]

    def _turn(self, stage: str, key: str) -> None:
        with self._lock:
            self._write()
            self._begin(stage, key)
            self._write()

    def _begin(self, stage: str, key: str) -> None:
        self._number += 1
        self._stage, self._key, self._began, self._known = stage, key, clock(), dict(self.longest)
        self._cpu_began, self._joules_began = time.process_time(), self._joules()

    def _note(self) -> dict[str, Any]:
        """The line of this stretch as it is now."""
        now, joules = clock(), self._joules()
        line = {
            "process": self._process,
            "stretch": self._number,
            "stage": self._stage,
            "key": self._key,
            "seconds": round(now - self._began, 6),
            "open": round(now - self._opened, 6),
            "devices": self._devices,
            "on": self.on,
            "cpu": round(time.process_time() - self._cpu_began, 3),
            "joules": {k: round(v - self._joules_began[k], 3) for k, v in joules.items() if k in self._joules_began},
        }
        if longer := {k: v for k, v in list(self.longest.items()) if v != self._known.get(k)}:
            line["longest"] = longer
        self._mine[self._number] = line
        return line

    def _write(self) -> None:
        """A line in one write. Where that cannot be, because the disk is full, say, the next one tells as much."""
        text = json.dumps(self._note()).encode() + b"\n"
        try:
            with open(self._file, "ab", buffering=0) as f:
                whole = b"\n" * self._torn + text
                self._torn = f.write(whole) != len(whole)
        except OSError:
            self._torn = True

    def _tick(self, interval: float) -> None:
        while not self._closed.wait(interval):
            with self._lock:
                if not self._closed.is_set():
                    self._write()


def metered(file: Path, gpu: str | None, processes: int) -> Meter:
    """A meter of the devices that a run holds: a GPU for each process, of which this one's energy is counted and taken
    for all of them; or, where ``gpu`` is None, this machine."""
    if gpu is None:
        return Meter(file, joules=Counters().joules)
    counters, times = Counters([gpu] if gpu else []), {"cpu": 1, "gpu": processes}
    return Meter(file, processes, "gpu", lambda: {k: v * times[k] for k, v in counters.joules().items()})


def last_lines(file: Path) -> Iterable[dict[str, Any]]:
    """The last whole line of each stretch in a file, in order; what a kill cut short is passed over."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for text in file.read_bytes().splitlines() if file.exists() else ():
        try:
            line = json.loads(text)
            Taken().add(line)
            if isinstance(line["open"], float | int) and {"stage", "key"} <= set(line):
                found[line["process"], line["stretch"]] = line
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return found.values()


def whole_of(lines: Sequence[dict[str, Any]]) -> Taken:
    """All that was metered; seconds are those that meters were open, told by a clock of their own."""
    out = taken(lines)
    longest: dict[str, float] = {}
    for line in lines:
        longest[line["process"]] = max(longest.get(line["process"], 0.0), line["open"])
    out.seconds = sum(longest.values())
    return out


def longest_of(lines: Iterable[dict[str, Any]]) -> dict[str, float]:
    """What a budget looks ahead by, as far as any try has found it out."""
    out: dict[str, float] = {}
    for line in lines:
        known = line.get("longest")
        for kind, seconds in known.items() if isinstance(known, dict) else ():
            if isinstance(seconds, float | int):
                out[kind] = max(out.get(kind, 0.0), seconds)
    return out


def taken(lines: Iterable[dict[str, Any]]) -> Taken:
    """What stretches took together."""
    out = Taken()
    for line in lines:
        out.add(line)
    return out
