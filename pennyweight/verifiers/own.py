"""A verifier of the user's own, named by the file and the function that it is: ``longest.py:verify``.

The file is run once as it stands, in this process and with all that this process may do, like any program of the
user's; once it is edited, it is run again. The function takes a response and its task, and gives a ``Verdict``, or
True or False.
"""

from __future__ import annotations

import hashlib
import importlib.util
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

from pennyweight.errors import DataError, first_line
from pennyweight.records import Task, Verdict, Verifier

SECONDS = 10


FILE_VERIFIERS = ("exact", "math", "choice", "regex", "code")
"""Rows of VERIFIERS that need no more than the columns of a file can give."""


class _TookTooLong(BaseException):
    """No Exception, so that what a verifier catches does not hold it up."""


def is_own(name: str) -> bool:
    """Whether it is the name of a file and a function, and of no row of VERIFIERS."""
    return name.partition(":")[0].endswith(".py")


def check_judge(verifier: str | None, answer: str | None) -> None:
    """Raise DataError where the answers of a file's rows are named, and nobody who can judge by them."""
    if (answer or verifier is not None) and verifier not in FILE_VERIFIERS and not is_own(verifier or ""):
        raise DataError(
            f"data.source.verifier={verifier!r} cannot judge rows of a file by their answers; set it to "
            f"{', '.join(FILE_VERIFIERS)}, or your own as FILE.py:FUNCTION"
        )


def own_verifier(name: str) -> Verifier:
    """The function of that name in the file as it is now, whose failures are verdicts; each content is run once.

    Raises:
        DataError: there is no such file or function, or the file cannot be run.
    """
    return _opened(name, str(_file(name).resolve()), _content(name))


def fingerprint(name: str) -> str:
    """SHA-256 of the file, which decides what its verdicts are; raises as ``own_verifier``."""
    return hashlib.sha256(_content(name)).hexdigest()


def made_with(settings: Any) -> dict[str, str]:
    """``fingerprint`` of the user's own verifier that some settings name, as a stage depends on it; else nothing."""
    name = getattr(settings, "verifier", None)
    return {"verifier": fingerprint(name)} if name and is_own(name) else {}


def _file(name: str) -> Path:
    file = Path(name.partition(":")[0]).expanduser()
    if not file.is_file():
        raise DataError(f"there is no file {file} for the verifier {name!r}; give its path, as from {Path.cwd()}")
    return file


def _content(name: str) -> bytes:
    try:
        return _file(name).read_bytes()
    except OSError as e:
        raise DataError(f"cannot read the verifier {name}: {e.strerror or e}; check its permissions") from None


@lru_cache(maxsize=64)
def _opened(name: str, file: str, content: bytes) -> Verifier:
    wanted = name.partition(":")[2]
    spec = importlib.util.spec_from_file_location(f"own_verifier_{hashlib.sha256(file.encode()).hexdigest()[:8]}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        code = compile(content, file, "exec", dont_inherit=True)
        exec(code, vars(module))  # its loader may take the bytes of before
    except (Exception, SystemExit) as e:
        said = first_line(e) if isinstance(e, Exception) else str(e)
        raise DataError(f"the verifier file {file} cannot be run: {type(e).__name__}: {said}; correct it") from None
    function = getattr(module, wanted, None) if wanted else None
    if not callable(function):
        there = [k for k, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        raise DataError(
            f"the verifier {name!r} names no function of that file; write it as FILE.py:FUNCTION with one of "
            f"{', '.join(there) or 'those that you define in it'}"
        )
    return _guarded(function)


def _guarded(function: Any) -> Verifier:
    def verify(response: str, task: Task) -> Verdict:
        try:
            with _at_most(SECONDS):
                said = function(response, task)
        except _TookTooLong:
            return Verdict(False, None, f"the verifier failed: it took longer than {SECONDS} seconds")
        except (Exception, SystemExit) as e:
            return Verdict(False, None, f"the verifier failed: {type(e).__name__}: {e}"[:300])
        if isinstance(said, Verdict):
            return said
        if isinstance(said, bool):
            return Verdict(said, None, "" if said else "turned down")
        return Verdict(False, None, f"the verifier failed: it gave {said!r:.60}, not a Verdict, True or False")

    return verify


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise ``_TookTooLong`` in what takes longer; in the main thread, which alone has signals, in Python code, and as
    long as that sets no alarm of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(signum: int, frame: FrameType | None) -> None:
        raise _TookTooLong

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # and again, should it have been caught
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
