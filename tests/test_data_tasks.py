"""Procedural problems: the same for the same seed, with solutions that their own verifier accepts."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys

import pytest

from pennyweight.data.tasks import TRACES, draw, freeze, problems, solution, thaw
from pennyweight.errors import DataError
from pennyweight.records import Task, canonical_json
from pennyweight.verifiers import judge

CONFIGS = {
    "chain_sum": [{}, {"allow_negation": True, "max_terms": 8}],
    "products": [{}, {"allow_negation": True, "max_terms": 4, "max_digits": 3}],
    "gcd": [{}, {"max_numbers": 4}],
    "lcm": [{}, {"max_numbers": 4, "max_value": 20}],
}
BARE = ["leg_counting", "sudoku", "arc_agi", "figlet_font", "tower_of_hanoi", "word_sorting"]


def verdict_of(name, config, entry):
    task = Task(name, "reasoning_gym", entry["answer"], canonical_json({"config": config, "entry": freeze(entry)}))
    return judge(solution(name, entry) or "", task)


@pytest.mark.parametrize("name", sorted(TRACES))
def test_worked_solutions_pass_their_own_verifier(name):
    for config in CONFIGS.get(name, [{}]):
        for entry in draw(name, 50, random.randrange(10**6), config):
            text = solution(name, entry)
            assert text is not None
            if not entry["answer"]:
                continue  # left out by problems: see the test of zero
            assert re.search(r"\n#### \S", "\n" + text)
            assert verdict_of(name, config, entry).correct, (entry, text)


@pytest.mark.parametrize("name", BARE)
def test_bare_answers_pass_their_own_verifier(name):
    for entry in draw(name, 3, random.randrange(10**6), {}):
        assert verdict_of(name, {}, entry).correct, entry


def test_a_wrong_answer_is_wrong():
    for entry in draw("chain_sum", 20, random.randrange(10**6), {}):
        task = Task(
            "chain_sum", "reasoning_gym", entry["answer"], canonical_json({"config": {}, "entry": freeze(entry)})
        )
        assert not judge(f"#### {int(entry['answer']) + 1}", task).correct


def test_the_form_of_a_chain_sum():
    entry = {"metadata": {"expression": "42 - 25 - 73"}, "answer": "-56"}
    assert solution("chain_sum", entry) == "42 - 25 = 17\n17 - 73 = -56\n#### -56"


def test_every_line_of_arithmetic_is_true():
    for name in ("chain_sum", "products"):
        for config in CONFIGS[name]:
            for entry in draw(name, 20, random.randrange(10**6), config):
                for left, right in re.findall(r"^([\d *+-]+) = (-?\d+)$", solution(name, entry) or "", re.MULTILINE):
                    a, sign, b = left.split()
                    value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
                    assert value == int(right), (left, right)


def test_problems_are_samples_without_repeats():
    found = problems("chain_sum", 60, 5, {"max_terms": 2, "max_digits": 1})
    prompts = [s.prompt[0].content for s in found]
    assert 0 < len(found) < 60
    assert len(set(prompts)) == len(prompts)
    first = found[0]
    assert first.prompt[0].role == "user"
    assert first.source == "reasoning-gym/chain_sum"
    assert first.licence == "Apache-2.0"
    assert first.task is not None
    assert first.response is not None
    assert first.task.verifier == "reasoning_gym"
    assert all(judge(s.response or "", s.task).correct for s in found if s.task)
    drawn = list(
        dict.fromkeys(e["question"].strip() for e in draw("chain_sum", 60, 5, {"max_terms": 2, "max_digits": 1}))
    )
    assert prompts == drawn


def test_problems_that_nobody_can_solve_are_left_out():
    config = {"min_value": 0, "max_value": 1, "min_base": 2, "max_base": 9}
    assert any(e["answer"] == "" for e in draw("base_conversion", 40, 1, config))
    found = problems("base_conversion", 40, 1, config)
    assert found
    assert all(s.task and judge(s.response or "", s.task).correct for s in found)


def test_no_solution_where_there_is_no_single_answer():
    assert all(s.response is None for s in problems("graph_color", 2, 1, {}))


def test_a_seed_names_the_same_problems_in_any_process():
    """word_ladder walks over sets of strings, list_functions draws from the global random state."""
    names = ["word_ladder", "list_functions"]
    code = (
        "import json, random; random.seed(); from pennyweight.data.tasks import problems; "
        f"print(json.dumps([[s.id for s in problems(name, 12, 3, {{}})] for name in {names}]))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "77"}
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True).stdout
    assert json.loads(there) == [[s.id for s in problems(name, 12, 3, {})] for name in names]


def test_drawing_leaves_the_random_state_alone():
    random.seed(1)
    draw("list_functions", 3, 2, {})
    after = random.random()
    random.seed(1)
    assert random.random() == after


def test_other_seeds_give_other_problems():
    assert draw("gcd", 5, 1, {}) != draw("gcd", 5, 2, {})


def test_freezing_keeps_tuples_and_keys():
    value = {"a": [(1, (2.5, None)), {"b": True}], "c": {1: "x", (2, 3): ["y"]}}
    assert thaw(json.loads(json.dumps(freeze(value)))) == value
    with pytest.raises(TypeError, match="set"):
        freeze({"a": {1, 2}})


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("chainsum", {}, "no task 'chainsum'.*chain_sum"),
        ("chain_sum", {"min_term": 2}, "no setting 'min_term'; did you mean 'min_terms'"),
        ("chain_sum", {"min_terms": 5, "max_terms": 2}, "refuses min_terms=5, max_terms=2: max_terms must be >="),
        ("chain_sum", {"min_terms": 2.5}, "refuses min_terms=2.5: .*correct"),
        ("chain_sum", {"seed": 3}, "seed of task chain_sum does not go into its config"),
        ("composite", {}, "composite refuses its defaults"),
    ],
)
def test_bad_settings_are_named(name, config, message):
    with pytest.raises(DataError, match=message):
        draw(name, 3, 0, config)


def test_refusals_reach_the_caller():
    with pytest.raises(DataError, match="no task 'chainsum'"):
        problems("chainsum", 3, 0, {})
