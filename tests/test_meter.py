"""The meter: what stages take adds up to the whole, and survives kill -9 but for one interval."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from truth import fresh

from pennyweight.meter.counters import Counters
from pennyweight.meter.meter import BETWEEN, METER, Meter, last_lines, taken

SHORT = 0.02


def stretch(**changed):
    line = {"process": "a", "stretch": 0, "stage": "s", "key": "k", "seconds": 2.0, "open": 2.0, "devices": 1}
    return line | {"on": "cpu", "cpu": 1.0, "joules": {}} | changed


def test_stages_and_what_is_between_them_add_up_to_the_whole(tmp_path):
    meter = Meter(tmp_path / METER, devices=2, interval=SHORT)
    for stage, seconds in (("teacher", 0.2), ("data", 0.1), ("teacher", 0.1)):
        meter.begin(stage, "k")
        time.sleep(seconds)
        meter.end()
        time.sleep(0.03)
    meter.close()
    parts, whole = meter.by_stage(), meter.whole()
    assert set(parts) == {("teacher", "k"), ("data", "k"), (BETWEEN, "")}
    assert parts["teacher", "k"].seconds >= 0.3 and parts["teacher", "k"].stretches == 2
    assert sum(p.seconds for p in parts.values()) == pytest.approx(whole.seconds, rel=0.01)
    assert whole.device_seconds == pytest.approx(2 * whole.seconds, rel=0.01)
    assert meter.of("data", "k").seconds == parts["data", "k"].seconds
    again = Meter(tmp_path / METER, interval=SHORT)
    assert again.of("teacher", "k").seconds == parts["teacher", "k"].seconds
    again.close()


WORK = """
import sys, time
from pathlib import Path
from pennyweight.meter.meter import Meter
meter = Meter(Path(sys.argv[1]), interval=0.05)
meter.begin("work", "k")
print(time.monotonic(), flush=True)
time.sleep(60)
"""


def test_killed_ten_times_a_stage_loses_an_interval_at_most_each_time(tmp_path):
    chance, lived = random.Random(seed := fresh()), 0.0
    for _ in range(10):
        command = [sys.executable, "-c", WORK, str(tmp_path / METER)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            began = float(process.stdout.readline())
            time.sleep(chance.uniform(0.05, 0.25))
            process.send_signal(signal.SIGKILL)
            process.wait()
            lived += time.monotonic() - began  # and what it took to be gone
    found = taken(x for x in last_lines(tmp_path / METER) if x["stage"] == "work")
    assert found.stretches == 10
    # A busy machine wakes the meter late, so that an interval is told here as what it may then be.
    assert lived - 10 * 0.5 <= found.seconds <= lived, f"seed {seed}"


def test_a_line_that_was_cut_short_costs_that_line_alone(tmp_path):
    meter = Meter(tmp_path / METER, interval=60)
    meter.begin("s", "k")
    meter.close()
    whole = (tmp_path / METER).read_bytes()
    (tmp_path / METER).write_bytes(whole[:-9])
    again = Meter(tmp_path / METER, interval=60)
    again.close()
    lines = (tmp_path / METER).read_bytes().splitlines()
    assert len(lines) == whole.count(b"\n") + 1 and json.loads(lines[-1])["stage"] == BETWEEN
    assert len(again.by_stage()) == 2


def test_damaged_lines_are_passed_over(tmp_path):
    rows = [stretch(), {"process": "b"}, [], stretch(stretch=1, seconds="x"), stretch(seconds=3.0)]
    (tmp_path / METER).write_text("\n".join(map(json.dumps, rows)) + "\n\xff\n", encoding="latin-1")
    assert [x["seconds"] for x in last_lines(tmp_path / METER)] == [3.0]


def test_joules_are_those_of_counters_and_what_had_none_is_told():
    rows = [stretch(joules={"cpu": 5.0}), stretch(seconds=3.0), stretch(on="gpu", devices=4, joules={"cpu": 1.0})]
    found = taken(rows)
    assert found.joules == {"cpu": 5.0} and found.device_seconds == 2 + 3 + 8
    assert found.uncounted == 3 + 8  # the second has no counter, the third none of what did the work
    assert found.host == 1.0 and found.hostless == 0  # of the third its host's processors, which did not do the work
    assert taken([stretch(on="gpu", joules={"gpu": 7.0})]).hostless == 2.0


class Short:
    """A file that takes half of the first thing that is written to it, as one on a full disk does."""

    full = True

    def __init__(self, *how, **more):
        self.file = open(*how, **more)  # noqa: SIM115

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.file.close()

    def write(self, text: bytes) -> int:
        part = text[: len(text) // 2] if Short.full else text
        Short.full = False
        return self.file.write(part)


def test_a_line_that_the_disk_took_half_of_costs_nothing_once_there_is_room(tmp_path, monkeypatch):
    monkeypatch.setattr("pennyweight.meter.meter.open", Short, raising=False)
    meter = Meter(tmp_path / METER, interval=60)
    meter.begin("s", "k")
    meter.end()
    meter.close()
    assert {x["stage"] for x in last_lines(tmp_path / METER)} == {"s", BETWEEN}
    assert meter.whole().seconds == pytest.approx(taken(last_lines(tmp_path / METER)).seconds, abs=0.01)


def test_what_a_budget_looks_ahead_by_outlives_a_kill(tmp_path):
    meter = Meter(tmp_path / METER, interval=SHORT)
    meter.begin("s", "k")
    meter.longest |= {"s": 3.0, "stopped at": 1 / 3000}  # a limit is to be known again to its last digit
    time.sleep(5 * SHORT)  # and no more is written: as after kill -9
    copied = tmp_path / f"killed-{METER}"
    copied.write_bytes((tmp_path / METER).read_bytes())
    meter.close()
    again = Meter(copied, interval=60)
    assert again.longest == {"s": 3.0, "stopped at": 1 / 3000}
    again.close()
    assert "longest" not in json.loads(copied.read_bytes().splitlines()[-1])  # what is known is not told again


def test_a_try_that_was_refused_leaves_nothing(tmp_path):
    Meter(tmp_path / METER, interval=60).close()
    before = (tmp_path / METER).read_bytes()
    meter = Meter(tmp_path / METER, interval=60)
    meter.forget()
    meter.close()
    assert (tmp_path / METER).read_bytes() == before


def rapl(folder: Path, name: str, microjoules: float, most: float = 1e6) -> Path:
    folder.mkdir(exist_ok=True)
    for file, value in (("name", name), ("energy_uj", microjoules), ("max_energy_range_uj", most)):
        (folder / file).write_text(str(value))
    return folder / "energy_uj"


def test_rapl_counts_packages_goes_on_after_its_end_and_is_left_out_once_it_fails(tmp_path):
    first = rapl(tmp_path / "intel-rapl:0", "package-0", 900_000)
    second = rapl(tmp_path / "intel-rapl:1", "package-1", 100_000)
    rapl(tmp_path / "intel-rapl:0:0", "core", 5)
    counters = Counters(powercap=tmp_path)
    second.write_text("400000")
    assert counters.joules() == {"cpu": pytest.approx(0.3)}
    first.write_text("200000")  # around its end, at 1 J
    assert counters.joules() == {"cpu": pytest.approx(0.6)}
    second.unlink()
    assert counters.joules() == {}


def test_where_there_is_no_counter_nothing_is_counted(tmp_path):
    assert Counters(powercap=tmp_path).joules() == {}
    assert Counters(["GPU-none-such"], powercap=tmp_path).joules() == {}
    (rapl(tmp_path / "intel-rapl:0", "package-0", 1)).write_text("no number")
    assert Counters(powercap=tmp_path).joules() == {}


def test_a_run_keeps_what_each_stage_took_in_its_ledger(tiny_run):
    out, summary = tiny_run
    stages = summary["stages"]
    assert all(s["metered"]["stretches"] == 1 and s["metered"]["seconds"] > 0 for s in stages.values())
    for name in ("sft-0", "kd-0"):
        assert stages[name]["metered"]["seconds"] >= stages[name]["seconds"]  # which leaves out opening and saving
    lines = list(last_lines(out / METER))
    assert {x["stage"] for x in lines} == {*stages, BETWEEN}
    sums = sum(x["seconds"] for x in lines)
    assert sums == pytest.approx(max(x["open"] for x in lines), rel=0.01)
