# ruff: noqa: E501
"""Files of answers, judged from the shell."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from pennyweight import grading
from pennyweight.evaluate.intervals import wilson
from pennyweight.records import Task, Verdict
from pennyweight.report.graded import aligned, print_graded
from pennyweight.verifiers import VERIFIERS, judge
from pennyweight.verifiers.code import cannot_shut_in

GSM8K = Path(__file__).resolve().parents[2] / "shared" / "real" / "gsm8k"

ROWS = [
    {"q": "1+1", "a": {"text": "so\nA: 2", "ok": True}, "gold": "1 + 1 = 2\n#### 2"},
    {"q": "1+2", "a": {"text": "#### 4", "ok": False}, "gold": "3"},
    {"q": "half", "a": {"text": r"\boxed{\frac{1}{2}}", "ok": True}, "gold": "A: 0.5"},
    {"q": "2+2", "a": {"text": "The answer is 5.", "ok": True}, "gold": "#### 4"},
    {"q": "3+3", "a": {"text": "", "ok": False}, "gold": 6},
    {"q": "3+4", "a": {"text": "7", "ok": "false"}, "gold": 7},
]
ASKED = ("--verifier", "math", "--answer", "a.text", "--gold", "gold")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in ROWS) + "\n")
    return path


def quiet(*_):
    return nullcontext(SimpleNamespace(advance=lambda n: None))


def test_counts_reasons_and_labels(file, typed):
    code, said, _ = typed("grade", file, *ASKED, "--label", "a.ok", "--json")
    found = json.loads(said)
    assert (code, found["answers"], found["correct"]) == (0, 6, 3)
    assert found["accuracy"] == wilson(3, 6).to_json()
    assert found["reasons"] == {"not equal to …": 2, "the response is empty": 1}
    assert [w["line"] for w in found["wrong"]] == [2, 4, 5]
    labels = found["labels"]
    assert labels["agree"] == 4
    assert labels["agreement"] == wilson(4, 6).to_json()
    assert labels["table"] == {
        "label_right": {"verdict_right": 2, "verdict_wrong": 1},
        "label_wrong": {"verdict_right": 1, "verdict_wrong": 2},
    }
    first, second = labels["disagreements"]
    assert first == {
        "line": 4, "label": True, "verdict": False, "answer": "5", "gold": "4", "reason": "not equal to '4'",
    }  # fmt: skip
    assert (second["line"], second["label"], second["verdict"], second["answer"]) == (6, False, True, "7")


def test_labels_as_tables_write_them(typed, tmp_path):
    written = [1.0, "1.0", "True", True, 1, "yes"], [0.0, "0.0", "False", False, 0, "no"]
    rows = [{"a": "2", "g": "2" if right else "3", "l": label} for right in (1, 0) for label in written[1 - right]]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = ("--verifier", "exact", "--answer", "a", "--gold", "g", "--label", "l", "--json")
    code, said, error = typed("grade", tmp_path / "rows.jsonl", *asked)
    assert code == 0, error
    assert json.loads(said)["labels"]["agree"] == 12
    (tmp_path / "rows.jsonl").write_text(json.dumps({"a": "2", "g": "2", "l": 0.5}))
    code, _, error = typed("grade", tmp_path / "rows.jsonl", *asked)
    assert code == 2 and "it has to be true or false, 1 or 0" in error


def test_what_is_printed_is_aligned(file, typed):
    code, said, _ = typed("grade", file, *ASKED, "--label", "a.ok")
    assert code == 0
    assert said.splitlines() == [
        "math: 3 of 6 correct, 50.00 % (95 % interval 18.76–81.24)",
        "",
        "why not                answers",
        "not equal to …               2",
        "the response is empty        1",
        "",
        "labels: 4 of 6 agree, 66.67 % (95 % interval 30.00–90.32)",
        "             verdict right  verdict wrong",
        "label right              2              1",
        "label wrong              1              2",
        "",
        "disagreements",
        "line  label  verdict  answer  gold  reason",
        "   4  right  wrong    5       4     not equal to '4'",
        "   6  wrong  right    7       7",
    ]


def test_limit_show_and_out(file, typed, tmp_path):
    out = tmp_path / "new" / "graded.jsonl"
    code, said, _ = typed("grade", file, *ASKED, "--limit", 4, "--show", 1, "--out", out, "--json")
    found = json.loads(said)
    assert (code, found["answers"], found["correct"], len(found["wrong"])) == (0, 4, 2, 1)
    assert "labels" not in found
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{k: v for k, v in r.items() if k != "verdict"} for r in written] == ROWS[:4]
    assert [r["verdict"]["correct"] for r in written] == [True, False, True, False]
    assert written[1]["verdict"] == {"correct": False, "answer": "4", "reason": "not equal to '3'", "gold": "3"}
    assert typed("grade", file, *ASKED, "--out", out)[1].endswith(f"graded: {out}\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("no.jsonl", *ASKED), "there is no file no.jsonl; check the path"),
        (("FILE", "--verifier", "maths", "--answer", "a.text", "--gold", "gold"),
         "no verifier is named 'maths'; use one of exact, math, choice, regex, code, reasoning_gym"),
        (("FILE", "--verifier", "math", "--answer", "b", "--gold", "gold"), "line 1 has no field 'b'; it has q, a, gold"),
        (("FILE", "--verifier", "math", "--answer", "a.b", "--gold", "gold"),
         "'a' in answers.jsonl line 1 has no field 'b'; it has text, ok"),
        (("FILE", "--verifier", "math", "--answer", "a", "--gold", "gold"), "'a' in answers.jsonl line 1 is no text but {"),
        (("FILE", *ASKED, "--label", "q"), "the label 'q' in answers.jsonl line 1 is \"1+1\"; it has to be true or false"),
        (("FILE", "--verifier", "math", "--answer", "a.text"), "--verifier math needs --gold FIELD"),
        (("FILE", "--verifier", "code", "--answer", "a.text"), "--verifier code needs --entry FIELD"),
        (("FILE", *ASKED, "--out", "FILE"), "is the file that is read; give it another name"),
        (("FILE", *ASKED, "--out", "."), "--out . is a folder; name a file in it"),
        (("FILE", *ASKED, "--out", "answers.jsonl/new/graded.jsonl"), "graded.jsonl cannot be written: Not a directory; name"),
        (("FILE", *ASKED, "--out", "/proc/no/graded.jsonl"), "/proc/no/graded.jsonl cannot be written: No such file"),
        (("FILE", "--verifier", "reasoning_gym", "--answer", "q", "--entry", "q"), "write NAME=q"),
        (("empty.jsonl", *ASKED), "is empty; it has to hold one JSON object a line"),
        (("broken.jsonl", *ASKED), "broken.jsonl line 2 is not valid JSON"),
        (("list.jsonl", *ASKED), "list.jsonl line 1 is no object, but [1]"),
        (("late.jsonl", *ASKED), "late.jsonl line 3 has no field 'gold'; it has a"),
        (("bytes.jsonl", *ASKED), "bytes.jsonl line 1 is not valid UTF-8"),
        (("FILE", *ASKED, "--limit", "0"), "--limit"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_sentence(arguments, said, file, typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = json.dumps({"a": {"text": "2"}, "gold": "2"})
    Path("empty.jsonl").write_text("\n\n")
    Path("broken.jsonl").write_text(f"{row}\n{{'a': 1}}\n")
    Path("list.jsonl").write_text("[1]\n")
    Path("late.jsonl").write_text(f'{row}\n\n{{"a": {{"text": ""}}}}\n')
    Path("bytes.jsonl").write_bytes(b'{"a": "\xff"}\n')
    monkeypatch.setattr(grading, "judged", lambda *_: pytest.fail("it is refused before anything is judged"))
    code, printed, error = typed("grade", *(str(file) if a == "FILE" else a for a in arguments))
    assert (code, printed, error.count("\n")) == (2, "", 1), error
    assert said in error


def test_choices_expressions_and_programs(typed, tmp_path):
    def graded(rows, *arguments):
        path = tmp_path / "some.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        code, said, error = typed("grade", path, "--answer", "r", "--json", *arguments)
        assert code == 0, error
        return [w["line"] for w in json.loads(said)["wrong"]]

    rows = [{"r": r, "g": "so\n#### Paris", "c": ["London", "Paris"]} for r in ("B", "(A)", "paris", "C")]
    assert graded(rows, "--verifier", "choice", "--gold", "g", "--entry", "c") == [2, 4]
    rows = [{"r": r, "g": r"\d+"} for r in ("12", "x")]
    assert graded(rows, "--verifier", "regex", "--gold", "g") == [2]
    if cannot_shut_in():
        return
    program = "def f(x): return x * x"
    rows = [{"r": program, "t": "def check(c):\n    assert c(2) == 4", "n": n} for n in ("f", "g")]
    assert graded(rows, "--verifier", "code", "--entry", "tests=t", "--entry", "entry_point=n") == [2]
    rows = [{"r": program, "t": [f"assert f(2) == {n}"]} for n in (3, 4)]
    assert graded(rows, "--verifier", "code", "--entry", "t") == [1]


def test_a_field_whose_name_has_a_dot():
    assert grading.field_of("line 1", {"a.b": 1, "a": {"b": 2}}, "a.b") == 1
    assert grading.field_of("line 1", {"a": {"b": {"c": 2}}, "a.b": {"c": 3}}, "a.b.c") == 2
    assert grading.field_of("line 1", {"a.b": {"c": 3}}, "a.b.c") == 3


def slow_judge(response: str, task: Task) -> Verdict:
    time.sleep(0.02)
    return Verdict(response == "1", str(os.getpid()))


def test_processes_give_the_same_verdicts_in_the_same_order(monkeypatch):
    monkeypatch.setattr(grading, "_ALONE_SECONDS", 0.05)
    asked = [(str(i % 3), Task("t", "math", "1")) for i in range(40)]
    advanced = []
    found = list(grading.judged(slow_judge, asked, advanced.append, processes=2))
    assert [v.correct for v in found] == [i % 3 == 1 for i in range(40)]
    assert sum(advanced) == 40
    assert len({v.answer for v in found}) >= 2
    assert {v.answer for v in grading.judged(slow_judge, asked, advanced.append, processes=1)} == {str(os.getpid())}


def stopped_judge(response: str, task: Task) -> Verdict:
    time.sleep(0.02)
    if response == "30":
        os.kill(os.getpid(), signal.SIGKILL)
    return Verdict(True, response)


def test_a_process_that_the_system_stops_is_told(monkeypatch):
    monkeypatch.setattr(grading, "_ALONE_SECONDS", 0.05)
    asked = [(str(i), Task("t", "math", "1")) for i in range(40)]
    with pytest.raises(grading.DataError, match="the system stopped a process that judged.*--limit"):
        list(grading.judged(stopped_judge, asked, lambda n: None, processes=2))


@pytest.mark.skipif(grading._cores() < 2, reason="needs two cores: on one, no process is started")
def test_ctrl_c_is_clean(tmp_path):
    path = tmp_path / "slow.jsonl"
    row = json.dumps({"r": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "g": "(a+)+b"})
    path.write_text(f"{row}\n" * 2000)  # hours, were it let to
    words = ["grade", str(path), "--verifier", "regex", "--answer", "r", "--gold", "g"]
    command = [sys.executable, "-m", "pennyweight", *words]
    hear = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 - a shell's background jobs ignore it
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=hear)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until = time.monotonic() + 20
    while children.exists() and len(children.read_text().split()) < 3 and time.monotonic() < until:
        time.sleep(0.05)  # in the middle of starting the other processes
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in error and error.splitlines()[-1].startswith("pennyweight: stopped"), error


def test_answers_that_would_move_the_cursor(capsys):
    graded = [grading.Graded(1, Verdict(False, "\x1b[31m\n\tred" + "x" * 300, "no"), "서울")]
    print_graded({"verifier": "exact"} | grading.summary(graded))
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\t" not in said
    assert all(len(line) < 200 for line in said.splitlines())
    assert aligned([("서울", "1"), ("abc", "22")]) == ["서울   1", "abc   22"]


def test_reasons_are_counted_by_kind():
    assert grading.kind_of("not equal to '18'") == grading.kind_of('not equal to "it\'s"') == "not equal to …"
    assert grading.kind_of("line 3 of the tests fails (AssertionError): assert f(2)") == "line N of the tests fails (AssertionError)"  # fmt: skip
    assert grading.kind_of("chain_sum scores it 0.01 of 1") == "chain_sum scores it N of N"


@pytest.mark.skipif(not GSM8K.is_dir(), reason="needs the real GSM8K, which lies beside a full checkout only")
def test_the_published_labels_of_all_four_models():
    for model in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
        fields = grading.Fields(f"{model}.solution", "ground_truth", f"{model}.is_correct")
        path = str(GSM8K / "example_model_solutions.jsonl")
        found = grading.grade(path, "math", fields, judge, VERIFIERS, quiet)
        assert found["answers"] == 1319
        assert found["labels"]["agreement"]["mean"] >= 0.99, found["labels"]["disagreements"][:5]
