"""Verifiers beside labels that somebody else gave, gold answers under their own verifier, and hostile programs.

    python -m benchmarks.verifiers [graded] [gold] [hostile]

graded: the 5,276 solutions of four models to GSM8K's test problems that were published with the data set, with a label
each; every disagreement is printed; and again with math-verify alone, where equal texts are no short cut. gold: the
worked solutions of all 8,792 GSM8K problems as responses to their own problem, and their final answers under
``check_golds``. hostile: the programs of ``tests/hostile.py``, which want to be called right without being right, or to
do harm. Contained: not called right, ended within the limit, no process left, nobody called, nothing touched, and this
process alive. Beside them 100 right programs, which have to pass.
"""

from __future__ import annotations

import json
import os
import random
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from functools import cache
from pathlib import Path

from benchmarks.bars import Bars, real, run_parts
from pennyweight.evaluate.intervals import wilson
from pennyweight.grading import Fields, grade
from pennyweight.progress import counting
from pennyweight.records import Message, Sample, Task
from pennyweight.verifiers import VERIFIERS, check_golds, final_answer, judge
from pennyweight.verifiers.code import SLOWEST, cannot_shut_in
from pennyweight.verifiers.math import equal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from hostile import HOSTILE, TESTS, program  # type: ignore[import-not-found]

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def graded(bars: Bars) -> None:
    path, agree, answers = real("gsm8k") / "example_model_solutions.jsonl", 0, 0
    for model in MODELS:
        fields = Fields(f"{model}.solution", "ground_truth", f"{model}.is_correct")
        found = grade(str(path), "math", fields, judge, VERIFIERS, counting)
        labels = found["labels"]
        agree, answers = agree + labels["agree"], answers + found["answers"]
        print(f"{model:18} {found['correct']:4} of {found['answers']:,} correct, {labels['agree']:,} as labelled")
        for row in labels["disagreements"]:
            print(f"  line {row['line']}: label {row['label']}, answer {row['answer']!r}, gold {row['gold']!r}")
    whole = wilson(agree, answers)
    print(f"{agree:,} of {answers:,} as labelled, 95 % interval {100 * whole.low:.2f} to {100 * whole.high:.2f} %")
    bars.check("verifiers.agreement_with_labels", whole.mean, ">=0.99", whole.mean >= 0.99)
    alone = wilson(_by_algebra(path), answers)
    bars.check("verifiers.agreement_by_algebra_alone", alone.mean, ">=0.99", alone.mean >= 0.99)


def _by_algebra(path: Path) -> int:
    """Solutions judged as labelled where math-verify has to compare every pair, and equal texts are no short cut."""
    agree, compared = 0, {}
    for row in map(json.loads, path.read_text().splitlines()):
        for model in MODELS:
            pair = final_answer(row["ground_truth"]) or "", final_answer(row[model]["solution"]) or ""
            if pair not in compared:
                compared[pair] = equal(*pair)
            agree += compared[pair] == row[model]["is_correct"]
    print(f"{agree:,} as labelled where math-verify compares all of the {len(compared):,} different pairs")
    return agree


def gold(bars: Bars) -> None:
    folder = real("gsm8k")
    lines = [line for name in ("train", "test") for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in lines]
    for verifier in ("math", "exact"):
        samples = [
            Sample(
                (Message("user", r["question"]),),
                r["answer"],
                "gsm8k",
                task=Task("gsm8k", verifier, final_answer(r["answer"]) or ""),
            )
            for r in rows
        ]
        began = time.monotonic()
        failed = [s for s in samples if s.task and not judge(s.response or "", s.task).correct]
        refused = check_golds(samples)
        seconds = time.monotonic() - began
        for sample in failed:
            print(f"  {sample.task.answer if sample.task else ''!r} in {sample.response!r}")
        if verifier == "math":
            unread = sorted({s.task.answer for s in samples if s.task and not _itself(s.task.answer)})
            print(f"gold answers that math-verify does not find equal to themselves: {unread or 'none'}")
        passing = 1 - len(failed) / len(rows)
        print(
            f"{verifier}: {len(rows) - len(failed):,} of {len(rows):,} worked solutions pass, "
            f"{len(refused)} gold answers are refused, {seconds:.1f} s"
        )
        bars.check(
            f"verifiers.gold_{verifier}", min(passing, 1 - len(refused) / len(rows)), ">=0.999", passing >= 0.999
        )


@cache
def _itself(answer: str) -> bool:
    return equal(answer, answer)


def hostile(bars: Bars) -> None:
    if cannot_shut_in():
        print(f"skipped: programs cannot be shut in here ({cannot_shut_in()})")
        return
    called: list[object] = []
    with tempfile.TemporaryDirectory() as place, socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_listen, args=(listener, called), daemon=True).start()
        kept = Path(place) / "kept"
        kept.write_text("kept")
        os.chmod(place, 0o777)
        contained, kinds = 0, Counter()
        for name in HOSTILE:
            source = program(name, place, listener.getsockname()[1], os.getpid())
            began = time.monotonic()
            verdict = judge(source, Task("hostile", "code", "", json.dumps({"tests": TESTS, "seconds": 1})))
            seconds = time.monotonic() - began
            whole = [p.name for p in Path(place).iterdir()] == ["kept"] and kept.read_text() == "kept"
            good = not verdict.correct and whole and not called and not _left() and seconds < SLOWEST + 1
            contained += good
            kinds[verdict.correct] += 1
            print(f"{name:34} {seconds:4.1f} s  {'' if good else 'NOT CONTAINED '}{verdict.reason[:90]}")
        listener.shutdown(socket.SHUT_RDWR)
    bars.check("verifiers.hostile_contained", contained, f"={len(HOSTILE)}", contained == len(HOSTILE))
    bars.check("verifiers.hostile_called_right", kinds[True], "=0", kinds[True] == 0)
    _right(bars)


def _right(bars: Bars) -> None:
    draw, passed, began = random.Random(0), 0, time.monotonic()
    for _ in range(100):
        a, b = draw.randrange(-99, 99), draw.randrange(-99, 99)
        tests = f"assert f(3) == {3 * a + b}\nassert f([1, 2]) == [{a + b}, {2 * a + b}]\n"
        source = f"def f(x):\n    return [f(y) for y in x] if isinstance(x, list) else {a} * x + {b}\n"
        passed += judge(source, Task("right", "code", "", json.dumps({"tests": tests}))).correct
    print(f"{passed} of 100 right programs pass, {10 * (time.monotonic() - began):.0f} ms each")
    bars.check("verifiers.right_programs", passed, "=100", passed == 100)


def _listen(listener: socket.socket, called: list[object]) -> None:
    try:
        while True:
            called.append(listener.accept())
    except OSError:
        return


def _left() -> list[str]:
    """Children of this process that are still there, the interpreter's own helpers left out."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    names = (Path(f"/proc/{n}/cmdline") for n in children)
    return [p.parent.name for p in names if p.exists() and b"sandbox.worker" in p.read_bytes()]


if __name__ == "__main__":
    run_parts({"graded": graded, "gold": gold, "hostile": hostile}, sys.argv[1:])
