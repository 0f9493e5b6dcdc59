"""Recipes in and out of text: TOML files, ``a.b=c`` settings on top, and what is wrong with them in one sentence."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from pennyweight.errors import DataError, RecipeError
from pennyweight.recipe import DEFAULT_KINDS, Recipe
from pennyweight.settings import Budget, Settings


def shipped(name: str) -> Path:
    """Path of a recipe that comes with the package, by file name without ``.toml``.

    Raises:
        RecipeError: there is none of that name.
    """
    here = Path(__file__).resolve().parent
    for folder in (here / "recipes", here.parent / "recipes"):
        if (folder / f"{name}.toml").is_file():
            return folder / f"{name}.toml"
    raise RecipeError(f"no recipe named {name!r} comes with Pennyweight; give the path of a .toml file")


def shipped_names() -> list[str]:
    """Names of the recipes, and chains, that come with the package."""
    return sorted(p.stem for p in shipped("quickstart").parent.glob("*.toml"))


def load(path: Path | str | None, overrides: list[str] | None = None) -> Recipe:
    """The recipe at ``path`` (the quickstart when None), with ``a.b=c`` overrides on top.

    Raises:
        RecipeError: the file is missing or malformed, a key is unknown, or a value does not fit.
    """
    file = shipped("quickstart") if path is None else Path(path)
    table = read_table(file)
    for item in overrides or []:
        override(table, item)
    return parse(table, str(file))


def read_table(file: Path) -> dict[str, Any]:
    """What a TOML file holds; a name such as ``r1`` that no file has is that of a recipe that ships.

    Raises:
        RecipeError: it is missing or malformed.
    """
    if str(file) in shipped_names() and not file.exists():
        file = shipped(str(file))
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(shipped_names())
        raise RecipeError(f"no recipe at {file}; give the path of a .toml file (shipped ones: {known})") from None
    except (OSError, UnicodeDecodeError) as e:
        raise RecipeError(f"cannot read the recipe {file}: {e}; check the path and its permissions") from None
    except tomllib.TOMLDecodeError as e:
        raise RecipeError(f"{file} is not valid TOML: {e}; correct that line") from None


def parse(table: dict[str, Any], origin: str = "recipe") -> Recipe:
    """A recipe from a plain table; ``origin``, where there is one, is named in messages."""
    try:
        return Recipe.model_validate(table)
    except ValidationError as e:
        raise RecipeError(f"{origin}: {_explain(e)}" if origin else _explain(e)) from None


class _Whole(Settings):
    """What a chain says of all its stages together."""

    budget: Budget


def parse_budget(table: Any, origin: str) -> Budget:
    """The budget of a chain from a plain table; ``origin`` is named in messages."""
    try:
        return _Whole.model_validate({"budget": table}).budget
    except ValidationError as e:
        raise RecipeError(f"{origin}: {_explain(e)}") from None


def distillation(
    *,
    teacher: str,
    teacher_model: str | None = None,
    data: str | None = None,
    student: str | None = None,
    cut: str | None = None,
    method: str = "kd",
    steps: int = 300,
    batch: int = 16,
    lr: float = 1e-3,
    seeds: int = 3,
    settings: list[str] | None = None,
    trust_remote_code: bool = False,
) -> Recipe:
    """The recipe behind ``pennyweight distill``.

    Raises:
        RecipeError: both or neither of ``student`` and ``cut``, or a setting that cannot be read.
    """
    is_endpoint = teacher.lower().startswith(("http://", "https://"))
    if teacher_model is not None and not is_endpoint:
        raise RecipeError("--teacher-model names a model of a server; give its address with --teacher, or leave it out")
    if data == "":
        raise RecipeError(
            "--data is empty; give a file, a folder or a hub name, or leave it out for the teacher's samples"
        )
    if (student is None) == (cut is None):
        raise RecipeError(
            "say which student: --student FOLDER, or --cut layers=N to cut one from the teacher; not both"
        )
    called = (teacher_model or "endpoint") if is_endpoint else teacher  # an address that is refused may hold a password
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(called.rstrip("/")).name).strip("-.") or "teacher"
    table: dict[str, Any] = {
        "name": f"distill-{name}"[:100],
        "seeds": list(range(seeds)),
        "teacher": {"kind": "endpoint", "url": teacher, "model": teacher_model}
        if is_endpoint
        else {"kind": "folder", "path": teacher, "trust_remote_code": trust_remote_code},
        "data": {"source": {"kind": "files", "path": data} if data is not None else {"kind": "teacher_samples"}},
        "student": {"kind": "folder", "path": student, "trust_remote_code": trust_remote_code}
        if student is not None
        else {"kind": "cut"},
        "method": {"kind": method},
        "train": {"steps": steps, "batch": batch, "lr": lr},
    }
    for pair in parted(cut or ""):
        if "=" not in pair:
            raise RecipeError(f"--cut {cut} cannot be read; write it as layers=N[,hidden=N][,intermediate=N]")
        override(table, f"student.{pair}")
    for item in settings or []:
        override(table, item)
    return parse(table, "")


def parted(text: str) -> list[str]:
    """``a=1,b=[2,3]`` at its commas, those inside brackets left alone."""
    return [p for p in re.split(r",(?![^\[]*\])", text) if p.strip()]


def task_of(text: str) -> tuple[str, dict[str, Any]]:
    """``name:a=1,b=2`` -> name and settings of a reasoning-gym task.

    Raises:
        DataError: a setting cannot be read.
    """
    name, _, rest = text.partition(":")
    settings: dict[str, Any] = {}
    for pair in parted(rest):
        key, equals, value = pair.partition("=")
        if not equals:
            raise DataError(f"cannot read the task setting {pair!r} of {text!r}; write it as name:setting=value")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
    return name, settings


def override(table: dict[str, Any], item: str) -> None:
    """Set ``a.b=c`` in ``table``; the value is read as TOML, else taken as text. A new ``kind`` drops its siblings.

    Raises:
        RecipeError: it cannot be read, or is below what is no table.
    """
    path, equals, text = item.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"cannot read the setting {item!r}; write it as a.b=value, for example train.steps=500")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    for key in keys[:-1]:
        inner = table.setdefault(key, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"cannot set {path}: {key} is a value, not a table; set {key} itself")
        table = inner
    if keys[-1] == "kind" and table.get("kind", DEFAULT_KINDS.get(keys[-2] if keys[1:] else "")) != value:
        table.clear()
    table[keys[-1]] = value


def _explain(error: ValidationError) -> str:
    """The first thing wrong, in one sentence that ends with what to do."""
    first = error.errors()[0]
    where = [str(p) for p in first["loc"]]
    if first["type"] == "extra_forbidden":
        known = _fields_at(where[:-1])
        near = difflib.get_close_matches(where[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {'.'.join(_plain(where))!r}; {hint}"
    name = ".".join(_plain(where)) or "the recipe"
    if first["type"] == "missing":
        return f"{name} is missing; add it"
    if first["type"] == "model_type":
        return f"{name} is a table of settings, not one value; set those you want ({', '.join(_fields_at(where))})"
    message = first["msg"].removeprefix("Value error, ")
    secret = where[-1:] in (["url"], ["key_env"])  # which may hold a key that was put in the wrong place
    got = "" if secret or isinstance(first["input"], dict | BaseModel) else f" (got {first['input']!r})"
    return f"{name}: {message}{got}; correct that value"


def _plain(where: list[str]) -> list[str]:
    """A location without the union tags that pydantic puts after a tagged field."""
    tagged = {"teacher", "student", "method", "targets", "source"}
    is_tag = lambda i: where[i - 1] in tagged or where[max(0, i - 2)] == "members"  # noqa: E731
    return [p for i, p in enumerate(where) if not (i and p in _TAGS and is_tag(i))]


def _fields_at(where: list[str]) -> list[str]:
    """Names of the settings allowed at a location, for the suggestion."""
    models: list[Any] = [Recipe]
    for part in where:
        tagged = [m for m in models if len(models) > 1 and _tag_of(m) == part]  # before a field: a student has shapes
        inner = [x for m in models if part in m.model_fields for x in _models_in(m.model_fields[part].annotation)]
        models = tagged or inner or models
    return sorted({name for model in models for name in model.model_fields})


def _tag_of(model: Any) -> str | None:
    """The ``kind`` of a variant of a tagged union."""
    return model.model_fields["kind"].default if "kind" in model.model_fields else None


def _models_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is None:
        return []
    return [m for a in get_args(annotation) for m in _models_in(a)]


def _tags(model: Any) -> set[str]:
    """The kinds of all variants below a model."""
    below = [x for field in model.model_fields.values() for x in _models_in(field.annotation)]
    own = _tag_of(model)
    return {tag for x in below for tag in _tags(x)} | ({own} if own else set())


_TAGS = _tags(Recipe)
"""What pydantic puts into a location after a tagged field, and nobody has written there."""
