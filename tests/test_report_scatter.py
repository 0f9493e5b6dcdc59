"""Quality against bytes: every model stands where its numbers say, and labels never touch."""

from __future__ import annotations

import itertools
import math
import random
import re
from xml.etree import ElementTree

import pytest
from test_report_page import Page, interval, low_bit, metrics, summary

from pennyweight.report.page import render
from pennyweight.report.scatter import Dot, beside, quality_against_bytes, scatter
from pennyweight.report.view import view


def with_copies():
    s = summary()
    s["quantized"] = {"int8": low_bit(0.929, 141200), "int4": {**low_bit(0.902, 109300), "recovered": 100}}
    s["rounded"] = {"int4": low_bit(0.861, 109300)}
    return s


def words(chart) -> str:
    return re.sub(r"<[^>]+>", " ", str(chart)).replace("\u00a0", " ")


def wide(chart: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<div>{chart}</div>")[0]


def texts(svg) -> list[str]:
    return [t.text or "" for t in svg.iter("text")]


def test_it_has_the_teacher_the_arms_and_every_copy_with_and_without_recovery():
    found = quality_against_bytes(view(with_copies()))
    assert found is not None
    svg = re.search(r"<svg.*?</svg>", found, re.DOTALL)
    assert svg is not None
    drawn = texts(ElementTree.fromstring(svg[0]))
    for label in ("Teacher", "Control (sft)", "Distilled (kd)", "int8", "int4"):
        assert drawn.count(label) == 1, label
    assert "Before training" not in drawn
    assert {"accuracy (pass@1), %", "size on disk, MB"} <= set(drawn)
    said = words(found)
    assert "The int4 copy: accuracy 90.2 % in 109 kB, 1/31 of the teacher’s bytes" in said
    assert "int4, rounded only: 86.1 % (85.1–87.1) in 109 kB" in said
    label = re.search(r'aria-label="([^"]*)"', found)
    assert label is not None and label[1].count(" in ") == 6 and "Teacher 99.0" in label[1]


def test_hollow_is_rounded_only():
    dots = [Dot("int4", "int4", 1, 50), Dot("int8", "int8", 3, 60, hollow=True), Dot("teacher", "t", 9, 70)]
    filled = [u.get("style") for u in wide(scatter("n", dots, "x", "y", "d")).iter("use") if u.get("style")]
    assert sum("fill: var(--card)" in s and "stroke: var(--int8)" in s for s in filled) == 1
    assert sum("fill: var(--int4)" in s for s in filled) == 1
    found = str(quality_against_bytes(view(with_copies())))
    assert found.count("fill: var(--card)") == 4  # int8, and int4 without recovery, each on a wide and a narrow page


def test_without_recovery_nothing_is_said_of_it():
    s = with_copies()
    s["rounded"] = {}
    assert "hollow" not in words(quality_against_bytes(view(s)))


def test_without_accuracy_it_goes_by_bits_per_byte():
    s = with_copies()
    models = [s["teacher"], *s["arms"].values(), *s["quantized"].values(), *s["rounded"].values()]
    for i, m in enumerate(models):
        m["metrics"] = {"bits_per_byte": interval(0.4 + 0.01 * i)}
    found = words(quality_against_bytes(view(s)))
    assert "bits per byte" in found and "further down is better" in found and "%" not in found.replace("95 %", "")


@pytest.mark.parametrize("missing", ["copies", "metrics", "bytes"])
def test_where_there_is_no_picture_the_sizes_are_drawn(missing):
    s = with_copies()
    s["rounded"] = {}
    if missing == "copies":
        s["quantized"] = {}
    for m in s["quantized"].values():
        m.pop(missing)
    assert quality_against_bytes(view(s)) is None
    page = Page(render(s, metrics(1), []))
    assert any("size on disk" in (svg["aria-label"] or "").lower() for svg in page.all("svg"))


def test_it_stands_in_the_report_in_the_place_of_sizes_alone():
    text = render(with_copies(), metrics(1), [])
    assert "accuracy (pass@1) against size on disk." in text and "Size on disk. " not in text
    assert "quality-bytes-wide" in text and "size-bytes-wide" not in text


def test_a_copy_of_any_format_is_called_a_copy():
    s = with_copies()
    s["quantized"]["nvfp4"] = low_bit(0.9, 120000)
    page = Page(render(s, metrics(1), [])).text
    assert "nvfp4 copy" in page and "Student (nvfp4)" not in page
    assert [(m.key, m.role) for m in view(s).copies] == [("int8", "int8"), ("nvfp4", "int4"), ("int4", "int4")]


def test_dots_stand_where_bytes_and_values_say():
    rng = random.Random()
    roles = ("teacher", "control", "student", "int8", "int4")
    xs = [10 ** (0.6 * i + rng.uniform(0, 0.4)) for i in range(5)]  # never over the same place
    dots = [Dot(role, role, x, rng.uniform(10, 90)) for role, x in zip(roles, rng.sample(xs, 5), strict=True)]
    at = {}
    for use in wide(scatter("n", dots, "x", "y", "d")).iter("use"):
        for d in dots:
            if f"fill: var(--{d.role})" in (use.get("style") or ""):
                at[d.role] = float(use.get("x", "nan")), float(use.get("y", "nan"))
    a, b = dots[:2]
    for d in dots:
        for i, value in ((0, lambda m: math.log10(m.x)), (1, lambda m: m.y)):
            scale = (at[b.role][i] - at[a.role][i]) / (value(b) - value(a))
            assert at[d.role][i] == pytest.approx(at[a.role][i] + scale * (value(d) - value(a)), abs=0.1)


def test_models_of_the_same_size_stand_side_by_side():
    dots = [Dot("control", "a", 5, 50), Dot("student", "b", 5, 50), Dot("teacher", "t", 50, 60)]
    xs = [float(u.get("x", "nan")) for u in wide(scatter("n", dots, "x", "y", "d")).iter("use") if u.get("style")]
    marks = sorted(x for x in xs if x > 60)
    assert any(b - a == pytest.approx(12, abs=0.01) for a, b in itertools.pairwise(marks))


def overlap(a, b) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def test_a_label_finds_a_place_that_touches_nothing():
    rng = random.Random()
    bounds = (0.0, 0.0, 900.0, 320.0)
    for _ in range(20):
        at = [(rng.uniform(20, 880), rng.uniform(20, 300)) for _ in range(18)]
        marks = [(x - 6, y - 6, x + 6, y + 6) for x, y in at]
        taken, written = list(marks), []
        for place in at:
            box = beside(place, (rng.uniform(20, 110), 14.0), taken, written, bounds)
            assert not any(overlap(box, other) for other in taken), at
            assert box[0] >= 0 and box[1] >= 0 and box[2] <= 900 and box[3] <= 320
            taken.append(box)
            written.append(box)


def test_labels_do_not_touch_on_a_wide_nor_on_a_narrow_page():
    s = with_copies()
    for i, fmt in enumerate(("nvfp4", "mxfp4", "int3", "fp8_block", "mxfp8")):
        s["quantized"][fmt] = {**low_bit(0.9 - 0.01 * i, 109300 + 4000 * i), "recovered": 1}
        s["rounded"][fmt] = low_bit(0.85 - 0.02 * i, 109300 + 4000 * i)
    found = str(quality_against_bytes(view(s)))
    names = {"Teacher", "Control (sft)", "Distilled (kd)", *s["quantized"]}
    for svg in re.findall(r"<svg.*?</svg>", found, re.DOTALL):
        boxes = {}
        for t in ElementTree.fromstring(svg).iter("text"):
            if t.text in names:
                x, y = (float(v) for v in (t.get("x"), t.get("y")) if v)
                assert "text-anchor: start" in (t.get("style") or "")
                boxes[t.text] = (x, y - 9, x + 6 * len(t.text), y + 2)
        assert set(boxes) == names
        for a, b in itertools.combinations(names, 2):
            assert not overlap(boxes[a], boxes[b]), (a, b)


def test_one_model_and_equal_values_can_be_drawn():
    assert "<svg" in scatter("n", [Dot("int4", "a", 1, 0), Dot("int8", "b", 1, 0)], "x", "y", "d")
