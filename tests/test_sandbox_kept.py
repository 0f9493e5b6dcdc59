"""A process that is kept to answer questions: what it answers, and when it is stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pennyweight.sandbox import jail
from pennyweight.sandbox.kept import Kept, NoAnswer, TookTooLong

_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")


def doing() -> Callable[[list[Any]], Any]:
    """What answers in these tests, in the other process."""

    def do(asked: list[Any]) -> Any:
        what, *given = asked
        if what == "loop":
            while True:
                pass
        if what == "forge":  # every open pipe is told that the next answer is 7
            for number in range(3, 64):
                with contextlib.suppress(OSError):
                    os.write(number, b'{"number": 1, "value": 7}\n' * 2)
        actions: dict[str, Callable[..., Any]] = {
            "sum": sum,
            "pid": os.getpid,
            "take": lambda size: len(bytes(size)),
            "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
            "read": lambda path: Path(path).read_text(),
            "key": lambda: os.environ.get("SOME_KEY"),
            "sleep": time.sleep,
            "forge": lambda: None,
        }
        return actions[what](*given)

    return do


@pytest.fixture
def kept(monkeypatch) -> Iterator[Kept]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    process = Kept("test_sandbox_kept:doing", 1, 1 << 28)
    yield process
    process.close()


def test_one_process_answers_all(kept):
    assert kept.ask(["sum", [1, 2]]) == 3
    pid = kept.ask(["pid"])
    assert pid != os.getpid() and kept.ask(["pid"]) == pid
    with pytest.raises(NoAnswer, match="KeyError: 'what'"):
        kept.ask(["what"])
    with pytest.raises(NoAnswer, match="MemoryError"):
        kept.ask(["take", 1 << 30])
    assert kept.ask(["take", 1 << 20]) == 1 << 20 and kept.ask(["pid"]) == pid


@pytest.mark.parametrize("question", [["loop"], ["sleep", 1000]])
def test_what_takes_too_long_is_stopped_and_the_next_answered(kept, question):
    pid, began = kept.ask(["pid"]), time.monotonic()
    with pytest.raises(TookTooLong, match="it took longer than 1 seconds"):
        kept.ask(question)
    assert time.monotonic() - began < 60
    assert kept.ask(["pid"]) != pid and not Path(f"/proc/{pid}").exists()


def test_one_that_went_is_started_again_and_one_that_goes_each_time_is_told(kept):
    os.kill(kept.ask(["pid"]), signal.SIGKILL)
    assert kept.ask(["sum", [1]]) == 1
    with pytest.raises(NoAnswer, match="its process stopped"):
        kept.ask(["die"])
    assert kept.ask(["sum", [2]]) == 2


def test_an_answer_of_another_question_is_never_taken(kept):
    kept.ask(["sum", []])
    with pytest.raises(NoAnswer, match="what it was not asked"):
        kept.ask(["forge"])
    assert kept.ask(["sum", [1]]) == 1


def test_an_interrupted_question_leaves_no_answer_behind(kept):
    kept.ask(["sum", []])

    def over(signum, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            kept.ask(["sleep", 0.9])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert kept.ask(["sum", [3]]) == 3


def test_threads_ask_one_after_another_and_the_process_outlasts_none_of_its_own(kept):
    found = []
    threads = [threading.Thread(target=lambda n=n: found.append(kept.ask(["sum", [n]]) == n)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8
    assert kept.ask(["sum", [9]]) == 9


def test_nothing_of_the_environment_comes_along(kept, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret")
    assert kept.ask(["key"]) is None


def test_shut_in_it_reads_packages_and_nothing_else(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    (tmp_path / "secret").write_text("secret")
    process = Kept("test_sandbox_kept:doing", 5, shut_in=True)
    try:
        assert process.ask(["sum", [1]]) == 1
        if _can_shut_in():
            with pytest.raises(NoAnswer, match="PermissionError"):
                process.ask(["read", str(tmp_path / "secret")])
            assert "class CannotShutIn" in process.ask(["read", jail.__file__])
    finally:
        process.close()


def _can_shut_in() -> bool:
    code = "from pennyweight.sandbox import jail; jail.shut_in(5, 1 << 40)"
    return subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


@_LINUX
def test_it_ends_with_the_process_that_asks():
    run = (
        "import sys; sys.path.insert(0, 'tests')\nfrom pennyweight.sandbox.kept import Kept\n"
        "kept = Kept('test_sandbox_kept:doing', 60)\nprint(kept.ask(['pid']), flush=True)\nkept.ask(['loop'])"
    )
    here = Path(__file__).parents[1]
    process = subprocess.Popen([sys.executable, "-c", run], cwd=here, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    until = time.monotonic() + 20
    while Path(f"/proc/{pid}/cmdline").exists() and time.monotonic() < until:
        if not Path(f"/proc/{pid}/cmdline").read_bytes():
            break  # ended, and not yet collected
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes()
