"""A process that is kept to answer questions which might take for ever: it is stopped over one that does, and another
is started for the next.

What answers runs in the other process, with limits of memory and of time, and shut in where that is asked for and the
system can. The kernel ends it with the process that asks. Standard library only.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

from pennyweight.sandbox import jail

SLOWEST = 3
"""Wall time, in processor times: for what sleeps, and for a machine that is busy."""

_STARTING, _LIFETIME = 180, 3600  # seconds to import what answers, by the clock; and of processor time in a life
_MOST = 20_000  # questions in a life, since some libraries keep a little of each
_LONGEST, _LONGEST_REASON = 1_000_000, 300
_ROOT = Path(__file__).resolve().parents[2]
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from pennyweight.sandbox.kept import main; main()"
_PASSED = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
_ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")}


class NoAnswer(Exception):
    """A question without an answer; the message says why."""


class TookTooLong(NoAnswer):
    """The process was stopped over it."""


class _Gone(Exception):
    """The process is no more, or says what it was not asked."""


class Kept:
    """The process, from the side that asks. It starts with the first question; threads ask one after another.

    Args:
        maker: ``module:function`` that gives, in the other process, the function that answers: JSON in, JSON out.
        seconds: of processor time that a question may take.
        memory: bytes of address space it may take beyond what ``maker`` has taken.
        shut_in: it is to read nothing but installed packages, and to reach nothing and nobody, where this system can
            see to that.
    """

    def __init__(self, maker: str, seconds: float, memory: int = 1 << 30, shut_in: bool = False):
        self.maker, self.seconds, self.memory, self.wanted = maker, seconds, memory, shut_in
        self.asked, self._last = 0, 0
        self._process: subprocess.Popen[bytes] | None = None
        self._owner, self._lock, self._rest = 0, threading.Lock(), b""

    def ask(self, question: Any) -> Any:
        """What the other process answers.

        Raises:
            TookTooLong: it was stopped.
            NoAnswer: it fails, or goes down over it.
        """
        with self._lock:
            fresh = self._running()
            try:
                return self._answer(question)
            except _Gone as e:
                if fresh:
                    raise NoAnswer(str(e)) from None
            self._start()  # it may have gone for another reason, as when the thread that started it is no more
            try:
                return self._answer(question)
            except _Gone as e:
                raise NoAnswer(str(e)) from None

    def close(self) -> None:
        """Stop the process, if there is one; the next question starts another."""
        process, self._process, self._rest = self._process, None, b""
        if process is None or self._owner != os.getpid():  # of a process that was forked it is the parent's
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream:
                with contextlib.suppress(OSError):
                    stream.close()

    def _running(self) -> bool:
        """See that there is a process; whether it is a new one."""
        process = self._process
        there = process is not None and self._owner == os.getpid() and process.poll() is None
        if there and self.asked < self._last:
            return False
        self._start()
        return True

    def _start(self) -> None:
        self.close()
        path = json.dumps([*(p or os.getcwd() for p in sys.path), str(_ROOT)])
        command = [sys.executable, "-I", "-B", "-c", _START, path, self.maker, str(self.memory), str(int(self.wanted))]
        environment = {"LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0"} | _ONE_THREAD
        environment |= {name: os.environ[name] for name in _PASSED if name in os.environ}
        pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=nothing, env=environment, start_new_session=True
        )
        if not self._owner:
            atexit.register(self.close)
        self._owner, self._last = os.getpid(), self.asked + _MOST
        try:
            said = self._line(_STARTING, _STARTING)
        except _Gone:
            raise NoAnswer(f"the process for {self.maker} stopped before it was ready") from None
        except BaseException:
            self.close()
            raise
        if "raised" in said:
            self.close()
            raise NoAnswer(said["raised"])

    def _answer(self, question: Any) -> Any:
        assert self._process and self._process.stdin
        self.asked += 1
        text = json.dumps([self.asked, question]).encode() + b"\n"
        try:
            try:
                self._process.stdin.write(text)
                self._process.stdin.flush()
            except OSError:
                raise _Gone("its process stopped") from None
            said = self._line(self.seconds, SLOWEST * self.seconds)
            if said.get("number") != self.asked:
                raise _Gone("its process says what it was not asked")
        except BaseException:  # whatever it is, an answer that is still to come would be taken for another's
            self.close()
            raise
        if "raised" in said:
            raise NoAnswer(said["raised"])
        return said.get("value")

    def _line(self, seconds: float, slowest: float) -> dict[str, Any]:
        """The next line, unless it takes more than ``seconds`` of processor time or ``slowest`` by the clock."""
        assert self._process and self._process.stdout
        pipe, began, before = self._process.stdout.fileno(), time.monotonic(), self._used()
        ready, said, wait = select.poll(), self._rest, seconds
        ready.register(pipe, select.POLLIN)
        while b"\n" not in said:
            if not ready.poll(max(1, int(1000 * wait))):
                wait = min(seconds - (self._used() - before), slowest - (time.monotonic() - began))
                if wait <= 0:
                    raise TookTooLong(f"it took longer than {seconds:g} seconds")
                continue
            more = os.read(pipe, 65536)
            if not more or len(said) > _LONGEST:
                raise _Gone("its process stopped")
            said += more
        line, _, self._rest = said.partition(b"\n")
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise _Gone("its process says what is no answer")
        return found

    def _used(self) -> float:
        """Processor time of the other process; where the system does not tell, time by the clock."""
        assert self._process
        try:
            return time.clock_gettime((~self._process.pid << 3) | 2)  # Linux's clock of another process
        except (OSError, AttributeError, OverflowError):
            return time.monotonic()


def main() -> None:
    """The other side: make what answers, shut in, then a line for each line."""
    maker, memory, wanted = sys.argv[2:]
    questions, replies = _apart()
    try:
        module, _, name = maker.partition(":")
        answer = getattr(importlib.import_module(module), name)()
        _limited(int(memory), wanted == "1")
    except BaseException as e:
        _say(replies, {"raised": _said(e)})
        return
    _say(replies, {"ready": True})
    for question in questions:
        number, asked = json.loads(question)
        try:
            reply = {"number": number, "value": answer(asked)}
        except BaseException as e:
            reply = {"number": number, "raised": _said(e)}
        _say(replies, reply)


def _apart() -> tuple[BinaryIO, BinaryIO]:
    """Standard input and output as private streams; in their place nothing."""
    streams = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1):
        os.dup2(nothing, number)
    os.close(nothing)
    return streams


def _limited(memory: int, wanted: bool) -> None:
    taken = Path("/proc/self/statm")
    if taken.exists():
        memory += int(taken.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    if wanted:
        with contextlib.suppress(jail.CannotShutIn):
            jail.shut_in(_LIFETIME, memory, _packages())
            return
    jail.end_with_parent()
    jail.limit(_LIFETIME, memory)


def _packages() -> list[str]:
    """Folders of installed packages, and this one: some are imported only when they are needed."""
    installed = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages") and Path(p).is_dir()]
    return [*installed, str(_ROOT / "pennyweight")]


def _said(e: BaseException) -> str:
    try:
        return f"{type(e).__name__}: {e}"[:_LONGEST_REASON]
    except BaseException:
        return type(e).__name__


def _say(replies: BinaryIO, reply: dict[str, Any]) -> None:
    line = json.dumps(reply).encode() + b"\n"
    while line:
        line = line[replies.write(line) :]
