"""Values -> HTML, safe by default: whatever is not ``Html`` already is escaped on its way in."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any


class Html(str):
    """Text that is markup already and must not be escaped again."""

    __slots__ = ()


_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_VOID = {"meta", "link", "br"}
_CONTROLS = {i: 0x2400 + i for i in range(32) if chr(i) not in "\n\t"} | {0x7F: 0x2421}
_CONTROLS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def escape(value: Any) -> Html:
    """``value`` as text of a page. Control characters become visible signs, broken surrogates question marks."""
    if isinstance(value, Html):
        return value
    text = re.sub("\r\n?", "\n", str(value)).translate(_CONTROLS)
    return Html(html.escape(text.encode("utf-8", "replace").decode("utf-8"), quote=True))


def element(tag: str, /, *children: Any, **attributes: Any) -> Html:
    """One element. A child or attribute of None is left out; ``class_`` is class, ``aria_label`` is aria-label."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if tag in _VOID:
        return Html(f"<{tag}{written}>")
    return Html(f"<{tag}{written}>{join(children)}</{tag}>")


def join(children: Iterable[Any]) -> Html:
    """Children one after the other, escaped where they are not markup; None is left out."""
    return Html("".join(escape(child) for child in children if child is not None))


def section(anchor: str, heading: str, *children: Any) -> Html:
    """A part of the page under its own heading."""
    return element("section", element("h2", heading, id=anchor), *children, class_="part", aria_labelledby=anchor)


def table(caption: str, headings: Sequence[Any], rows: Iterable[Sequence[Any]], foot: Sequence[Any] = ()) -> Html:
    """A table that scrolls inside its own box; the first cell of each row is its heading."""

    def line(cells: Sequence[Any]) -> Html:
        first, *others = cells
        return element("tr", element("th", first, scope="row"), *(element("td", c) for c in others))

    head = element("thead", element("tr", *(element("th", h, scope="col") for h in headings)))
    body = element("tbody", *map(line, rows))
    tail = element("tfoot", line(foot)) if foot else None
    inner = element("table", head, body, tail, aria_label=caption)
    # The caption stands outside the box that scrolls, or a narrow page would cut it off.
    scrolls = element("div", inner, class_="scroll", role="region", tabindex="0", aria_label=f"{caption}, table")
    return element("div", element("p", caption, class_="caption"), scrolls, class_="box")


def facts(pairs: Iterable[tuple[Any, Any]]) -> Html:
    """Names and values, one pair a line; a pair whose value is None or empty is left out."""
    kept = [(name, value) for name, value in pairs if value is not None and value != ""]
    return element("dl", *(element("div", element("dt", n), element("dd", v)) for n, v in kept), class_="facts")


def document(title: str, description: str, style: str, *body: Any) -> str:
    """A whole page that needs nothing but itself: no script, and a policy that forbids scripts and fetches besides."""
    head = [
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="description", content=description),
        element("link", rel="icon", href="data:,"),  # else browsers ask the server for one
        element("title", title),
        element("style", Html(style)),
    ]
    return f'<!doctype html>\n<html lang="en">\n<head>{join(head)}</head>\n<body>{join(body)}</body>\n</html>\n'


def figure(finding: str, chart: str, note: str | None = None) -> Html:
    """A chart under the sentence that says what it shows, with how to read it below."""
    return element(
        "figure",
        element("figcaption", element("strong", finding), element("span", note, class_="note") if note else None),
        Html(chart),
    )


def judged(correct: Any) -> Html:
    """A verdict as a word of its colour."""
    if correct is None:
        return element("span", "not judged", class_="note")
    return element("span", "✓ correct", class_="right") if correct else element("span", "✗ wrong", class_="wrong")


def pre(text: Any) -> Html:
    """A text as it was written, in a box that scrolls where it is long."""
    if text is None or not str(text).strip():
        return element("span", "(empty)", class_="empty")
    long = len(str(text)) > 600 or str(text).count("\n") > 9
    return element("pre", text, dir="auto", tabindex="0" if long else None)
