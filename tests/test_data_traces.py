"""Several responses to a prompt: who is asked how often, what is turned down for what, and that the rest differ."""

from __future__ import annotations

import json

import pytest

from pennyweight.data.prepare import told
from pennyweight.data.sources import read
from pennyweight.data.traces import asked_for, selected
from pennyweight.errors import DataError
from pennyweight.recipe import FileData, Responses
from pennyweight.records import Message, Sample


def row(prompt: str, response: str | None, complete: bool = True, teacher: str | None = None) -> Sample:
    asked = (Message("user", prompt),) if prompt else ()
    return Sample(asked, response, "tests", complete=complete, teacher=teacher)


def test_prompts_without_a_response_are_asked_as_often_as_is_said():
    rows = [row("a", None), row("b", "given"), row("", "a text")]
    assert [s.response for s in asked_for(rows, Responses(samples=3))] == [None, None, None, "given", "a text"]
    assert len(asked_for(rows, Responses(samples=3, by="teacher"))) == 7
    assert len({id(s) for s in asked_for(rows, Responses(samples=3))}) == 5
    assert asked_for(rows, Responses()) == rows


def test_what_is_turned_down_is_counted_by_reason():
    rows = [
        row("What is it?", "It is 2."),
        row("What is it?", "it  is 2"),
        row("What is it?", "Two, and no more", complete=False),
        row("What is it?", "это два, и всё"),
        row("Another?", "it is 2."),
        row("", "a text"),
        row("", "another text", complete=False),
    ]
    kept, why = selected(rows, Responses(samples=2, keep="verified", language=0.5))
    assert why == {"cut_off": 1, "language": 1, "repeated": 1} and kept == [rows[0], *rows[4:]]
    every, nothing = selected(rows, Responses())
    assert every == rows and not nothing  # one response a prompt was asked for: all are as the data has them


def test_those_that_differ_most_are_kept():
    rows = [
        row("q", "first add one and two then add three to it"),
        row("q", "first add one and two then add three to that"),
        row("q", "take three and one, which make four, and two"),
        row("q", "first add one and two then add three to this"),
        row("other", "first add one and two then add three to it"),
    ]
    kept, why = selected(rows, Responses(samples=4, most=2))
    assert kept == [rows[0], rows[2], rows[4]] and why == {"beyond": 2}
    assert selected(rows, Responses(samples=4, most=9)) == (rows, {})
    twice = [row("q", "the same", teacher=t) for t in ("a", "b")]
    assert selected(twice, Responses(samples=2, most=1)) == (twice, {})  # each teacher's own


def test_a_row_may_hold_several_responses(tmp_path):
    file = tmp_path / "traces.jsonl"
    asked = [{"role": "user", "content": "1 + 1?"}]
    rows = [
        {"problem": "1 + 1?", "answer": "2", "generations": ["<think>a</think> 2", "<think>b</think> 3"]},
        {"problem": "2 + 2?", "answer": "4", "generations": ["4"]},
    ]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    made = read(FileData(path=str(file), answer="answer", verifier="math", prompt="problem"))
    assert [(s.prompt[0].content, s.response) for s in made] == [
        ("1 + 1?", "<think>a</think> 2"),
        ("1 + 1?", "<think>b</think> 3"),
        ("2 + 2?", "4"),
    ]
    assert all(s.task and s.task.answer in "24" for s in made)
    file.write_text(json.dumps({"prompt": "x", "messages": asked, "responses": ["a", "b"]}) + "\n")
    assert [s.response for s in read(FileData(path=str(file)))] == ["a", "b"]
    file.write_text(json.dumps({"prompt": "x", "responses": ["a", 2]}) + "\n")
    with pytest.raises(DataError, match="line 1"):
        read(FileData(path=str(file), response="responses"))


def test_the_reasons_are_said():
    found = {"train": 5, "evaluation": 2, "rejected": 3, "rejected_for": {"verifier": 2, "repeated": 1}}
    found |= {"train_left_out": 0, "eval_left_out": 0, "overlap": {"normalised": 0, "ngram": 0}}
    assert "3 rejected (2 verifier, 1 repeated)" in told(found)
