"""A recipe, tried in seconds before it runs: how long its rows are, and what its own steps take on this machine.

    python -m pennyweight.rehearsal < recipes.json

It has the run's own code at work: some of its data, a few steps of each training, a few rows labelled, scored and
written. A model that the recipe will only make is stood in for by one of the same shape with random weights, and what
would hang on what it writes is not told of it. Nobody's server is asked, and what is written goes away with the folder.

Recipes of a chain come in the order of their stages, with folders of earlier ones as their models.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pennyweight.report.draw  # noqa: F401  whose libraries are in the memory of a run's process
from pennyweight.bench import Bench
from pennyweight.data.lengths import lengths
from pennyweight.errors import PennyweightError
from pennyweight.fewer import some_of
from pennyweight.meter.counters import Counters
from pennyweight.methods import METHODS
from pennyweight.model.device import gpu_of
from pennyweight.recipe import EndpointTeacher, Recipe, SeveralTeachers, TrainedTeacher
from pennyweight.settings import TEXT_ONLY
from pennyweight.timing import Timing


def rehearse(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """What was seen of one recipe: ``rows`` (how long, and how many where all were read), ``timed`` by what was done,
    ``bytes_per_token`` of targets by a teacher that is there already, ``watts`` where a counter tells, ``vocabulary``;
    empty where a server teaches.

    Args:
        folder: gets models that stand in for those that the run would make: ``teacher`` and ``student``.
    """
    if isinstance(recipe.teacher, EndpointTeacher | SeveralTeachers):
        return {}
    made = isinstance(recipe.teacher, TrainedTeacher) or _stands_in(recipe.teacher.path)
    some = some_of(recipe, made)
    bench = Bench(some, folder)
    by, gpu = Timing(bench), gpu_of(bench.compute.device)
    counters, began = Counters([gpu] if gpu else []), time.perf_counter()
    if isinstance(some.teacher, TrainedTeacher):
        by.teacher(some.teacher, recipe.data.eval_fraction)
        _mark(folder / "teacher")
    if not made:
        by.meet(bench.teacher)
    kept = by.data(writes=not made)
    student = by.start()
    _mark(folder / "student")
    by.meet(student)
    told = by.targets() if recipe.method.kind not in TEXT_ONLY and recipe.targets.kind != "dense" else None
    for arm in dict.fromkeys(["sft", recipe.method.kind] if recipe.control else [recipe.method.kind]):
        by.arm(arm)
    by.scored(student)
    asked = recipe.evaluate.problems if bench.held_out.problems else 0
    rolls = METHODS[recipe.method.kind].rolls
    at_once = recipe.train.batch * getattr(recipe.method, "updates", 1) if rolls else 0
    limit = recipe.evaluate.max_tokens if asked else 1
    if asked or rolls:
        longest = getattr(recipe.method, "max_tokens", 1) if rolls else 1
        by.written("student", student, max(asked, at_once), max(limit, longest))
    responses = recipe.data.responses
    if made if responses.by == "teacher" else asked:  # one at hand wrote the data
        longest = responses.max_tokens if responses.by == "teacher" else 1
        by.written("teacher", bench.teacher, asked, max(limit, longest))
    rows = by.counted(recipe.data) or lengths(bench.encoded, recipe.train) | {"kept": kept}
    joules = counters.joules().get("cpu" if gpu is None else "gpu")
    return {
        "rows": rows,
        "timed": by.timed,
        "bytes_per_token": None if made else told,
        "watts": joules and joules / (time.perf_counter() - began),
        "vocabulary": len(bench.language.tokenizer),
    }


_MARK = ".stands-in"


def _mark(folder: Path) -> None:
    (folder / _MARK).touch()


def _stands_in(path: str) -> bool:
    return (Path(path) / _MARK).exists()


def main() -> None:
    """Recipes by stage on stdin; what was seen of each, or a refusal, on stdout. They name earlier ones' folders under
    ``place``, which is this process's own."""
    asked = json.load(sys.stdin)
    place = Path(asked["place"])
    try:
        seen = {}
        for stage, settings in asked["recipes"].items():
            (place / stage).mkdir(parents=True, exist_ok=True)
            seen[stage] = rehearse(Recipe.model_validate(settings), place / stage)
        reply: dict[str, Any] = {"seen": seen}
    except PennyweightError as e:
        reply = {"refused": str(e)}
    sys.stdout.write(json.dumps(reply))


if __name__ == "__main__":
    main()
