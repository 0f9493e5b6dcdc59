"""What the first word of a plan names: a recipe, one that ships, or a model. No torch."""

from __future__ import annotations

from pathlib import Path

from pennyweight.errors import ModelError
from pennyweight.recipe_file import shipped_names


def is_recipe(named: str) -> bool:
    """Whether it is a recipe's file, or the name of one that ships and no file or folder of that name is here."""
    return named.lower().endswith(".toml") or (named in shipped_names() and not Path(named).exists())


def a_model(named: str) -> None:
    """Raise ModelError where ``named`` is nothing that a model's shapes could be read from."""
    place = Path(named).expanduser()
    if place.is_dir() and not (place / "config.json").exists():
        has = sorted(p.name for p in place.glob("*.toml"))
        more = f" (it has {', '.join(has[:4])})" if has else ""
        raise ModelError(
            f"the folder {named} holds no config.json{more}; give a model's folder, or a recipe's .toml file"
        )
    if not place.exists() and place.name == named:
        raise ModelError(
            f"there is no {named}; give a model's folder, the file of a recipe, or the name of one that ships "
            f"({', '.join(shipped_names())})"
        )
