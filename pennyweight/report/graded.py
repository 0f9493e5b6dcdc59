"""What grading a file gave, for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len

_WIDEST = {"answer": 40, "gold": 30, "reason": 90}


def print_graded(found: dict[str, Any]) -> None:
    """Counts with their interval, reasons, agreement with labels as a table of two by two, and answers to look at."""
    accuracy = _share(found["accuracy"])
    print(f"{found['verifier']}: {found['correct']:,} of {found['answers']:,} correct, {accuracy}")
    if found["reasons"]:
        print("", *aligned([("why not", "answers"), *((r, f"{n:,}") for r, n in found["reasons"].items())]), sep="\n")
    labels = found.get("labels")
    if labels is None:
        _list("wrong", found["wrong"])
        return
    print(f"\nlabels: {labels['agree']:,} of {found['answers']:,} agree, {_share(labels['agreement'])}")
    cells = [(name.replace("_", " "), *(f"{n:,}" for n in row.values())) for name, row in labels["table"].items()]
    print(*aligned([("", "verdict right", "verdict wrong"), *cells]), sep="\n")
    _list("disagreements", labels["disagreements"])


def aligned(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Rows as lines of columns two spaces apart; those numbered in ``left`` to the left, the others to the right."""
    widths = [max(cell_len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        gaps = [" " * (w - cell_len(cell)) for cell, w in zip(row, widths, strict=True)]
        cells = (c + gap if i in left else gap + c for i, (c, gap) in enumerate(zip(row, gaps, strict=True)))
        lines.append("  ".join(cells).rstrip())
    return lines


def paragraph(text: str, width: int, first: str = "", others: str = "  ") -> str:
    """A text in lines of at most ``width`` columns, of which a Korean syllable takes two."""
    if cell_len(text) == len(text):
        return textwrap.fill(text, width, initial_indent=first, subsequent_indent=others)
    lines, begun = [first], False
    for word in text.split():
        if begun and cell_len(lines[-1]) + 1 + cell_len(word) > width:
            lines.append(others)
            begun = False
        lines[-1] += f" {word}" if begun else word
        begun = True
    return "\n".join(lines)


def _list(title: str, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    shown = (n for n in rows[0] if any(row[n] not in (None, "") for row in rows))
    names = [n for n in shown if n != "verdict" or "label" in rows[0]]
    lines = [[_cell(name, row[name]) for name in names] for row in rows]
    print(f"\n{title}", *aligned([names, *lines], left=range(1, len(names))), sep="\n")


def _cell(name: str, value: Any) -> str:
    """One line of printable characters, so that no answer moves the cursor or colours the terminal."""
    if isinstance(value, bool):
        return "right" if value else "wrong"
    text = "–" if value is None else "".join(c if c.isprintable() else " " for c in str(value))
    widest = _WIDEST.get(name, 20)
    return text if len(text) <= widest else f"{text[: widest - 1]}…"


def _share(interval: dict[str, Any]) -> str:
    return f"{100 * interval['mean']:.2f} % (95 % interval {100 * interval['low']:.2f}–{100 * interval['high']:.2f})"
