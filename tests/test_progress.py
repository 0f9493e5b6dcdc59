"""Progress where nobody watches: plain lines with rate and time left, on stderr, not too many."""

from __future__ import annotations

import re

from pennyweight import progress


def test_plain_lines_with_rate_and_time_left(capsys, monkeypatch):
    clock = iter(float(t) for t in range(0, 1000, 4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.counting("kd (seed 0)", 10, "steps") as c:
        for _ in range(10):
            c.advance(1, "loss 0.5")
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and 2 <= len(lines) <= 4
    assert re.fullmatch(r"  kd \(seed 0\): \d+/10 0\.\d steps/s  loss 0\.5  \d+ s left", lines[0])


def test_the_rate_after_a_resume_counts_only_what_was_done_now(monkeypatch, capsys):
    clock = iter([0.0, 0.0, 10.0, 20.0, 30.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    counter = progress.Counter("x", 1000, "steps")
    counter.reach(900)
    counter.reach(910)
    assert re.fullmatch(r"  x: 910/1,000 1\.0 steps/s +90 s left\n", capsys.readouterr().err)
