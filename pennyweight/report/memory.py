"""A memory plan for people: a page with a bar for each way, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from rich.console import Console
from rich.table import Table

from pennyweight.report.charts import STAND_IN, Mark, both, label_rows, tick
from pennyweight.report.markup import Html, document, element, facts, figure, section, table
from pennyweight.report.style import sheet
from pennyweight.report.wording import MISSING, count, parameters, plural, size, size_unit

_PARTS = {
    "weights": ("student", "weights"),
    "gradients": ("control", "gradients"),
    "moments": ("int4", "moments"),
    "activations": ("int8", "activations"),
    "kv_cache": ("int8", "KV cache"),
    "logits_tile": ("base", "logits tile"),
    "optimizer_step": ("teacher", "optimizer's step"),
}
"""Colour and name of each part. Activations and KV cache, both what tokens leave behind, never stand side by side."""

_TRAIN = ("weights", "gradients", "moments", "activations", "logits_tile", "optimizer_step")
_USE = ("weights", "kv_cache", "logits_tile")


def memory_page(found: Mapping[str, Any]) -> str:
    """One self-contained HTML page of what ``plan.memory.memory`` found; the same findings give the same text."""
    name = found["model"]
    body = [
        element(
            "header",
            element("h1", f"Pennyweight memory plan: {name}"),
            element("p", _lead(found), class_="lead"),
        ),
        element("main", _train(found), _use(found), _counting(found)),
    ]
    return document(f"{name} – Pennyweight memory plan", _lead(found), sheet(), *body)


def print_memory(found: Mapping[str, Any]) -> None:
    """The same on the terminal, in 80 columns: a table of ways to train, one of ways to use, and how it is counted."""
    console = Console(width=None, soft_wrap=True, highlight=False, markup=False)
    console.print(_lead(found))
    for rows, parts, heading in ((found["train"], _TRAIN, "to train"), (found["use"], _USE, "to use")):
        shown = Table(box=None, padding=(0, 0, 0, 1), pad_edge=False)
        shown.add_column(f"\n{heading}", no_wrap=True)
        for part in (*parts, "peak"):
            name = "step" if part == "optimizer_step" else _named(part).partition(" tile")[0]
            shown.add_column(f"\n{name}", justify="right", no_wrap=True)
        for row in rows:
            shown.add_row(_label(row), *(_size(row[part]) for part in (*parts, "peak")))
        console.print(shown)
    console.print()
    settings = [(row["way"], row["settings"]) for row in found["train"]]
    for name, said in (*settings, *_explained(found)):
        console.print(f"{name}: {said}")


def _lead(found: Mapping[str, Any]) -> str:
    ends = [tuple(size(pick(row["peak"] for row in found[k])) for pick in (min, max)) for k in ("train", "use")]
    (least, most), (little, much) = ends
    rows = f"{plural(found['batch'], 'row')} of {plural(found['length'], 'token')}"
    what = f"a {found['architecture']} of {parameters(found['parameters'])} parameters"
    where = "a GPU" if found["device"] == "cuda" else "a CPU"
    return (
        f"{found['model']}, {what}, takes {least} to {most} to train on {rows} at a time on {where}, and {little} to "
        f"{much} to use."
    )


def _named(part: str) -> str:
    return _PARTS[part][1] if part in _PARTS else part


def _label(row: Mapping[str, Any]) -> str:
    """A way's name; of a way to use, with the KV cache where that is in 8 bits."""
    return f"{row['way']}, 8-bit KV" if row["settings"] == "KV cache in 8 bits" else row["way"]


def _size(n: int) -> str:
    return size(n) if n else MISSING


def _train(found: Mapping[str, Any]) -> Html:
    rows = found["train"]
    least = min(rows, key=lambda row: row["peak"])
    return section(
        "train",
        "What does it take to train?",
        figure(
            f"Least with {_label(least)}: {size(least['peak'])}",
            stacked("memory-train", [(row, _at_peak(row)) for row in rows], "what is there at once, at most"),
            "Each bar is what is there when most is. The optimizer works when activations and logits are gone, so it "
            "stands in a bar in their place where it takes more.",
        ),
        _table("Ways to train, and what each takes", rows, _TRAIN),
        facts((_label(row), element("code", row["settings"])) for row in rows),
    )


def _use(found: Mapping[str, Any]) -> Html:
    rows = found["use"]
    least = min(rows, key=lambda row: row["peak"])
    return section(
        "use",
        "What does it take to use?",
        figure(
            f"Least with {_label(least)}: {size(least['peak'])}",
            stacked("memory-use", [(row, _USE) for row in rows], "weights, KV cache and logits"),
        ),
        _table("Ways to use, and what each takes", rows, _USE),
    )


def _table(caption: str, rows: Sequence[Mapping[str, Any]], parts: Sequence[str]) -> Html:
    headings = ["way", *(_named(part) for part in parts), "peak"]
    return table(caption, headings, [[_label(r), *(_size(r[p]) for p in (*parts, "peak"))] for r in rows])


def _at_peak(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The parts that are there when most is."""
    works = row["activations"] + row["logits_tile"]
    last = ("optimizer_step",) if row["optimizer_step"] > works else ("activations", "logits_tile")
    return "weights", "gradients", "moments", *last


def _counting(found: Mapping[str, Any]) -> Html:
    return section("counting", "How is it counted?", facts(_explained(found)))


def _explained(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What each column is, how sure it is, and what is not in it."""
    near = f"{100 * found['accuracy']:.0f} %"
    gpu = "; attention is taken to be fused, which was not measured on a GPU" if found["device"] == "cuda" else ""
    return [
        ("counted", f"{count(found['parameters'])} parameters, exactly, from config.json; {found['layers']:,} layers"),
        (
            "weights",
            "under autocast with the 16-bit copies that it keeps; in use with scales, all but Linears in 16 bits",
        ),
        ("activations", f"what autograd keeps of one forward pass, an estimate to {near}{gpu}"),
        ("logits tile", "the loss at work: a tile of float32 logits, its hidden states, the head and its gradient"),
        (
            "optimizer's step",
            "what it holds in passing: in float32 of the largest tensor (of all on a GPU), else of a part of it",
        ),
        ("peak", "weights, gradients, moments, and the larger of the step and all the rest"),
        ("KV cache", f"of {found['batch']:,} x {found['length']:,} tokens; in 8 bits a 16-bit scale for each vector"),
        ("not counted", "a live teacher, what a prompt's forward pass holds in passing, and the process itself"),
        *(("besides", note) for note in found["notes"]),
    ]


def stacked(name: str, rows: Sequence[tuple[Mapping[str, Any], Sequence[str]]], axis: str) -> str:
    """A bar for each row, of its parts one behind the other; bytes."""
    unit, one = size_unit(max(row["peak"] for row, _ in rows))
    drawn = [part for part in _PARTS if any(part in parts for _, parts in rows)]
    marks = [Mark("student", _label(row), row["peak"] / one, size(row["peak"])) for row, _ in rows]

    def draw(canvas: Figure, narrow: bool) -> None:
        ax = canvas.subplots()
        for part in drawn:
            at = [y for y, (_, parts) in enumerate(rows) if part in parts]
            behind = [_before(*rows[y], part) / one for y in at]
            role, label = _PARTS[part]
            long = [rows[y][0][part] / one for y in at]
            ax.barh(at, long, left=behind, height=0.58, color=STAND_IN[role], linewidth=0, zorder=2, label=label)
        ax.set_xlim(0, 1.02 * max(m.value for m in marks))
        ax.xaxis.set_major_locator(MaxNLocator(3 if narrow else 6))
        ax.xaxis.set_major_formatter(FuncFormatter(tick))
        label_rows(ax, marks)
        ax.set_xlabel(f"{axis}, {unit}")
        canvas.legend(loc="outside upper left", ncols=2 if narrow else len(drawn), frameon=False)

    said = "; ".join(
        f"{_label(row)} {size(row['peak'])}: " + ", ".join(f"{_named(p)} {size(row[p])}" for p in parts)
        for row, parts in rows
    )
    return both(name, f"{axis}. {said}.", lambda narrow: 34 * len(rows) + (130 if narrow else 84), draw)


def _before(row: Mapping[str, Any], parts: Sequence[str], part: str) -> int:
    """Bytes that stand before a part in its bar."""
    return sum(row[p] for p in parts[: list(parts).index(part)])
