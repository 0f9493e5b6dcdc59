"""The hash chain: what a row's hash is made of, and which row of a chain is the first bad one. No SQL.

    hash = SHA-256(tag of the table || previous row's hash || canonical JSON of the row's content)

The content includes ``seq``, so a row cannot be moved. Nothing here is secret: whoever may write the file can also
compute a whole new chain, which only a head kept elsewhere (``summary.json`` holds one) gives away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pennyweight.records import canonical_json

GENESIS = bytes(32)
"""The hash before the first row."""

CONTENT: Mapping[str, Mapping[str, type]] = {
    "entries": {"seq": int, "kind": str, "body": str, "time": str},
    "records": {
        "seq": int,
        "sample": bytes,
        "prompt": bytes,
        "response": bytes,
        "split": str,
        "origin": int,
        "time": str,
    },
}
"""The hashed columns of each table, with the type that each must come back as."""


@dataclass(frozen=True, slots=True)
class Row:
    """One stored row: its table, the values of that table's ``CONTENT`` columns in order, and its two hashes."""

    table: str
    values: tuple[Any, ...]
    prev_hash: bytes
    hash: bytes

    @property
    def seq(self) -> int:
        return self.values[0]

    def __str__(self) -> str:
        return f"{self.table} row {self.seq}"


@dataclass(frozen=True, slots=True)
class Fault:
    """The first bad row: its number, and one clause that says what differs."""

    seq: int
    what: str


def link(table: str, values: Iterable[Any], prev_hash: bytes) -> bytes:
    """The hash (32 bytes) of a row with these content values, after a row with ``prev_hash``."""
    content = {
        name: value.hex() if isinstance(value, bytes) else value
        for name, value in zip(CONTENT[table], values, strict=True)
    }
    # surrogatepass: text that is not UTF-8 was put there by somebody else, and must hash to something, not raise.
    text = canonical_json(content).encode("utf-8", "surrogatepass")
    return hashlib.sha256(f"pennyweight/ledger/{table}/1\0".encode() + prev_hash + text).digest()


def walk(rows: Iterable[Row]) -> tuple[dict[str, int], Fault | None]:
    """Re-derive every hash in order: (good rows by table, the first fault or None). Stops at the fault.

    Args:
        rows: all rows of both tables, sorted by ``seq``.
    """
    checked = dict.fromkeys(CONTENT, 0)
    before: Row | None = None
    for row, after in _with_next(rows):
        fault = _fault(row, before, after)
        if fault is not None:
            return checked, fault
        checked[row.table] += 1
        before = row
    return checked, None


def _with_next(rows: Iterable[Row]) -> Iterator[tuple[Row, Row | None]]:
    iterator = iter(rows)
    row = next(iterator, None)
    while row is not None:
        after = next(iterator, None)
        yield row, after
        row = after


def _fault(row: Row, before: Row | None, after: Row | None) -> Fault | None:
    """What is wrong with ``row``, given that everything up to ``before`` holds together."""
    expected = before.seq + 1 if before else 1
    prev_hash = before.hash if before else GENESIS
    if row.seq > expected:
        return Fault(expected, f"row {expected} is missing; the next one is {row}")
    if row.seq < expected:
        return Fault(row.seq, f"{row} was inserted: its number is not the next one, {expected}")
    wrong = _wrong_type(row)
    if wrong:
        return Fault(row.seq, f"{row}: its {wrong} holds another type of value than was written")
    if row.prev_hash != prev_hash:
        return _broken_link(row, before, after, prev_hash)
    derived = link(row.table, row.values, row.prev_hash)
    if derived == row.hash:
        return None
    if after is not None and after.prev_hash == derived:
        return Fault(row.seq, f"{row}: its hash was edited; the row after it still holds the right one")
    return Fault(row.seq, f"{row}: its content ({', '.join(CONTENT[row.table])}) does not give its hash")


def _broken_link(row: Row, before: Row | None, after: Row | None, prev_hash: bytes) -> Fault:
    """Which of two neighbours is to blame when the later one's prev_hash is not the earlier one's hash."""
    if link(row.table, row.values, prev_hash) == row.hash:
        return Fault(row.seq, f"{row}: its prev_hash was edited; all else in it agrees with the row before it")
    if link(row.table, row.values, row.prev_hash) != row.hash:
        return Fault(row.seq, f"{row}: neither its content nor its prev_hash agrees with its hash and the row before")
    if before is not None and after is not None and after.prev_hash == row.hash:
        return Fault(before.seq, f"{before} was replaced; the rows after it follow another one")
    return Fault(row.seq, f"{row} does not follow the row before it; one of the two was replaced")


def _wrong_type(row: Row) -> str | None:
    """Name of the first column whose value has another type than is ever written there."""
    # SQLite lets any column hold any type, and a blob's hex as text would otherwise hash like the blob itself.
    kinds = {**CONTENT[row.table], "prev_hash": bytes, "hash": bytes}
    values = (*row.values, row.prev_hash, row.hash)
    return next((name for (name, kind), v in zip(kinds.items(), values, strict=True) if type(v) is not kind), None)
