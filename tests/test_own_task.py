"""A task of the user's own, as docs/verifiers.md tells it: a verifier, a JSONL and a recipe in under 30 lines."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest

from pennyweight.commands import verify
from pennyweight.data.sources import read
from pennyweight.data.store import read_samples
from pennyweight.errors import DataError
from pennyweight.recipe import FileData
from pennyweight.records import Task
from pennyweight.verifiers import judge, own, verifier_of

DOCS = Path(__file__).resolve().parents[1] / "docs" / "verifiers.md"


def told() -> dict[str, str]:
    """Name -> text of each file that the docs have the reader write, and the command under ``run``."""
    section = DOCS.read_text(encoding="utf-8").split("## Your own task")[1].split("\n## ")[0]
    files = re.findall(r"`([\w.]+)`[^`\n]*(?:`[^`\n]*`[^`\n]*)*:\n\n```\w+\n(.*?)```", section, re.DOTALL)
    return dict(files) | {"run": re.findall(r"^    pennyweight (.*)$", section, re.MULTILINE)[0]}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_task_of_the_docs_runs_as_it_stands_there(here, tiny_run, typed):
    files = told()
    command = files.pop("run")
    assert set(files) == {"short.py", "sums.jsonl", "short.toml"}
    assert sum(len(text.strip().splitlines()) for text in files.values()) + 1 < 30
    for name, text in files.items():
        (here / name).write_text(text)
    for folder in ("teacher", "student"):  # a smaller quickstart
        shutil.copytree(tiny_run[0] / folder, here / "runs" / "quickstart" / folder)
    code, out, err = typed(*command.split())
    assert code == 0, err
    summary = json.loads((here / "runs" / "short" / "summary.json").read_text())
    assert summary["arms"]["grpo"]["steps"] == 10 and "accuracy" in summary["arms"]["grpo"]["metrics"]
    assert verify("runs/short").ok and "report: runs/short/report.html" in out
    samples = read_samples(here / "runs" / "short" / "data" / "train.jsonl")
    assert {s.task.verifier for s in samples} == {"short.py:verify"}
    (here / "short.py").write_text(files["short.py"].replace("<= 16", "<= 17"))
    before = json.loads((here / "runs" / "short" / "summary.json").read_text())["stages"]
    assert typed(*command.split())[0] == 0
    after = json.loads((here / "runs" / "short" / "summary.json").read_text())["stages"]
    assert {n for n in before if before[n] != after[n]} >= {"data", "grpo-0", "evaluate-grpo-0"}
    assert before["start-0"] == after["start-0"]


VERIFIER = """
import time

def says(response, task):
    return task.answer in response

def raises(response, task):
    return 1 / 0

def leaves(response, task):
    raise SystemExit

def hangs(response, task):
    while True:
        try:
            time.sleep(0.01)
        except Exception:
            pass

def mumbles(response, task):
    return "yes"
"""


def test_what_goes_wrong_in_it_is_a_verdict(here, monkeypatch):
    monkeypatch.setattr(own, "SECONDS", 0.2)
    (here / "v.py").write_text(VERIFIER)
    said = {name: judge("it is 7", Task("t", f"v.py:{name}", "7")) for name in re.findall(r"def (\w+)", VERIFIER)}
    assert said.pop("says").correct and not any(v.correct for v in said.values())
    assert {name: v.reason for name, v in said.items()} == {
        "raises": "the verifier failed: ZeroDivisionError: division by zero",
        "leaves": "the verifier failed: SystemExit: ",
        "hangs": "the verifier failed: it took longer than 0.2 seconds",
        "mumbles": "the verifier failed: it gave 'yes', not a Verdict, True or False",
    }
    assert not judge("it is 8", Task("t", "v.py:says", "7")).correct


def test_an_edited_verifier_judges_with_its_new_code(here):
    """At once, in the same process, and where size and second of the file are those of before."""
    for gold in ("7", "8", "9"):
        (here / "v.py").write_text(f"def verify(response, task):\n    return response == '{gold}'\n")
        os.utime(here / "v.py", (1, 1))
        assert [judge(r, Task("t", "v.py:verify", "")).correct for r in "789"] == [r == gold for r in "789"]


def test_the_limit_holds_behind_a_verdict_of_the_packages_own(here, monkeypatch):
    monkeypatch.setattr(own, "SECONDS", 8)
    (here / "v.py").write_text(
        "import time\nfrom pennyweight.verifiers import VERIFIERS\n\n"
        "def verify(response, task):\n    VERIFIERS['math'](response, task)\n    time.sleep(600)\n    return True\n"
    )
    judge("#### 1/2", Task("t", "math", "0.5"))  # its process is there
    began = time.monotonic()
    found = judge("#### 2/4", Task("t", "v.py:verify", "1/2"))
    assert found.reason == "the verifier failed: it took longer than 8 seconds"
    assert time.monotonic() - began < 300


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gone.py:verify", "there is no file gone.py for the verifier"),
        ("v.py", "names no function of that file; write it as FILE.py:FUNCTION with one of says, raises"),
        ("v.py:sais", "names no function of that file.*says, raises, leaves, hangs, mumbles"),
        ("v.py:time", "names no function of that file"),
        ("bad.py:verify", "bad.py cannot be run: SyntaxError"),
        ("gut", "no verifier is named 'gut'; use one of exact.*or your own as FILE.py:FUNCTION"),
    ],
)
def test_a_verifier_that_is_not_there(here, name, says):
    (here / "v.py").write_text(VERIFIER)
    (here / "bad.py").write_text("def verify(:\n")
    with pytest.raises(DataError, match=says):
        verifier_of(name)


def test_the_row_is_at_hand_and_an_answer_need_not_be(here):
    (here / "v.py").write_text(VERIFIER)
    (here / "rows.jsonl").write_text('{"prompt": "p", "numbers": [1, 2]}\n')
    (sample,) = read(FileData(path="rows.jsonl", verifier="v.py:says"))
    assert sample.task and sample.task.answer == "" and json.loads(sample.task.entry)["row"]["numbers"] == [1, 2]
    with pytest.raises(DataError, match="no column 'gold'"):
        read(FileData(path="rows.jsonl", verifier="v.py:says", answer="gold"))


def test_answers_of_a_file_are_graded_by_it(here, typed):
    (here / "v.py").write_text(VERIFIER)
    (here / "a.jsonl").write_text('{"r": "it is 7", "g": "7"}\n{"r": "it is 8", "g": "7"}\n')
    asked = ("grade", "a.jsonl", "--answer", "r", "--gold", "g", "--json", "--verifier")
    code, out, _ = typed(*asked, "v.py:says")
    assert code == 0 and json.loads(out)["correct"] == 1
    code, _, err = typed(*asked, "v.py:nothing")
    assert code == 2 and "names no function" in err


@pytest.mark.parametrize("where", ["data.source", "method.reward"])
@pytest.mark.parametrize("name", ["gut", "gone.py:verify"])
def test_names_of_verifiers_are_refused_before_anything_is_made(here, typed, where, name):
    tiny = Path(__file__).with_name("tiny.toml")
    given = ["data.source.kind=files", "data.source.path=rows.jsonl", "method.kind=grpo", f"{where}.verifier={name}"]
    (here / "rows.jsonl").write_text('{"prompt": "p", "answer": "1"}\n' * 3)
    code, _, err = typed("run", tiny, "--out", "run", *given)
    assert code == 2 and name in err and ("math" in err or "no file gone.py" in err) and err.count("\n") == 1
    assert not (here / "run" / "teacher").exists()


@pytest.mark.parametrize(
    ("row", "given", "says"),
    [
        ('{"prompt": "p", "answer": "1"}', ["data.source.verifier=code"], "verifier: rows.jsonl line 1 has no tests"),
        ('{"prompt": "p", "answer": "1"}', ["data.source.verifier=reasoning_gym"], "cannot judge rows of a file"),
        ('{"prompt": "p", "answer": "1"}', ["data.source.verifier=math", "method.reward.verifier=code"],
         "method.reward.verifier=code needs tests, which the problems of this recipe's data do not have; take rows"),
        ('{"prompt": "p", "tests": "f()"}', ["data.source.verifier=code", "method.reward.verifier=reasoning_gym"],
         "method.reward.verifier=reasoning_gym needs the problem of reasoning-gym's that it came from, which"),
    ],
)  # fmt: skip
def test_verifiers_that_need_what_rows_do_not_have_are_refused_before_anything_is_made(here, typed, row, given, says):
    tiny = Path(__file__).with_name("tiny.toml")
    (here / "rows.jsonl").write_text(f"{row}\n" * 3)
    files = ["data.source.kind=files", "data.source.path=rows.jsonl", "method.kind=grpo", *given]
    code, _, err = typed("run", tiny, "--out", "run", *files)
    assert code == 2 and says in err and err.count("\n") == 1, err
    assert not (here / "run").exists()
