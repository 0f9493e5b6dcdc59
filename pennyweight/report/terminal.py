"""Numbers for the terminal: a run's summary as a table, single findings as lines."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from pennyweight.records import METRICS
from pennyweight.report.chain_page import chain_bill, chain_headline, columns, compared_on, finished, leading, to_be_run
from pennyweight.report.page import against_control, headline
from pennyweight.report.run_bill import bill_in_words
from pennyweight.report.view import view
from pennyweight.report.wording import MISSING, count, duration, measured, parameters, size, span

_HEADINGS = {
    "accuracy": "accuracy, %",
    "accuracy_harder": "harder, %",
    "kl_to_teacher": "teacher KL",
    "agreement": "agreement, %",
    "bits_per_byte": "bits/byte",
}

_LIKE = {"kl_to_teacher": "kl", "ece": "ece", "bits_per_byte": ""}
"""Metrics that lend their unit to values of other names, by how those begin."""


def interval(name: str, row: dict[str, Any]) -> str:
    """``87.0 % (84.1–89.5)``."""
    unit = METRICS[name].unit
    value = measured(unit, row["mean"]) + (" %" if unit == "percent" else "")
    between = span(unit, row)
    return f"{value} ({between})" if between else value


def print_summary(summary: dict[str, Any]) -> None:
    """What was made in a sentence, then teacher, arms and low-bit copies side by side with their intervals; of a chain
    its stages."""
    console = Console(width=None, soft_wrap=True, highlight=False)
    if "chain" in summary:
        _print_chain(summary, console)
        return
    if summary.get("unfinished"):
        console.print(
            f"{summary['recipe']['name']}: unfinished; stages so far: {', '.join(summary['stages']) or 'none'}"
        )
        if stopped := summary.get("stopped"):
            console.print(*stopped, sep="\n", markup=False)
        return
    seen = view(summary)
    console.print(*filter(None, (headline(seen), against_control(seen))), sep="\n")
    console.print(_table(summary))
    if found := summary.get("bill"):
        console.print(*bill_in_words(found), sep="\n", markup=False)
    t = summary["targets"]
    if t["bytes"]:
        console.print(f"teacher's targets: {t['tokens']:,} tokens at {t['bytes_per_token']:.1f} bytes each")


def _print_chain(summary: dict[str, Any], console: Console) -> None:
    done = finished(summary)
    metric = leading(done)
    console.print(*filter(None, (chain_headline(summary), metric and compared_on(done, metric))), sep="\n")
    if done:
        console.print(_stages(summary, done), _costs(done), sep="")
        tokens = f"{summary['tokens_trained']:,} tokens trained, {summary['tokens_generated']:,} generated"
        console.print(f"all stages: {duration(summary['seconds'])}, {tokens}")
        if said := chain_bill(summary):
            console.print(textwrap.fill(said, min(console.width, 120)), markup=False)
    if told := to_be_run(summary):
        console.print(told)


def _stages(summary: dict[str, Any], done: Mapping[str, Any]) -> Table:
    """Every stage in two lines: its values, and below them the intervals; fits 80 columns."""
    shown = columns(done)
    title = f"{summary['name']}: {len(summary['stages'])} stages, 95 % intervals below each value"
    table = _of_columns(title, ("stage", "method"), ("size", *(heading for *_, heading in shown)))
    for name, s in summary["stages"].items():
        if s["state"] != "finished":
            table.add_row(name, s["state"])
            continue
        rows = [(METRICS[n].unit, s.get(side, {}).get(n)) for side, n, _ in shown]
        values = [measured(unit, row["mean"]) if row else MISSING for unit, row in rows]
        table.add_row(name, s["method"], parameters(s["params"]), *values)
        table.add_row("", "", "", *(span(unit, row) if row else "" for unit, row in rows))
    return table


def _costs(done: Mapping[str, Any]) -> Table:
    """What each stage took."""
    table = _of_columns(None, ("stage",), ("time", "tokens trained", "generated", "peak memory"))
    for name, s in done.items():
        tokens = [count(s[k]) if s[k] else MISSING for k in ("tokens_trained", "tokens_generated")]
        table.add_row(name, duration(s["seconds"]), *tokens, size(s["peak_memory_bytes"]))
    return table


def _of_columns(title: str | None, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="", box=None, padding=(0, 0, 0, 1), pad_edge=False)
    for heading in (*left, *right):
        table.add_column(heading, justify="left" if heading in left else "right", no_wrap=True)
    return table


def print_inspection(found: dict[str, Any]) -> None:
    """What ``targets inspect`` found: one table a student."""
    console = Console(width=None, soft_wrap=True, highlight=False)
    console.print(
        f"{found['tokens']:,} training tokens, vocabulary {found['vocabulary']:,}, teacher's entropy "
        f"{found['entropy']:.2f} nats. Bytes, ids and mass: kept of the teacher, per token; error and angle: of the "
        "batch gradient, against the whole teacher's; calibration: error of the most probable token's weight."
    )
    for name, rows in found["students"].items():
        table = Table(title=f"\n{name}", title_justify="left", title_style="", box=None, pad_edge=False)
        for heading in ("kept", "set to", "bytes", "ids", "mass", "error", "angle", "calibration"):
            table.add_column(heading, justify="left" if heading == "kept" else "right", no_wrap=True)
        for r in rows:
            cells = (f"{r['setting']:.4g}", f"{r['bytes_per_token']:.1f}", f"{r['ids_per_token']:.1f}")
            cells += (f"{r['mass']:.3f}", f"{r['gradient_error']:.4f}", f"{r['gradient_angle']:.1f}°")
            style = "bold" if r["chosen"] else ""
            table.add_row(r["way"], *cells, f"{100 * r['calibration_error']:.2f} %", style=style)
        console.print(table)
    console.print(found["said"])


def print_quantized(found: dict[str, Any]) -> None:
    """What ``quantize`` made, or would make: bytes, then the copy beside its parent with their intervals."""
    console = Console(width=None, soft_wrap=True, highlight=False)
    predicted = found["predicted"]
    if "copy" not in found:
        console.print(f"{found['format']}: {size(predicted['bytes'])} of {size(found['parent_bytes'])}")
        console.print(
            f"lost when rounded to nearest: {_nats(predicted['kl'])}, {predicted['bits_per_byte']:.2g} bits a byte"
        )
        return
    console.print(f"{found['path']}: {size(found['bytes'])} of {size(found['parent_bytes'])}, {found['format']}")
    if found["recovered"]:
        console.print(f"taught by its parent for {found['recovered']['steps']:,} steps")
    if left := found["left_in_16_bits"]:
        console.print(f"Linears left in 16 bits: {len(left)} ({', '.join([*left[:2], *['…'][: len(left) - 2]])})")
    console.print(f"KL to the parent: {_nats(found['kl'])}")
    console.print(f"predicted for rounding to nearest: {_nats(predicted['kl'])}")
    console.print(f"same most probable token: {interval('agreement', found['agreement'])}")
    if cache := found.get("kv_cache"):
        taken = f"{cache['bytes']:,} of {cache['bytes_in_16_bits']:,} bytes a token"
        console.print(f"with its KV cache in {cache['format']}, {taken}: {_nats(cache['kl'])}")
    table = Table(box=None, pad_edge=False)
    for heading in ["", *(_HEADINGS.get(n) or n for n in found["copy"])]:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for side in ("parent", "copy"):
        rows = [(METRICS[n].unit, found[side][n]) for n in found["copy"]]
        table.add_row(side, *(measured(unit, row["mean"]) for unit, row in rows))
        table.add_row("", *(span(unit, row) for unit, row in rows))
    console.print(table)
    console.print(f"measured on {found['tokens_measured']:,} tokens of: {found['samples']}")
    if found["engine"]:
        console.print(found["engine"])


def _nats(row: dict[str, Any]) -> str:
    return f"{row['mean']:.2g} ({row['low']:.2g} to {row['high']:.2g}) nats a token"


def _table(summary: dict[str, Any]) -> Table:
    """Every model in two lines: its values, and below them the intervals; fits 80 columns."""
    models = {"teacher": summary["teacher"], **summary["arms"], **summary["quantized"]}
    models = {name: m for name, m in models.items() if m["metrics"] or m["params"]}  # not a teacher behind a server
    names = [n for n in _HEADINGS if any(n in m["metrics"] for m in models.values())][:4]  # what 80 columns hold
    seeds = len(summary["seeds"])
    title = f"{summary['name']}: {seeds} seed{'s' if seeds > 1 else ''}, 95 % intervals below each value"
    table = _of_columns(title, ("model",), ("size", "weights", *(_HEADINGS[n] for n in names)))
    for name, m in models.items():
        rows = [(METRICS[n].unit, m["metrics"].get(n)) for n in names]
        values = [measured(unit, row["mean"]) if row else MISSING for unit, row in rows]
        table.add_row(name, parameters(m["params"]), size(m["bytes"]), *values)
        table.add_row("", "", "", *(span(unit, row) if row else "" for unit, row in rows))
    return table


def print_values(found: dict[str, Any], indent: str = "") -> None:
    """One line a value; an interval on one line."""
    for key, value in found.items():
        if isinstance(value, dict) and {"mean", "low", "high"} <= set(value):
            known = next(n for n in (key, *_LIKE) if n in METRICS and (n == key or key.startswith(_LIKE[n])))
            print(f"{indent}{key}: {interval(known, value)}  [{value.get('how', '')}]")
        elif isinstance(value, dict):
            print(f"{indent}{key}:")
            print_values(value, indent + "  ")
        else:
            print(f"{indent}{key}: {value:,}" if isinstance(value, int) else f"{indent}{key}: {value}")
