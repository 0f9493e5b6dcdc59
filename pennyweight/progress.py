"""How far long work is: a bar with rate and time left in a terminal, plain lines elsewhere. Always on stderr.

Of several processes only the first one shows it.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

import pennyweight.processes as processes

_SECONDS_BETWEEN_LINES = 10.0


@dataclass
class Counter:
    """Counts finished units. ``advance`` adds; ``reach`` sets; a note is shown beside the rate. ``asked`` is called
    each time, and raises where the work must stop."""

    label: str
    total: int
    unit: str
    bar: Progress | None = None
    done: int = 0
    first: int | None = None
    began: float = field(default_factory=lambda: time.monotonic())
    told: float = field(default_factory=lambda: time.monotonic())
    asked: Callable[[], None] = lambda: None

    def advance(self, n: int = 1, note: str = "") -> None:
        if self.first is None:
            self.first = self.done
        if not n and not note:  # said while a unit is at work, and often
            self.asked()
            return
        self.reach(self.done + n, note)

    def reach(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if self.first is None:  # resumed work starts anywhere: what was done before says nothing about the rate
            self.first, self.began = done, now
        self.done = done
        rate = (done - self.first) / max(now - self.began, 1e-6)
        text = f"{rate:,.1f} {self.unit}/s  {note}"
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=done, note=text)
        elif rate > 0 and now - self.told >= _SECONDS_BETWEEN_LINES:
            self.told = now
            left = (self.total - done) / rate
            say(f"  {self.label}: {done:,}/{self.total:,} {text}  {left:,.0f} s left")
        self.asked()


@contextmanager
def counting(label: str, total: int, unit: str) -> Iterator[Counter]:
    """A ``Counter`` that is shown while the block runs."""
    console = Console(stderr=True)
    if not console.is_terminal or processes.rank() > 0:
        yield Counter(label, total, unit)
        return
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        bar.add_task(label, total=total, note="")
        yield Counter(label, total, unit, bar)


def say(text: str) -> None:
    """One line about the run's progress, for people."""
    if processes.rank() == 0:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def stoppable(after: str = "this step") -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C (or SIGTERM) only makes the yielded function True; the second one interrupts.

    ``after`` is what is still finished, for people.
    """
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        say(f"stopping after {after} (Ctrl-C again to stop at once)")

    try:
        before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are somebody else's
        yield lambda: False
        return
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
