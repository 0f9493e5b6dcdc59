"""What of a recipe's plan fits where: two lines for the terminal, and tables for the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pennyweight.report.markup import Html, section, table
from pennyweight.report.wording import MISSING, plural, size

_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "logits": "logits tile",
    "teacher": "teacher",
    "kv_cache": "KV cache",
    "process": "process",
}

Span = Callable[[Mapping[str, float]], str]


def fit_lines(fits: Mapping[str, Any], span: Span, lasts: Span) -> list[str]:
    """Whether it fits where it is to run, with the cure, and where it is cheapest."""
    out, best = [], fits["cheapest"]
    if fits["fits"] is not None:
        most, there = size(fits["most"]), size(fits["memory"])
        if fits["fits"]:
            out.append(f"fits: {fits['stage']} takes most of a device, {most} of {there}")
        elif fits["settings"]:
            out.append(
                f"does not fit: {fits['stage']} takes {most} of {there}; with {' '.join(fits['settings'])} it does"
            )
        else:
            left = fits["left"]
            least = f"{left['stage']} still takes {size(left['bytes'])}" if left else "no settings help"
            out.append(
                f"does not fit: {fits['stage']} takes {most} of {there}, and with the smallest settings {least}; take "
                "larger devices, shorter rows or a smaller model"
            )
    if best:
        by = f" (with {' '.join(fits['by'])})" if fits["by"] else ""
        price = f"{best['currency']} {span(best['price'])} an hour and device"
        out.append(
            f"cheapest of the catalogue that holds it{by}: {best['devices']:,} x {best['chip']} at {price}, "
            f"{lasts(best['hours'])}, {best['currency']} {span(best['money'])}"
        )
    elif not any(row["devices"] for row in fits["chips"]):
        out.append("no chip of the catalogue holds it, be they 64: take shorter rows or a smaller model")
    return out


def fits_section(runs: Sequence[Mapping[str, Any]], fits: Mapping[str, Any], span: Span, lasts: Span) -> Html:
    """Tables of what each stage takes of a device, part by part, and of the chips that hold all of them."""
    several = len(runs) > 1
    stages = [(f"{r['name']}: {s['stage']}" if several else s["stage"], s) for r in runs for s in r["stages"]]
    shown = [p for p in _PARTS if any(p in s.get("parts", {}) for _, s in stages)]
    parts = [
        [name, *(size(s["parts"][p]) if p in s["parts"] else MISSING for p in shown), size(sum(s["parts"].values()))]
        for name, s in stages
        if "parts" in s
    ]
    heads = ["stage", *(_PARTS[p] for p in shown), "together"]
    chips = [_chip(row, span, lasts) for row in fits["chips"]]
    by = f", with {' '.join(fits['by'])}" if fits["by"] else ""
    columns = ["chip", "memory", "how many hold it", "of an hour and device", "time", "money"]
    return section(
        "fits",
        "What fits where",
        table("Bytes of a device at the high end: rows as long as data.context", heads, parts),
        table(f"Chips of the catalogue, the cheapest first{by}", columns, chips),
    )


def _chip(row: Mapping[str, Any], span: Span, lasts: Span) -> list[str]:
    count = plural(row["devices"], "device") if row["devices"] else "not 64 of them"
    if "money" not in row:
        return [row["chip"], size(row["memory"]), count, MISSING, MISSING, MISSING]
    money, price = (f"{row['currency']} {span(row[k])}" for k in ("money", "price"))
    return [row["chip"], size(row["memory"]), count, price, lasts(row["hours"]), money]
