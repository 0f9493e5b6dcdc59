"""Plain values as JSON and back: what crosses between a program that is not trusted and its tests.

What is read is built anew from numbers, texts and containers, so no code of the sender's comes along.
Standard library only.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

LONGEST = 1_000_000
"""Bytes of one line, and items of an iterator."""

STOPPED = "the program stopped before it answered"

_CONTAINERS: dict[str, type] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def encode(value: Any, other: Callable[[Any], Any]) -> Any:
    """``value`` as JSON: atoms as they are, containers tagged; ``other`` says what is written for anything else.

    Subclasses of plain types go as the plain type, iterators as the list of what is left in them.
    """
    if value is None or isinstance(value, bool):
        return value
    for atom in (int, float, str):
        if isinstance(value, atom):
            return atom(value)
    if isinstance(value, bytes | bytearray):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, dict):
        return {"dict": [[encode(k, other), encode(v, other)] for k, v in value.items()]}
    for name, kind in _CONTAINERS.items():
        if isinstance(value, kind):
            return {name: [encode(v, other) for v in value]}
    if isinstance(value, Iterator):
        return {"iterator": [encode(v, other) for v in itertools.islice(value, LONGEST)]}
    return other(value)


def decode(value: Any, other: Callable[[Any], Any]) -> Any:
    """What ``encode`` wrote; ``other`` is given what stands in ``{"object": ...}``.

    Raises:
        ValueError, TypeError, AttributeError: it is not of that form.
    """
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise ValueError("a bare list")
        return value
    ((name, inside),) = value.items()
    if name in _CONTAINERS:
        return _CONTAINERS[name](decode(v, other) for v in inside)
    if name == "dict":
        return {decode(k, other): decode(v, other) for k, v in inside}
    if name == "iterator":
        return iter([decode(v, other) for v in inside])
    if name == "bytes":
        return bytes.fromhex(inside)
    if name == "complex":
        return complex(*inside)
    if name == "object":
        return other(inside)
    raise ValueError(f"no kind of value is named {str(name)[:40]!r}")


def line(message: dict[str, Any]) -> bytes:
    """One message as one line."""
    return json.dumps(message).encode() + b"\n"
