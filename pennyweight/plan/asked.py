"""What is asked of a plan, looked at before anything is reckoned: prices, lengths, data. No torch."""

from __future__ import annotations

import math
from pathlib import Path

from pennyweight.data.files import is_hub_name
from pennyweight.errors import DataError, RecipeError
from pennyweight.plan.hardware import PriceRange, own_price
from pennyweight.recipe import FileData, Recipe


def price_as_given(amount: float) -> PriceRange:
    """What ``--price`` says.

    Raises:
        RecipeError: it is no price.
    """
    if not 0 <= amount < math.inf:
        raise RecipeError(f"--price {amount:g} is no price; give what a device costs an hour, as in --price 2.50")
    return own_price(amount)


def length_within(length: int, most: int, whose: str) -> int:
    """What ``--length`` says.

    Raises:
        RecipeError: it is more than ``whose`` rows may have.
    """
    if length > most:
        raise RecipeError(f"--length {length:,} is more than the {most:,} tokens that {whose}; give less")
    return length


def looked_at(recipe: Recipe, length: int | None, made_in: Path) -> None:
    """Raise where the recipe's data is not there, or its samples cannot be that long on average.

    Args:
        made_in: the folder in which earlier stages of a chain make what a later one begins from.
    """
    if length is not None:
        length_within(length, recipe.data.context, f"a sample of {recipe.name} may have (data.context)")
    source = recipe.data.source
    if not isinstance(source, FileData) or Path(source.path).expanduser().exists() or is_hub_name(source.path):
        return
    if made_in not in Path(source.path).parents:
        raise DataError(f"there is no file or folder {source.path}; check data.source.path")
