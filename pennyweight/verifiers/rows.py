"""What the rows of a file give a verifier beside the gold answer, by the usual names of the columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pennyweight.errors import DataError

COLUMNS: dict[str, dict[str, tuple[str, ...]]] = {
    "choice": {"choices": ("choices", "options")},
    "code": {"tests": ("tests", "test", "test_list"), "entry_point": ("entry_point",), "seconds": ("seconds",)},
}
"""Verifier -> part of its entry -> names of the columns that hold it; the first that a row has something under."""

NEEDS = {"code": "tests", "reasoning_gym": "the problem of reasoning-gym's that it came from"}
"""Verifiers that a gold answer is not enough for, and what it is that they need."""


def entry_of(row: Mapping[str, Any], verifier: str | None, where: str) -> dict[str, Any]:
    """What a row gives its verifier beside the gold answer: ``choices``, or ``tests`` with what belongs to them.

    Raises:
        DataError: it is of another form than the verifier takes, or what the verifier cannot do without is not there.
    """
    found = {}
    for part, names in COLUMNS.get(verifier or "", {}).items():
        column = next((n for n in names if row.get(n) is not None), None)
        if column is not None:
            value, (fits, form) = row[column], _FORMS[part]
            if fits(value):
                found[part] = value
            elif part != "choices":  # which a text may list for the model to read: then any letter goes
                raise DataError(f"{where}: {column} holds {repr(value)[:40]}, not {form}; correct it or drop the row")
        elif part == NEEDS.get(verifier or ""):
            there = ", ".join(map(str, row)) or "none"
            raise DataError(
                f"{where} has no {part} for the verifier {verifier} (its columns: {there}); give each row a column "
                f"{', '.join(names[:-1])} or {names[-1]}"
            )
    return found


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, str) for x in value)


_FORMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "choices": (lambda value: isinstance(value, list | dict) and bool(value), "a list, or an object of letters"),
    "tests": (lambda value: _is_text(value) or _are_texts(value), "Python as a text, or a list of its lines"),
    "entry_point": (_is_text, "the name of a function"),
    "seconds": (lambda value: type(value) is int and 1 <= value <= 600, "a whole number from 1 to 600"),
}
