"""Final answers, and the verdicts of each verifier."""

from __future__ import annotations

import json
import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pennyweight.data.tasks import problems
from pennyweight.errors import DataError
from pennyweight.records import Message, Sample, Task, Verdict
from pennyweight.verifiers import VERIFIERS, check_golds, final_answer, judge, judge_sample, math, reasoning_gym
from pennyweight.verifiers.exact import never_raises

GSM8K = Path(__file__).resolve().parents[2] / "shared" / "real" / "gsm8k"
needs_gsm8k = pytest.mark.skipif(
    not GSM8K.is_dir(), reason="needs the real GSM8K, which lies beside a full checkout only"
)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("1 + 1 = 2\n#### 2", "2"),
        ("#### 1\nno, wait\n####  3 \nthat is it", "3"),
        ("#### \nso the answer is 7", "7"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}, done", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{never closed, Answer: 4", "4"),
        ("<answer>a</answer> <answer>\n b\nc </answer>", "b\nc"),
        ("<answer>\n####\n#..#\n####\n</answer>", "####\n#..#\n####"),
        ("<answer>8</answer>\n#### 9", "9"),
        ("The answer is: 42.", "42"),
        ("**Answer:** 3.5", "3.5"),
        ("Janet makes 18 dollars\nA: 18", "18"),
        ("정답: 12", "12"),
        ("first\n\nlast line  \n\n", "last line"),
        ("  \n ", None),
        ("", None),
    ],
)
def test_final_answer(response, answer):
    assert final_answer(response) == answer


CHOSEN = ("7", "8", "9", "12")


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<think>\n5 + 7 = 12\n</think>\n#### 12", "12"),
        ("5 + 7 = 12\n#### 12", "12"),
        ("5 + 7 = 12\n</think>\n#### 12", "12"),  # its opening was the prompt's
        ("<think>first try \\boxed{7}</think>\nThe answer is 8.", "8"),
        ("<think>#### 7</think>\n<think>#### 8</think>\n9", "9"),
        ("<think>#### 7", None),
        ("#### 7\n<think>no, wait", None),
        ("<think>#### 7</think>\n ", None),
    ],
)
def test_the_answer_stands_behind_the_thought(response, answer):
    assert final_answer(response) == answer
    for verifier in ("exact", "math", "regex", "choice"):
        verdict = judge(response, Task("t", verifier, answer or "7", json.dumps({"choices": {n: n for n in CHOSEN}})))
        assert (verdict.correct, verdict.answer) == (answer is not None, answer)
        assert not judge(response, Task("t", verifier, "7")).correct


def test_a_thought_without_an_answer_is_told():
    task = Task("t", "exact", "7")
    assert judge("<think>#### 7", task).reason == "the thought is not closed"
    assert judge("<think>#### 7</think>", task).reason == "nothing stands behind the thought"
    assert judge(" ", task).reason == "the response is empty"


def test_final_answer_takes_a_hostile_text_in_its_stride():
    for text in ("<answer>" * 50_000, r"\boxed{" * 50_000, "answer is" * 50_000, "#" * 100_000, "{" * 100_000):
        final_answer(text)


@pytest.mark.parametrize(
    ("answer", "gold", "correct"),
    [
        ("1,234", "1234", True),
        ("12,34", "1234", False),
        ("1,234,567.50", "1234567.50", True),
        ("12345,678", "12345678", False),
        ("1,234,56", "1234,56", False),
        ("New  YORK", "new york", True),
        ("가나", "가나", True),
        ("0.50", "0.5", False),
        ("5", "6", False),
    ],
)
def test_exact(answer, gold, correct):
    verdict = judge(f"so\n#### {answer}", Task("t", "exact", gold))
    assert verdict.correct is correct
    assert verdict.answer == answer
    assert bool(verdict.reason) is not correct


@pytest.mark.parametrize(
    ("answer", "gold", "correct"),
    [
        ("0.5", "1/2", True),
        (r"\frac{1}{2}", "0.5", True),
        ("$18.00", "18", True),
        ("(x+1)^2", "x^2+2x+1", True),
        ("y-2", "x+2", False),
        ("(1, 2)", "(1,2)", True),
        ("(2, 1)", "(1,2)", False),
        ("6 apples", "6", True),
        ("-3", "3", False),
        ("1,234", "1234", True),
        ("-1,234,567.5", "-1234567.5", True),
        ("1,2", "12", False),
        ("12", "1,2", False),
        ("1,,,,2", "12", False),
        ("34", "3,4", False),
        ("12,34", "1234", False),
        ("2,1", "1,2", True),
        ("3,2", "1,2", False),
        ("", "3", False),
    ],
)
def test_math(answer, gold, correct):
    assert judge(rf"\boxed{{{answer}}}", Task("t", "math", gold)).correct is correct


CITIES = {"choices": ["London", "Paris", "a dog", "42"]}
GIVEN = [
    *(
        "B",
        "b",
        "(B)",
        "B.",
        "**B**",
        "[B]",
        "$B$",
        r"\text{B}",
        "option B",
        "Option (B).",
        "the correct answer is (B)",
    ),
    *(
        "답: B",
        "정답은 B입니다",
        "B번",
        "B) Paris",
        "**B.** Paris",
        "B: Paris",
        "B - Paris",
        "B is correct",
        "B, not A",
    ),
    *("B because A is too far", "so it has to be (B).", "Therefore, option B is correct."),
]
NOT_ONE = ["A or B", "A, B", "(A) or (B)", "A/B", "A. B", "B Paris", "both", "E", "AB", "I think so", "not option B"]


@pytest.mark.parametrize("entry", [CITIES, {}], ids=["listed", "not listed"])
@pytest.mark.parametrize("given", GIVEN)
def test_choice_takes_a_letter_in_every_dress(given, entry):
    for gold in ("B", "(B)", "so\n#### B", *(["Paris", "so it is Paris.\n#### paris"] if entry else [])):
        task = Task("t", "choice", gold, json.dumps(entry))
        for response in (f"#### {given}", f"A bus, then a train.\nAnswer: {given}", rf"\boxed{{{given}}}"):
            assert judge(response, task) == Verdict(True, "B"), response
    assert judge(f"#### {given}", Task("t", "choice", "A", json.dumps(entry))) == Verdict(False, "B", "not A")


@pytest.mark.parametrize("given", NOT_ONE)
def test_choice_takes_no_two_and_no_words(given):
    for gold in "ABCD":
        assert not judge(f"#### {given}", Task("t", "choice", gold, json.dumps(CITIES))).correct


@pytest.mark.parametrize(
    ("answer", "choices", "letter"),
    [
        ("paris.", CITIES["choices"], "B"),
        ("A dog", CITIES["choices"], "C"),
        ("B. London", CITIES["choices"], None),
        ("2. 3 km", {"label": ["1", "2", "3"], "text": ["2 km", "3 km", "1 km"]}, "2"),
        ("(3)", {"label": ["1", "2", "3"], "text": ["x", "y", "z"]}, "3"),
        ("x", {"가": "x", "나": "y"}, "가"),
        ("나", {"가": "x", "나": "y"}, "나"),
        ("same", ["same", "same"], None),
    ],
)
def test_choices_of_their_own_text_and_labels(answer, choices, letter):
    task = Task("t", "choice", letter or "A", json.dumps({"choices": choices}))
    verdict = judge(f"#### {answer}", task)
    assert (verdict.correct, verdict.answer) == (letter is not None, letter or answer)


def test_choice_refuses_a_gold_that_is_no_choice():
    task = Task("t", "choice", "Rome", json.dumps(CITIES))
    assert judge("#### B", task).reason == "the gold answer 'Rome' is none of the choices"
    assert not judge("answer " * 300, Task("t", "choice", "B")).correct  # no backtracking without end


@pytest.mark.parametrize(
    ("pattern", "answer", "correct"),
    [
        (r"\d+ km", "12 km", True),
        (r"\d+ km", "12 km.", False),
        (r"\d+", "x1", False),
        (r"(?i)yes|ja", "JA", True),
        (r"[가-힣]+", "서울", True),
    ],
)
def test_regex_matches_the_whole_answer(pattern, answer, correct):
    verdict = judge(f"so\n#### {answer}", Task("t", "regex", pattern))
    assert (verdict.correct, verdict.answer, bool(verdict.reason)) == (correct, answer, not correct)


def test_regex_gives_up_on_what_takes_for_ever():
    began = time.monotonic()
    verdict = judge("#### " + "a" * 60, Task("t", "regex", "(a+)+b"))
    assert "stopped: matching took longer than 2 seconds" in verdict.reason
    assert time.monotonic() - began < 10
    assert "no regular expression: missing )" in judge("#### a", Task("t", "regex", "(a")).reason


def test_gold_answers_that_do_not_pass_their_own_verifier_are_told():
    def sample(verifier, answer, **entry):
        return Sample((Message("user", "?"),), None, "s", task=Task("t", verifier, answer, json.dumps(entry)))

    good = [
        *(sample("math", a) for a in ("18", "1,000", r"\frac{1}{2}", "x^2+1", "12 apples")),
        *(sample("exact", a) for a in ("New York", "a\nb", "#### #", "<x>")),
        sample("choice", "Paris", **CITIES),
        sample("regex", r"\d+", example="12"),
        sample("regex", r"\d+"),
    ]
    bad = {
        "the gold answer is empty": sample("math", " "),
        "none of the choices": sample("choice", "Rome", **CITIES),
        "no regular expression": sample("regex", "(a"),
        "not '": sample("regex", r"\d+", example="x"),
    }
    untold = Sample((Message("user", "?"),), None, "s")
    refused = check_golds([*good, untold, *bad.values()])
    assert [s for s, _ in refused] == list(bad.values())
    for (_, reason), wanted in zip(refused, bad, strict=True):
        assert wanted in reason


def test_math_off_the_main_thread():
    task, found = Task("t", "math", "1/2"), {}

    def work():
        for answer in ("0.5", "3"):
            found[answer] = judge(f"#### {answer}", task)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found["0.5"] == Verdict(True, "0.5")
    assert not found["3"].correct
    assert "failed" not in found["3"].reason


def test_math_has_one_limit_for_the_whole_verdict(monkeypatch):
    monkeypatch.setattr(math._comparing, "seconds", 1)
    judge("#### 1/2", Task("t", "math", "0.5"))  # so that it is there
    began = time.monotonic()
    found = judge("#### 9^{9^{9^{9}}}", Task("t", "math", "3^{9^{9^{9}}}"))
    assert (found.correct, found.reason) == (False, "stopped: comparing it took longer than 5 seconds")
    assert time.monotonic() - began < 60
    assert judge("#### 1/2", Task("t", "math", "0.5")).correct


def test_math_agrees_with_itself_on_fresh_fractions():
    rng = random.Random()
    for _ in range(20):
        a, b, k = rng.randint(1, 99), rng.randint(2, 99), rng.randint(2, 9)
        assert judge(rf"#### \frac{{{a * k}}}{{{b * k}}}", Task("t", "math", f"{a}/{b}")).correct, (a, b, k)
        assert not judge(f"#### {a + b}/{b}", Task("t", "math", f"{a}/{b}")).correct, (a, b)


@pytest.mark.parametrize(
    "answer",
    [
        "__import__('os').system('touch pwned')",
        "exec('open(1)')",
        "[open('pwned', 'w')]",
        "(lambda: 1)()",
        "9**9**9**9",
        "sympify('1')",
    ],
)
def test_programs_are_not_run(answer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    entry = json.dumps(
        {"config": {}, "entry": {"question": "", "answer": "_ Q", "metadata": {"valid_answers": ["_ Q"]}}}
    )
    verdict = judge(f"#### {answer}", Task("n_queens", "reasoning_gym", "_ Q", entry))
    assert not verdict.correct
    assert "program" in verdict.reason
    assert not list(tmp_path.iterdir())


FOR_EVER = ["9**(9)**9", "(((9**999)**999)**999)", "99999999!", "factorial(10**8)"]


@pytest.mark.parametrize("answer", FOR_EVER)
def test_answers_that_take_for_ever_to_score_are_stopped(answer, monkeypatch):
    monkeypatch.setattr(reasoning_gym._scorers, "seconds", 1)
    problem = {"question": "", "answer": "1 + 2", "metadata": {"numbers": [1, 2], "target": 3}}
    entry = json.dumps({"config": {}, "entry": problem})
    began = time.monotonic()
    assert not judge(f"#### {answer}", Task("countdown", "reasoning_gym", "1 + 2", entry)).correct
    assert time.monotonic() - began < 60
    assert judge("#### 2 + 1", Task("countdown", "reasoning_gym", "1 + 2", entry)) == Verdict(True, "2 + 1")


def test_what_looks_like_a_program_is_found_without_searching_for_long():
    for text in ("a(" * 50_000, "lambda " * 15_000, "**" + " " * 100_000, "exec" * 25_000, "* * " * 25_000):
        assert not reasoning_gym.looks_like_a_program(text)


def test_scorers_that_only_compare_are_asked_here_and_others_where_they_are_shut_in(monkeypatch):
    before = reasoning_gym._scorers.asked
    for name in ("chain_sum", "basic_arithmetic", "gcd"):
        (sample,) = problems(name, 1, 3, {})
        assert sample.task and judge(f"#### {sample.task.answer}", sample.task).correct
        assert not judge("#### what?", sample.task).correct
    assert reasoning_gym._scorers.asked == before
    assert judge("#### 1e400", replace(sample.task, name="chain_sum")).correct is False
    (board,) = problems("n_queens", 1, 3, {})
    monkeypatch.setattr(reasoning_gym, "looks_like_a_program", lambda answer: False)
    reads = "[[__import__('os').listdir('/etc')]]"
    assert board.task and not judge(f"#### {reads}", board.task).correct
    assert reasoning_gym._scorers.asked == before + 2


@pytest.mark.parametrize("verifier", sorted(VERIFIERS))
def test_no_verifier_raises(verifier):
    for response in ("", "####", "\\boxed{", "\x00", "\ud800", "#### " + "(" * 500, "#### \\frac{1}{0}", "#### 9/0"):
        for entry in ("{}", "not json", '{"config": {}, "entry": {}}'):
            verdict = judge(response, Task("no_such_task", verifier, "1", entry))
            assert isinstance(verdict, Verdict)
            assert not verdict.correct
            assert verdict.reason


def test_a_failure_inside_becomes_a_verdict():
    @never_raises
    def broken(response, task):
        raise ZeroDivisionError("no good")

    verdict = broken("x", Task("t", "exact", "1"))
    assert not verdict.correct
    assert "ZeroDivisionError: no good" in verdict.reason


def test_an_unknown_verifier_is_refused_by_name():
    with pytest.raises(DataError, match="no verifier is named 'maths'.*exact, math"):
        judge("1", Task("t", "maths", "1"))


def test_judging_samples():
    sample = Sample((Message("user", "1+1?"),), "#### 2", "s", task=Task("t", "exact", "2"))
    assert judge_sample(sample) == Verdict(True, "2")
    assert judge_sample(Sample(sample.prompt, None, "s", task=sample.task)) is None
    assert judge_sample(Sample(sample.prompt, "2", "s")) is None


@needs_gsm8k
@pytest.mark.parametrize("verifier", ["math", "exact"])
def test_gsm8k_answers_pass_their_own_verifier(verifier):
    rows = [json.loads(line) for line in (GSM8K / "train.jsonl").read_text().splitlines()[:300]]
    for row in rows:
        verdict = judge(row["answer"], Task("gsm8k", verifier, row["answer"].split("####")[1].strip()))
        assert verdict.correct, (row["answer"], verdict)


@needs_gsm8k
def test_agrees_with_the_published_labels():
    rows = [json.loads(line) for line in (GSM8K / "example_model_solutions.jsonl").read_text().splitlines()[:200]]
    agree = total = 0
    for row in rows:
        task = Task("gsm8k", "math", row["ground_truth"].rpartition("A:")[2].strip())
        for model in ("6b_finetuning", "175b_verification"):
            total += 1
            agree += judge(row[model]["solution"], task).correct == row[model]["is_correct"]
    assert agree / total > 0.99
