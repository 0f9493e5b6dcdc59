"""Rollouts survive: killed while it writes, judges or steps, a run ends in the same student; a verifier that raises or
hangs spoils no verdict but its own.

    python -m benchmarks.rollouts [kill] [verifier]

``kill`` sends a run of a few rounds signal 9 from within: in the middle of a call of the sampler, after some verdicts
of a round, and after an optimizer step that no checkpoint has yet; each at four moments drawn by a seed. Then the same
command is run to its end, and what it made is compared byte for byte with a run that was never stopped. ``verifier``
trains with a verifier that raises on some responses and hangs on others, one in twenty, and with one that calls just
these wrong: the student is to be the same, byte for byte.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.bars import Bars, run_parts
from pennyweight.commands import verify
from pennyweight.ledger.hashing import hash_folder

STEPS, UPDATES, ROUND = 12, 2, 32
KILLS = {"writing": (2, STEPS // UPDATES), "judging": (1, ROUND * STEPS // UPDATES), "stepping": (1, STEPS)}
"""Phase -> first and last of the calls in it that a kill may fall into."""

SUMS = (
    '{ name = "basic_arithmetic", size = 300, config = { min_terms = 2, max_terms = 2, min_digits = 1, max_digits = 1, '
    'operators = ["+"], allow_parentheses = false, allow_negation = false } }'
)
RECIPE = f"""
name = "rollouts"
seeds = [0]
control = false
compute = {{ dtype = "float32", threads = 1 }}
student = {{ kind = "cut" }}
teacher = {{ kind = "folder", path = "TEACHER" }}
evaluate = {{ problems = 16, samples = 0, max_tokens = 16 }}
quantize = {{ formats = [] }}
[data]
context = 64
eval_fraction = 0.2
source = {{ kind = "files", path = "DATA", verifier = "VERIFIER", answer = "answer" }}
[method]
kind = "grpo"
max_tokens = 16
updates = {UPDATES}
reward = {{ accuracy = 1.0, brevity = 0.5 }}
[train]
steps = {STEPS}
batch = {ROUND // UPDATES}
lr = 1e-3
checkpoint_every = 3
[tripwires.rollouts]
held_out_every = 0
stuck = 1.0
"""
TEACHER = f"""
name = "teacher"
seeds = [0]
control = false
compute = {{ dtype = "float32", threads = 1 }}
student = {{ kind = "cut" }}
method = {{ kind = "sft" }}
train = {{ steps = 1, batch = 8 }}
evaluate = {{ problems = 8, samples = 0, max_tokens = 16 }}
quantize = {{ formats = [] }}
[teacher]
kind = "trained"
tasks = [{SUMS}]
shape = {{ hidden = 32, layers = 2, heads = 2, intermediate = 64 }}
schedule = {{ steps = 150, batch = 32, lr = 5e-3 }}
vocabulary = 64
context = 64
[data]
context = 64
source = {{ kind = "tasks", seed = 7, tasks = [{SUMS}] }}
"""
VERIFIER = """
import hashlib, time
def verify(response, task):
    chance = int(hashlib.sha256(response.encode()).hexdigest()[:8], 16) / 16**8
    if chance < 0.05:
        BROKEN
    return response.rpartition("#### ")[2].strip() == task.answer
"""
BROKEN = {"calm": "return False", "broken": 'time.sleep(60) if chance < 0.005 else {}["not there"]'}


def prepared(root: Path) -> None:
    """A teacher that can add a little, and a JSONL of sums, in ``root``."""
    (root / "teacher.toml").write_text(TEACHER)
    finished(["pennyweight", "run", str(root / "teacher.toml"), "--out", str(root / "made")])
    rows = [json.loads(line) for line in (root / "made" / "data" / "train.jsonl").read_text().splitlines()]
    data = [{"prompt": r["prompt"][0]["content"], "answer": r["task"]["answer"]} for r in rows]
    (root / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))


def recipe(root: Path, name: str, verifier: str) -> Path:
    file = root / f"{name}.toml"
    told = {"TEACHER": root / "made" / "teacher", "DATA": root / "sums.jsonl", "VERIFIER": verifier}
    text = RECIPE
    for key, value in told.items():
        text = text.replace(f'"{key}"', json.dumps(str(value)))
    file.write_text(text)
    return file


def finished(argv: list[str]) -> float:
    """Run a module with its arguments to its end; seconds. What it says is told where it fails."""
    began = time.monotonic()
    command = [sys.executable, "-m", *argv]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(argv)} failed:\n{done.stderr[-2000:]}")
    return time.monotonic() - began


def kill(bars: Bars) -> None:
    chance, trials, same, verified = random.Random(0), 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepared(root)
        file = recipe(root, "rollouts", "exact")
        took = finished(["pennyweight", "run", str(file), "--out", str(root / "whole")])
        want = hash_folder(root / "whole" / "student")
        print(f"a run that is never stopped takes {took:.1f} s; {STEPS // UPDATES} rounds, {STEPS} steps")
        for phase, (first, last) in KILLS.items():
            for call in chance.sample(range(first, last + 1), 4):
                out = root / f"{phase}-{call}"
                command = [sys.executable, "-m", "benchmarks.rollouts", "within", phase, str(call), str(file), str(out)]
                killed = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
                if killed.returncode != -signal.SIGKILL:
                    sys.exit(f"{phase}, call {call}: was not killed\n{killed.stderr.decode()[-2000:]}")
                finished(["pennyweight", "run", str(file), "--out", str(out)])
                is_same, found = hash_folder(out / "student") == want, verify(str(out))
                trials, same, verified = trials + 1, same + is_same, verified + found.ok
                ledger = "verifies" if found.ok else found.problem
                print(
                    f"{phase:8} call {call:3}: {'the same' if is_same else 'ANOTHER'} student, ledger {ledger}",
                    flush=True,
                )
    bars.check("rollouts.same_student", same, f"={trials}", same == trials)
    bars.check("rollouts.ledger_verifies", verified, f"={trials}", verified == trials)


def within(phase: str, call: str, file: str, out: str) -> None:
    """A run that kills itself in the ``call``-th call of a phase; of phase ``noting``, one that notes its verdicts."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from pennyweight import api
    from pennyweight.train import rollout

    seen, last = {"calls": 0, "seconds": 0.0}, int(call)
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731

    def due() -> bool:
        seen["calls"] += 1
        return seen["calls"] == last

    def writing(*args: Any, **kwargs: Any) -> Any:
        now, began = due(), time.monotonic()
        if now:  # in the middle, by how long the call before took
            threading.Timer(0.5 * seen["seconds"], die).start()
        made = generate(*args, **kwargs)
        if now:
            die()
        seen["seconds"] = time.monotonic() - began
        return made

    def judging(*args: Any, **kwargs: Any) -> Any:
        if due():
            die()
        return rewards(*args, **kwargs)

    def noting(*args: Any) -> Any:
        with open(f"{out}.verdicts", "a", encoding="utf-8") as f:
            f.write(json.dumps(asdict(args[-1])) + "\n")
        return rewards(*args)

    generate, rewards = rollout.generate, rollout.rewards
    if phase == "writing":
        rollout.generate = writing
    elif phase == "noting":
        rollout.rewards = noting
    elif phase == "judging":
        rollout.rewards = judging
    else:
        register_optimizer_step_post_hook(lambda *a: die() if due() else None)
    api.run(file, out=out)


def verifier(bars: Bars) -> None:
    made: dict[str, str] = {}
    verdicts: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepared(root)
        for name, does in BROKEN.items():
            (root / f"{name}.py").write_text(VERIFIER.replace("BROKEN", does))
            out = root / name
            file = recipe(root, name, f"{root / name}.py:verify")
            took = finished(["benchmarks.rollouts", "within", "noting", "0", str(file), str(out)])
            made[name] = hash_folder(out / "student")
            verdicts[name] = [json.loads(line) for line in Path(f"{out}.verdicts").read_text().splitlines()]
            print(f"{name}: {took:.1f} s")
    pairs = list(zip(*verdicts.values(), strict=True))
    spoilt = [b for a, b in pairs if a["reason"] != b["reason"]]
    other = sum(a["correct"] != b["correct"] for a, b in pairs)
    hung = sum("second" in b["reason"] for b in spoilt)
    print(f"{len(pairs)} verdicts: {hung} took too long, {len(spoilt) - hung} raised; all others are the same")
    bars.check("rollouts.broken_verdicts", len(spoilt), ">=5", len(spoilt) >= 5)
    bars.check("rollouts.hung", hung, ">=1", hung >= 1)
    bars.check("rollouts.other_verdicts", other, "=0", other == 0)
    bars.check("rollouts.same_under_broken", len(set(made.values())), "=1", len(set(made.values())) == 1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["within"]:
        within(*sys.argv[2:])
    else:
        run_parts({"kill": kill, "verifier": verifier}, sys.argv[1:])
