"""Released models by name: shapes of what published figures are about, from ``models.toml`` beside this file."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path

from pennyweight.errors import RecipeError
from pennyweight.plan.architectures import shapes_of
from pennyweight.plan.shapes import Shapes


@cache
def models() -> dict[str, Shapes]:
    """Shapes of all of them."""
    said = tomllib.loads(Path(__file__).with_name("models.toml").read_text(encoding="utf-8"))
    return {name: shapes_of(row["config"], f"models.toml, {name}") for name, row in said.items()}


def model(name: str) -> Shapes:
    """The released model of that name.

    Raises:
        RecipeError: there is none.
    """
    if name not in models():
        raise RecipeError(f"no released model is called {name!r}; known are {', '.join(models())}; or write its config")
    return models()[name]
