"""What a run is metered to have taken, beside a stopwatch, through kills; and budgets that are never passed.

    python -m benchmarks.budget [kills] [stops] [TIMES]

``kills``: one run is killed with -9 so many times (10) at random moments, each time resumed, and at last goes to its
end. The stopwatch of a try runs while the process holds the lock of its RUN folder (as /proc/locks has it): loading
Python and torch comes before that, leaving them after it, and neither is metered.

``stops``: so many runs, each with a budget of hours, kWh or dollars in turn, at a random share of what a run without
one takes. Each must end with code 3 and less than that metered, keep something, stop at once when it is started again,
and under a larger budget end in the weights of the run that was never stopped, byte for byte.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.bars import Bars, machine
from pennyweight.ledger.hashing import hash_folder
from pennyweight.ledger.store import Ledger
from pennyweight.meter.meter import INTERVAL, METER, last_lines, taken, whole_of
from pennyweight.meter.rates import spent_in
from pennyweight.recipe import Recipe
from pennyweight.recipe_file import load

RECIPE = Path(__file__).resolve().parents[1] / "tests" / "tiny.toml"
PRICE = 0.4  # dollars for a device and an hour
SETTINGS = [
    "seeds=[0]",
    "control=false",
    "teacher.schedule.steps=150",
    "teacher.schedule.checkpoint_every=10",
    "train.steps=300",
    "train.checkpoint_every=10",
    "evaluate.problems=60",
    f"budget.usd_per_hour={PRICE}",
]
LONGER = [
    "teacher.schedule.steps=800",
    "train.steps=2500",
    "tripwires.loss_spike=1000",
]  # so that a try outlasts an interval
LATE = 0.5  # seconds: that a stopwatch sees a lock later than it is taken, and a busy machine wakes the meter later
COMPARED = ("student", "student-int8", "student-int4")


def start(folder: Path, *settings: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pennyweight.cli", "run", str(RECIPE), *SETTINGS, *settings]
    environment = {**os.environ, "PENNYWEIGHT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    with open(folder / "said", "ab") as said:
        return subprocess.Popen(
            [*command, "--out", str(folder / "run")], env=environment, stdout=subprocess.DEVNULL, stderr=said
        )


def ended(folder: Path, *settings: str) -> int:
    """The exit code of a run that is left alone."""
    return start(folder, *settings).wait()


def once(held: bool, process: subprocess.Popen[bytes], lock: Path) -> float:
    """When the process holds the lock of its folder, or no longer does, or is gone."""
    while process.poll() is None:
        if held == (lock.exists() and f":{lock.stat().st_ino} " in _locks_of(process.pid)):
            break
        time.sleep(0.005)
    return time.monotonic()


def to_its_end(folder: Path) -> tuple[int, float]:
    """Process id of a run that is left alone, and how long it held its folder."""
    process, lock = start(folder, *LONGER), folder / "run" / ".lock"
    began = once(True, process, lock)
    held = once(False, process, lock) - began
    if process.wait():
        sys.exit(f"the run failed:\n{(folder / 'said').read_text()[-2000:]}")
    return process.pid, held


def _locks_of(pid: int) -> str:
    lines = Path("/proc/locks").read_text().splitlines()
    return "\n".join(line for line in lines if f" {pid} " in line)


def kills(bars: Bars, times: int) -> None:
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as root:
        alone = Path(root) / "alone"
        alone.mkdir()
        _, length = to_its_end(alone)
        print(f"a run that is never killed holds its folder for {length:.1f} s", flush=True)
        folder, lived, killed = Path(root) / "killed", {}, 0
        folder.mkdir()
        while killed < times:
            process = start(folder, *LONGER)
            began = once(True, process, folder / "run" / ".lock")
            time.sleep(chance.uniform(0, length / 8))
            if process.poll() is not None:
                sys.exit(f"it ended by itself before kill {killed + 1}: {(folder / 'said').read_text()[-500:]}")
            process.send_signal(signal.SIGKILL)
            process.wait()
            lived[process.pid] = time.monotonic() - began
            killed += 1
        lived |= [to_its_end(folder)]
        _compare(bars, list(last_lines(folder / "run" / METER)), lived, times)


def _compare(bars: Bars, lines: list[dict[str, Any]], lived: dict[int, float], times: int) -> None:
    """The lines of the meter beside the stopwatch of each process, of which the last one was not killed."""
    metered = {pid: whole_of([x for x in lines if x["process"].startswith(f"{pid}-")]).seconds for pid in lived}
    for pid, seconds in lived.items():
        print(
            f"stopwatch {seconds:7.3f} s, metered {metered[pid]:7.3f} s, lost {seconds - metered[pid]:6.3f} s",
            flush=True,
        )
    *tries, last = (lived[pid] - metered[pid] for pid in lived)
    within = sum(-LATE <= lost <= INTERVAL + LATE for lost in tries)
    whole, parts = whole_of(lines), taken(lines)
    print(f"in all: stopwatch {sum(lived.values()):.3f} s, metered {whole.device_seconds:.3f} device-seconds")
    bars.check("budget.kills_lose_an_interval_at_most", within, f"={times}", within == times)
    bars.check("budget.last_try_off_seconds", abs(last), f"<={LATE}", abs(last) <= LATE)
    off = abs(parts.seconds / whole.seconds - 1)
    bars.check("budget.parts_make_the_whole", off, "<=0.01", off <= 0.01)


def stops(bars: Bars, times: int) -> None:
    chance, recipe = random.Random(1), load(RECIPE, SETTINGS)
    ok: dict[str, int] = dict.fromkeys(
        ("stopped_before_the_cap", "kept_something", "stopped_again_at_once", "same_weights"), 0
    )
    with tempfile.TemporaryDirectory() as root:
        never = Path(root) / "never"
        never.mkdir()
        assert ended(never) == 0, (never / "said").read_text()[-2000:]
        bill = json.loads((never / "run" / "summary.json").read_text())["bill"]
        took = {name: bill["spent"][name] for name in ("hours", "kwh", "usd")}
        least = {name: (bill["foretold"].get(key) or {}).get("low", 0.0) for name, key in _FORETOLD.items()}
        want = {name: hash_folder(never / "run" / name) for name in COMPARED}
        print(
            f"without a budget: {3600 * took['hours']:.1f} s, {took['kwh']:.3g} kWh, USD {took['usd']:.3g}", flush=True
        )
        for trial in range(times):
            kind, folder = ("hours", "kwh", "usd")[trial % 3], Path(root) / str(trial)
            cap = max(chance.uniform(0.35, 0.75) * took[kind], 1.02 * least[kind])  # a lower one is refused at once
            while True:
                folder.mkdir()
                if (code := ended(folder, setting := f"budget.{kind}={cap!r}")) or cap / 2 < least[kind]:
                    break
                print(f"{kind}={cap:.4g}: came to its end below that; tried anew with half of it", flush=True)
                shutil.rmtree(folder)
                cap /= 2
            found = _stopped(folder, kind, cap, code, recipe, setting)
            code = ended(folder)
            differ = [n for n in COMPARED if hash_folder(folder / "run" / n) != want[n]] if code == 0 else ["all"]
            found["same_weights"] = not differ
            for name, good in found.items():
                ok[name] += good
            said = ", ".join(name for name, good in found.items() if not good)
            print(f"  then to its end{f': NOT {said}' if said else ''}", flush=True)
    for name, count in ok.items():
        bars.check(f"budget.{name}", count, f"={times}", count == times)


_FORETOLD = {"hours": "hours", "kwh": "kwh", "usd": "money"}


def _stopped(folder: Path, kind: str, cap: float, code: int, recipe: Recipe, setting: str) -> dict[str, bool]:
    """What a run under a cap left that ended with ``code``, and what becomes of the same command again."""
    run = folder / "run"
    spent = spent_in(run, recipe, "cpu float32", 1, 1)[kind]
    with Ledger.open(run / "ledger.sqlite", create=False) as ledger:
        stages = list(ledger.finished_stages())
    checkpoints = [p.parent.name for p in run.glob("work/*/*") if p.is_dir()]
    again = ended(folder, setting)
    after = spent_in(run, recipe, "cpu float32", 1, 1)[kind]
    parts = ", ".join(sorted(set(checkpoints))) or "none"
    print(
        f"{kind}={cap:.4g}: code {code} at {spent / cap:.0%} of it, {len(stages)} stages finished, parts of {parts}; "
        f"again: code {again} at {after / cap:.0%}",
        flush=True,
    )
    return {
        "stopped_before_the_cap": code == 3 and spent <= cap,
        "kept_something": bool(stages or checkpoints),
        "stopped_again_at_once": again == 3 and after == spent,
    }


PARTS = {"kills": kills, "stops": stops}

if __name__ == "__main__":
    print(machine())
    asked = [word for word in sys.argv[1:] if word in PARTS] or list(PARTS)
    count = next((int(word) for word in sys.argv[1:] if word.isdigit()), 10)
    all_bars = Bars()
    for part in asked:
        PARTS[part](all_bars, count)
    all_bars.finish()
