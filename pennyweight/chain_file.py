"""Chains of runs in and out of text: one TOML of several recipes, of which a later one begins from what an earlier one
made. ``docs/chain.md`` has the form.
"""

from __future__ import annotations

import copy
import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pennyweight.errors import RecipeError
from pennyweight.recipe import DEFAULT_KINDS, Recipe
from pennyweight.recipe_file import load as load_recipe
from pennyweight.recipe_file import override, parse, parse_budget, read_table
from pennyweight.settings import Budget

_KEYS = ("name", "budget", "defaults", "stages")
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # without a dot, which parts the settings of the command line
_REFERENCE = re.compile(r"@([^/]*)/(.*)", re.DOTALL)
_PATHS = frozenset({"path", "tokenizer"})  # settings that are a path and nothing else


@dataclass(frozen=True)
class Chain:
    """Stages by name, in order: each the table of a recipe, references and all. ``origin`` is named in messages;
    ``budget`` is for all stages together."""

    name: str
    tables: dict[str, dict[str, Any]]
    origin: str = "chain"
    budget: Budget = field(default_factory=Budget)

    def needs(self, stage: str) -> dict[str, str]:
        """What a stage begins from: each reference (``@base/student``) with the stage that it is to, once."""
        found = (text for _, text in _strings(self.tables[stage]) if text.startswith("@"))
        return {text: m[1] for text in found if (m := _REFERENCE.fullmatch(text))}

    def recipes(self, out: Path) -> dict[str, Recipe]:
        """The stages as recipes, with ``@STAGE/...`` as paths below the chain's folder ``out``.

        Raises:
            RecipeError: a stage is no recipe.
        """
        made, place = {}, self.place(out)
        for stage, table in self.tables.items():
            resolved = _replaced(table, lambda text: _resolved(text, place))
            made[stage] = parse({"name": f"{self.name}-{stage}", **resolved}, f"{self.origin}: stages.{stage}")
        return made

    @staticmethod
    def place(out: Path) -> Path:
        """The chain's folder as its recipes name it: relative where that can be, so that a folder which is named in
        another way is the same to what depends on paths."""
        here = Path(os.path.relpath(out))
        return out if here.parts[:1] == ("..",) else here


def load(
    path: Path | str | None, settings: list[str] | None = None, everywhere: list[str] | None = None
) -> Recipe | Chain:
    """The recipe at ``path`` (the quickstart when None), or the chain, which is a file that has ``stages``.

    Args:
        settings: ``a.b=c`` on top; of a chain ``STAGE.a.b=c`` for one stage, or ``defaults.a.b=c`` for all of them,
            whatever they say themselves; or ``budget.a=c`` for all of them together.
        everywhere: ``a.b=c`` for the recipe, or for all stages.

    Raises:
        RecipeError: the file is missing or malformed, or something in it cannot be.
    """
    settings, everywhere = settings or [], everywhere or []
    if path is None or "stages" not in (table := read_table(Path(path))):
        return load_recipe(path, settings + everywhere)
    return chain_of(table, settings + [f"defaults.{item}" for item in everywhere], str(path))


def chain_of(table: dict[str, Any], settings: list[str], origin: str = "chain") -> Chain:
    """The chain in a plain table, with settings on top.

    Raises:
        RecipeError: an unknown key, no stages, a name that cannot be one, or a reference to what is not made before.
    """
    for key in table:
        if key not in _KEYS:
            raise RecipeError(f"{origin}: unknown key {key!r} beside the stages; {_near(key, _KEYS)}")
    defaults, stages = (_table(table.get(key, {}), key, origin) for key in ("defaults", "stages"))
    if not stages:
        raise RecipeError(f"{origin}: stages is empty; give at least one recipe as [stages.NAME]")
    for stage in stages:
        if not _PLAIN.fullmatch(stage) or stage in _KEYS:
            raise RecipeError(
                f"{origin}: {stage!r} cannot be the name of a stage; use letters, digits, - and _, and none of "
                f"{', '.join(_KEYS)}"
            )
    merged = {stage: _merged(defaults, _table(own, f"stages.{stage}", origin)) for stage, own in stages.items()}
    whole = _set(merged, {"name": table.get("name"), "budget": copy.deepcopy(table.get("budget", {}))}, settings)
    named = whole["name"]
    for stage, recipe in merged.items():
        if "name" in recipe:
            raise RecipeError(f"{origin}: stages.{stage} is named by its key; remove its name (or that in defaults)")
    if not isinstance(named, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", named):
        raise RecipeError(f"{origin}: name is {'missing' if named is None else 'not a plain name'}; give the chain one")
    chain = Chain(named, merged, origin, _budget(whole["budget"], origin))
    _check_references(chain)
    return chain


def _set(stages: dict[str, dict[str, Any]], whole: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """Settings of the command line put into the stages, those for all of them first; and into what is the chain's."""
    for everyone in (True, False):
        for item in settings:
            key, dot, rest = item.partition(".")
            if item.partition("=")[0].strip() == "name" or key == "budget":
                override(whole, item)
            elif not dot or "=" in key or key not in (*stages, "defaults"):
                raise RecipeError(
                    f"cannot tell the stage of the setting {item!r}; settings of a chain begin with a stage's name "
                    f"({', '.join(stages)}), or with defaults for all of them: defaults.{item}"
                )
            elif (key == "defaults") == everyone:
                for stage in stages if everyone else (key,):
                    override(stages[stage], rest)
    return whole


def _budget(table: Any, origin: str) -> Budget:
    budget = parse_budget(table, origin)
    if budget.usd_per_hour is not None:
        raise RecipeError(
            f"{origin}: budget.usd_per_hour is the price of a device, which each stage has; set it in defaults.budget"
        )
    return budget


def _check_references(chain: Chain) -> None:
    order = list(chain.tables)
    for stage in order:
        for key, text in _strings(chain.tables[stage]):
            if not text.startswith("@"):
                continue
            found, where = _REFERENCE.fullmatch(text), f"{chain.origin}: {text!r} in stages.{stage}"
            if found is None and key in _PATHS:
                raise RecipeError(f"{where} names no file; write it as @STAGE/PATH, for example @{order[0]}/student")
            if found is None:
                continue  # a column's name, say
            if found[1] not in order:
                raise RecipeError(f"{where} refers to no stage of this chain; {_near(found[1], order)}")
            if order.index(found[1]) >= order.index(stage):
                raise RecipeError(
                    f"{where} refers to {'itself' if found[1] == stage else 'a later stage'}; stages run in the order "
                    f"of the file, so put {found[1]} before it, or refer to an earlier one"
                )
            if ".." in PurePosixPath(found[2]).parts or not found[2].strip("/"):
                raise RecipeError(f"{where} is nothing inside that stage's folder; write it as @STAGE/PATH")


def _merged(below: dict[str, Any], own: dict[str, Any], key: str = "") -> dict[str, Any]:
    """``own`` on top of ``below``, table by table; one of another ``kind`` takes the place of what is below it."""
    kind = below.get("kind", DEFAULT_KINDS.get(key))
    if "kind" in own and kind is not None and own["kind"] != kind:
        return copy.deepcopy(own)
    out = copy.deepcopy(below)
    for name, value in own.items():
        both = isinstance(value, dict) and isinstance(out.get(name), dict)
        out[name] = _merged(out[name], value, name) if both else copy.deepcopy(value)
    return out


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a table, with the key that it is under."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _strings(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, key)


def _replaced(value: Any, by: Any) -> Any:
    """A table with every text in it as ``by`` gives it."""
    if isinstance(value, dict):
        return {k: _replaced(v, by) for k, v in value.items()}
    if isinstance(value, list):
        return [_replaced(v, by) for v in value]
    return by(value) if isinstance(value, str) else value


def _resolved(text: str, out: Path) -> str:
    found = _REFERENCE.fullmatch(text)
    return str(out / found[1] / found[2]) if found else text


def _table(value: Any, name: str, origin: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RecipeError(f"{origin}: {name} is a table of settings, not one value; write it as [{name}]")
    return value


def _near(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
