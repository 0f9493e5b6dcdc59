"""Reports and plans in another language: nothing of ours is left in English, and what is not ours stays as it is."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from pathlib import Path

import pytest
from rich.cells import cell_len
from test_bill import SPENT, made
from test_chain import told_of
from test_plan_recipe import LLAMA
from test_report_page import metrics, samples, summary
from test_report_rollouts import metrics as rollouts
from test_report_rollouts import responses
from test_report_scatter import with_copies

from pennyweight.cli import main
from pennyweight.errors import RecipeError
from pennyweight.meter.bill import per_point
from pennyweight.plan.pace import on_this
from pennyweight.plan.reckon import reckon
from pennyweight.plan.seen import seen_pace
from pennyweight.plan.subjects import subjects_of
from pennyweight.plan.work import rows_of
from pennyweight.recipe_file import load
from pennyweight.report.chain_page import (
    chain_bill,
    chain_headline,
    compared_on,
    finished,
    leading,
    render_chain,
    to_be_run,
)
from pennyweight.report.graded import aligned, paragraph
from pennyweight.report.language import ENGLISH, LANGUAGES, english_words, in_language
from pennyweight.report.page import render
from pennyweight.report.plan_fits import fit_lines
from pennyweight.report.recipe_plan import lasts, span
from pennyweight.report.serving import serving_lines
from pennyweight.train.rollout_watch import CURES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pennyweight"
KO = in_language("ko")
KEYS = [k for t in tomllib.loads((PACKAGE / "report" / "ko.toml").read_text()).values() for k in t]

SHOWN = [
    *(PACKAGE / "report" / f"{n}.py" for n in ("page", "quality", "sections", "origin", "rollouts", "scatter", "view")),
    *(PACKAGE / "report" / f"{n}.py" for n in ("chain_page", "run_bill", "recipe_plan", "markup", "bill")),
    *(PACKAGE / "report" / f"{n}.py" for n in ("serving", "plan_fits")),
    *(PACKAGE / "plan" / f"{n}.py" for n in ("reckon", "pace", "seen", "work", "subjects", "assumed", "outlook")),
    *(PACKAGE / "plan" / f"{n}.py" for n in ("forecast", "claim", "fits", "serving", "disk", "room")),
    *(PACKAGE / n for n in ("train/tripwire.py", "train/rollout_watch.py", "model/lineage.py")),
    *(PACKAGE / n for n in ("records.py", "evaluate/intervals.py", "meter/rates.py", "meter/bill.py")),
]
"""Files whose texts are shown on a page or by a plan."""

NAMES = {
    "evaluate teacher", "evaluate students", "train teacher", "write student", "write teacher", "score teacher",
    "prepare teacher", "pennyweight ledger verify RUN", "git dirty", "dense, new", "outputs pairs",
    "light dark", "the chips'",
    "a thread of an AMD EPYC", "measured on a virtual machine with two cores of an AMD EPYC", "devices at once",
    "config of", "the model takes", "budget.usd_per_hour (of a device and an hour", "of a million tokens",
    "is in no catalogue of chips, or not in this precision", "nothing can be foretold, since",
}  # fmt: skip
"""What stays as it is: names of stages, commands and chips; keys; and what errors and warnings alone say."""


def texts(page: str) -> list[str]:
    """What a reader sees of a page, less code, links and what models wrote."""
    page = re.sub(r"<(style|pre|code|a)\b.*?</\1>", "", page, flags=re.DOTALL)
    told = re.findall(r'(?:aria-label|title)="([^"]*)"', page)
    return [*told, *(t for t in re.split(r"<[^>]*>", page) if t.strip())]


def left_in_english(said: list[str], theirs: str) -> list[str]:
    """Texts with two English words in them that are not the user's."""
    known = set(re.findall(r"\w+", theirs))
    bare = [(t, re.sub(r"--\w+|[a-z_]+\.[a-z_.]+", "", t)) for t in said]  # less options and settings
    return [t for t, b in bare if len([w for w in english_words(b) if w not in known]) > 1]


def whole_run() -> dict:
    """A summary that has every part: several seeds, low-bit copies of both kinds, a bill, an inspection."""
    s = with_copies()
    s["bill"] = made() | {"per_point": per_point(SPENT, 0.5, 0.6)}
    s["bill"]["spent"] = SPENT | {"energy": "5 W for each of 2 threads, without a counter"}
    return s


TRIPPED = (
    "entropy collapsed: 0.1, and 0.5 at the start, nats a token",
    "90% of responses are cut off; 3% at the start",
    "the KL to the start stayed above 0.5 nats a token: it is 0.7",
    "the reward is being hacked: what is credited as right rose from 30% (25% to 35%) to 80% (75% to 85%), while "
    "accuracy on 100 held-out problems, by their tasks' own verifier, went from 30% (20% to 40%) to 25% (15% to 35%)",
)
THEIRS = "evaluate students the teacher chain_sum torch int8 int4 kd sft grpo cpu kB kWh Wh pennyweight Pennyweight nat"


@pytest.mark.parametrize("kind", ["whole", "plain", "unfinished", "rollouts"])
def test_no_text_of_a_report_is_left_in_english(kind):
    s, lines, shown = whole_run(), metrics(), []
    if kind == "plain":
        s = summary()
        s["seeds"], s["arms"]["kd"]["seeds"] = [0], [0]
        s["targets"] = {"kind": "text"}
        lines = metrics(1)
    if kind == "unfinished":
        s |= {"unfinished": True, "arms": {}, "quantized": {}, "gap_recovered": {}}
        cure = f"{CURES['stuck']}; or loosen [tripwires.rollouts] if this is right"
        lines = [{"arm": "sft", "seed": 0, "step": 9, "tripped": t, "cure": cure} for t in TRIPPED]
    if kind == "rollouts":
        s["arms"]["grpo"] = s["arms"].pop("kd")
        lines, shown = rollouts(seeds=2), responses()
    page = KO.page(render(s, lines, samples(), shown))
    assert left_in_english(texts(page), THEIRS) == []
    assert '<html lang="ko"' in page and page.startswith("<!doctype html>")


@pytest.mark.parametrize("path", SHOWN, ids=lambda p: p.name)
def test_every_text_of_the_code_is_in_the_table(path):
    """Of each text of three words or more, its parts between figures stand in a phrase of the table."""
    keys = "\n".join(re.sub(r"\{\w+\}", "{}", k) for k in KEYS)
    missing = [t for t in _parts(path) if t not in keys and t not in NAMES]
    assert missing == [], f"add them to pennyweight/report/ko.toml: {missing}"


def _parts(path: Path) -> list[str]:
    tree, out = ast.parse(path.read_text(encoding="utf-8")), []
    apart = [n for n in ast.walk(tree) if isinstance(n, ast.Raise)]
    apart += [n for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    skipped = {id(c) for n in apart for c in ast.walk(n)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            for part in re.split(r"\{\w*\}|(?<=[.?]) ", node.value.replace("\u00a0", " ")):
                text = part.strip(" .:;,()%\n")
                if len(re.findall("[a-z]{2,}", text)) > 1 and " " in text and "<" not in text and "=" not in text:
                    out.append(text)
    return [t for t in out if not t.startswith("default-src")]


@pytest.mark.parametrize(
    "found",
    [
        told_of(0.1, 0.2, 0.5),
        told_of(0.5, 0.1, params=250),
        told_of(0.1, 0.5, measured_on=None),
        told_of(0.3, 0.4, state="not run"),
        told_of(0.3, metrics={}),
    ],
)
def test_sentences_on_a_chain(found):
    done = finished(found)
    metric = leading(done)
    said = [chain_headline(found), (metric and compared_on(done, metric)) or "", to_be_run(found) or ""]
    assert left_in_english([KO(t) for t in said], "") == []


def test_the_bill_of_a_chain():
    ends = {"low": 0.5, "middle": 1.0, "high": 2.0}
    bill = {"seconds": 1000.0, "kwh": 0.4, "usd": 0.1, "budget": {"hours": 3, "kwh": 2, "usd": 5}}
    for foretold in (None, {"hours": ends, "kwh": ends}, {"hours": ends, "kwh": ends, "money": ends}):
        said = KO(chain_bill({"bill": bill | {"foretold": foretold}}) or "")
        assert left_in_english([said], "") == [] and ("(예측 30분 00초 – 2시간 00분); 400 Wh(장치만; " in said) == bool(
            foretold
        )


def test_what_fits_and_what_does_not():
    ends = {"low": 0.5, "middle": 1.0, "high": 2.0}
    best = {"devices": 2, "chip": "H100", "currency": "USD", "price": ends, "hours": ends, "money": ends}
    found = {"fits": False, "stage": "kd-0", "most": 9e10, "memory": 8e10, "settings": None, "left": None, "by": []}
    found |= {"cheapest": None, "chips": []}
    cures = ({"settings": ["train.lora.rank=16"]}, {"left": {"stage": "kd-0", "bytes": 9e10}}, {"fits": True})
    for more in ({}, *cures, {"cheapest": best}, {"cheapest": best, "by": ["train.weights=bfloat16"]}):
        said = [KO(line) for line in fit_lines(found | more, span, lasts)]
        assert len(said) == 2 and left_in_english(said, "train bfloat16 lora rank weights kd") == []
    none = {"chip": "H100", "context": 64, "currency": "USD", "formats": []}
    assert serving_lines(none, span, KO) == ["서빙: H100 64개로도 모델이 들어가지 않습니다"]


def test_the_page_of_a_chain(no_charts):
    found = told_of(0.1, 0.2, 0.5, needs=["b"])
    for name, s in found["stages"].items():
        s |= {"seconds": 75.0, "tokens_trained": 5000, "tokens_generated": 700, "peak_memory_bytes": 1e9}
        s |= {"report": f"{name}/report.html", "ledger": "0" * 64}
    found["stages"]["d"] = {"state": "unfinished", "needs": ["c"]}
    found |= {k: found["stages"]["a"][k] for k in ("seconds", "tokens_trained", "tokens_generated")}
    found |= {"version": "0.1.0", "peak_memory_bytes": 1e9}
    page = KO.page(render_chain(found))
    assert left_in_english(texts(page), "Pennyweight sft") == [] and 'href="a/report.html">a</a>' in page


def test_reasons_of_a_recipe_that_was_tried():
    recipe = load(Path(__file__).parent / "tiny.toml")
    of = subjects_of(recipe)
    step = {"what": "train sft", "seconds": 1.0, "memory": 7e8, "rows": 8, "length": 40.0}
    pace = seen_pace(on_this(None, 1, False), of, {"timed": [step], "watts": 50.0})
    reasons = reckon(recipe, of, rows_of(recipe), pace, None)["reasons"]
    assert "50 W" in reasons["kwh"] and "tried here" in reasons["memory"]
    assert left_in_english([KO(r) for r in reasons.values()], "data context trained budget usd_per_hour price") == []


def test_what_a_model_will_take(capsys, monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    monkeypatch.setenv("COLUMNS", "80")
    for more in (["--on", "h100x8"], ["--on", "h100", "--teacher", str(tmp_path), "--precision", "fp8"]):
        asked = ["plan", str(tmp_path), "--tokens", "10B", "--length", "64", *more, "--lang", "ko"]
        monkeypatch.setattr("sys.argv", ["pennyweight", *asked])
        with pytest.raises(SystemExit):
            main()
        lines = capsys.readouterr().out.splitlines()
        theirs = f"{tmp_path.name} kWh docs bill Nebius RunPod train moments compute dtype bfloat16"
        assert left_in_english(lines, theirs) == [] and max(map(cell_len, lines)) <= 80


@pytest.mark.parametrize(
    "arguments",
    [
        ["recipes/quickstart.toml"],
        ["recipes/r1.toml", "--on", "h100x8"],
        ["--chips"],
        ["--claim", "deepseek-v3"],
        ["--claim", "llama-3.2"],
    ],
)
def test_a_plan_on_the_terminal_is_aligned_and_of_80_columns(arguments, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "80")
    more = ["--out", str(tmp_path / "plan.html")] if "recipes" in arguments[0] else []
    monkeypatch.setattr("sys.argv", ["pennyweight", "plan", *arguments, "--lang", "ko", *more])
    with pytest.raises(SystemExit) as left:
        main()
    lines = capsys.readouterr().out.splitlines()
    assert left.value.code == 0 and max(map(cell_len, lines)) <= 80
    theirs = "evaluate teacher students kd sft threads of an AMD EPYC data.context budget.usd_per_hour config.json"
    if "--claim" not in arguments:  # which has its file's words, in the language of that file
        assert (
            left_in_english(lines, theirs + " catalogue FILE.toml json dense Mercatus Nebius Silicon zero grpo") == []
        )
    else:
        assert not {"checks", "holds", "covers", "peak", "device-hours"} & set(" ".join(lines).split())
    if more:
        page = (tmp_path / "plan.html").read_text()
        assert (
            left_in_english(texts(page), theirs + " Mercatus Silicon Nebius AWS Pennyweight Huawei Ascend zero rl grpo")
            == []
        )
        assert 'lang="ko"' in page
        assert ">data</th>" in page and ">로짓 조각</th>" in page


def test_english_is_what_it_was_and_others_are_refused_in_a_sentence(capsys, monkeypatch):
    page = render(summary(), metrics(1), [])
    assert ENGLISH.page(page) is page and in_language("en")("The bill") == "The bill"
    assert LANGUAGES == ("en", "ko")
    with pytest.raises(RecipeError, match="--lang fr is none of en, ko; name one of them"):
        in_language("fr")
    for command in (["plan", "--chips"], ["report", "nowhere"]):
        monkeypatch.setattr("sys.argv", ["pennyweight", *command, "--lang", "fr"])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_what_users_and_models_wrote_is_not_translated():
    s = summary()
    s["name"], s["data"]["source"] = "The bill", "training step 4"
    said = {"prompt": "The bill", "gold": None, "outputs": {"kd": {"text": "How good is it?", "correct": None}}}
    page = KO.page(render(s, metrics(1), [said]))
    assert "Pennyweight 보고서: The bill" in page and ">The bill</pre>" in page and ">How good is it?</pre>" in page
    assert "training step 4" in page and '<h2 id="bill">' not in page


def test_markup_stays_as_it_is():
    page = render(whole_run(), metrics(), samples())
    tags = lambda text: re.findall(r"</?[a-zA-Z0-9]+", text)  # noqa: E731
    assert tags(KO.page(page)) == tags(page) and "<script" not in KO.page(page)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("1", "1을"),
        ("2", "2를"),
        ("10 %", "10 %를"),
        ("0.3 Wh", "0.3 Wh를"),
        ("3.44 MB", "3.44 MB를"),
        ("0.1 M", "0.1 M을"),
    ],
)
def test_particles_go_by_the_last_sound(word, said):
    assert KO(f"At its most it takes {word} of memory.") == f"메모리는 가장 많을 때 {said} 씁니다."


def test_a_particle_behind_brackets_goes_by_the_word_before_them():
    assert KO("Control (sft) beside Teacher, with 95 % intervals") == "대조군(sft)과 교사, 95 % 구간과 함께"


def test_sentences_are_translated_one_by_one_and_figures_stay():
    assert KO("The dashed line is the teacher. Sample 3") == "점선은 교사입니다. 표본 3"
    assert KO("1\u00a0min\u00a024\u00a0s") == "1분 24초"
    assert KO("of a kind that nobody knows") == "of a kind that nobody knows"


def test_lines_are_as_wide_as_they_look():
    rows = aligned([["단계", "토큰"], ["teacher", "3.3M"]])
    assert len({cell_len(r) for r in rows}) == 1
    long = "가나다라 " * 30
    assert all(cell_len(line) <= 40 for line in paragraph(long, 40).splitlines())
    assert paragraph(long, 40, "  - ", "    ").startswith("  - 가나다라") and paragraph("a b", 40) == "a b"


def test_places_of_a_phrase_are_those_of_its_key():
    phrases = {k: v for t in tomllib.loads((PACKAGE / "report" / "ko.toml").read_text()).values() for k, v in t.items()}
    for key, phrase in phrases.items():
        names = re.findall(r"\{(\w+)\}", key)
        assert set(re.findall(r"\{(\w+)(?::\w+)?\}", phrase)) <= set(names) and len(set(names)) == len(names), key
    assert json.dumps(phrases)
