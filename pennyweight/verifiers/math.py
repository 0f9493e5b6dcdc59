"""Mathematical equality with the gold answer, by math-verify.

math-verify may take for ever, and limits its time with a signal that only the main thread has and that others use as
well. So it runs in a process that is kept for it (``sandbox/kept.py``), with one limit of time for the whole verdict.
Answers that are plainly equal, or two plainly different integers, are told apart here first, which is quicker.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from pennyweight.records import Task, Verdict
from pennyweight.sandbox.kept import Kept, NoAnswer, TookTooLong
from pennyweight.verifiers.exact import final_answer, never_raises, no_answer, normalised

SECONDS = 5
_NUMBER = re.compile(r"[-+]?\$?((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)\.?")  # commas between thousands only
_PROSE = re.compile(r":|(?<!\\)\b(?!(?:sin|cos|tan|log|exp|sqrt|inf)\b)[A-Za-z]{3,}")

_comparing = Kept("pennyweight.verifiers.math:comparing", SECONDS)


@never_raises
def verify_math(response: str, task: Task) -> Verdict:
    """Correct when the final answer is mathematically equal to the gold answer (``1/2`` is ``0.5``)."""
    answer = final_answer(response)
    if answer is None:
        return no_answer(response)
    same = _plainly_equal(task.answer, answer)
    if same is None:
        try:
            same = _comparing.ask([task.answer, answer])
        except TookTooLong:
            return Verdict(False, answer, f"stopped: comparing it took longer than {SECONDS} seconds")
        except NoAnswer as e:
            return Verdict(False, answer, f"the verifier failed: {e}")
    return Verdict(same, answer, "" if same else f"not equal to {task.answer!r}")


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
    """Whether math-verify finds both equal; False as well where it gives none, or takes longer than five seconds."""
    try:
        return _comparing.ask([gold, answer])
    except NoAnswer:
        return False


def comparing() -> Callable[[list[str]], bool]:
    """What compares, in a process of its own, which is stopped from outside."""
    from math_verify import parse, verify

    def compare(both: list[str]) -> bool:
        ours, theirs = (parse(_as_latex(t), parsing_timeout=None) for t in both)  # type: ignore[arg-type]
        return bool(verify(ours, theirs, timeout_seconds=None))

    return compare


def _as_latex(text: str) -> str:
    """Between dollar signs, so that math-verify reads all of it as LaTeX; prose, or text marked already, as it is."""
    marked = "$" in text or r"\(" in text or r"\[" in text
    return text if marked or _PROSE.search(text) else f"${text}$"
