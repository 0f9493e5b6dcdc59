"""What the terminal shows of a run: the finding in words, and a table that fits 80 columns."""

from __future__ import annotations

from pennyweight.report.terminal import bounds, interval, number, print_summary, print_values, size


def metrics(accuracy, kl=None):
    out = {"accuracy": {"mean": accuracy, "low": accuracy - 0.02, "high": accuracy + 0.02, "how": "Wilson"}}
    if kl is not None:
        out["kl_to_teacher"] = {"mean": kl, "low": kl - 0.001, "high": kl + 0.001, "how": "bootstrap"}
    return out


def model(params, size_, accuracy, kl=None):
    return {"params": params, "bytes": size_, "seeds": [0], "metrics": metrics(accuracy, kl)}


SUMMARY = {
    "name": "a-recipe-with-a-long-name",
    "seeds": [0],
    "teacher": model(1_234_567_890, 4_938_271_560, 0.9),
    "arms": {
        "base": model(123_456_789, 493_827_156, 0.02, 11.5),
        "sft": model(123_456_789, 493_827_156, 0.7, 0.4),
        "kd": model(123_456_789, 493_827_156, 0.8, 0.3),
    },
    "quantized": {"int4": model(123_456_789, 71_234_567, 0.78, 0.31)},
    "gap_recovered": {
        "accuracy": {
            "mean": 0.5,
            "low": None,
            "high": None,
            "difference": {"mean": 0.1, "low": None, "high": None},
            "verdict": "kd better",
        }
    },
    "targets": {"tokens": 1000, "bytes": 12_000, "bytes_per_token": 12.0},
}


def test_a_summary_is_a_finding_and_a_table_in_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    print_summary(SUMMARY)
    told = capsys.readouterr().out
    table = told[told.index("a-recipe") :].splitlines()
    assert "keeps 89\u00a0% of the teacher’s accuracy" in told and "better than its control" in told
    assert "12.0 bytes each" in told
    assert all(len(line) <= 80 for line in table) and "…" not in told
    assert [line.split()[0] for line in table[2::2]] == ["teacher", "base", "sft", "kd", "int4", "teacher's"]
    assert "80.0 %" in table[8] and "78.0–82.0" in table[9]


def test_an_unfinished_run_says_so(capsys):
    print_summary({"unfinished": True, "recipe": {"name": "x"}, "stages": ["teacher", "data"]})
    assert capsys.readouterr().out == "x: unfinished; stages so far: teacher, data\n"


def test_numbers_have_their_unit_and_their_bounds():
    row = {"mean": 0.87, "low": 0.841, "high": 0.895}
    assert number("accuracy", 0.87) == "87.0 %" and number("bits_per_byte", 1.5) == "1.500"
    assert number("accuracy", None) == number("accuracy", float("nan")) == "-"
    assert interval("accuracy", row) == "87.0 % (84.1–89.5)"
    assert bounds("ece", {"mean": 0.1, "low": 0.1, "high": 0.1}) == bounds("ece", {**row, "low": None}) == ""
    assert [size(n) for n in (12, 1_500, 2_500_000, 3_000_000_000)] == ["12 B", "1.5 kB", "2.5 MB", "3.0 GB"]


def test_values_are_lines(capsys):
    print_values({"a": 1234, "b": {"c": "x"}, "kl_a_to_b": {"mean": 0.5, "low": 0.4, "high": 0.6, "how": "bootstrap"}})
    assert capsys.readouterr().out.splitlines() == [
        "a: 1,234",
        "b:",
        "  c: x",
        "kl_a_to_b: 0.500 (0.400–0.600)  [bootstrap]",
    ]
