"""After the first steps of a training, what is left of it is told by the rate that it has."""

from __future__ import annotations

from types import SimpleNamespace

from pennyweight import line
from pennyweight.ledger.entries import entry_body
from pennyweight.line import Line
from pennyweight.model.device import choose


def paced(monkeypatch, steps: int, first: int = 1, each: float = 2.0, updates: int = 1) -> list[tuple[str, dict]]:
    """Entries of the ledger after a training of ``steps``, from ``first`` on, ``each`` seconds a step."""
    clock, entries, reached = [100.0], [], []
    monkeypatch.setattr(line.time, "monotonic", lambda: clock[0])
    held = object.__new__(Line)
    held.foretold = held.allowance = None
    held.recipe = SimpleNamespace(method=SimpleNamespace(updates=updates))
    held.run = SimpleNamespace(ledger=SimpleNamespace(append=lambda kind, body: entries.append((kind, body))))
    reach = held.paced("kd-0", steps, lambda step, note: reached.append(step))
    for step in range(first, steps + 1):
        reach(step, "")
        clock[0] += each
    assert reached == list(range(first, steps + 1))
    return entries


def test_after_twenty_steps_once(monkeypatch):
    entries = paced(monkeypatch, 200)
    assert entries == [("forecast", {"stage": "kd-0", "step": 21, "seconds": 358.0, "step_seconds": 2.0})]
    assert entry_body(*entries[0])


def test_after_a_minute_where_steps_are_long(monkeypatch):
    assert [e["step"] for _, e in paced(monkeypatch, 50, each=25.0)] == [4]


def test_from_where_a_checkpoint_left_off(monkeypatch):
    assert [e["step"] for _, e in paced(monkeypatch, 200, first=101)] == [121]


def test_of_a_short_training_after_half_of_it(monkeypatch):
    assert [[e["step"] for _, e in paced(monkeypatch, steps)] for steps in (4, 8, 21, 39)] == [[3], [5], [12], [21]]


def test_not_before_a_student_has_written_again(monkeypatch):
    assert [e["step"] for _, e in paced(monkeypatch, 12, updates=8)] == [9]  # which it does before steps 1 and 9
    assert [e["step"] for _, e in paced(monkeypatch, 100, updates=8)] == [25] and paced(monkeypatch, 8, updates=8) == []


def test_not_where_nothing_is_left(monkeypatch):
    assert paced(monkeypatch, 2) == [] and paced(monkeypatch, 200, first=185) == []


def test_the_whole_run_is_told_anew_by_what_is_over_and_what_is_to_come(monkeypatch):
    took = {"data": 5.0, "targets": 15.0, "sft-0": None}
    stages = {n: {"metered": s and {"seconds": s}, "peak_memory_bytes": 10} for n, s in took.items()}
    held, seen = object.__new__(Line), []
    held.foretold, held.recipe = SimpleNamespace(parts=("recipe",), pace="pace"), SimpleNamespace(train="schedule")
    held.bench = SimpleNamespace(encoded=[], group=SimpleNamespace(first=True))
    held.compute = choose("cpu", "float32")
    held.run = SimpleNamespace(
        stages=lambda: stages, meter=SimpleNamespace(whole=lambda: SimpleNamespace(seconds=30.0))
    )
    monkeypatch.setattr(line, "lengths", lambda *of: {"rows": 3})
    peaks = []
    held._retold = lambda *of: seen.append(of) or 100.0, lambda *of: peaks.append(of) or 12345.6
    told = held._whole("sft-0", 40.0, 60.0)
    assert told["whole_seconds"] == 170.0 and told["peak_memory_bytes"] == 12346
    assert peaks[0][:2] == ("pace", "sft-0") and peaks[0][2] > 1e7 and peaks[0][3] == 10
    assert seen == [("recipe", {"rows": 3, "train": 0}, "sft-0", 60.0, {"data": 5.0, "targets": 15.0})]
    del stages["targets"]
    assert held._whole("teacher-0", 40.0, 60.0) == {}
    held.bench.group.first = False
    assert held._whole("sft-0", 40.0, 60.0) == {}
