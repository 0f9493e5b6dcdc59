"""The line from Python: what ``pennyweight.run`` and ``pennyweight.distill`` are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pennyweight.recipe_file import distillation, load
from pennyweight.stages import run_line


def run(
    recipe: str | Path | None = None, settings: list[str] | None = None, out: str | Path | None = None
) -> dict[str, Any]:
    """Run a recipe (the quickstart when None) with ``a.b=c`` settings on top; what summary.json holds."""
    resolved = load(recipe, settings)
    return run_line(resolved, Path(out) if out else Path("runs") / resolved.name)


def distill(teacher: str, out: str | Path | None = None, **options: Any) -> dict[str, Any]:
    """Distil with no recipe to write: options as ``recipe.distillation`` takes them; what summary.json holds."""
    resolved = distillation(teacher=teacher, **options)
    return run_line(resolved, Path(out) if out else Path("runs") / resolved.name)
