"""Who judges a response. A new verifier is one file here and one row in ``VERIFIERS``."""

from __future__ import annotations

import json
from collections.abc import Iterable

from pennyweight.errors import DataError
from pennyweight.records import Sample, Task, Verdict, Verifier
from pennyweight.verifiers.choice import verify_choice
from pennyweight.verifiers.code import verify_code
from pennyweight.verifiers.exact import final_answer, verify_exact
from pennyweight.verifiers.math import verify_math
from pennyweight.verifiers.reasoning_gym import verify_reasoning_gym
from pennyweight.verifiers.regex import matches, verify_regex

__all__ = ["VERIFIERS", "check_golds", "final_answer", "judge", "judge_sample"]

VERIFIERS: dict[str, Verifier] = {
    "exact": verify_exact,
    "math": verify_math,
    "choice": verify_choice,
    "regex": verify_regex,
    "code": verify_code,
    "reasoning_gym": verify_reasoning_gym,
}


def judge(response: str, task: Task) -> Verdict:
    """The verdict of the verifier that the task names.

    Raises:
        DataError: there is no such verifier. What goes wrong inside one is a Verdict.
    """
    verifier = VERIFIERS.get(task.verifier)
    if verifier is None:
        raise DataError(f"no verifier is named {task.verifier!r}; use one of {', '.join(VERIFIERS)}")
    return verifier(response, task)


def judge_sample(sample: Sample) -> Verdict | None:
    """The verdict on a sample's response; None where there is no task, or no response yet."""
    if sample.task is None or sample.response is None:
        return None
    return judge(sample.response, sample.task)


def check_golds(samples: Iterable[Sample]) -> list[tuple[Sample, str]]:
    """The samples whose gold answer does not pass its own verifier, each with the reason; samples without a task pass.

    A gold program is run against its tests. A regular expression cannot be its own answer: it has to compile, and to
    match ``example`` where the entry has one.

    Raises:
        DataError: a task names a verifier that there is not.
    """
    verdicts = ((s, _of_gold(s.task)) for s in samples if s.task is not None)
    return [(s, v.reason or "its gold answer does not pass") for s, v in verdicts if not v.correct]


def _of_gold(task: Task) -> Verdict:
    if not task.answer.strip() and task.verifier != "reasoning_gym":
        return Verdict(False, None, "the gold answer is empty")
    if task.verifier == "code":
        return judge(task.answer, task)
    if task.verifier == "regex":
        try:
            example = json.loads(task.entry).get("example")
        except (ValueError, AttributeError):
            example = None
        if example is None:
            found = matches(task.answer, "")
            return Verdict(not isinstance(found, str), None, found if isinstance(found, str) else "")
        return judge(f"<answer>\n{example}\n</answer>", task)
    return judge(f"<answer>\n{task.answer}\n</answer>", task)
