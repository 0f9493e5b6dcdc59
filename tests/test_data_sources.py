"""Rows of every kind become samples, and every row that does not is named with its place and the cure."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from pennyweight.data.files import documents
from pennyweight.data.sources import read, read_tasks
from pennyweight.errors import DataError
from pennyweight.recipe import FileData, TaskData
from pennyweight.records import Message
from pennyweight.settings import TaskSource
from pennyweight.verifiers import VERIFIERS, judge, judge_sample
from pennyweight.verifiers.own import FILE_VERIFIERS

REAL = Path(__file__).resolve().parents[2] / "shared" / "real"
needs_real = pytest.mark.skipif(
    not REAL.is_dir(), reason="needs the real inputs, which lie beside a full checkout only"
)


@pytest.fixture
def file(tmp_path):
    """Writes a file (text, bytes, or rows of JSONL) and gives its path."""

    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def read_rows(file, rows, **settings):
    return read(FileData(path=file("rows.jsonl", rows), **settings))


def pair(sample):
    assert len(sample.prompt) == 1
    assert sample.prompt[0].role == "user"
    return sample.prompt[0].content, sample.response


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "response": "r"}, ("p", "r")),
        ({"question": "질문", "answer": "답 😀"}, ("질문", "답 😀")),
        ({"Q": "p", "A": "r", "label": 0}, ("p", "r")),
        ({"query": "p", "completion": "r"}, ("p", "r")),
        ({"instruction": "do", "input": "this", "output": "r"}, ("do\n\nthis", "r")),
        ({"instruction": "do", "input": "", "output": "r"}, ("do", "r")),
        ({"prompt": "p"}, ("p", None)),
        ({"prompt": "p", "response": None}, ("p", None)),
        ({"prompt": "p", "response": " \n"}, ("p", None)),
        ({"turns": ["first", "second"], "question_id": 1}, ("first", None)),
        (
            {"prompt": [{"role": "user", "content": "p"}], "completion": [{"role": "assistant", "content": "r"}]},
            ("p", "r"),
        ),
    ],
)
def test_prompts_and_responses(file, row, expected):
    assert pair(read_rows(file, [row])[0]) == expected


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": r, "content": c} for r, c in [("system", "s"), ("user", "u"), ("assistant", "a")]]},
        {"conversations": [{"from": r, "value": c} for r, c in [("system", "s"), ("human", "u"), ("gpt", "a")]]},
        {"messages": [{"role": "developer", "content": "s"},
                      {"role": "user", "content": [{"type": "text", "text": "u"}]},
                      {"role": "assistant", "content": "a"}]},
        {"system": "s", "prompt": "u", "response": "a"},
    ],
)  # fmt: skip
def test_conversations(file, row):
    sample = read_rows(file, [row])[0]
    assert sample.prompt == (Message("system", "s"), Message("user", "u"))
    assert sample.response == "a"


def test_a_conversation_that_waits_for_its_answer(file):
    turns = [("user", "u"), ("assistant", "a"), ("user", "v")]
    sample = read_rows(file, [{"messages": [{"role": r, "content": c} for r, c in turns]}])[0]
    assert [m.content for m in sample.prompt] == ["u", "a", "v"]
    assert sample.response is None


def test_texts(file):
    samples = read_rows(file, [{"text": "one"}, {"text": "  "}, {"text": "two\n"}])
    assert [(s.prompt, s.response) for s in samples] == [((), "one"), ((), "two")]


def test_given_names_come_first(file):
    row = {"prompt": "no", "response": "no", "ask": "p", "say": "r", "text": "no", "body": "t"}
    assert pair(read_rows(file, [row], prompt="ask", response="say")[0]) == ("p", "r")
    assert read_rows(file, [row], text="body")[0].response == "t"


def test_source_licence_and_limit(file, monkeypatch, tmp_path):
    rows = [{"text": f"t{i}"} for i in range(5)]
    samples = read_rows(file, rows, licence="MIT", limit=3)
    assert [s.response for s in samples] == ["t0", "t1", "t2"]
    assert {(s.source, s.licence, s.author) for s in samples} == {("rows.jsonl", "MIT", "given")}
    monkeypatch.chdir(tmp_path)
    assert read(FileData(path="rows.jsonl"))[0].source == "rows.jsonl"
    assert read(FileData(path="."))[0].source == tmp_path.name


def test_a_limit_stops_reading(file):
    assert len(read(FileData(path=file("a.jsonl", '{"text": "a"}\nbroken\n'), limit=1))) == 1


def test_gold_answers(file):
    row = {"question": "q", "answer": "6 * 12 = 72\n#### 72"}
    sample = read_rows(file, [row], answer="answer", verifier="math")[0]
    assert sample.task is not None
    assert (sample.task.name, sample.task.verifier, sample.task.answer) == ("file", "math", "72")
    assert sample.response == row["answer"]
    bare = read_rows(file, [{"question": "q", "answer": 72}], verifier="exact")[0]
    assert bare.task is not None
    assert (bare.task.answer, bare.response) == ("72", None)
    both = read_rows(file, [{"question": "q", "answer": "72", "response": "it is 72"}], verifier="exact")[0]
    assert both.task is not None
    assert (both.task.answer, both.response) == ("72", "it is 72")
    named = read_rows(file, [{"question": "q", "gold": "9", "answer": "so 9"}], answer="gold", verifier="exact")[0]
    assert named.task is not None
    assert (named.task.answer, named.response) == ("9", "so 9")


def entries(file, rows, **given):
    return [(s.task.answer, json.loads(s.task.entry)) for s in read_rows(file, rows, **given) if s.task]


def test_rows_give_code_its_tests_and_choice_its_choices(file):
    asked = {"prompt": "Square it.", "test": "def check(c):\n    assert c(2) == 4", "entry_point": "f"}
    mbpp = {"prompt": "p", "test_list": ["assert f(2) == 4"], "code": "#### square\ndef f(x): return x * x"}
    assert entries(file, [asked, mbpp], verifier="code") == [
        ("", {"tests": asked["test"], "entry_point": "f"}),
        (mbpp["code"], {"tests": mbpp["test_list"]}),
    ]
    assert all(s.response is None for s in read_rows(file, [asked, mbpp], verifier="code"))
    listed = {"question": "q", "answer": "B", "choices": ["x", "y"]}
    labelled = {"question": "q", "answer": "2", "options": {"label": ["1", "2"], "text": ["x", "y"]}}
    in_text = {"question": "q", "answer": "B", "choices": "A) x  B) y"}
    assert entries(file, [listed, labelled, in_text], verifier="choice") == [
        ("B", {"choices": ["x", "y"]}),
        ("2", {"choices": labelled["options"]}),
        ("B", {}),
    ]
    (sample,) = read_rows(file, [listed], verifier="choice")
    assert sample.task and judge("#### y", sample.task).correct and not judge("#### x", sample.task).correct


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "p", "answer": "1"}, "line 1 has no tests for the verifier code .its columns: prompt, answer.; "),
        ({"prompt": "p", "tests": "  "}, "line 1: tests holds '  ', not Python as a text"),
        ({"prompt": "p", "tests": "f()", "entry_point": 3}, "line 1: entry_point holds 3, not the name of a function"),
        ({"prompt": "p", "tests": "f()", "seconds": 0}, "line 1: seconds holds 0, not a whole number from 1 to 600"),
    ],
)  # fmt: skip
def test_rows_that_code_cannot_use_are_refused(file, row, says):
    with pytest.raises(DataError, match=says):
        read_rows(file, [row], verifier="code")


def test_file_verifiers_are_all_but_those_that_need_an_entry():
    assert set(FILE_VERIFIERS) == set(VERIFIERS) - {"reasoning_gym"}
    known = "exact, math, choice, regex, code, or your own as FILE.py:FUNCTION"
    with pytest.raises(DataError, match=f"data.source.verifier='maths'.*{known}"):
        read(FileData(path="x", answer="a", verifier="maths"))
    with pytest.raises(DataError, match="data.source.verifier=None"):
        read(FileData(path="x", answer="a"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "ok"}\n\n{"text": 5}\n', r"a.jsonl line 3: text holds 5 \(int\), not text"),
        ("a.jsonl", '{"text": "ok"}\n{"text": }\n', r"a.jsonl line 2 is not valid JSON \(.* at column 10\)"),
        ("a.jsonl", "[" * 100_000, "a.jsonl line 1 cannot be read as JSON"),
        ("a.jsonl", "[1, 2]\n", r"a.jsonl line 1 holds \[1, 2\] \(list\), not a row"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xff"}\n', "a.jsonl line 2 is not valid UTF-8 .byte 0xff"),
        ("a.jsonl", '{"text": "\\ud800"}\n', "a.jsonl line 1: text has half a surrogate pair at character 1"),
        ("a.jsonl", '{"foo": 1, "bar": 2}\n', r"line 1 has no column known .*\(it has: foo, bar\); name one with"),
        ("a.jsonl", "{}\n", r"\(it has: none\)"),
        ("a.jsonl", '{"prompt": " "}\n', "a.jsonl line 1: prompt is blank"),
        ("a.jsonl", '{"prompt": "p", "response": {"a": 1}}\n', r"line 1: response holds {'a': 1} \(dict\)"),
        ("a.jsonl", '{"messages": []}\n', r"messages holds \[\] \(list\), not a list of turns"),
        ("a.jsonl", '{"messages": ["hi"]}\n', r"messages\[0\] holds 'hi' \(str\)"),
        ("a.jsonl", '{"messages": [{"role": "boss", "content": "x"}]}\n', r"messages\[0\] has the unknown role 'boss'"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": null}]}\n', r"messages\[0\] content holds None"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": "x"}]}\n', "no user turn"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}, '
         '{"role": "assistant", "content": null, "tool_calls": [1]}]}', r"messages\[1\] calls a tool"),
        ("a.jsonl", "\n \n", "a.jsonl has no rows"),
        ("a.json", "", "a.json has no rows"),
        ("a.json", '{"text": "x"}', "a.json holds one object, not a list of rows"),
        ("a.json", '[{"text": "x"},\n{"text": 1}]', "a.json row 2: text holds 1 "),
        ("a.json", '[{"text": "x"},\n{]', "a.json is not valid JSON .* at line 2 column 2"),
        ("a.csv", "prompt,response\np,r\np,r,s\n", "a.csv row 2 has 3 cells, its header 2"),
        ("a.csv", "prompt,prompt\np,r\n", "two columns named 'prompt'"),
        ("a.csv", b"prompt\np\n\xc3(\n", "a.csv line 3 is not valid UTF-8"),
        ("a.csv", "prompt\n" + "x" * 200_000, "a.csv row 1 cannot be read"),
        ("a.csv", "prompt,response\n", "a.csv has no rows"),
        ("a.txt", "\n\n", "a.txt has no rows"),
        ("a.txt", b"fine\nnot \xe9\n", "a.txt line 2 is not valid UTF-8"),
        ("a.parquet", b"not parquet", "a.parquet .*Parquet"),
        ("a.xlsx", "x", r"cannot read a.xlsx: its kind .xlsx is unknown; convert it to .jsonl"),
        ("noend", "x", r"its kind \(no suffix\) is unknown"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(file, name, content, message):
    with pytest.raises(DataError, match=message) as e:
        read(FileData(path=file(name, content)))
    assert "\n" not in str(e.value)
    assert ";" in str(e.value)


def test_columns_that_are_not_there(file):
    with pytest.raises(DataError, match=r"line 1 has no column 'ask' \(it has: prompt\)"):
        read_rows(file, [{"prompt": "p"}], prompt="ask")
    with pytest.raises(DataError, match="line 2 has no column 'body'"):
        read_rows(file, [{"body": "p"}, {"text": "p"}], text="body")
    with pytest.raises(DataError, match="line 1 has no answer for the verifier"):
        read_rows(file, [{"prompt": "p"}], verifier="exact")
    with pytest.raises(DataError, match="line 1: answer is blank"):
        read_rows(file, [{"prompt": "p", "answer": "x #### "}], verifier="exact")


def test_what_is_not_there(tmp_path):
    with pytest.raises(DataError, match="there is no file or folder .*gone.jsonl"):
        read(FileData(path=str(tmp_path / "gone.jsonl")))
    with pytest.raises(DataError, match="there is no file or folder data/gone.csv"):
        read(FileData(path="data/gone.csv"))


def test_the_hub_is_out_of_reach(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="nobody/nothing-at-all is no file or folder here.*hub.*check data.source.path"):
        read(FileData(path="nobody/nothing-at-all"))


def test_separated_files(tmp_path):
    rows = [["안녕, 너", 'say "hi"'], ["two\nlines", "x\u2028y"], ["tab\there", "z"]]
    for name, dialect in (("a.csv", "excel"), ("a.tsv", "excel-tab")):
        with open(tmp_path / name, "w", encoding="utf-8-sig", newline="") as f:
            csv.writer(f, dialect).writerows([["Q", "A"], *rows])
        found = read(FileData(path=str(tmp_path / name)))
        assert [pair(s) for s in found] == [tuple(r) for r in rows]


def test_parquet(tmp_path):
    table = pa.table(
        {"prompt": [f"p{i}" for i in range(3000)], "response": [f"r{i}" if i % 2 else None for i in range(3000)]}
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    found = read(FileData(path=str(tmp_path / "a.parquet")))
    assert [pair(s) for s in found] == [(f"p{i}", f"r{i}" if i % 2 else None) for i in range(3000)]
    turns = [[{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]]
    pyarrow.parquet.write_table(pa.table({"messages": turns}), tmp_path / "b.parquet")
    assert pair(read(FileData(path=str(tmp_path / "b.parquet")))[0]) == ("u", "a")
    pyarrow.parquet.write_table(pa.table({"prompt": ["p", None]}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match="c.parquet row 2: prompt holds None"):
        read(FileData(path=str(tmp_path / "c.parquet")))


def test_text_files(file):
    assert documents("a\n\nb\n<|endoftext|>\n c \n<|endoftext|>", True) == ["a\n\nb", "c"]
    assert documents("a\nb\n \n\n\nc\n", True) == ["a\nb", "c"]
    assert documents("a\n\nb", False) == ["a\n\nb"]
    found = read(FileData(path=file("t.txt", "\ufeff하나\r\n둘\r\n\r\nthree\r\n")))
    assert [(s.prompt, s.response) for s in found] == [((), "하나\n둘"), ((), "three")]


def test_jsonl_with_a_byte_order_mark_and_repeated_keys(file):
    found = read(FileData(path=file("a.jsonl", '\ufeff{"text": "a", "text": "b"}\r\n{"text": "c\u2028d"}')))
    assert [s.response for s in found] == ["b", "c\u2028d"]


def test_folders(file, tmp_path):
    file("plain/b.jsonl", [{"text": "b"}])
    file("plain/a.csv", "text\na\n")
    file("plain/README.md", "not data")
    file("plain/.hidden.jsonl", "broken")
    assert [s.response for s in read(FileData(path=str(tmp_path / "plain")))] == ["a", "b"]
    file("hub/data/train-00001-of-00002.jsonl", [{"text": "t1"}])
    file("hub/data/train-00000-of-00002.jsonl", [{"text": "t0"}])
    file("hub/data/validation.jsonl", [{"text": "v"}])
    file("hub/dataset_infos.json", "{}")
    hub = str(tmp_path / "hub")
    assert [s.response for s in read(FileData(path=hub))] == ["t0", "t1"]
    assert [s.response for s in read(FileData(path=hub, split="dev"))] == ["v"]
    with pytest.raises(DataError, match="no split 'test', only train, validation; set data.source.split"):
        read(FileData(path=hub, split="test"))
    file("bad/sub/x.jsonl", [{"text": 1}])
    with pytest.raises(DataError, match="sub/x.jsonl line 1"):
        read(FileData(path=str(tmp_path / "bad")))
    file("none/x.bin", "x")
    with pytest.raises(DataError, match=r"folder none has no data file \(it holds .bin\)"):
        read(FileData(path=str(tmp_path / "none")))


def test_saved_datasets(tmp_path):
    from datasets import Dataset, DatasetDict

    one = Dataset.from_dict({"prompt": ["p", "q"], "response": ["r", "s"]})
    one.save_to_disk(tmp_path / "one")
    assert [pair(s) for s in read(FileData(path=str(tmp_path / "one")))] == [("p", "r"), ("q", "s")]
    DatasetDict({"train": one, "extra": one.select([1])}).save_to_disk(tmp_path / "both")
    assert [pair(s) for s in read(FileData(path=str(tmp_path / "both"), split="extra"))] == [("q", "s")]
    with pytest.raises(DataError, match="dataset both has no split 'test', only train, extra"):
        read(FileData(path=str(tmp_path / "both"), split="test"))
    (tmp_path / "one" / "state.json").write_text("broken")
    with pytest.raises(DataError, match="folder one .*saved dataset"):
        read(FileData(path=str(tmp_path / "one")))


def test_tasks_in_order_without_repeats():
    tasks = [TaskSource(name="gcd", size=5), TaskSource(name="chain_sum", size=4), TaskSource(name="gcd", size=7)]
    found = read_tasks(TaskData(tasks=tasks, seed=4))
    assert [s.source.split("/")[1] for s in found] == ["gcd"] * 5 + ["chain_sum"] * 4 + ["gcd"] * 2
    assert all(v and v.correct for v in map(judge_sample, found))


@needs_real
def test_real_gsm8k():
    found = read(FileData(path=str(REAL / "gsm8k" / "train.jsonl"), answer="answer", verifier="math", licence="MIT"))
    assert len(found) == 7473
    assert all(len(s.prompt) == 1 and s.response and s.task for s in found)
    assert {s.source for s in found} == {"train.jsonl"}
    assert all(v and v.correct for v in map(judge_sample, found[:200]))


@needs_real
def test_real_korean():
    found = read(FileData(path=str(REAL / "korean" / "ChatbotData.csv")))
    assert len(found) == 11823
    assert pair(found[0]) == ("12시 땡!", "하루가 또 가네요.")


@needs_real
def test_real_chat_prompts():
    found = read(FileData(path=str(REAL / "api_logs" / "fastchat" / "mt_bench_question.jsonl")))
    assert len(found) == 80
    assert all(s.response is None for s in found)
    assert found[0].prompt[0].content.startswith("Compose an engaging travel blog post")


@needs_real
def test_real_texts_of_a_named_column():
    found = read(FileData(path=str(REAL / "pii" / "generated_small.json"), text="full_text"))
    assert found[0].response
    with pytest.raises(DataError, match=r"generated_small.json row 1 has no column known .*full_text"):
        read(FileData(path=str(REAL / "pii" / "generated_small.json")))
