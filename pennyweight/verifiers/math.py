"""Mathematical equality with the gold answer, by math-verify.

math-verify limits its own time with SIGALRM, which exists in the main thread only. In any other thread the
comparison therefore runs in a process of its own, which can be stopped; that takes about a second, so answers that
are plainly equal, or two plainly different integers, are told apart here first.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
from fractions import Fraction

from pennyweight.records import Task, Verdict
from pennyweight.verifiers.exact import final_answer, never_raises, no_answer, normalised

_SECONDS = 5
_NUMBER = re.compile(r"[-+]?\$?((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)\.?")  # commas between thousands only
_PROSE = re.compile(r":|(?<!\\)\b(?!(?:sin|cos|tan|log|exp|sqrt|inf)\b)[A-Za-z]{3,}")


@never_raises
def verify_math(response: str, task: Task) -> Verdict:
    """Correct when the final answer is mathematically equal to the gold answer (``1/2`` is ``0.5``)."""
    answer = final_answer(response)
    if answer is None:
        return no_answer(response)
    plain = _plainly_equal(task.answer, answer)
    if plain is None:
        in_main = threading.current_thread() is threading.main_thread()
        plain = equal(task.answer, answer) if in_main else _equal_elsewhere(task.answer, answer)
    return Verdict(plain, answer, "" if plain else f"not equal to {task.answer!r}")


def _plainly_equal(gold: str, answer: str) -> bool | None:
    """True or False where no algebra is needed to tell, else None."""
    if normalised(gold) == normalised(answer):
        return True
    a, b = _number(gold), _number(answer)
    if a is None or b is None:
        return None
    if a == b:
        return True
    return False if a.denominator == b.denominator == 1 else None  # decimals may be equal after rounding


def _number(text: str) -> Fraction | None:
    found = _NUMBER.fullmatch(text.strip())
    if not found:
        return None
    value = Fraction(found[1].replace(",", ""))
    return -value if text.strip().startswith("-") else value


def equal(gold: str, answer: str) -> bool:
    """Whether math-verify finds both equal. Main thread only; gives up, with False, after a few seconds."""
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException

    log = logging.getLogger("math_verify")
    if not log.handlers:
        log.addHandler(logging.NullHandler())  # it says aloud when it gives up, into whatever the terminal shows
    try:
        ours, theirs = (parse(_as_latex(t), parsing_timeout=_SECONDS) for t in (gold, answer))
        return bool(verify(ours, theirs, timeout_seconds=_SECONDS))
    except TimeoutException:  # not an Exception: math-verify derives it from BaseException
        return False


def _as_latex(text: str) -> str:
    """Between dollar signs, so that math-verify reads all of it as LaTeX; prose, or text marked already, as it is."""
    marked = "$" in text or r"\(" in text or r"\[" in text
    return text if marked or _PROSE.search(text) else f"${text}$"


def _equal_elsewhere(gold: str, answer: str) -> bool:
    """``equal`` in the main thread of another process."""
    command = [sys.executable, "-m", "pennyweight.verifiers.math"]
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    done = subprocess.run(
        command,
        input=json.dumps([gold, answer]),
        capture_output=True,
        text=True,
        timeout=6 * _SECONDS,
        env={**os.environ, "PYTHONPATH": path},
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "math-verify stopped")
    return json.loads(done.stdout)


if __name__ == "__main__":
    print(json.dumps(equal(*json.load(sys.stdin))))
