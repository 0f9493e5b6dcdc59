"""Numbers -> charts, as SVG that takes its colours and its font from the page around it.

Each chart is drawn twice, for a wide and a narrow page, because text that is scaled down with its drawing cannot be
read. The style sheet shows one of the two. The same numbers give the same text, byte for byte.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

WIDE, NARROW = 970, 328
"""Widths in CSS pixels at which a chart's text has its natural size."""

ROLES = ("ink", "muted", "grid", "card", "teacher", "base", "control", "student", "int8", "int4")
"""Colours are roles: each one is the CSS variable of that name on the page."""

STAND_IN = {role: f"#fed1{16 + i:02x}" for i, role in enumerate(ROLES)}
"""Matplotlib must be given real colours; these stand for the roles and are replaced in its output."""

MARKER = {
    "teacher": ("D", 7.5),
    "base": ("X", 9),
    "control": ("s", 8),
    "student": ("o", 9),
    "int8": ("^", 10),
    "int4": ("v", 10),
}


@dataclass(frozen=True, slots=True)
class Mark:
    """One row of a chart, in the unit of its axis. ``text`` is the value as it is written beside the row."""

    role: str
    label: str
    value: float
    text: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Panel:
    """Curves of one arm: name of each seed -> (steps, values), in step order. ``text`` is written at the right, or
    below the label in a chart whose axis ends at ``top``; without a top, the axis is logarithmic over a decade."""

    role: str
    label: str
    seeds: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    text: str = ""
    top: float | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """One way of doing something, as (x, y) points that its settings give, by rising x."""

    role: str
    label: str
    points: Sequence[tuple[float, float]]


def intervals(
    name: str,
    marks: Sequence[Mark],
    axis: str,
    description: str,
    reference: float | None = None,
    bounds: tuple[float, float] | None = None,
) -> str:
    """A dot with its interval for each mark, one below the other.

    Args:
        name: of this chart on the page, unique and fit for an id.
        axis: label of the value axis, with its unit.
        description: what a reader who cannot see it is told.
        reference: a value to draw a dashed line at (the teacher's).
        bounds: values that the axis never goes beyond. Without them, it is logarithmic where values span a decade.
    """

    def draw(figure: Figure, narrow: bool) -> None:
        ax = figure.subplots()
        ends = [x for m in marks for x in (m.value, m.low, m.high) if x is not None]
        if bounds is None and min(ends) > 0 and max(ends) / min(ends) > 10:
            log_axis(ax, "x", min(ends), max(ends), 4 if narrow else 7)
        else:
            _linear(ax, min(ends), max(ends), bounds, 4 if narrow else 7)
        if reference is not None:
            ax.axvline(reference, color=STAND_IN["muted"], linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        for y, m in enumerate(marks):
            colour = STAND_IN[m.role]
            if m.low is not None and m.high is not None:
                ax.plot([m.low, m.high], [y, y], color=colour, linewidth=2.5, solid_capstyle="round", zorder=2)
            shape, size = MARKER[m.role]
            ax.plot([m.value], [y], shape, color=colour, markersize=size, markeredgewidth=0, zorder=3)
        label_rows(ax, marks)
        ax.set_xlabel(axis)

    return both(name, description, lambda narrow: 34 * len(marks) + 52, draw)


def bars(name: str, marks: Sequence[Mark], axis: str, description: str) -> str:
    """A bar from zero for each mark, one below the other."""

    def draw(figure: Figure, narrow: bool) -> None:
        ax = figure.subplots()
        for y, m in enumerate(marks):
            ax.barh(y, m.value, height=0.58, color=STAND_IN[m.role], linewidth=0, zorder=2)
        ax.set_xlim(0, 1.02 * max(m.value for m in marks) or 1)
        ax.xaxis.set_major_locator(MaxNLocator(3 if narrow else 6))
        ax.xaxis.set_major_formatter(FuncFormatter(tick))
        label_rows(ax, marks)
        ax.set_xlabel(axis)

    return both(name, description, lambda narrow: 34 * len(marks) + 52, draw)


def curves(name: str, panels: Sequence[Panel], x_axis: str, y_axis: str, description: str) -> str:
    """A panel for each arm: a thin line for each seed, and their mean."""
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)

    def draw(figure: Figure, narrow: bool) -> None:
        grid = figure.subplots(*((len(panels), 1) if narrow else (rows, columns)), squeeze=False)
        axes = list(grid.flat)
        for i, (ax, panel) in enumerate(zip(axes, panels, strict=False)):
            _curve_panel(ax, panel)
            if narrow or i % columns == 0:
                ax.set_ylabel(y_axis)
            if not narrow or i == len(panels) - 1:
                ax.set_xlabel(x_axis)
        for ax in axes[len(panels) :]:
            ax.set_visible(False)

    return both(name, description, lambda narrow: 20 + 200 * len(panels) if narrow else 250 * rows, draw)


def tradeoff(name: str, lines: Sequence[Line], x_axis: str, y_axis: str, description: str) -> str:
    """A line for each way, both axes logarithmic, named above."""
    xs, ys = ([p[i] for line in lines for p in line.points if p[i] > 0] for i in (0, 1))

    def draw(figure: Figure, narrow: bool) -> None:
        ax = figure.subplots()
        log_axis(ax, "x", min(xs), max(xs), 4 if narrow else 7)
        log_axis(ax, "y", min(ys), max(ys), 5)
        for line in lines:
            shape, size = MARKER[line.role]
            x, y = zip(*(p for p in line.points if p[1] > 0), strict=True)
            ax.plot(x, y, f"{shape}-", color=STAND_IN[line.role], markersize=size, linewidth=2, label=line.label)
        ax.grid(color=STAND_IN["grid"], linewidth=1)
        ax.tick_params(length=0)
        ax.set_xlabel(x_axis)
        ax.set_ylabel(y_axis)
        figure.legend(loc="outside upper left", ncols=2 if narrow else len(lines), frameon=False)

    return both(name, description, lambda narrow: 300 if narrow else 340, draw)


def _curve_panel(ax: Axes, panel: Panel) -> None:
    """One arm's curves on their own scale."""
    colour = STAND_IN[panel.role]
    several = len(panel.seeds) > 1
    for steps, values in panel.seeds.values():
        ax.plot(steps, values, color=colour, linewidth=0.9 if several else 2, alpha=0.45 if several else 1)
    if several:
        ax.plot(*_mean(panel.seeds), color=colour, linewidth=2)
    every = [v for _, values in panel.seeds.values() for v in values]
    if panel.top is None and min(every) > 0 and max(every) / min(every) > 10:
        log_axis(ax, "y", min(every), max(every), 5)
    else:
        ax.set_ylim(min(0.0, 1.05 * min(every)), panel.top or (1.05 * max(every)) or 1.0)
        ax.yaxis.set_major_locator(MaxNLocator(4))
        ax.yaxis.set_major_formatter(FuncFormatter(tick))
    last = max(steps[-1] for steps, _ in panel.seeds.values())
    ax.set_xlim(0, max(last, 1))
    ax.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(tick))
    ax.grid(axis="y", color=STAND_IN["grid"], linewidth=1)
    ax.tick_params(length=0)
    below = panel.top is not None  # many small panels in a row leave no room for both on one line
    ax.set_title(short(panel.label), loc="left", color=colour, fontweight="bold", pad=24 if below else None)
    if below:
        ax.annotate(panel.text, (0, 1), (0, 6), "axes fraction", "offset points", color=STAND_IN["muted"])
    else:
        ax.set_title(panel.text, loc="right", color=STAND_IN["muted"])


def _mean(seeds: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> tuple[list[float], list[float]]:
    """Mean over seeds at the steps that all of them have."""
    tables = [dict(zip(steps, values, strict=True)) for steps, values in seeds.values()]
    shared = sorted(set.intersection(*(set(t) for t in tables)))
    return list(shared), [math.fsum(t[s] for t in tables) / len(tables) for s in shared]


def label_rows(ax: Axes, marks: Sequence[Mark]) -> None:
    """Names at the left and values at the right of each row, the first row on top."""
    ax.set_ylim(len(marks) - 0.4, -0.6)
    ax.set_yticks(range(len(marks)), [short(m.label) for m in marks])
    right = ax.secondary_yaxis("right")
    right.set_yticks(range(len(marks)), [m.text for m in marks])
    for side in (ax, right):
        side.tick_params(axis="y", length=0, labelcolor=STAND_IN["ink"], pad=8)
    right.spines["right"].set_visible(False)
    ax.tick_params(axis="x", length=0)
    ax.grid(axis="x", color=STAND_IN["grid"], linewidth=1)


def short(label: str) -> str:
    """A label that leaves room for the chart; tables have it whole."""
    return label if len(label) <= 24 else f"{label[:23]}…"


def _linear(ax: Axes, low: float, high: float, bounds: tuple[float, float] | None, ticks: int) -> None:
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    floor, ceiling = bounds or (-math.inf, math.inf)
    # A dot that lies on a bound would be cut in half by the axis: a little room beyond it.
    ax.set_xlim(max(low - margin, floor - 0.25 * margin), min(high + margin, ceiling + 0.25 * margin))
    ax.xaxis.set_major_locator(MaxNLocator(ticks))
    ax.xaxis.set_major_formatter(FuncFormatter(tick))


def log_axis(ax: Axes, which: str, low: float, high: float, most: int) -> None:
    """A logarithmic axis over [low, high] with ticks at 1, 2, 5 times powers of ten, thinned to ``most`` or fewer."""
    low, high = low / 1.25, high * 1.25
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [d for e in decades for s in steps if low <= (d := s * 10.0**e) <= high]
        if len(ticks) <= most:
            break
    ticks = ticks[:: math.ceil(len(ticks) / most)]
    if which == "x":
        ax.set_xscale("log")
        ax.set_xlim(low, high)
    else:
        ax.set_yscale("log")
        ax.set_ylim(low, high)
    axis = ax.xaxis if which == "x" else ax.yaxis
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(tick))


def tick(value: float, _: int | None = None) -> str:
    """A tick's number: thousands separated, no trailing zeros, a real minus."""
    if value and abs(value) < 1e-4:
        return f"{value:.0e}".replace("e-0", "e-").replace("-", "\u2212")
    return f"{value:,.6f}".rstrip("0").rstrip(".").replace("-", "\u2212")


def both(name: str, description: str, height: Callable[[bool], float], draw: Callable[[Figure, bool], None]) -> str:
    """The chart for a wide and for a narrow page."""
    out = []
    for kind, width in (("wide", WIDE), ("narrow", NARROW)):
        narrow = kind == "narrow"
        with _settings(f"{name}-{kind}", 12 if narrow else 13):
            # 72 dots per inch make one point, one SVG unit and one CSS pixel the same length.
            figure = Figure(figsize=(width / 72, height(narrow) / 72), dpi=72, layout="constrained")
            figure.get_layout_engine().set(w_pad=2 / 72, h_pad=4 / 72, wspace=0.05, hspace=0.09)  # type: ignore[union-attr]
            canvas = FigureCanvasSVG(figure)
            draw(figure, narrow)
            out.append(_svg(canvas, f"{name}-{kind}", kind, description))
    return "".join(out)


@contextmanager
def _settings(salt: str, size: int) -> Iterator[None]:
    """Matplotlib as it comes, whatever the reader's own settings are, with the look of the report."""
    ink, muted, grid = (STAND_IN[r] for r in ("ink", "muted", "grid"))
    look: dict[Any, Any] = {
        "svg.hashsalt": salt,
        "svg.fonttype": "none",
        "text.parse_math": False,
        "font.size": size,
        "axes.edgecolor": grid,
        "axes.labelcolor": muted,
        "axes.labelsize": size,
        "axes.titlesize": size,
        "xtick.labelsize": size,
        "ytick.labelsize": size,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.spines.bottom": False,
        "axes.axisbelow": True,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "xtick.labelcolor": muted,
        "ytick.labelcolor": muted,
        "xtick.color": grid,
        "ytick.color": grid,
        "text.color": ink,
        "lines.solid_joinstyle": "round",
    }
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(look)
        yield


def _svg(canvas: FigureCanvasSVG, name: str, kind: str, description: str) -> str:
    """Matplotlib's SVG made fit for the inside of a page: no outside names, unique ids, colours and font by CSS."""
    out = io.StringIO()
    # savefig would draw everything once more, unseen, to lay the figure out; this draw lays it out just the same.
    canvas.print_svg(out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", text, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    opening = f'<svg {box[0]} class="{kind}" role="img" aria-label="{html.escape(description, quote=True)}">'
    text = re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # only definitions are referred to
    text = re.sub(r' id="', f' id="{name}-', text)
    text = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    text = re.sub(r"font-family: [^;\"]*; ?", "", text)
    for role, colour in STAND_IN.items():
        text = text.replace(colour, f"var(--{role})")
    return re.sub(r"\n\s*", "\n", text).strip()
