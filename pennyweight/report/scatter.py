"""The picture of quality against bytes: teacher, arms and every low-bit copy, with and without recovery."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import IdentityTransform

from pennyweight.records import METRICS
from pennyweight.report.charts import MARKER, STAND_IN, both, log_axis, short, tick
from pennyweight.report.markup import Html, figure
from pennyweight.report.view import Model, View
from pennyweight.report.wording import finite, measured, share_of, size, size_unit, span

Box = tuple[float, float, float, float]
"""Left, bottom, right and top, in points of the drawing."""

Point = tuple[float, float]

_AGAINST = ("accuracy", "bits_per_byte")
_ROOM = 3.0  # points between what is written and all else
_APART = 12.0  # points between dots over the same place
_FAR = 16.0  # points from a dot from which on a line leads to its label


@dataclass(frozen=True, slots=True)
class Dot:
    """A model: bytes on disk and value with its interval, in the units of the axes. ``hollow``: rounded only."""

    role: str
    label: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    hollow: bool = False


def quality_against_bytes(view: View) -> Html | None:
    """The picture, by accuracy or else by bits per byte; None where it would have no low-bit copy in it."""
    metric = next((m for m in _AGAINST if view.student and view.student.interval(m)), None)
    if metric is None:
        return None
    shown = [m for m in view.models if m.role != "base"] + view.rounded
    known = [(m, n, i) for m in shown if (n := finite(m.facts.get("bytes"))) and n > 0 and (i := m.interval(metric))]
    copies = {m.key for m in view.copies}
    if len(known) < 3 or not any(m.key in copies for m, _, _ in known):
        return None
    unit, one = size_unit(max(n for _, n, _ in known))
    info = METRICS[metric]
    dots = [_dot(m, n / one, i, info.unit, m.key in copies) for m, n, i in known]
    better = "up" if info.higher_is_better else "down"
    only = [f"{m.label}: {_value(info.unit, i)} in {size(n)}" for m, n, i in known if m in view.rounded]
    notes = [
        f"Further left is smaller, further {better} is better; lines are 95 % intervals.",
        "Low-bit copies that were rounded only are hollow, those that were then taught by their parent are filled; a "
        f"line leads from one to the other. {'; '.join(only)}."
        if only
        else "",
    ]
    name = f"{info.label}, %" if info.unit == "percent" else info.label
    said = "; ".join(f"{m.label} {_value(info.unit, i)} in {size(n)}" for m, n, i in known)
    chart = scatter("quality-bytes", dots, f"size on disk, {unit}", name, f"{info.label} against size on disk. {said}.")
    return figure(_finding(view, metric), chart, " ".join(n for n in notes if n))


def _dot(m: Model, x: float, found: dict[str, Any], unit: str, is_copy: bool) -> Dot:
    scale = 100.0 if unit == "percent" else 1.0
    low, high = (None if (v := finite(found.get(end))) is None else scale * v for end in ("low", "high"))
    label = m.key if is_copy or m.label.endswith("rounded only") else m.label
    return Dot(m.role, label, x, scale * found["mean"], low, high, hollow=is_copy and not m.facts.get("recovered"))


def _value(unit: str, found: dict[str, Any]) -> str:
    bounds = span(unit, found)
    return measured(unit, found["mean"]) + ("\u00a0%" if unit == "percent" else "") + (f" ({bounds})" if bounds else "")


def _finding(view: View, metric: str) -> str:
    """The smallest copy, what it is worth, and what it takes."""
    copy = view.smallest
    found = copy.interval(metric) if copy else None
    if copy is None or found is None:
        return "What are the models worth, and what do they take?"
    info = METRICS[metric]
    whole = finite(view.teacher.facts.get("bytes")) if view.teacher else None
    part = share_of(copy.facts["bytes"], whole, "the teacher’s bytes")
    takes = f"{size(copy.facts['bytes'])}, {part}" if part else size(copy.facts["bytes"])
    value = measured(info.unit, found["mean"]) + ("\u00a0%" if info.unit == "percent" else "")
    return f"The {copy.label}: {info.label.partition(' (')[0]} {value} in {takes}"


def scatter(name: str, dots: Sequence[Dot], x_axis: str, y_axis: str, description: str) -> str:
    """A dot with its interval for each model over a logarithmic axis; each label once, where nothing else stands. Dots
    over the same place are drawn side by side."""

    def draw(canvas: Figure, narrow: bool) -> None:
        ax = canvas.subplots()
        log_axis(ax, "x", min(d.x for d in dots), max(d.x for d in dots), 4 if narrow else 7)
        ends = [v for d in dots for v in (d.y, d.low, d.high) if v is not None]
        margin = 0.12 * (max(ends) - min(ends)) or 0.06 * abs(max(ends)) or 1.0
        ax.set_ylim(min(ends) - margin, max(ends) + margin)
        ax.yaxis.set_major_locator(MaxNLocator(5))
        ax.yaxis.set_major_formatter(FuncFormatter(tick))
        ax.grid(color=STAND_IN["grid"], linewidth=1)
        ax.tick_params(length=0)
        ax.set_xlabel(x_axis)
        ax.set_ylabel(y_axis)
        canvas.draw_without_rendering()  # so that the axes know where they stand
        at = _side_by_side([tuple(ax.transData.transform((d.x, d.y))) for d in dots])
        taken: list[Box] = []
        for (x, y), d in zip(at, dots, strict=True):
            ends = [y if v is None else float(ax.transData.transform((d.x, v))[1]) for v in (d.low, d.high)]
            _mark(canvas, d, x, y, ends)
            taken += [(x - 6, y - 6, x + 6, y + 6), (x - 1, ends[0], x + 1, ends[1])]
        for (x, y), (other_x, other_y), role in _pairs(dots, at):
            _line(canvas, [x, other_x], [y, other_y], role, 1.5)
            taken += [(a, b, a, b) for a, b in _along((x, y), (other_x, other_y))]
        area = ax.get_window_extent()
        _label(canvas, dots, at, taken, (area.x0, area.y0, area.x1, area.y1))

    return both(name, description, lambda narrow: 320 if narrow else 380, draw)


def _side_by_side(at: Sequence[Point]) -> list[Point]:
    """Points on the drawing, moved apart where they are over the same place."""
    out = list(at)
    for x in {x for x, _ in at}:
        over = [i for i, (other, _) in enumerate(at) if abs(other - x) < 1]
        for k, i in enumerate(over):
            out[i] = at[i][0] + _APART * (k - (len(over) - 1) / 2), at[i][1]
    return out


def _mark(canvas: Figure, d: Dot, x: float, y: float, ends: Sequence[float]) -> None:
    """A dot, hollow or filled, and its interval; on the drawing itself, where a dot that was moved apart stands."""
    _line(canvas, [x, x], ends, d.role, 2, 0.55)
    colour, (shape, big) = STAND_IN[d.role], MARKER[d.role]
    fill, edge = (STAND_IN["card"], 1.8) if d.hollow else (colour, 0)
    _line(canvas, [x], [y], d.role, 0, marker=shape, markersize=big, markerfacecolor=fill, markeredgewidth=edge)


def _line(
    canvas: Figure, xs: Sequence[float], ys: Sequence[float], role: str, width: float, alpha: float = 1.0, **more: Any
) -> None:
    style = {"color": STAND_IN[role], "linewidth": width, "alpha": alpha, "solid_capstyle": "round"}
    canvas.add_artist(Line2D(xs, ys, transform=IdentityTransform(), **style, **more))


def _pairs(dots: Sequence[Dot], at: Sequence[Point]) -> Iterator[tuple[Point, Point, str]]:
    """Where copies of the same format stand, rounded only and taught, and their colour."""
    for (a, here), (b, there) in itertools.combinations(zip(dots, at, strict=True), 2):
        if a.label == b.label and a.hollow != b.hollow:
            yield here, there, a.role


def _label(canvas: Figure, dots: Sequence[Dot], at: Sequence[Point], taken: Sequence[Box], bounds: Box) -> None:
    """Write each label beside its first dot, with a line to it where that is far."""
    there, written = list(taken), []
    for i, (d, (x, y)) in enumerate(zip(dots, at, strict=True)):
        if d.label in [other.label for other in dots[:i]]:
            continue
        text = canvas.text(x, y, short(d.label), color=STAND_IN[d.role], va="baseline", transform=IdentityTransform())
        size = text.get_window_extent()
        box = beside((x, y), (size.width, size.height), there, written, bounds)
        text.set_position((box[0], box[1] + y - size.y0))
        end = nearest(box, (x, y))
        if math.dist(end, (x, y)) > _FAR:
            _line(canvas, [end[0], x], [end[1], y], d.role, 0.8, 0.7)
            there += [(a, b, a, b) for a, b in _along(end, (x, y))]
        there.append(box)
        written.append(box)


def beside(at: Point, wide: Point, taken: Sequence[Box], written: Sequence[Box], bounds: Box) -> Box:
    """Where a label of that width and height stands nearest to ``at`` without touching what is there, within bounds,
    right first; its line to it crosses no label ``written`` before, where that can be. Right, where nothing is free."""
    free: Box | None = None
    for box in _around(at, wide):
        if _within(box, bounds) and not any(_touch(box, other) for other in taken):
            line = _along(nearest(box, at), at)
            if not any(_touch(other, (a, b, a, b)) for other in written for a, b in line):
                return box
            free = free or box
    return free or next(_around(at, wide))


def _around(at: Point, wide: Point) -> Iterator[Box]:
    """Boxes of that width and height around a point, further and further off."""
    (x, y), (width, height) = at, wide
    turns = sorted(range(16), key=lambda k: (k % 4 > 0, k % 2, k % 8, k))  # right, left, up, down; then between
    for far in range(9, 400, 4):
        for turn in turns:
            right, up = math.cos(turn * math.pi / 8), math.sin(turn * math.pi / 8)
            left, bottom = x + far * right - width * (1 - right) / 2, y + far * up - height * (1 - up) / 2
            yield left, bottom, left + width, bottom + height


def nearest(box: Box, to: Point) -> Point:
    """The point of a box that is nearest to another."""
    return min(max(to[0], box[0]), box[2]), min(max(to[1], box[1]), box[3])


def _along(a: Point, b: Point) -> list[Point]:
    """Points of the line from a to b, a few points of the drawing apart."""
    count = 2 + int(math.dist(a, b) / _ROOM)
    return [(a[0] + k / count * (b[0] - a[0]), a[1] + k / count * (b[1] - a[1])) for k in range(count + 1)]


def _within(box: Box, bounds: Box) -> bool:
    return box[0] >= bounds[0] and box[1] >= bounds[1] and box[2] <= bounds[2] and box[3] <= bounds[3]


def _touch(a: Box, b: Box) -> bool:
    return a[0] < b[2] + _ROOM and b[0] < a[2] + _ROOM and a[1] < b[3] + _ROOM and b[1] < a[3] + _ROOM
