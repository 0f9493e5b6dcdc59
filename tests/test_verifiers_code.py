# ruff: noqa: E501
"""The verifier of programs: what passes, what does not, and that nothing gets out."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hostile
import pytest

from pennyweight.records import Message, Sample, Task
from pennyweight.verifiers import check_golds, code, judge

needs_isolation = pytest.mark.skipif(
    bool(code.cannot_shut_in()), reason=f"programs cannot be shut in here: {code.cannot_shut_in()}"
)


@pytest.fixture(autouse=True)
def _time_by_the_processor(monkeypatch):
    """A busy machine lets a second of processor time take many by the clock; those of the hostile programs are as they
    are in use."""
    monkeypatch.setattr(code, "SLOWEST", 120)


def verdict(program, tests="assert f(2) == 4", **entry):
    return judge(program, Task("t", "code", "", json.dumps({"tests": tests, "seconds": 1, **entry})))


def workers():
    """Processes of the sandbox of this checkout that are there now, by number."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if code._ROOT.encode() in words and code._START.encode() in words:
            found.append(int(place.name))
    return found


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """Verdicts of all hostile programs, seconds each took, how often the port was called, the victim's folder."""
    victim = tmp_path_factory.mktemp("victim")
    (victim / "kept").write_text("kept")
    for place in (victim, *victim.parents[:3]):
        place.chmod(0o755)  # so that not these rights keep anybody out
    victim.chmod(0o777)
    (victim / "kept").chmod(0o666)
    called = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def listen():
            try:
                while True:
                    called.append(listener.accept())
            except OSError:
                pass

        threading.Thread(target=listen, daemon=True).start()

        def attack(name):
            began = time.monotonic()
            source = hostile.program(name, str(victim), listener.getsockname()[1], os.getpid())
            return verdict(source, hostile.TESTS), time.monotonic() - began

        with ThreadPoolExecutor(4) as pool:
            found = dict(zip(hostile.HOSTILE, pool.map(attack, hostile.HOSTILE), strict=True))
        listener.shutdown(socket.SHUT_RDWR)
    return found, called, victim


@needs_isolation
@pytest.mark.parametrize("name", hostile.HOSTILE)
def test_hostile_programs_neither_pass_nor_last(attacked, name):
    found, seconds = attacked[0][name]
    assert not found.correct
    assert found.reason and "verifier failed" not in found.reason, found.reason
    assert seconds < 60, seconds  # each has one of processor time, and three by the clock


@needs_isolation
def test_hostile_programs_leave_everything_as_it_was(attacked):
    _, called, victim = attacked
    assert not called
    assert {p.name: p.read_text() for p in victim.iterdir()} == {"kept": "kept"}
    assert (victim / "kept").stat().st_mode & 0o777 == 0o666
    assert not workers()


def test_unprotected_they_do_get_out():
    """The other side of the tests above: what they look for is there to be found."""
    tests = "found = escapes()\nassert found == [], sorted(found)"
    assert "'a file', 'a file to write', 'a process', 'a signal', 'a socket'" in code._run(
        code._ESCAPES.replace('"/tmp/escaped"', '"/dev/null"').replace("os.fork", "lambda: os.fork() or os._exit(0)"),
        tests, None, 5, False,
    )  # fmt: skip


@needs_isolation
@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("def f(x): return x * x", hostile.TESTS),
        ("Here you are:\n```python\ndef f(x):\n    return x * x\n```\nIt squares.", hostile.TESTS),
        ("```python\ndef f(x): return 0\n```\nNo:\n```python\nf = lambda x: x * x\n```\n```bash\nls\n```", hostile.TESTS),
        ("```\ndef f(x): return x * x", hostile.TESTS),
        ("def f(a, *, b=1): return {'a': [a, (b, None)], 'c': {1, 2}}", "assert f(1, b=2) == {'a': [1, (2, None)], 'c': {2, 1}}"),
        ("import collections\ndef f(s): return collections.Counter(s)", "assert f('aab') == {'a': 2, 'b': 1}"),
        ("def f(n):\n    yield from range(n)", "assert list(f(3)) == [0, 1, 2]\nassert next(f(2)) == 0"),
        ("def f(x): raise ValueError('no')", "try:\n    f(1)\nexcept ValueError as e:\n    assert str(e) == 'no'\nelse:\n    assert False"),
        ("LIMIT = 3\ndef f(): return 1", "assert f() < LIMIT"),
        ("class Stack:\n    def __init__(self): self.all = []\n    def push(self, x): self.all.append(x)",
         "s = Stack()\ns.push(3)\ns.push('é')\nassert s.all == [3, 'é']"),
        ("print('hello')\ndef f(x):\n    print(x)\n    return b'\\x00' + x", "assert f(b'a') == b'\\x00a'"),
        ("def f(x): return x / 3", "import math\nassert math.isclose(f(1), 1 / 3)\nassert f(float('inf')) == float('inf')"),
        ("def f(x): return '\\ud800'", "assert f(0) == '\\ud800'"),
        ("import sys\nassert __name__ != '__main__'\ndef f(): return sys.stdin.read()", "assert f() == ''"),
        ("import re, json, heapq, decimal, datetime, asyncio, random, statistics, hashlib, sqlite3, zoneinfo\n"
         "def f(): return str(decimal.Decimal('1.10'))", "assert f() == '1.10'"),
    ],
)  # fmt: skip
def test_right_programs_pass(program, tests):
    found = verdict(program, tests)
    assert found.correct, found.reason


@needs_isolation
@pytest.mark.parametrize(
    ("program", "entry", "reason"),
    [
        ("def f(x): return x", {"tests": "assert f(1) == 1\nassert f(2) == 4"}, "line 2 of the tests fails (AssertionError)"),
        ("def f(x) return x", {}, "the program cannot be loaded: SyntaxError"),
        ("def g(x): return x", {}, "line 1 of the tests fails (NameError"),
        ("f = 3", {}, "line 1 of the tests fails (TypeError"),
        ("def f(x): return x * x", {"tests": "assert True"}, "the tests call nothing"),
        ("def f(x): return x * x", {"tests": "assert f"}, "the tests compare an object of the program's"),
        ("def f(x): raise StopIteration", {"tests": "assert all(map(lambda n: f(n) == n * n, range(5)))"}, "(RuntimeError: StopIteration"),
        ("def f(x): return x * x", {"tests": "assert f(lambda: 1)"}, "the tests give the program a function"),
        ("def f(x): return x * x", {"tests": "assert f(2) == "}, "the tests cannot be read: SyntaxError"),
        ("def f(x): return x * x", {"tests": "import sys\nf(2)\nsys.exit(0)"}, "line 3 of the tests fails (SystemExit"),
        ("def f(x): return x * x", {"tests": "f(2)\nimport os\nos._exit(0)"}, "the tests stopped before they were through"),
        ("def f(x): return x * x", {"tests": "f(2)\nwhile True: pass"}, "the tests took more than 1 seconds"),
        ("def f(x): return x * x", {"tests": "open('/tmp/made', 'w')"}, "line 1 of the tests fails (PermissionError"),
        ("def f(x):\n    while True: pass", {}, "the program took more than 1 seconds of processor time"),
        ("def f(x): return object()", {}, "the tests compare an object of the program's"),
        ("def f(x): return x", {"entry_point": "g", "tests": "def check(g): assert g(1)"}, "the program defines no g"),
        ("", {}, "the response is empty"),
        ("```python\n```", {}, "the response is empty"),
        ("x", {"tests": "  "}, "no tests"),
        ("x", {"tests": 3}, "no tests"),
        ("x", {"seconds": 0}, "whole number from 1 to 600, not 0"),
    ],
)  # fmt: skip
def test_why_a_program_does_not_pass(program, entry, reason):
    found = verdict(program, **entry)
    assert not found.correct
    assert reason in found.reason


FAKES = {
    "math": "class math: fabs = staticmethod(lambda x: 0.0)\n",
    "math imported": "import math\nmath.fabs = lambda x: 0.0\n",
    "isclose": "def isclose(a, b): return True\n",
}


@needs_isolation
@pytest.mark.parametrize(
    ("fake", "tests", "entry"),
    [
        ("math", "assert math.fabs(f(2) - 4) < 1e-6", {}),
        ("math imported", "assert math.fabs(f(2) - 4) < 1e-6", {}),
        ("math", "def check(candidate):\n    assert math.fabs(candidate(2) - 4) < 1e-6", {"entry_point": "f"}),
        ("isclose", "def check(candidate):\n    assert isclose(candidate(2), 4)", {"entry_point": "f"}),
    ],
)
def test_what_tests_compare_with_is_pythons_own(fake, tests, entry):
    found = verdict(FAKES[fake] + "def f(x): return 0", tests, **entry)
    assert not found.correct and "line" in found.reason, found.reason
    for program in (FAKES[fake] + "def f(x): return x * x", "def f(x): return x * x"):
        assert verdict(program, tests, **entry).correct


@needs_isolation
@pytest.mark.parametrize(
    ("program", "tests", "entry"),
    [
        ("def select(x): return x * x", "assert select(2) == 4", {}),
        ("def gcd(a, b): return b", "assert gcd(2, 4) == 4", {}),
        ("def gcd(a, b): return b", "def check(c):\n    assert c(2, 4) == 4", {"entry_point": "gcd"}),
        (
            "def f(x): return g(x)\ndef g(x): return x * x",
            "def check(c):\n    assert c(2) == g(2)",
            {"entry_point": "f"},
        ),
    ],
)
def test_what_is_tested_is_the_programs_whatever_it_is_called(program, tests, entry):
    found = verdict(program, tests, **entry)
    assert found.correct, found.reason


@needs_isolation
def test_a_check_of_a_candidate_and_a_list_of_tests():
    check = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == {}\n"
    assert verdict("def f(x): return x * x", check.format(9), entry_point="f").correct
    assert "line 3" in verdict("def f(x): return x * x", check.format(8), entry_point="f").reason
    assert verdict("def f(x): return x * x", ["assert f(2) == 4", "assert f(3) == 9"]).correct
    assert "line 2" in verdict("def f(x): return x * x", ["assert f(2) == 4", "assert f(3) == 8"]).reason


@needs_isolation
def test_asserts_hold_where_python_is_told_to_leave_them_out(monkeypatch):
    monkeypatch.setenv("PYTHONOPTIMIZE", "2")
    assert not verdict("def f(x): return x").correct


@needs_isolation
def test_nothing_of_the_environment_comes_along(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret")
    assert verdict("import os\ndef f(): return 'SOME_KEY' in os.environ", "assert f() is False").correct
    fds = "import os, stat\ndef f():\n    kinds = []\n    for n in range(64):\n        try: kinds.append(os.fstat(n).st_mode)\n"
    fds += "        except OSError: pass\n    return sum(map(stat.S_ISFIFO, kinds)), sum(map(stat.S_ISREG, kinds))"
    with open(__file__) as held:
        os.set_inheritable(held.fileno(), True)
        assert verdict(fds, "assert f() == (2, 0), f()").correct


def test_where_programs_cannot_be_shut_in_they_are_refused_unless_told(monkeypatch):
    monkeypatch.setattr(code, "cannot_shut_in", lambda: "it is a Mac")
    found = verdict("def f(x): return x * x")
    assert not found.correct
    assert (
        "not run, since it cannot be shut in here (it is a Mac); set PENNYWEIGHT_RUN_CODE=unprotected" in found.reason
    )
    monkeypatch.setenv("PENNYWEIGHT_RUN_CODE", "unprotected")
    assert verdict("def f(x): return x * x").correct
    assert "processor time" in verdict("while True: pass").reason
    assert not verdict("a = bytes(1 << 40)").correct


def test_that_there_was_no_time_to_find_out_is_not_kept(monkeypatch):
    said = [None, b"", b'{"passed": false, "reason": "%s"}' % code.STOPPED.encode(), b'{"passed": true}']
    taken = iter([*said, b'{"passed": false}'])
    monkeypatch.setattr(code, "_said", lambda *asked: (next(taken), [0.1, 0.1]))
    code._cannot_shut_in.cache_clear()
    try:
        assert [bool(code.cannot_shut_in()) for _ in range(6)] == [True, True, True, False, False, False]
        code._cannot_shut_in.cache_clear()
        refused = b'{"passed": false, "refused": "no Landlock"}'
        taken = iter([refused])
        assert [code.cannot_shut_in() for _ in range(2)] == ["no Landlock"] * 2
    finally:
        code._cannot_shut_in.cache_clear()


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("```py\na\n```\n```python\nb\n```\n```py\nc\n```", "c"),
        ("```python\na\n```\n```py\nb\n```\n```python\nc\n```\n```\nd\n```", "c"),
        ("```\na\n```\n```bash\nls\n```\n```\nb\n```", "b"),
        ("<think>\n```python\na\n```\n</think>\n```\nb\n```", "b"),
        ("<think>\n```python\na\n```\n</think>\n\nb", "b"),
        ("<think>a</think>b", "b"),
        ("```python\na\n```\n</think>\n```\nb\n```", "b"),
        ("<think>\n```python\na\n```", ""),
        ("```python\nx = s.split('</think>')[1]\n```", "x = s.split('</think>')[1]"),
        ("x = s.split('</think>')[1]", "x = s.split('</think>')[1]"),
    ],
)
def test_which_program_is_meant(response, program):
    assert code.program_in(response).strip() == program
    if not program:
        assert verdict(response).reason == "no program stands behind the thought"


def test_a_system_that_lacks_something_is_named(tmp_path):
    run = (
        "import platform; from pennyweight.sandbox import jail\nplatform.machine = lambda: 'riscv64'\n"
        "try: jail.shut_in(1, 1 << 30)\nexcept jail.CannotShutIn as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, cwd=code._ROOT)
    assert "it takes Linux on x86-64 or ARM64, and this is" in done.stdout, done.stderr


@needs_isolation
def test_a_verifier_that_is_killed_leaves_no_process():
    run = (
        "import json\nfrom pennyweight.records import Task\nfrom pennyweight.verifiers.code import verify_code\n"
        "verify_code('import time\\ntime.sleep(99)', Task('t', 'code', '', json.dumps({'tests': 'f()', 'seconds': 60})))"
    )
    process = subprocess.Popen([sys.executable, "-c", run], cwd=code._ROOT, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while len(workers()) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.3)
    process.kill()  # what no clean-up outlives: the sandbox goes with its parent
    process.wait()
    until = time.monotonic() + 60
    while workers() and time.monotonic() < until:
        time.sleep(0.05)
    assert not workers()


@needs_isolation
def test_gold_programs_are_run():
    def sample(answer, tests):
        return Sample(
            (Message("user", tests),), None, "s", task=Task("t", "code", answer, json.dumps({"tests": tests}))
        )

    good, bad = sample("def f(x): return 1", "assert f(0) == 1"), sample("def f(x): return 1", "assert f(0) == 2")
    untried = sample("", "assert f(0) == 1")
    ((refused, reason),) = check_golds([good, bad, untried])
    assert refused is bad and "line 1 of the tests fails" in reason
