"""metrics.jsonl: appended, handed on, and never doubled after a resume."""

from __future__ import annotations

from pennyweight.train.journal import Journal


def test_lines_come_back_and_are_handed_on(tmp_path):
    taken = []
    journal = Journal(tmp_path / "metrics.jsonl", [taken.append])
    for step in (1, 2):
        journal.write({"arm": "kd", "step": step, "loss": 0.5})
    assert journal.read() == taken == [{"arm": "kd", "step": s, "loss": 0.5} for s in (1, 2)]


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.write({"step": 1})
    with open(journal.path, "a") as f:
        f.write('{"step": 2, "lo')
    assert journal.read() == [{"step": 1}]


def test_rewinding_drops_only_later_lines_of_the_same_training(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl")
    for arm in ("sft", "kd"):
        for step in (1, 2, 3):
            journal.write({"arm": arm, "seed": 0, "step": step})
    with open(journal.path, "a") as f:
        f.write('{"step": 4, "ar')
    journal.rewind({"arm": "kd", "seed": 0}, 1)
    assert [(x["arm"], x["step"]) for x in journal.read()] == [("sft", 1), ("sft", 2), ("sft", 3), ("kd", 1)]
    assert journal.path.read_text().endswith("}\n")
