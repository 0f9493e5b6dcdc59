"""A recipe with fewer rows, to be tried (``rehearsal.py``)."""

from __future__ import annotations

from typing import Any

from pennyweight.recipe import FileData, Recipe, TaskData
from pennyweight.verifiers.own import is_own

ROWS, OWN, _HELD_OUT = 512, 256, 48
"""Rows that are worked on, of the teacher's own samples, and held out"""


def some_of(recipe: Recipe, made: bool) -> Recipe:
    """The recipe with some of its rows; where its teacher is not there yet, nothing is written by it."""
    whole = recipe.model_dump(mode="json")
    source, data = whole["data"]["source"], whole["data"]
    asked = data["responses"]["by"] == "teacher"
    most = OWN if asked and not made else ROWS  # which a teacher takes its time for
    if source["kind"] == "tasks":
        source["tasks"] = [_fewer(t, most) for t in source["tasks"]]
    elif source["kind"] == "files":
        source["limit"] = min(source["limit"] or most, most)
    else:
        source["count"] = min(source["count"], OWN)
    if whole["teacher"]["kind"] == "trained":
        whole["teacher"]["tasks"] = [_fewer(t, ROWS) for t in whole["teacher"]["tasks"]]
    data["responses"] |= {"keep": "all", "samples": 1, "most": None, "language": 0.0}
    if asked and made:
        data["responses"]["by"] = "auto"
    data["eval_limit"] = min(data["eval_limit"], _HELD_OUT)
    whole["evaluate"]["problems"] = min(whole["evaluate"]["problems"], _HELD_OUT)
    return Recipe.model_validate(whole)


def up_to(source: TaskData | FileData, most: int) -> TaskData | FileData:
    """The first rows of a file; of tasks fewer problems each."""
    if isinstance(source, FileData):
        return source.model_copy(update={"limit": min(source.limit or most, most)})
    whole = sum(t.size for t in source.tasks)
    if whole <= most:
        return source
    tasks = [t.model_copy(update={"size": max(1, t.size * most // whole)}) for t in source.tasks]
    return source.model_copy(update={"tasks": tasks})


def by_programs(source: TaskData | FileData) -> bool:
    """Whether a program is run for each answer that is judged."""
    verifier = getattr(source, "verifier", None) or ""
    return verifier == "code" or is_own(verifier)


def _fewer(task: dict[str, Any], most: int) -> dict[str, Any]:
    """A task of at most so many problems."""
    return task | {"size": min(task["size"], most)}
