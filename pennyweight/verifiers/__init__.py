"""Who judges a response. A new verifier is one file here and one row in ``VERIFIERS``; a user's own is a file
that is named with its function, ``FILE.py:FUNCTION``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from pennyweight.errors import DataError, RecipeError
from pennyweight.recipe import FileData, Recipe
from pennyweight.records import Sample, Task, Verdict, Verifier
from pennyweight.verifiers.choice import verify_choice
from pennyweight.verifiers.code import verify_code
from pennyweight.verifiers.exact import final_answer, verify_exact
from pennyweight.verifiers.math import verify_math
from pennyweight.verifiers.own import check_judge, is_own, own_verifier
from pennyweight.verifiers.reasoning_gym import verify_reasoning_gym
from pennyweight.verifiers.regex import verify_regex

__all__ = ["VERIFIERS", "check_golds", "check_verifiers", "final_answer", "judge", "judge_sample", "verifier_of"]

VERIFIERS: dict[str, Verifier] = {
    "exact": verify_exact,
    "math": verify_math,
    "choice": verify_choice,
    "regex": verify_regex,
    "code": verify_code,
    "reasoning_gym": verify_reasoning_gym,
}


def verifier_of(name: str) -> Verifier:
    """The row of that name, or the function of that file.

    Raises:
        DataError: there is no such verifier.
    """
    if is_own(name):
        return own_verifier(name)
    if name not in VERIFIERS:
        known = ", ".join(VERIFIERS)
        raise DataError(f"no verifier is named {name!r}; use one of {known}, or your own as FILE.py:FUNCTION")
    return VERIFIERS[name]


def check_verifiers(recipe: Recipe) -> None:
    """Refuse names of verifiers that there are not, before anything is written or trained.

    Raises:
        RecipeError, DataError: with those that there are.
    """
    source, reward = recipe.data.source, getattr(recipe.method, "reward", None)
    named = {"method.reward.verifier": reward.verifier if reward else None}
    if isinstance(source, FileData):
        check_judge(source.verifier, source.answer)
        named["data.source.verifier"] = source.verifier
    for where, name in named.items():
        try:
            if name is not None:
                verifier_of(name)
        except DataError as e:
            raise RecipeError(f"{where}: {e}") from None


def judge(response: str, task: Task) -> Verdict:
    """The verdict of the verifier that the task names.

    Raises:
        DataError: there is no such verifier. What goes wrong inside one is a Verdict.
    """
    return verifier_of(task.verifier)(response, task)


def judge_sample(sample: Sample) -> Verdict | None:
    """The verdict on a sample's response; None where there is no task, or no response yet."""
    if sample.task is None or sample.response is None:
        return None
    return judge(sample.response, sample.task)


def check_golds(samples: Iterable[Sample]) -> list[tuple[Sample, str]]:
    """The samples whose gold answer does not pass its own verifier, each with the reason; samples without a task pass.

    A gold program is run against its tests. A regular expression cannot be its own answer: it has to compile, and to
    match ``example`` where the entry has one. What a user's own verifier takes for an answer is not known: the gold
    answer passes as it stands, marked as the final answer, or by the sample's response.

    Raises:
        DataError: a task names a verifier that there is not.
    """
    verdicts = ((s, _of_gold(s.task, s.response)) for s in samples if s.task is not None)
    return [(s, v.reason or "its gold answer does not pass") for s, v in verdicts if not v.correct]


def _of_gold(task: Task, response: str | None) -> Verdict:
    marked = f"<answer>\n{task.answer}\n</answer>"
    if is_own(task.verifier):
        tries = [judge(text, task) for text in (marked, task.answer, *([response] if response else []))]
        return next((v for v in tries if v.correct), tries[0])
    if not task.answer.strip() and task.verifier != "reasoning_gym":
        return Verdict(False, None, "the gold answer is empty")
    if task.verifier == "code":
        return judge(task.answer, task)
    if task.verifier != "regex":
        return judge(marked, task)
    try:
        re.compile(task.answer)
        example = json.loads(task.entry).get("example")
    except (re.error, OverflowError, RecursionError) as e:
        return Verdict(False, None, f"the gold answer is no regular expression: {e}")
    except (ValueError, AttributeError):
        example = None
    return Verdict(True, None) if example is None else judge(f"<answer>\n{example}\n</answer>", task)
