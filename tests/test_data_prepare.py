"""Data made ready: problems whose gold answer its own verifier turns down are left out and counted."""

from __future__ import annotations

import pytest

from pennyweight.data.prepare import both_sides, told
from pennyweight.errors import DataError
from pennyweight.recipe import Data, FileData
from pennyweight.records import Encoded, Message, Sample, Task
from pennyweight.verifiers import check_golds, judge_sample

DATA = Data(source=FileData(path="x"), eval_fraction=0.3)


def problem(number: int, answer: str, verifier: str = "regex") -> Sample:
    return Sample((Message("user", f"p{number}?"),), "12", "s", task=Task("t", verifier, answer, "{}"))


def ready(samples: list[Sample]):
    def nobody(member: str | None):
        raise AssertionError("all samples have a response")

    encode = lambda some: [Encoded(s.id, (1, 2), (False, True)) for s in some]  # noqa: E731
    return both_sides(samples, DATA, nobody, judge_sample, check_golds, encode)


def test_problems_that_nobody_can_solve_are_left_out_and_said():
    good, bad = [problem(i, r"\d+") for i in range(40)], [problem(40 + i, "(a") for i in range(3)]
    sides, found = ready([*bad, *good])
    kept = {s.id for side in sides.values() for s in side}
    assert kept == {s.id for s in good} and found["unsound"] == 3
    assert "; 3 left out whose gold answer does not pass its own verifier; the first: '(a' by regex: " in told(found)
    assert "gold" not in told(ready(good)[1])


def test_where_no_gold_answer_passes_nothing_is_made():
    with pytest.raises(DataError, match=r"no gold answer of the 5 problems passes .*'\(a' by regex: .* correct the"):
        ready([problem(i, "(a") for i in range(5)])


def test_a_verifier_of_ones_own_may_ask_for_more_than_the_gold_answer(tmp_path):
    file = tmp_path / "long.py"
    file.write_text("def verify(response, task):\n    return len(response) > int(task.answer)\n")
    sides, found = ready([problem(i, "1" if i % 2 else "900", f"{file}:verify") for i in range(40)])
    assert found["unsound"] == 0 and found["unsure_golds"] == 20 and sum(map(len, sides.values())) == 40
    assert "; 20 gold answers do not pass your verifier as they stand; the first: '900'" in told(found)
