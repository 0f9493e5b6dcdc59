"""Numbers for the terminal: a run's summary as a table, single findings as lines."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from pennyweight.records import METRICS


def number(name: str, value: float | None) -> str:
    """A metric's value in its unit: percent with one decimal, nats and bits with three."""
    if value is None or value != value:
        return "-"
    return f"{100 * value:.1f} %" if METRICS[name].unit == "percent" else f"{value:.3f}"


def interval(name: str, row: dict[str, Any] | None) -> str:
    """``87.0 % (84.1 to 89.5)``; the bounds are left out where they are the value itself."""
    if not row:
        return "-"
    value = number(name, row["mean"])
    if row["low"] is None or row["high"] is None or row["low"] == row["high"]:
        return value
    low, high = (number(name, row[k]).removesuffix(" %") for k in ("low", "high"))
    return f"{value} ({low} to {high})"


def size(n: int) -> str:
    """Bytes in kB, MB or GB."""
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= one:
            return f"{n / one:,.1f} {unit}"
    return f"{n} B"


def print_summary(summary: dict[str, Any]) -> None:
    """Teacher, arms and low-bit copies side by side, and what was recovered of the gap."""
    console = Console(width=None, soft_wrap=True)
    if summary.get("unfinished"):
        console.print(
            f"{summary['recipe']['name']}: unfinished; stages so far: {', '.join(summary['stages']) or 'none'}"
        )
        return
    models = {"teacher": summary["teacher"], **summary["arms"], **summary["quantized"]}
    shown = ("accuracy", "pass_at_k", "kl_to_teacher", "agreement", "bits_per_byte")
    names = [n for n in shown if any(n in m["metrics"] for m in models.values())]
    seeds = len(summary["seeds"])
    table = Table(
        title=f"{summary['name']}, {seeds} seed{'s' if seeds > 1 else ''}, 95 % intervals", box=None, pad_edge=False
    )
    for heading in ("model", "parameters", "weights", *(METRICS[n].label for n in names)):
        table.add_column(heading, justify="left" if heading == "model" else "right", overflow="fold")
    for name, m in models.items():
        table.add_row(name, f"{m['params']:,}", size(m["bytes"]), *(interval(n, m["metrics"].get(n)) for n in names))
    console.print(table)
    for name, gap in summary["gap_recovered"].items():
        if name in ("accuracy", "kl_to_teacher"):
            share = (
                "" if gap["mean"] is None else f", {100 * gap['mean']:.0f} % of the gap from sft to teacher recovered"
            )
            console.print(f"{METRICS[name].label}: {gap['verdict']}{share}")
    t = summary["targets"]
    if t["bytes"]:
        console.print(f"targets: {t['tokens']:,} tokens, {t['bytes_per_token']:.1f} bytes a token")


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
