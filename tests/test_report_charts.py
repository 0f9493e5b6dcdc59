"""Charts: the same numbers give the same text, marks stand where their numbers say, colours come from the page."""

from __future__ import annotations

import random
import re
from xml.etree import ElementTree

import matplotlib as mpl
import pytest

from pennyweight.report import style
from pennyweight.report.charts import NARROW, ROLES, WIDE, Mark, Panel, bars, curves, intervals


def _marks(rng: random.Random, low: float = 40, high: float = 90) -> list[Mark]:
    out = []
    for role in ("teacher", "base", "control", "student", "int8", "int4"):
        value, half = rng.uniform(low, high), rng.uniform(0.5, 3)
        out.append(Mark(role, f"the {role}", value, f"{value:.1f} %", value - half, value + half))
    return out


def _both(chart: str) -> list[ElementTree.Element]:
    """The wide and the narrow drawing, as XML."""
    wide, narrow = ElementTree.fromstring(f"<div>{chart}</div>")
    assert wide.get("class") == "wide" and narrow.get("class") == "narrow"
    return [wide, narrow]


def _texts(svg: ElementTree.Element) -> list[str]:
    return [t.text or "" for t in svg.iter("text")]


def _examples(seed: int) -> list[str]:
    rng = random.Random(seed)
    marks = _marks(rng)
    line = (list(range(1, 30)), [rng.uniform(0.1, 5) for _ in range(29)])
    return [
        intervals("a", marks, "accuracy, %", "described", reference=60.0, bounds=(0, 100)),
        bars("b", marks, "size on disk, MB", "described"),
        curves("c", [Panel("student", "Distilled", {"0": line, "1": line}, "ends at 1")], "step", "loss", "described"),
    ]


def test_same_numbers_same_text_whatever_the_settings_of_matplotlib() -> None:
    seed = random.randrange(10**6)
    before = _examples(seed)
    with mpl.rc_context({"font.size": 31, "svg.fonttype": "path", "axes.grid": True, "lines.linewidth": 9}):
        changed = dict(mpl.rcParams)
        assert _examples(seed) == before
        assert dict(mpl.rcParams) == changed, "a chart must leave the settings as it found them"


def test_colours_are_variables_of_the_page_and_nothing_points_outside() -> None:
    for chart in _examples(3):
        assert not re.findall(r"#[0-9a-fA-F]{6}\b", chart)
        used = set(re.findall(r"var\(--(\w+)\)", chart))
        assert used and used <= set(ROLES)
        assert "http" not in chart and "<style" not in chart and "<metadata" not in chart
        assert "font-family" not in chart
    assert set(ROLES) <= set(style.LIGHT) and set(style.LIGHT) == set(style.DARK)


def test_ids_are_unique_over_a_page_and_every_reference_has_one() -> None:
    page = "".join(_examples(4))
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    referred = set(re.findall(r'href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page))
    assert referred and referred <= set(ids)


def test_drawn_at_its_natural_size_and_described() -> None:
    for chart in _examples(5):
        for svg, width in zip(_both(chart), (WIDE, NARROW), strict=True):
            assert svg.get("viewBox", "").split()[2] == str(width)
            assert svg.get("role") == "img" and svg.get("aria-label") == "described"


def test_dots_stand_where_their_values_say() -> None:
    marks = _marks(random.Random())
    for svg in _both(intervals("q", marks, "accuracy, %", "d")):
        at = {}
        for m in marks:
            for use in svg.iter("use"):
                if f"var(--{m.role})" in (use.get("style") or ""):
                    at[m.role] = float(use.get("x", "nan"))
        first, last = marks[0], marks[-1]
        scale = (at[last.role] - at[first.role]) / (last.value - first.value)
        for m in marks:
            assert at[m.role] == pytest.approx(at[first.role] + scale * (m.value - first.value), abs=0.01)
        for m in marks:
            assert m.label in _texts(svg) and m.text in _texts(svg)
        assert "accuracy, %" in _texts(svg)


def test_bars_start_at_zero_and_are_as_long_as_their_values() -> None:
    rng = random.Random()
    marks = [Mark(r, r, rng.uniform(1, 1000), "x") for r in ("teacher", "student", "int8", "int4")]
    for svg in _both(bars("b", marks, "size, kB", "d")):
        length = {}
        for path in svg.iter("path"):
            role = re.search(r"fill: var\(--(\w+)\)", path.get("style") or "")
            if role and role[1] in {m.role for m in marks}:
                xs = [float(x) for x in re.findall(r"[ML] (-?[\d.]+)", path.get("d") or "")]
                length[role[1]] = max(xs) - min(xs)
        assert [length[m.role] / length["teacher"] for m in marks] == pytest.approx(
            [m.value / marks[0].value for m in marks], abs=1e-3
        )


def test_values_that_span_decades_get_a_logarithmic_axis_with_plain_ticks() -> None:
    marks = [Mark("student", "a", 0.02, "0.02"), Mark("control", "b", 4.0, "4")]
    ticks = _texts(_both(intervals("q", marks, "KL", "d"))[0])
    assert {"0.1", "1"} <= set(ticks)
    bounded = _texts(_both(intervals("q", marks, "KL", "d", bounds=(0, 100)))[0])
    assert "0.1" not in bounded


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_line_for_each_seed_and_their_mean_at_shared_steps(seeds: int) -> None:
    rng = random.Random()
    lines = {str(s): ([1.0, 2.0, 3.0], [rng.uniform(2, 5) for _ in range(3)]) for s in range(seeds)}
    if seeds > 1:
        lines["0"] = ([1.0, 3.0], lines["0"][1][::2])
    svg = _both(curves("c", [Panel("student", "Distilled", lines, "ends")], "step", "loss", "d"))[0]
    drawn = [p for p in svg.iter("path") if "stroke: var(--student)" in (p.get("style") or "")]
    assert len(drawn) == (1 if seeds == 1 else seeds + 1)
    points = [re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", p.get("d") or "") for p in drawn]
    if seeds > 1:
        assert len(points[-1]) == 2
        heights = [float(line[-1][1]) for line in points]
        assert heights[-1] == pytest.approx(sum(heights[:-1]) / seeds, abs=0.01)
    assert {"Distilled", "ends", "step", "loss"} <= set(_texts(svg))


def test_labels_are_text_and_not_markup_or_formulas() -> None:
    marks = [Mark("student", "<b>$x^2$</b>", 1, "&"), Mark("control", "b", 2, "y")]
    chart = bars("b", marks, 'axis "', 'say "<hi>"')
    for svg in _both(chart):
        assert "<b>$x^2$</b>" in _texts(svg) and "&" in _texts(svg)
        assert svg.get("aria-label") == 'say "<hi>"'


def test_a_long_name_leaves_room_for_the_chart() -> None:
    for svg in _both(intervals("q", [Mark("student", "name" * 40, 1, "1"), Mark("control", "b", 2, "2")], "y", "d")):
        label = next(t for t in _texts(svg) if t.startswith("name"))
        assert len(label) == 24 and label.endswith("…")


def test_one_value_alone_and_equal_values_can_be_drawn() -> None:
    for value in (0.0, 1.0, 100.0):
        assert "<svg" in intervals("q", [Mark("student", "a", value, "x")], "y", "d", bounds=(0, 100))
        assert "<svg" in bars("b", [Mark("student", "a", value, "x")], "y", "d")
        assert "<svg" in curves("c", [Panel("student", "a", {"0": ([0.0], [value])})], "x", "y", "d")
