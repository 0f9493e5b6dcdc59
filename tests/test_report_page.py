"""The report page: what it says, in which order, from whole and from broken inputs; safe and accessible."""

from __future__ import annotations

import copy
import itertools
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any

import pytest

from pennyweight.records import sha256_text
from pennyweight.report import style
from pennyweight.report.page import render

EVIL = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>"
OVER_SEEDS = "t interval over 3 seeds"


def interval(mean: float, half: float = 0.01, how: str = OVER_SEEDS) -> dict[str, Any]:
    return {"mean": mean, "low": mean - half, "high": mean + half, "how": how}


def arm(accuracy: float, kl: float) -> dict[str, Any]:
    metrics = {"accuracy": interval(accuracy), "kl_to_teacher": interval(kl, kl / 10), "bits_per_byte": interval(0.43)}
    return {
        "params": 118528,
        "bytes": 476112,
        "seeds": [0, 1, 2],
        "steps": 600,
        "tokens": 3120000,
        "decode_tokens_per_second": 3120.4,
        "metrics": metrics,
        "per_seed": {},
    }


def low_bit(accuracy: float, size: int) -> dict[str, Any]:
    metrics = {"accuracy": interval(accuracy, how="Wilson, 300 trials"), "kl_parent": interval(0.012, 0.001)}
    return {"format": "x", "path": "x", "bytes": size, "params": 118528, "metrics": metrics}


def summary() -> dict[str, Any]:
    teacher = {"accuracy": interval(0.99, how="Wilson, 300 trials"), "bits_per_byte": interval(0.41)}
    difference = {"mean": 0.06, "low": 0.041, "high": 0.079, "how": OVER_SEEDS}
    return {
        "schema": 1,
        "name": "quickstart",
        "version": "0.1.0",
        "recipe_hash": sha256_text("recipe"),
        "finished": "2026-01-02T03:04:05+00:00",
        "seeds": [0, 1, 2],
        "teacher": {
            "name": "the teacher",
            "path": "/somewhere/private",
            "fingerprint": sha256_text("teacher"),
            "licence": "Apache-2.0",
            "params": 853120,
            "bytes": 3388300,
            "bytes_fp32": 3412480,
            "decode_tokens_per_second": 1480.2,
            "metrics": teacher,
        },
        "arms": {"base": arm(0.0, 3.9), "sft": arm(0.8706, 0.061), "kd": arm(0.9306, 0.0432)},
        "quantized": {"int4": low_bit(0.902, 109300), "int8": low_bit(0.929, 141200)},
        "gap_recovered": {
            "accuracy": {**interval(0.52, 0.2), "difference": difference, "verdict": "kd better"},
        },
        "targets": {"kind": "sampled", "tokens": 1040000, "bytes": 11440000, "bytes_per_token": 11.0},
        "data": {
            "source": "chain_sum",
            "licence": "CC0-1.0",
            "train": 10790,
            "evaluation": 500,
            "train_tokens": 1040211,
            "eval_tokens": 48012,
            "duplicates": 1204,
            "rejected": 7,
            "overlap": {"normalised": 0, "ngram": 3, "eval": 500},
            "authors": {"given": 10290, "the teacher": 500},
        },
        "stages": {
            "teacher": {"seconds": 412.3, "tokens": 9830400, "peak_memory_bytes": 1420000000},
            "kd-0": {"seconds": 92.0, "tokens": 3120000, "peak_memory_bytes": 990000000},
        },
        "environment": {"device": "cpu", "memory": 16777216000, "packages": {"torch": "2.13.0", "numpy": None}},
        "ledger": {"entries": 64, "records": 11290, "head": sha256_text("head")},
    }


def metrics(seeds: int = 3) -> list[dict[str, Any]]:
    return [
        {"stage": "train", "arm": a, "seed": s, "step": step, "loss": 5 * math.exp(-step / 30) + 0.1 * s + 0.05}
        for a in ("sft", "kd")
        for s in range(seeds)
        for step in (1, 50, 100)
    ]


def samples() -> list[dict[str, Any]]:
    right, wrong = {"text": "The answer is 43.", "correct": True}, {"text": EVIL, "correct": False}
    return [
        {
            "prompt": EVIL,
            "gold": EVIL,
            "outputs": {"int4": right, "kd": wrong, "teacher": {"text": "", "correct": None}},
        }
    ]


class Page(HTMLParser):
    """A page taken apart; raises where elements are not closed as they were opened."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[tuple[int, str]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"left open: {self._open}"
        self.text = " ".join("".join(self.words).replace("\u00a0", " ").replace("\u2212", "-").split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br"):
            self._open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self._open and re.fullmatch("h[1-6]", self._open[-1]):
            level, text = self.headings[-1]
            self.headings[-1] = (level, text + data)
        if "style" not in self._open and "svg" not in self._open:
            self.words.append(data + (" " if self._open and self._open[-1] not in ("b", "strong", "code") else ""))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def whole() -> tuple[str, Page]:
    text = render(summary(), metrics(), samples())
    return text, Page(text)


def said(*changes: Any) -> str:
    """The words of the page after changing the summary by functions of it."""
    s = summary()
    for change in changes:
        change(s)
    return Page(render(s, metrics(1), [])).text


def test_it_starts_with_what_was_made(whole: tuple[str, Page]) -> None:
    words = whole[1].text
    lead = (
        "A student of 0.12 M parameters, 1/7 of its teacher, keeps 94 % of the teacher’s accuracy; "
        "its int4 copy takes 1/31 of the teacher’s bytes."
    )
    assert lead in words
    assert "On accuracy it is better than its control" in words
    assert "the difference is +6.0 percentage points (95 % interval +4.1 to +7.9)" in words


def test_the_parts_stand_in_order(whole: tuple[str, Page]) -> None:
    assert [text for level, text in whole[1].headings if level == 2] == [
        "How good is it?",
        "How small and how fast?",
        "How did training go?",
        "What do they write?",
        "What did it take?",
        "What was it made from?",
        "What did the teacher hand over?",
        "How can it be checked?",
    ]


def test_the_numbers_are_there_with_units(whole: tuple[str, Page]) -> None:
    words = whole[1].text
    for expected in (
        "93.1 92.1–94.1",
        "52 % 32 to 72",
        "109 kB",
        "3.39 MB",
        "3,120",
        "8 min 24 s in all",
        "12,950,400",
        "1.42 GB",
        "10,790 samples, 1,040,211 tokens",
        "3 of 500 held-out samples share a 13-gram",
        "the data itself: 10,290 (95 %)",
        "Bytes per token 11.0",
        "64 entries, 11,290 records",
        "torch 2.13.0",
        "t interval over 3 seeds",
        "Wilson, 300 trials",
        sha256_text("head"),
        sha256_text("recipe"),
        sha256_text("teacher"),
    ):
        assert expected in words, expected
    assert "/somewhere/private" not in whole[0], "paths of a machine are nobody's business"


def test_outputs_are_text_and_marked_in_words(whole: tuple[str, Page]) -> None:
    text, page = whole
    assert not page.all("script") and not page.all("img")
    assert text.count("&lt;script&gt;alert(1)") == 3
    assert EVIL in page.text
    for mark in ("✓ correct", "✗ wrong", "not judged", "(empty)"):
        assert mark in page.text
    places = [page.text.index(who) for who in ("Teacher not judged", "Distilled (kd) ✗", "int4 copy ✓")]
    assert places == sorted(places), "models stand in their order, not in that of the file"


def test_whatever_is_text_in_the_summary_is_escaped() -> None:
    s = summary()

    def poison(node: Any) -> Any:
        if isinstance(node, dict):
            return {k: poison(v) for k, v in node.items()}
        if isinstance(node, list):
            return [poison(v) for v in node]
        return EVIL if isinstance(node, str) else node

    s = poison(s)
    s["data"]["authors"] = {EVIL: 3}
    s["stages"][EVIL] = s["stages"]["kd-0"]
    s["arms"][EVIL] = s["arms"].pop("kd")
    lines = [{**line, "arm": EVIL} for line in metrics(1)]
    shown = [{"prompt": "p", "gold": None, "outputs": {EVIL: {"text": "x", "correct": None}}}]
    page = Page(render(s, lines, shown))
    assert not page.all("script") and not page.all("img")


def test_text_that_utf8_or_html_cannot_hold_is_made_visible() -> None:
    bad = "a\ud800b\x00c\x1b[31m\r\nd\x85"
    text = render({}, [], [{"prompt": bad, "gold": None, "outputs": {}}])
    text.encode("utf-8")
    assert "a?b␀c␛[31m\nd�" in text


def test_nothing_is_fetched_and_nothing_runs(whole: tuple[str, Page]) -> None:
    text, page = whole
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), name
            if name in ("src", "href", "xlink:href", "action"):
                assert value and (value.startswith("#") or value == "data:,")
    assert "http://" not in text and "https://" not in text and "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    policy = [m["content"] or "" for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy and "default-src 'none'" in policy[0] and "script" not in policy[0]


def test_it_can_be_read_without_seeing_it(whole: tuple[str, Page]) -> None:
    page = whole[1]
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("title")) == 1 and "quickstart" in page.text
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels)), levels
    assert len(page.all("svg")) == 8
    for svg in page.all("svg"):
        assert svg["role"] == "img" and len(svg["aria-label"] or "") > 20
    assert all(th.get("scope") in ("col", "row") for th in page.all("th"))
    boxes = [d for d in page.all("div") if d.get("class") == "scroll"]
    assert len(boxes) == len(page.all("table")) >= 4
    assert all(b["tabindex"] == "0" and b["aria-label"] for b in boxes)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {s["aria-labelledby"] for s in page.all("section")} <= set(ids)


def test_it_fits_a_phone_and_the_dark(whole: tuple[str, Page]) -> None:
    text, page = whole
    assert "width=device-width, initial-scale=1" in [m.get("content") for m in page.all("meta")]
    assert "prefers-color-scheme:dark" in text and "color-scheme:light dark" in text
    used = set(re.findall(r"var\(--(\w+)\)", text))
    assert used <= set(style.LIGHT)


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("theme", [style.LIGHT, style.DARK], ids=["light", "dark"])
def test_contrast_of_everything_written(theme: dict[str, str]) -> None:
    for role in set(theme) - {"page", "card", "line", "grid"}:
        for ground in ("page", "card"):
            light, dark = sorted((_luminance(theme[role]), _luminance(theme[ground])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (role, ground)


def test_same_input_same_page_and_input_left_alone(whole: tuple[str, Page]) -> None:
    s, m, o = summary(), metrics(), samples()
    before = copy.deepcopy((s, m, o))
    assert render(s, m, o) == whole[0]
    assert (s, m, o) == before


def test_a_draw_is_called_a_draw() -> None:
    def draw(s: dict[str, Any]) -> None:
        gap = s["gap_recovered"]["accuracy"]
        gap["verdict"], gap["difference"] = "draw", {"mean": 0.004, "low": -0.009, "high": 0.017}

    words = said(draw)
    assert "On accuracy it is a draw with its control" in words
    assert "+0.4 percentage points (95 % interval -0.9 to +1.7, which includes zero)" in words
    assert "teacher 99.0 %: a draw with the control" in words
    assert "better than its control" not in words


def test_a_defeat_is_called_worse() -> None:
    words = said(lambda s: s["gap_recovered"]["accuracy"].update(verdict="sft better"))
    assert "On accuracy it is worse than its control" in words and "control better" in words
    assert "better than its control" not in words


def test_one_seed_says_that_there_is_no_interval() -> None:
    def one(s: dict[str, Any]) -> None:
        gap = s["gap_recovered"]["accuracy"]
        gap.update(low=None, high=None, difference={"mean": 0.06, "low": None, "high": None})
        for a in s["arms"].values():
            a["seeds"] = [0]

    words = said(one)
    assert (
        "one seed has no interval of it: the arms' own 95 % intervals do not overlap, but another seed may differ"
        in words.replace("’", "'")
    )
    assert "One seed of each arm was trained." in words


def test_without_tasks_it_leads_with_the_distance_then_with_bits() -> None:
    def without(*names: str) -> Any:
        def change(s: dict[str, Any]) -> None:
            for m in (s["teacher"], *s["arms"].values(), *s["quantized"].values()):
                for name in names:
                    m["metrics"].pop(name, None)
            s["gap_recovered"] = {}

        return change

    words = said(without("accuracy"))
    assert "is 0.0432 nats per token away from its teacher (KL divergence, 0 is the same model), from 3.90" in words
    words = said(without("accuracy", "kl_to_teacher"))
    assert "needs 0.430 bits per byte of text where its teacher needs 0.410 bits per byte;" in words


def test_a_teacher_stored_in_half_precision_is_compared_as_it_is_stored() -> None:
    words = said(lambda s: s["teacher"].update(bytes=1706240))
    assert "its int4 copy takes 1/16 of the teacher’s bytes" in words
    assert "Teacher, in 32 bit" in words and "Teacher, as stored" in words


def test_no_copies_no_samples_no_metrics_no_gap() -> None:
    s = summary()
    s.update(quantized={}, gap_recovered={}, targets={"kind": "dense", "tokens": 0, "bytes": 0})
    page = Page(render(s, [], []))
    assert "keeps 94 % of the teacher’s accuracy." in page.text and "copy" not in page.text
    assert "What do they write?" not in page.text and "How did training go?" not in page.text
    assert "dense: the teacher’s whole distribution" in page.text


def test_plain_fine_tuning_has_no_control() -> None:
    words = said(lambda s: s["arms"].pop("kd"), lambda s: s.update(gap_recovered={}))
    assert "keeps 88 % of the teacher’s accuracy" in words and "Fine-tuned (sft)" in words
    assert "ontrol" not in words


def test_reinforcement_is_held_against_its_own_start() -> None:
    reinforced = {"base": arm(0.367, 0.0), "grpo": arm(0.953, 0.2)}
    words = said(lambda s: s.update(arms=reinforced, gap_recovered={}))
    assert "answers 95.3 % of the held-out problems right, where it was 36.7 % before training" in words
    assert "of the teacher’s accuracy" not in words


def test_a_null_metric_is_a_dash() -> None:
    def null(s: dict[str, Any]) -> None:
        s["arms"]["sft"]["metrics"]["accuracy"] = {"mean": None, "low": None, "high": None, "how": "no trials"}
        s["arms"]["base"]["metrics"]["accuracy"]["mean"] = float("nan")

    words = said(null)
    assert "nan" not in words.lower().split() and "None" not in words
    assert "keeps 94 %" in words


@pytest.mark.parametrize(
    "early", [{}, {"recipe": {"name": "quickstart"}, "unfinished": True, "stages": {"teacher": {}}}]
)
def test_an_unfinished_run_says_so(early: dict[str, Any]) -> None:
    page = Page(render(early, metrics(1), []))
    assert "This run is not finished." in page.text and "No student has been measured yet." in page.text
    assert ("Stages done so far: teacher." if early else "Stages done so far: none.") in page.text


def test_a_finished_run_does_not(whole: tuple[str, Page]) -> None:
    assert "not finished" not in whole[1].text


def test_any_part_may_be_missing_or_null() -> None:
    rng = random.Random()

    def places(node: Any, path: tuple = ()) -> list[tuple]:
        if not isinstance(node, dict):
            return []
        return [p for k, v in node.items() for p in ((*path, k), *places(v, (*path, k)))]

    for _ in range(6):
        s, broken = summary(), []
        for _ in range(rng.randint(3, 12)):
            *path, last = rng.choice(places(s) or [("name",)])
            node = s
            for key in path:
                node = node[key]
            broken.append((*path, last))
            if rng.random() < 0.5:
                node.pop(last, None)
            else:
                node[last] = None
        try:
            Page(render(s, rng.choice([metrics(1), []]), rng.choice([samples(), []])))
        except Exception as e:
            raise AssertionError(f"cannot draw a summary without {broken}") from e


def test_drawing_a_report_loads_no_torch() -> None:
    code = "import sys, pennyweight.report.page, pennyweight.report.trackers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
