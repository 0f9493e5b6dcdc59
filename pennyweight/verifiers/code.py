"""A program against tests, both shut in, in processes of their own (``sandbox``).

The tests run where the program is not: they call its functions through a pipe and compare what comes back. So there is
no success mark to forge, no assert to patch and no exit status to fake: all that a program can do is to give values.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

from pennyweight.data.thought import CLOSE, OPEN
from pennyweight.records import Task, Verdict
from pennyweight.sandbox.wire import STOPPED
from pennyweight.verifiers.exact import never_raises

SECONDS, MEMORY = 5, 512 << 20
"""Processor time of program and of tests, unless the entry says ``seconds``; and bytes of address space of each."""
SLOWEST = 3
"""Wall time, in processor times: for what sleeps, and for a machine that is busy."""

UNPROTECTED = "PENNYWEIGHT_RUN_CODE"
"""The environment variable that, set to ``unprotected``, has programs run where they cannot be shut in."""

_ROOT = str(Path(__file__).resolve().parents[2])
_START = "import sys; sys.path.append(sys.argv[1]); from pennyweight.sandbox.worker import main; main()"
_FENCE = re.compile(r"[ \t]*```[ \t]*([\w+-]*)[^`\n]*")
_CLOSED = re.compile(rf"^[ \t]*{CLOSE}|{CLOSE}[ \t]*$", re.MULTILINE)
_LONGEST_VERDICT = 100_000

_ESCAPES = """
import os, socket
def escapes():
    tries = {
        "a socket": lambda: socket.socket(), "a process": os.fork, "a file": lambda: open("/etc/passwd"),
        "a file to write": lambda: open("/tmp/escaped", "w"), "a signal": lambda: os.kill(os.getppid(), 0),
    }
    found = []
    for name, attempt in tries.items():
        try:
            attempt()
        except OSError:
            continue
        found.append(name)
    return found
"""


@never_raises
def verify_code(response: str, task: Task) -> Verdict:
    """Correct when the program in the response passes the tests in ``task.entry``.

    The entry holds ``tests``, Python (or a list of lines of it) that calls what the program defines; ``entry_point``,
    the function that a ``check(candidate)`` in the tests is given, if they have one; and ``seconds`` of processor time,
    5 unless it says so. Numbers, texts, bytes, None and lists, tuples, sets and dicts of them cross between tests and
    program; other objects stay with the program, and the tests can call them and ask for their attributes, not compare
    them.
    """
    entry = json.loads(task.entry)
    tests, entry_point, seconds = entry.get("tests"), entry.get("entry_point"), entry.get("seconds", SECONDS)
    tests = "\n".join(tests) if isinstance(tests, list) else tests
    if not isinstance(tests, str) or not tests.strip():
        return Verdict(False, None, "the task has no tests; its entry has to hold them as 'tests', a text or a list")
    if type(seconds) is not int or not 1 <= seconds <= 600:
        return Verdict(False, None, f"the entry's seconds are a whole number from 1 to 600, not {seconds!r}")
    program = program_in(response)
    if not program.strip():
        thought = response.lstrip().startswith(OPEN)
        return Verdict(False, None, "no program stands behind the thought" if thought else "the response is empty")
    trusted = os.environ.get(UNPROTECTED) == "unprotected"
    refused = "" if trusted else cannot_shut_in()
    if refused:
        how = f"set {UNPROTECTED}=unprotected to run it with limits of time and memory only"
        return Verdict(False, program, f"not run, since it cannot be shut in here ({refused}); {how}")
    reason = _run(program, tests, entry_point, seconds, not trusted)
    return Verdict(not reason, program, reason)


def program_in(response: str) -> str:
    """The last block fenced as Python; else the last fenced without a language; else the whole response.

    A block whose end is missing goes to the end of the response. What stands in a thought is no part of it, and where
    the response begins with one that is not closed there is no program.
    """
    response = _behind_the_thought(response)
    blocks: list[tuple[str, str]] = []
    language, inside = None, []
    for line in response.splitlines():
        fence = _FENCE.fullmatch(line)
        if fence and language is None:
            language, inside = fence[1].lower(), []
        elif fence and not fence[1]:
            blocks.append((language or "", "\n".join(inside)))
            language = None
        elif language is not None:
            inside.append(line)
    if language is not None:
        blocks.append((language, "\n".join(inside)))
    for wanted in (("python", "py", "python3"), ("",)):
        for name, text in reversed(blocks):
            if name in wanted:
                return text
    return response


def _behind_the_thought(response: str) -> str:
    """What follows the last closing mark at an end of a line; one inside a line may well be the program's own text,
    unless the response begins with a thought."""
    ends = [found.end() for found in _CLOSED.finditer(response)]
    if ends:
        return response[ends[-1] :]
    return response.partition(CLOSE)[2] if response.lstrip().startswith(OPEN) else response


def cannot_shut_in() -> str:
    """Why this machine cannot shut a program in, tried with one that attempts to get out; empty where it can. What was
    found is kept, unless the time was too short to find it."""
    try:
        return _cannot_shut_in()
    except TimeoutError as e:
        return str(e)


@cache
def _cannot_shut_in() -> str:
    said, taken = _said(_ESCAPES, "import json, random\nassert escapes() == [], escapes()", None, SECONDS, True)
    reason = _reason(said, taken, SECONDS)
    if not said or json.loads(said).get("reason") == STOPPED:
        raise TimeoutError(reason)  # which is not kept
    return reason


def _run(program: str, tests: str, entry_point: str | None, seconds: int, shut_in: bool) -> str:
    """Why the program does not pass; empty where it does. Leaves no process."""
    return _reason(*_said(program, tests, entry_point, seconds, shut_in), seconds)


def _said(
    program: str, tests: str, entry_point: str | None, seconds: int, shut_in: bool
) -> tuple[bytes | None, list[float]]:
    """What the tests say, None where they were stopped, and the processor time of program and tests."""
    task = json.dumps({"program": program, "tests": tests, "entry_point": entry_point}).encode()
    ask_out, ask_in = os.pipe()
    reply_out, reply_in = os.pipe()
    started: list[subprocess.Popen[bytes]] = []
    try:
        limits = (str(seconds), str(MEMORY), "shut-in" if shut_in else "unprotected")
        started.append(_start("answer", *limits, stdin=ask_out, stdout=reply_in))
        pipe = subprocess.PIPE
        asking = _start("examine", *limits, str(ask_in), str(reply_out), stdin=pipe, stdout=pipe)
        started.append(asking)
        for end in (ask_out, ask_in, reply_out, reply_in):
            os.close(end)
        ask_out = ask_in = reply_out = reply_in = -1
        assert asking.stdin and asking.stdout
        with contextlib.suppress(BrokenPipeError), asking.stdin:
            asking.stdin.write(task)
        said = _read(asking.stdout.fileno(), time.monotonic() + SLOWEST * seconds)
    finally:
        for end in (ask_out, ask_in, reply_out, reply_in):
            if end >= 0:
                os.close(end)
        taken = [_end(process) for process in started]
    return said, taken


def _start(*arguments: str, stdin: int, stdout: int) -> subprocess.Popen[bytes]:
    # Python's own folders only, no user's, and none of the environment, which may hold keys.
    command = [sys.executable, "-I", "-S", "-B", "-c", _START, _ROOT, *arguments]
    passed = [int(a) for a in arguments[4:]]
    environment = {"LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0"}
    return subprocess.Popen(
        command,
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.DEVNULL,
        pass_fds=passed,
        env=environment,
        start_new_session=True,
    )


def _read(pipe: int, until: float) -> bytes | None:
    """What comes until the pipe is closed; None when that takes too long, or is too much."""
    said = b""
    while len(said) <= _LONGEST_VERDICT:
        ready = select.poll()
        ready.register(pipe, select.POLLIN)
        if not ready.poll(max(0, int(1000 * (until - time.monotonic())))):
            return None
        more = os.read(pipe, 65536)
        if not more:
            return said
        said += more
    return None


def _end(process: subprocess.Popen[bytes]) -> float:
    """Kill a process, and its session where it could start others; the processor time it took, in seconds."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # before it is waited for: until then its number is nobody else's
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    for stream in (process.stdin, process.stdout):
        if stream:
            stream.close()
    return used.ru_utime + used.ru_stime


def _reason(said: bytes | None, taken: list[float], seconds: int) -> str:
    """From what the tests said, None where they were stopped, and the processor time of program and tests."""
    who = next((n for n, t in zip(("program", "tests"), taken, strict=True) if t >= 0.8 * seconds), None)
    limited = f"the {who} took more than {seconds} seconds of processor time"
    if said is None:
        return limited if who else f"stopped after {SLOWEST * seconds} seconds"
    if not said:
        return limited if who else "the tests stopped before they were through"
    found = json.loads(said)
    if found.get("passed") is True:
        return ""
    if found.get("reason") == STOPPED and who:
        return limited
    return found.get("refused") or found.get("reason") or "the tests say neither that it passes nor why not"
