"""Who judges a response. A new verifier is one file here and one row in ``VERIFIERS``."""

from __future__ import annotations

from pennyweight.errors import DataError
from pennyweight.records import Sample, Task, Verdict, Verifier
from pennyweight.verifiers.exact import final_answer, verify_exact
from pennyweight.verifiers.math import verify_math
from pennyweight.verifiers.reasoning_gym import verify_reasoning_gym

__all__ = ["VERIFIERS", "final_answer", "judge", "judge_sample"]

VERIFIERS: dict[str, Verifier] = {
    "exact": verify_exact,
    "math": verify_math,
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
