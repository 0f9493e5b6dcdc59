"""The numbers of summary.json: intervals over seeds, the gap recovered, verdicts that call a draw a draw."""

from __future__ import annotations

import json
import math

import pytest

from pennyweight.report.summary import combine, gap_recovered, shown_samples, summarise


def interval(mean, half=0.01, how="Wilson, 100 trials"):
    return {"mean": mean, "low": mean - half, "high": mean + half, "how": how}


def evaluation(accuracy, kl=None, half=0.01, outputs=()):
    metrics = {"accuracy": interval(accuracy, half)}
    if kl is not None:
        metrics["kl_to_teacher"] = interval(kl, half)
    return {"metrics": metrics, "outputs": list(outputs), "decode_tokens_per_second": 10.0}


def test_over_seeds_the_interval_is_students_and_stays_in_range():
    found = combine({0: evaluation(0.97), 1: evaluation(0.99), 2: evaluation(1.0)})["accuracy"]
    assert found["mean"] == pytest.approx(0.98667, abs=1e-4) and "3 seeds" in found["how"]
    assert found["low"] < 0.97 and found["high"] == 1.0


def test_where_nothing_varies_the_sampling_interval_stands():
    same = combine({0: evaluation(0.5), 1: evaluation(0.5)})["accuracy"]
    assert same == interval(0.5)
    assert combine({7: evaluation(0.5)})["accuracy"] == interval(0.5)


def test_the_gap_is_the_share_of_what_sft_left():
    sft = {0: evaluation(0.70, 0.5), 1: evaluation(0.72, 0.5)}
    kd = {0: evaluation(0.80, 0.25), 1: evaluation(0.82, 0.24)}
    found = gap_recovered(evaluation(0.91), sft, kd, "kd")
    assert found["accuracy"]["mean"] == pytest.approx(0.5)  # (0.81 - 0.71) / (0.91 - 0.71)
    assert found["accuracy"]["difference"]["mean"] == pytest.approx(0.10)
    assert found["accuracy"]["verdict"] == "kd better"
    assert found["kl_to_teacher"]["mean"] == pytest.approx(0.51)  # the teacher is 0 from itself
    assert found["kl_to_teacher"]["verdict"] == "kd better"  # lower is better


@pytest.mark.parametrize(
    ("kd", "verdict"),
    [([0.74, 0.76, 0.75], "kd better"), ([0.60, 0.85, 0.72], "draw"), ([0.60, 0.62, 0.61], "sft better")],
)
def test_a_draw_is_called_a_draw(kd, verdict):
    sft = {i: evaluation(v) for i, v in enumerate([0.70, 0.72, 0.71])}
    found = gap_recovered(evaluation(0.9), sft, {i: evaluation(v) for i, v in enumerate(kd)}, "kd")
    assert found["accuracy"]["verdict"] == verdict


def test_one_seed_decides_only_when_the_intervals_are_apart():
    def verdict(kd, half):
        return gap_recovered(evaluation(0.9), {0: evaluation(0.7, half=half)}, {0: evaluation(kd, half=half)}, "kd")[
            "accuracy"
        ]["verdict"]

    assert verdict(0.75, 0.01) == "kd better" and verdict(0.75, 0.04) == "draw" and verdict(0.6, 0.01) == "sft better"


def test_no_gap_is_no_division():
    found = gap_recovered(evaluation(0.7), {0: evaluation(0.7)}, {0: evaluation(0.7)}, "kd")["accuracy"]
    assert found["mean"] is None and found["verdict"] == "draw"
    ahead = gap_recovered(evaluation(0.7), {0: evaluation(0.8)}, {0: evaluation(0.6)}, "kd")["accuracy"]
    assert ahead["mean"] is None and ahead["verdict"] == "sft better" and "as good as the teacher" in ahead["how"]


def test_the_summary_is_json_without_nan_or_infinity():
    facts = {"name": "t", "path": "t", "fingerprint": "f", "licence": "MIT", "params": 10, "bytes": 40}
    nan = evaluation(float("nan"))
    nan["metrics"]["accuracy"] |= {"low": 0.0, "high": 1.0}
    made = summarise(
        recipe={"name": "r", "seeds": [0], "method": {"kind": "kd"}},
        teacher=facts,
        start=facts,
        trained={"sft": {"steps": 1, "tokens": 2}, "kd": {"steps": 1, "tokens": 2}},
        evaluations={
            "teacher": evaluation(0.9),
            "base": {0: evaluation(0.1)},
            "sft": {0: evaluation(0.5)},
            "kd": {0: nan},
        },
        copies={"int8": {"bytes": 5, "params": 10, "evaluation": evaluation(0.5)}},
    )
    text = json.dumps(made, allow_nan=False)
    assert json.loads(text)["arms"]["kd"]["metrics"]["accuracy"]["mean"] is None
    assert json.loads(text)["arms"]["sft"]["metrics"]["accuracy"]["mean"] == 0.5
    assert not math.isnan(json.loads(text)["arms"]["sft"]["per_seed"]["0"]["accuracy"])


def test_copies_that_were_rounded_only_are_kept_apart():
    facts = {"name": "t", "path": "t", "fingerprint": "f", "licence": "MIT", "params": 10, "bytes": 40}
    copies = {
        "int4": {"bytes": 3, "params": 10, "recovered": 7, "evaluation": evaluation(0.5)},
        "int4-rounded": {"bytes": 3, "params": 10, "evaluation": evaluation(0.4)},
    }
    evaluations = {"teacher": evaluation(0.9), "base": {0: evaluation(0.1)}, "sft": {0: evaluation(0.5)}}
    recipe = {"name": "r", "seeds": [0], "method": {"kind": "sft"}}
    made = summarise(recipe=recipe, teacher=facts, start=facts, trained={}, evaluations=evaluations, copies=copies)
    assert set(made["quantized"]) == set(made["rounded"]) == {"int4"}
    assert made["rounded"]["int4"]["metrics"]["accuracy"]["mean"] == 0.4 and made["rounded"]["int4"]["recovered"] == 0
    assert (made["rounded"]["int4"]["path"], made["rounded"]["int4"]["format"]) == (
        "student-int4-rounded",
        "int4, compressed-tensors",
    )
    rows = [{"prompt": "p", "gold": None, "text": "t", "correct": None}]
    every = {"int4": evaluation(1, outputs=rows), "int4-rounded": evaluation(1, outputs=rows)}
    assert set(shown_samples(every, 1)[0]["outputs"]) == {"int4"}


def test_shown_samples_are_the_first_and_of_every_model():
    rows = [{"prompt": f"p{i}", "gold": "1", "text": f"t{i}", "correct": bool(i)} for i in range(3)]
    found = shown_samples({"teacher": evaluation(1, outputs=rows), "kd-0": evaluation(1, outputs=rows)}, 2)
    assert [r["prompt"] for r in found] == ["p0", "p1"]
    assert found[1]["outputs"]["kd-0"] == {"text": "t1", "correct": True}
