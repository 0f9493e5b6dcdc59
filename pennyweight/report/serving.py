"""What it takes to serve a finished model, for people: a table for the terminal, and one for the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pennyweight.report.graded import aligned
from pennyweight.report.language import ENGLISH, Language
from pennyweight.report.markup import Html, element, section, table
from pennyweight.report.wording import size

Span = Callable[[Mapping[str, float]], str]


def serving_lines(found: Mapping[str, Any], span: Span, spoken: Language = ENGLISH) -> list[str]:
    """A heading, and a line for each format."""
    if not found["formats"]:
        return [spoken(f"to serve: 64 x {found['chip']} do not hold the model")]
    head, *rows = _rows(found, span, short=True)
    priced = f", {found['currency']} for a million tokens" if found["currency"] else ""
    title = spoken(f"to serve on {found['chip']}: tokens a second{priced}")
    return [title, *aligned([[*map(spoken, head)], *rows])]


def serving_section(found: Mapping[str, Any], span: Span) -> Html:
    """The same with what is waited for."""
    head, *rows = _rows(found, span, short=False)
    caption = f"Tokens that are written a second on {found['chip']}, alone and many rows at once"
    return section(
        "serving", "What serving takes", table(caption, head, rows), element("p", found["reason"], class_="small")
    )


def _rows(found: Mapping[str, Any], span: Span, short: bool) -> list[list[str]]:
    money = f"{found['currency']} a million"
    head = ["format", "bytes", "devices", "alone"]
    head += [money] * bool(found["currency"] and not short) + ([] if short else ["waits for"])
    head += ["rows", "together"] + ([] if short else ["wait for"])
    head += [money if not short else found["currency"]] if found["currency"] else []
    out = [head]
    for row in found["formats"]:
        alone, many = row["alone"], row["many"]
        cells = [row["format"], size(row["bytes"]), f"{row['devices']:,}", span(alone["tokens_per_second"])]
        if not short:
            cells += [span(alone["money"])] if "money" in alone else []
            cells += [alone["bound"]]
        cells += [f"{many['rows']:,}", span(many["tokens_per_second"])] + ([] if short else [many["bound"]])
        out.append([*cells, *([span(many["money"])] if "money" in many else [])])
    return out
