"""The two processes behind a verdict on code, each shut in before it reads anything that is not ours.

``answer`` holds the program and answers calls; ``examine`` holds the tests and asks. Only plain values cross, and the
comparison is made where the program is not, so the program decides nothing but what its functions give. Neither can
reach the other but through the pipe between them. Standard library only.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import math
import os
import sys
import traceback
from typing import Any, BinaryIO

from pennyweight.sandbox import jail, wire

_PROGRAM, _TESTS = "<response>", "<tests>"
_LONGEST_REASON = 300


def main() -> None:
    """``answer``, or ``examine``, as the command line says, with its limits."""
    role, seconds, memory, protected, *pipes = sys.argv[2:]
    sys.path.remove(sys.argv[1])  # what is still to be imported is the standard library's
    sys.set_int_max_str_digits(wire.LONGEST)
    limits = (int(seconds), int(memory), protected == "shut-in")
    if role == "answer":
        answer(*limits)
    else:
        examine(*limits, *map(int, pipes))


def _apart() -> tuple[BinaryIO, BinaryIO]:
    """Standard input and output as private streams; in their place, and for errors, nothing."""
    streams = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    os.close(nothing)
    return streams


def _shut_in(seconds: int, memory: int, protected: bool) -> None:
    (jail.shut_in if protected else jail.limit)(seconds, memory)


def answer(seconds: int, memory: int, protected: bool) -> None:
    """Load the program that the first line holds, then answer each line: get a name, or call an object."""
    requests, replies = _apart()
    _shut_in(seconds, memory, protected)
    namespace: dict[str, Any] = {"__name__": "response"}
    held: list[Any] = []

    def hold(value: Any) -> dict[str, int]:
        held.append(value)
        return {"object": len(held) - 1}

    def do(request: dict[str, Any]) -> Any:
        if "load" in request:
            exec(compile(request["load"], _PROGRAM, "exec"), namespace)
            return None
        if "get" in request:
            of, name = request["get"]
            return namespace[name] if of is None else getattr(held[of], name)
        of, arguments, named = request["call"]
        return held[of](*wire.decode(arguments, held.__getitem__), **wire.decode(named, held.__getitem__))

    for request in requests:
        try:
            reply = wire.line({"value": wire.encode(do(json.loads(request)), hold)})
        except BaseException as e:
            reply = wire.line({"raised": [type(e).__name__, _said(e)]})
        while reply:
            reply = reply[replies.write(reply) :]


def _said(e: BaseException) -> str:
    try:
        return str(e)[:_LONGEST_REASON]
    except BaseException:  # the program's exceptions are its own
        return ""


class Broken(BaseException):
    """The tests cannot go on; not an ``Exception``, so that they do not catch it by the way."""


class Asked:
    """What the tests know of the program, and the line to it. ``broken`` stays once it is said."""

    def __init__(self, requests: BinaryIO, replies: BinaryIO):
        self.requests, self.replies = requests, replies
        self.calls, self.broken = 0, ""

    def fail(self, reason: str) -> Broken:
        self.broken = self.broken or reason
        return Broken(reason)

    def ask(self, request: dict[str, Any]) -> Any:
        if self.broken:
            raise Broken(self.broken)
        try:
            self.requests.write(wire.line(request))
            self.requests.flush()
            reply = self.replies.readline(wire.LONGEST + 1)
        except OSError:
            reply = b""
        if not reply.endswith(b"\n"):
            too_long = f"the program gave more than {wire.LONGEST:,} bytes"
            raise self.fail(too_long if reply else wire.STOPPED)
        try:
            said = json.loads(reply)
            if "raised" in said:
                kind, text = map(str, said["raised"])
            else:
                return wire.decode(said["value"], lambda number: Object(self, int(number)))
        except Exception as e:
            raise self.fail(f"the program gave what is no value ({type(e).__name__})") from None
        known = getattr(builtins, kind, None)
        ending = kind in (
            "StopIteration",
            "StopAsyncIteration",
        )  # all(map(f, cases)) would take it for the end of cases
        if ending or not (isinstance(known, type) and issubclass(known, Exception)):
            raise RuntimeError(f"{kind}: {text}")
        try:
            error = known(text)
        except TypeError:  # UnicodeDecodeError and its like want more than a text
            error = RuntimeError(f"{kind}: {text}")
        raise error

    def plain(self, value: Any) -> Any:
        def other(what: Any) -> Any:
            if isinstance(what, Object):
                return {"object": object.__getattribute__(what, "_number")}
            raise self.fail(f"the tests give the program a {type(what).__name__}, and only plain values cross")

        return wire.encode(value, other)


class Object:
    """Something of the program's that is no plain value: it can be called and asked for attributes. It is never
    compared, since only the program could answer that."""

    def __init__(self, asked: Asked, number: int):
        self._asked, self._number = asked, number

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self._asked.calls += 1
        plain = self._asked.plain
        return self._asked.ask({"call": [self._number, plain(arguments), plain(named)]})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._asked.ask({"get": [self._number, name]})

    def _judged(self, *_: Any) -> Any:
        raise self._asked.fail("the tests compare an object of the program's, of which only it could say what it is")

    __eq__ = __ne__ = __hash__ = __bool__ = _judged


def examine(seconds: int, memory: int, protected: bool, requests: int, replies: int) -> None:
    """Read program and tests as one JSON object, run the tests, and write ``{"passed", "reason"}``."""
    given, verdict = _apart()
    task = json.load(given)
    asked = Asked(os.fdopen(requests, "wb"), os.fdopen(replies, "rb"))
    try:
        _shut_in(seconds, memory, protected)
    except (jail.CannotShutIn, OSError) as e:
        found = {"passed": False, "refused": str(e)}
    else:
        reason = _reason(task, asked)
        found = {"passed": not reason, "reason": reason[:_LONGEST_REASON]}
    verdict.write(wire.line(found))
    os._exit(0)


def _reason(task: dict[str, Any], asked: Asked) -> str:
    """Why the program does not pass; empty where it does."""
    tests, entry = task["tests"], task.get("entry_point")
    try:
        wanted, modules = asked_for(tests, entry)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        return f"the tests cannot be read: {type(e).__name__}: {e}"
    try:
        asked.ask({"load": task["program"]})
    except (Exception, Broken) as e:
        return asked.broken or f"the program cannot be loaded: {type(e).__name__}: {e}"
    namespace: dict[str, Any] = {"__name__": "tests"}
    try:
        namespace |= {name: _of_python(name) for name in modules}
        for name in sorted(wanted):
            _fetch(asked, namespace, name, entry if name == "candidate" and entry else name)
        if entry and entry not in namespace:
            return asked.broken or f"the program defines no {entry}"
        exec(compile(tests, _TESTS, "exec", optimize=0), namespace)  # PYTHONOPTIMIZE would leave the asserts out
        if entry and callable(namespace.get("check")):
            namespace["check"](namespace[entry])
    except BaseException as e:
        return asked.broken or _failed(e, tests)
    return asked.broken or ("" if asked.calls else "the tests call nothing of the program's")


def _fetch(asked: Asked, namespace: dict[str, Any], name: str, called: str) -> None:
    try:
        namespace[name] = asked.ask({"get": [None, called]})
    except Exception:
        return  # not defined by the program: the tests will say where they miss it


def _of_python(name: str) -> Any:
    """A module of the standard library, or else the function of ``math`` that has that name."""
    return importlib.import_module(name) if name in sys.stdlib_module_names else getattr(math, name)


def asked_for(tests: str, entry: str | None) -> tuple[set[str], set[str]]:
    """Names that the tests use and do not define: those of the program, and those of Python that nobody imports.

    Names of Python's own are never the program's, or it could bring its own ``all`` or ``AssertionError``. So it is
    with the standard library's modules, where the tests use no more of them than what lies in them (``math.fabs``), and
    with the functions of ``math`` (``isclose``) where another function, ``entry``, is the one that is tested.
    """
    nodes = list(ast.walk(ast.parse(tests)))
    names = [n for n in nodes if isinstance(n, ast.Name)]
    defined = {n.id for n in names if not isinstance(n.ctx, ast.Load)} | set(dir(builtins))
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            defined |= {(a.asname or a.name).partition(".")[0] for a in node.names}
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
    missing = {n.id for n in names} - defined - {entry}
    looked_into = {id(n.value) for n in nodes if isinstance(n, ast.Attribute)}
    whole = {n.id for n in names if id(n) not in looked_into}
    of_python = {n for n in missing if n in sys.stdlib_module_names and n not in whole}
    if entry:
        of_python |= {n for n in missing & set(dir(math)) if not n.startswith("_")}
    return (missing - of_python) | ({entry, "candidate"} if entry else set()), of_python


def _failed(e: BaseException, tests: str) -> str:
    """Which line of the tests, and with what."""
    number = next((f.lineno for f in reversed(traceback.extract_tb(e.__traceback__)) if f.filename == _TESTS), None)
    said = f"{type(e).__name__}: {e}" if str(e) else type(e).__name__
    if not number:
        return f"the tests fail: {said}"
    return f"line {number} of the tests fails ({said}): {tests.splitlines()[number - 1].strip()}"
