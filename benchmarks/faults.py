"""A server that fails in ten ways, and clients killed on the way: is an answer lost, or paid twice?

    python -m benchmarks.faults [each] [kills] [--seed N]

each: 60 prompts through the endpoint teacher, a quarter of the requests ending in one kind of fault, for each of the
ten kinds: too many requests with seconds to wait or a date, errors 500, 503 and 408, a connection cut in the middle of
the answer, an answer later than the client waits, half of a JSON text, another schema, no choices. kills: ten clients,
each killed with SIGKILL when a random number of its 60 answers has been delivered, among faults of every kind, with a
torn last line besides; the same command goes on. Lost: answers that the server gave whole and that had to be asked for
again, or that came back otherwise. Paid twice: requests that the server answered whole more than once. The server is on
loopback.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.bars import Bars, machine

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from faulty import FAULTS, SLOW, Faulty, reply_to  # noqa: E402  # type: ignore[import-not-found]

from pennyweight.recipe import EndpointTeacher  # noqa: E402
from pennyweight.records import Message, Prompt  # noqa: E402
from pennyweight.teacher.endpoint import ServedTeacher, endpoint_of  # noqa: E402

PROMPTS, SEED = 60, 3


def write(url: str, answers: str) -> list[tuple[str, bool]]:
    """What the endpoint teacher gives for the prompts."""
    patient = EndpointTeacher(url=url, concurrency=8, timeout=SLOW / 2, retries=100)
    asked = [Prompt((Message("user", f"question {i}"),), "", (i,)) for i in range(PROMPTS)]
    return ServedTeacher(endpoint_of(patient, Path(answers))).write(asked, SEED)


def lost_and_paid_twice(server: Faulty, answers: Path) -> tuple[int, int]:
    """After a run that ended: answers that are not the server's or are asked for again, and those delivered twice."""
    count = len(server.seen)
    given = write(server.url, str(answers))
    wanted = [reply_to({"prompt": f"question {i}", "seed": SEED}) for i in range(PROMPTS)]
    wrong = sum(text != want for (text, _), want in zip(given, wanted, strict=True))
    return wrong + len(server.seen) - count, sum(n - 1 for n in server.delivered.values())


def each(bars: Bars, draw: random.Random) -> None:
    clean = 0
    for fault in FAULTS:
        plan = partial(_sometimes, fault, draw)
        with tempfile.TemporaryDirectory() as place, Faulty(plan) as server:
            began, answers = time.monotonic(), Path(place) / "answers.jsonl"
            write(server.url, str(answers))
            seconds, failed = time.monotonic() - began, len(server.seen) - sum(server.delivered.values())
            lost, twice = lost_and_paid_twice(server, answers)
        print(f"{fault:10} {failed:3} requests failed, {lost} lost, {twice} paid twice, {seconds:.1f} s", flush=True)
        clean += failed > 0 and not lost and not twice
    bars.check("faults.kinds_that_lose_nothing", clean, f"={len(FAULTS)}", clean == len(FAULTS))


def _sometimes(fault: str, draw: random.Random, number: int, body: dict[str, Any]) -> str:
    return fault if number and draw.random() < 0.25 else "ok"


def kills(bars: Bars, draw: random.Random) -> None:
    clean = 0
    for _ in range(10):
        at = draw.randrange(3, PROMPTS - 10)
        with tempfile.TemporaryDirectory() as place, Faulty() as server:
            answers = Path(place) / "answers.jsonl"
            server.plan = lambda number, body, s=server, at=at: _held(s, at) or _often(number, draw)
            killed_after = _killed(server, answers)
            with open(answers, "ab") as f:
                f.write(b'{"key": "torn off by the ki')
            server.plan = lambda number, body: _often(number, draw)
            write(server.url, str(answers))
            lost, twice = lost_and_paid_twice(server, answers)
        print(f"killed when {killed_after} answers were there: {lost} lost, {twice} paid twice", flush=True)
        clean += not lost and not twice
    bars.check("faults.kills_that_lose_nothing", clean, "=10", clean == 10)


def _often(number: int, draw: random.Random) -> str:
    return draw.choice([f for f in FAULTS if f != "slow"]) if number and draw.random() < 0.25 else "ok"


def _held(server: Faulty, at: int) -> None:
    """From the moment on at which so many are delivered, no answer goes out."""
    if sum(server.delivered.values()) >= at:
        server.go.clear()


def _killed(server: Faulty, answers: Path) -> int:
    """Answers on disk when a client was killed, which was waiting for others."""
    run = f"from benchmarks.faults import write; write({server.url!r}, {str(answers)!r})"
    process = subprocess.Popen([sys.executable, "-c", run], cwd=ROOT)
    while server.go.is_set():
        assert process.poll() is None, "the client ended before it could be killed"
        time.sleep(0.01)
    time.sleep(0.3)  # what has gone out is written by now
    process.send_signal(signal.SIGKILL)
    process.wait()
    server.clients += 1  # what was under way comes to nothing
    server.go.set()
    return answers.read_bytes().count(b"\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=["each", "kills"])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(machine())
    found, dice = Bars(), random.Random(given.seed)
    for part in given.parts:
        {"each": each, "kills": kills}[part](found, dice)
    found.finish()
