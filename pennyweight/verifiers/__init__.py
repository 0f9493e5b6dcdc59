"""Who judges a response. A new verifier is one file here and one row in ``VERIFIERS``; a user's own is a file
that is named with its function, ``FILE.py:FUNCTION``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from pennyweight.data.files import rows as rows_of
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
from pennyweight.verifiers.rows import NEEDS, entry_of

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
    """Refuse names of verifiers that there are not, and verifiers that need what the data does not have, before
    anything is written or trained.

    Raises:
        RecipeError, DataError: with those that there are, or what is missing.
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
    of_data = source.verifier if isinstance(source, FileData) else "reasoning_gym"
    for_training = named["method.reward.verifier"]
    if for_training in NEEDS and for_training != of_data:
        raise RecipeError(
            f"method.reward.verifier={for_training} needs {NEEDS[for_training]}, which the problems of this recipe's "
            f"data do not have; {_CURES[for_training]}, or leave it out for each task's own"
        )
    if isinstance(source, FileData):
        _check_first_row(source)


_CURES = {
    "code": "take rows of a file with data.source.verifier=code",
    "reasoning_gym": "take problems with data.source.kind=tasks",
}


def _check_first_row(source: FileData) -> None:
    """Where the file is at hand: what its verifier needs is in its first row."""
    if source.verifier not in NEEDS or not Path(source.path).expanduser().exists():
        return
    for where, row in islice(rows_of(source.path, source.split), 1):
        if isinstance(row, dict):
            try:
                entry_of(row, source.verifier, where)
            except DataError as e:
                raise RecipeError(f"data.source.verifier: {e}") from None


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

    A gold program, where there is one, is run against its tests. A regular expression cannot be its own answer: it has
    to compile, and to match ``example`` where the entry has one. What a user's own verifier takes for an answer is not
    known: the gold answer passes as it stands, marked as the final answer, or by the sample's response.

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
    if task.verifier == "code":  # its tests are what it goes by
        return judge(task.answer, task) if task.answer.strip() else Verdict(True, None)
    if not task.answer.strip() and task.verifier != "reasoning_gym":
        return Verdict(False, None, "the gold answer is empty")
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
