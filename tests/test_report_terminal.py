"""What the terminal shows of a run: the finding in words, and a table that fits 80 columns."""

from __future__ import annotations

from pennyweight.report.terminal import interval, print_quantized, print_summary, print_values


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
    assert "80.0" in table[8] and "78.0–82.0" in table[9]


def test_an_unfinished_run_says_so(capsys):
    print_summary({"unfinished": True, "recipe": {"name": "x"}, "stages": ["teacher", "data"]})
    assert capsys.readouterr().out == "x: unfinished; stages so far: teacher, data\n"


def test_numbers_have_their_unit_and_their_bounds():
    row = {"mean": 0.87, "low": 0.841, "high": 0.895}
    assert interval("accuracy", row) == "87.0 % (84.1–89.5)"
    assert interval("ece", {**row, "low": None}) == "87.0 %"
    assert interval("kl_to_teacher", {"mean": 0.00083, "low": 0.0007, "high": 0.00091}) == "0.00083 (0.00070–0.00091)"


def test_values_are_lines(capsys):
    kl = {"mean": 0.5, "low": 0.4, "high": 0.6, "how": "bootstrap"}
    ece = {"mean": 0.05, "low": 0.04, "high": 0.06, "how": "bootstrap"}
    print_values({"a": 1234, "b": {"c": "x"}, "kl_a_to_b": kl, "ece_a": ece, "bits_per_byte_a": kl})
    assert capsys.readouterr().out.splitlines() == [
        "a: 1,234",
        "b:",
        "  c: x",
        "kl_a_to_b: 0.500 (0.400–0.600)  [bootstrap]",
        "ece_a: 5.0 % (4.0–6.0)  [bootstrap]",
        "bits_per_byte_a: 0.500 (0.400–0.600)  [bootstrap]",
    ]


def test_a_copy_is_shown_beside_its_parent_with_what_was_predicted(capsys):
    def row(mean):
        return {"mean": mean, "low": 0.9 * mean, "high": 1.1 * mean, "how": "bootstrap"}

    predicted = {"bytes": 250_000, "kl": row(0.09), "bits_per_byte": 0.06, "linears": {"int4": 35}}
    planned = {"format": "int4", "params": 260_000, "parent_bytes": 1_040_000, "predicted": predicted}
    print_quantized(planned)
    out = capsys.readouterr().out.replace("\u00a0", " ")
    assert "int4: 250 kB of 1.04 MB" in out and "0.09 (0.081 to 0.099) nats a token, 0.06 bits a byte" in out
    found = {
        **planned, "path": "small", "bytes": 251_000, "recovered": {"steps": 1200}, "kl": row(0.03),
        "agreement": row(0.9), "left_in_16_bits": ["a", "b", "c"], "samples": "texts.jsonl", "tokens_measured": 12_345,
        "engine": "llama.cpp says so", "copy": {"bits_per_byte": row(1.2)}, "parent": {"bits_per_byte": row(1.1)},
    }  # fmt: skip
    print_quantized(found)
    out = capsys.readouterr().out.replace("\u00a0", " ")
    assert "small: 251 kB of 1.04 MB, int4" in out and "taught by its parent for 1,200 steps" in out
    assert "Linears left in 16 bits: 3 (a, b, …)" in out and "KL to the parent: 0.03 (0.027 to 0.033)" in out
    assert "12,345 tokens of: texts.jsonl" in out and "llama.cpp says so" in out
    assert [line.split()[0] for line in out.splitlines() if line.startswith(("parent", "copy"))] == ["parent", "copy"]
