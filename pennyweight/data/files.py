"""Paths -> rows: JSONL, JSON, CSV, TSV, Parquet and text files, folders of them, saved and hub datasets.

Each row comes with the place it stands at (file and line), for messages. Files are read as the rows are asked for.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pennyweight.errors import DataError

Row = tuple[str, Any]
"""(place, row): ``train.jsonl line 3`` and what stands there, normally a dict"""

_SPLITS = {"train": "train", "test": "test", "validation": "validation"}
_SPLITS |= {"valid": "validation", "val": "validation", "dev": "validation", "training": "train", "testing": "test"}
_NOT_DATA = re.compile(r"\.|(readme|licen[cs]e|notice)\b|dataset_infos?\.json$|state\.json$", re.IGNORECASE)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


def rows(path: str, split: str) -> Iterator[Row]:
    """Rows of a file, of a folder (its files of that split, where their names say so), or of a hub dataset.

    A hub dataset is ``org/name``, or ``org/name:config``.

    Raises:
        DataError: nothing is there, or it cannot be read.
    """
    place = Path(path).expanduser()
    try:
        if place.is_dir():
            yield from _folder_rows(place, split)
        elif place.exists():
            yield from _file_rows(place, place.name)
        elif is_hub_name(path):
            yield from _hub_rows(path, split)
        else:
            raise DataError(f"there is no file or folder {path}; check data.source.path")
    except OSError as e:
        raise DataError(
            f"cannot read {e.filename or path}: {e.strerror or e}; check the path and its permissions"
        ) from None


def is_hub_name(path: str) -> bool:
    """Whether a path that is not here is taken to be a hub dataset's name."""
    return bool(_HUB_NAME.fullmatch(path)) and Path(path).suffix.lower() not in _READERS


def read_text(path: Path, shown: str) -> str:
    """A UTF-8 text file, a byte-order mark left out, line ends as ``\\n``.

    Raises:
        DataError: it cannot be read, or is not UTF-8; ``shown`` is its name in the message.
    """
    try:
        return _utf8(path.read_bytes(), shown).removeprefix("\ufeff").replace("\r\n", "\n")
    except OSError as e:
        raise DataError(f"cannot read {shown}: {e.strerror or e}; check the path and its permissions") from None


def documents(text: str, by_paragraph: bool) -> list[str]:
    """The documents of a text: between lines of ``<|endoftext|>``; without such lines its paragraphs, or all of it."""
    parts = re.split(r"^[ \t]*<\|endoftext\|>[ \t]*$", text, flags=re.MULTILINE)
    if len(parts) == 1 and by_paragraph:
        parts = re.split(r"\n[ \t]*\n", text)
    return [p.strip() for p in parts if p.strip()]


def _utf8(data: bytes, shown: str, line: int = 1) -> str:
    """``data`` decoded; ``line`` is the number of its first line."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        at = line + data.count(b"\n", 0, e.start)
        raise DataError(f"{shown} line {at} is not valid UTF-8 (byte {data[e.start]:#04x}); save it as UTF-8") from None


def _file_rows(path: Path, shown: str) -> Iterator[Row]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(_READERS)
        raise DataError(
            f"cannot read {shown}: its kind {path.suffix or '(no suffix)'} is unknown; convert it to {known}"
        )
    return reader(path, shown)


def _folder_rows(folder: Path, split: str) -> Iterator[Row]:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        yield from _saved_rows(folder, split)
        return
    files = [
        f
        for f in sorted(folder.rglob("*"))
        if f.is_file() and not any(_NOT_DATA.match(p) for p in f.relative_to(folder).parts)
    ]
    readable = [f for f in files if f.suffix.lower() in _READERS]
    if not readable:
        there = ", ".join(sorted({f.suffix or f.name for f in files})) or "nothing"
        raise DataError(
            f"folder {folder.name} has no data file (it holds {there}); put {', '.join(_READERS)} files there"
        )
    by_split = {f: _split_of(f.relative_to(folder)) for f in readable}
    named = sorted({s for s in by_split.values() if s})
    wanted = _SPLITS.get(split, split)
    if named:
        readable = [f for f, s in by_split.items() if s == wanted]
    if not readable:
        raise DataError(f"folder {folder.name} has no split {split!r}, only {', '.join(named)}; set data.source.split")
    for file in readable:
        yield from _file_rows(file, file.relative_to(folder).as_posix())


def _split_of(path: Path) -> str | None:
    """The split that a file's name, or else its folders, speak of."""
    for part in (path.stem, *reversed(path.parts[:-1])):
        for word in re.split(r"[-_. ]", part.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return None


def _jsonl(path: Path, shown: str) -> Iterator[Row]:
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            text = _utf8(line, shown, number).removeprefix("\ufeff")
            if text.strip():
                yield f"{shown} line {number}", _json_value(text, f"{shown} line {number}")


def _json_value(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        at = f"column {e.colno}" if e.lineno == 1 else f"line {e.lineno} column {e.colno}"
        raise DataError(f"{where} is not valid JSON ({e.msg} at {at}); correct or delete it") from None
    except (ValueError, RecursionError) as e:
        raise DataError(f"{where} cannot be read as JSON ({e}); correct or delete it") from None


def _json(path: Path, shown: str) -> Iterator[Row]:
    text = read_text(path, shown)
    value = _json_value(text, shown) if text.strip() else []
    if not isinstance(value, list):
        raise DataError(f"{shown} holds one {_kind(value)}, not a list of rows; put it in [ ], or save it as .jsonl")
    for number, row in enumerate(value, 1):
        yield f"{shown} row {number}", row


def _kind(value: Any) -> str:
    return {dict: "object", list: "list", str: "text"}.get(type(value), type(value).__name__)


def _separated(separator: str) -> Callable[[Path, str], Iterator[Row]]:
    """A reader of CSV (comma) or TSV (tab) with a header."""

    def read(path: Path, shown: str) -> Iterator[Row]:
        lines = iter(csv.reader(io.StringIO(read_text(path, shown), newline=""), delimiter=separator))
        number = 0
        try:
            header = next(lines, [])
            if len(set(header)) != len(header):
                twice = next(h for h in header if header.count(h) > 1)
                raise DataError(f"{shown} has two columns named {twice!r}; rename one in its first line")
            for cells in lines:
                if not cells:
                    continue
                number += 1
                if len(cells) != len(header):
                    raise DataError(
                        f"{shown} row {number} has {len(cells)} cells, its header {len(header)}; put quotes around "
                        "cells that hold the separator"
                    )
                yield f"{shown} row {number}", dict(zip(header, cells, strict=True))
        except csv.Error as e:
            raise DataError(f"{shown} row {number + 1} cannot be read ({e}); correct it, or save as .jsonl") from None

    return read


def _parquet(path: Path, shown: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{shown} row {number}", row
    except (pyarrow.ArrowException, UnicodeDecodeError) as e:
        reason = str(e).strip().split("\n")[0]
        raise DataError(
            f"{shown} cannot be read as Parquet after row {number} ({reason}); write the file again"
        ) from None


def _text(path: Path, shown: str) -> Iterator[Row]:
    for number, document in enumerate(documents(read_text(path, shown), by_paragraph=True), 1):
        yield f"{shown} text {number}", {"text": document}


def _saved_rows(folder: Path, split: str) -> Iterator[Row]:
    from datasets import DatasetDict, load_from_disk

    try:
        data = load_from_disk(str(folder))
    except Exception as e:
        raise DataError(
            f"folder {folder.name} cannot be read as a saved dataset ({_first_line(e)}); save it again"
        ) from None
    if isinstance(data, DatasetDict):
        if split not in data:
            known = ", ".join(map(str, data))
            raise DataError(f"dataset {folder.name} has no split {split!r}, only {known}; set data.source.split")
        data = data[split]
    for number, row in enumerate(data, 1):
        yield f"{folder.name} row {number}", row


def _hub_rows(name: str, split: str) -> Iterator[Row]:
    from datasets import load_dataset

    repository, _, config = name.partition(":")
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the hub client counts its tries aloud
    try:
        data = load_dataset(repository, config or None, split=split)
    except Exception as e:
        raise DataError(
            f"{name} is no file or folder here, and its split {split!r} cannot be had from the hub ({_first_line(e)}); "
            "check data.source.path and the network, or download it and give the folder"
        ) from None
    finally:
        logging.disable(before)
    for number, row in enumerate(data, 1):
        yield f"{name} row {number}", row


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0][:200]


_READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
    ".txt": _text,
    ".md": _text,
}
