"""Numbers for the terminal: a run's summary as a table, single findings as lines."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from pennyweight.records import METRICS
from pennyweight.report.page import against_control, headline
from pennyweight.report.view import view

_HEADINGS = {
    "accuracy": "accuracy",
    "kl_to_teacher": "teacher KL",
    "agreement": "agreement",
    "bits_per_byte": "bits/byte",
}


def number(name: str, value: float | None) -> str:
    """A metric's value in its unit: percent with one decimal, nats and bits with three."""
    if value is None or value != value:
        return "-"
    return f"{100 * value:.1f} %" if METRICS[name].unit == "percent" else f"{value:.3f}"


def bounds(name: str, row: dict[str, Any]) -> str:
    """``84.1–89.5``; empty where they are not known, or are the value itself."""
    if row["low"] is None or row["high"] is None or row["low"] == row["high"]:
        return ""
    low, high = (number(name, row[k]).removesuffix(" %") for k in ("low", "high"))
    return f"{low}–{high}"


def interval(name: str, row: dict[str, Any]) -> str:
    """``87.0 % (84.1–89.5)``."""
    between = bounds(name, row)
    return f"{number(name, row['mean'])} ({between})" if between else number(name, row["mean"])


def size(n: int) -> str:
    """Bytes in kB, MB or GB."""
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= one:
            return f"{n / one:,.1f} {unit}"
    return f"{n} B"


def print_summary(summary: dict[str, Any]) -> None:
    """What was made in a sentence, then teacher, arms and low-bit copies side by side with their intervals."""
    console = Console(width=None, soft_wrap=True, highlight=False)
    if summary.get("unfinished"):
        console.print(
            f"{summary['recipe']['name']}: unfinished; stages so far: {', '.join(summary['stages']) or 'none'}"
        )
        return
    seen = view(summary)
    console.print(*filter(None, (headline(seen), against_control(seen))), sep="\n")
    console.print(_table(summary))
    t = summary["targets"]
    if t["bytes"]:
        console.print(f"teacher's targets: {t['tokens']:,} tokens at {t['bytes_per_token']:.1f} bytes each")


def _table(summary: dict[str, Any]) -> Table:
    """Every model in two lines: its values, and below them the intervals; fits 80 columns."""
    models = {"teacher": summary["teacher"], **summary["arms"], **summary["quantized"]}
    names = [n for n in _HEADINGS if any(n in m["metrics"] for m in models.values())]
    seeds = len(summary["seeds"])
    title = f"{summary['name']}: {seeds} seed{'s' if seeds > 1 else ''}, 95 % intervals below each value"
    table = Table(title=title, title_justify="left", title_style="", box=None, pad_edge=False)
    table.add_column("model", no_wrap=True)
    for heading in ("parameters", "weights", *(_HEADINGS[n] for n in names)):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, m in models.items():
        rows = [m["metrics"].get(n) for n in names]
        values = [number(n, r["mean"]) if r else "-" for n, r in zip(names, rows, strict=True)]
        table.add_row(name, f"{m['params']:,}", size(m["bytes"]), *values)
        table.add_row("", "", "", *(bounds(n, r) if r else "" for n, r in zip(names, rows, strict=True)))
    return table


def print_values(found: dict[str, Any], indent: str = "") -> None:
    """One line a value; an interval on one line."""
    for key, value in found.items():
        if isinstance(value, dict) and {"mean", "low", "high"} <= set(value):
            known = key if key in METRICS else ("kl_parent" if key.startswith("kl") else "bits_per_byte")
            print(f"{indent}{key}: {interval(known, value)}  [{value.get('how', '')}]")
        elif isinstance(value, dict):
            print(f"{indent}{key}:")
            print_values(value, indent + "  ")
        else:
            print(f"{indent}{key}: {value:,}" if isinstance(value, int) else f"{indent}{key}: {value}")
