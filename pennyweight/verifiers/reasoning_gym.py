"""The scorer of the reasoning-gym task that a problem came from."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

from pennyweight.data.tasks import thaw
from pennyweight.records import Task, Verdict, canonical_json
from pennyweight.verifiers.exact import final_answer, never_raises

_FULL = 1 - 1e-9

_CODE = re.compile(
    r"__[A-Za-z]|\b(?:exec|eval|compile|open|input|breakpoint|exit|quit|(?:get|set|del)attr|globals|locals|vars)\s*\("
    r"|\b(?:sympify|lambdify|parse_expr|preview)\s*\(|[A-Za-z_]\([^\n]*['\"]|\blambda\b[^\n]*:"
    r"|\*\*\s*(?:\d{4,}|\(?\s*\d+\s*\*\*)"
)
"""Answers never scored: some of the scorers evaluate the answer as Python, and a model wrote it."""


@never_raises
def verify_reasoning_gym(response: str, task: Task) -> Verdict:
    """Correct when the task's own ``score_answer`` gives the final answer full marks."""
    answer = final_answer(response)
    if answer is None:
        return Verdict(False, None, "the response is empty")
    if _CODE.search(answer):
        return Verdict(False, answer, "not scored: the answer looks like a program, and some scorers would run it")
    problem = json.loads(task.entry)
    score = _scorer(task.name, canonical_json(problem["config"])).score_answer(answer, thaw(problem["entry"]))
    if score >= _FULL:
        return Verdict(True, answer)
    return Verdict(False, answer, f"{task.name} scores it {score:.3g} of 1")


@lru_cache(maxsize=256)
def _scorer(name: str, config: str) -> Any:
    """The task's data set, kept since making one can read word lists and the like."""
    import reasoning_gym

    return reasoning_gym.create_dataset(name, size=1, seed=0, **json.loads(config))
