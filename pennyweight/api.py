"""The line from Python: what ``pennyweight.run`` and ``pennyweight.distill`` are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pennyweight.chain import go
from pennyweight.chain_file import load
from pennyweight.recipe_file import distillation
from pennyweight.stages import run_line


def run(
    recipe: str | Path | None = None,
    settings: list[str] | None = None,
    out: str | Path | None = None,
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """Run a recipe (the quickstart when None) with ``a.b=c`` settings on top; what summary.json holds.

    Of a chain of runs, ``only`` names the stages to run (all when there is none), and settings begin with a stage's
    name, or with ``defaults`` for all stages.

    Raises:
        PennyweightError: what is asked for cannot be read, cannot be done, or was stopped.
    """
    plan = load(recipe, settings)
    return go(plan, Path(out) if out else Path("runs") / plan.name, run_line, only)


def distill(teacher: str, out: str | Path | None = None, **options: Any) -> dict[str, Any]:
    """Distil with no recipe to write: options as ``recipe.distillation`` takes them; what summary.json holds."""
    resolved = distillation(teacher=teacher, **options)
    return run_line(resolved, Path(out) if out else Path("runs") / resolved.name)
