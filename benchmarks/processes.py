"""One process and two: the same losses, checkpoints either way, and kill -9 of a worker.

    python -m benchmarks.processes [losses|back|kills|memory ...] [--kills N] [--seed N]

losses: stories260K cut to 2 layers, sft and kd for 60 steps in uneven micro-batches; the log of two processes beside
that of one. back: kd stopped by Ctrl-C in two processes, gone on with in one, stopped again, and ended in two. kills:
kd in two processes, one of them killed at a random moment; the student beside that of an undisturbed run of two, and
the seconds until a step is logged again. memory: a Llama of 50 M parameters made from nothing, trained for a few steps.
"""

from __future__ import annotations

import argparse
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

from benchmarks.bars import Bars, machine, real
from pennyweight.commands import verify
from pennyweight.ledger.hashing import hash_folder

STEPS = 60
SETTINGS = ["train.micro_batch=5", "train.checkpoint_every=10", "data.source.count=96", "data.eval_fraction=0.2"]
SETTINGS += ["quantize.formats=[]", "compute.dtype=float32", "targets.kind=dense", "data.source.max_tokens=128"]
SETTINGS += ["evaluate.problems=1", "evaluate.samples=0", "evaluate.shown=0", "evaluate.max_tokens=8"]


def start(out: Path, processes: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pennyweight", "distill", "--teacher", str(real("stories260K"))]
    command += ["--cut", "layers=2", "--steps", str(STEPS), "--seeds", "1", "--out", str(out)]
    for setting in SETTINGS:
        command += ["--set", setting]
    command += ["--processes", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(run: subprocess.Popen[str], code: int = 0) -> str:
    told = run.communicate(timeout=600)[0]
    if run.returncode != code:
        sys.exit(f"a run ended with {run.returncode}:\n{told[-3000:]}")
    return told


def lines_of(out: Path, arm: str = "kd") -> dict[int, dict]:
    """Log lines of an arm by step; the last one may not be whole yet."""
    lines = {}
    file = out / "metrics.jsonl"
    for text in file.read_text().splitlines() if file.exists() else []:
        if text.endswith("}"):
            line = json.loads(text)
            if line["arm"] == arm:
                lines[line["step"]] = line
    return lines


def workers(agent: int) -> list[int]:
    """Process ids of the workers that a launcher has started."""
    return [int(c) for f in Path(f"/proc/{agent}/task").glob("*/children") for c in f.read_text().split()]


def until_step(run: subprocess.Popen[str], out: Path, step: int) -> None:
    while max(lines_of(out), default=0) < step:
        if run.poll() is not None:
            sys.exit(f"a run ended before step {step}:\n{finish(run)[-3000:]}")
        time.sleep(0.01)


class Runs:
    """The undisturbed runs of one and of two processes, made when first asked for."""

    def __init__(self, root: Path):
        self.root = root

    def whole(self, processes: int) -> Path:
        out = self.root / f"whole-{processes}"
        if not (out / "summary.json").exists():
            finish(start(out, processes))
        return out

    def again(self, name: str, processes: int) -> Path:
        """A copy of a whole run whose student is to be trained again."""
        out = shutil.copytree(self.whole(processes), self.root / name)
        shutil.rmtree(out / "arms" / "kd-0")
        kept = [x for x in (out / "metrics.jsonl").read_text().splitlines() if json.loads(x)["arm"] != "kd"]
        (out / "metrics.jsonl").write_text("".join(f"{x}\n" for x in kept))
        return out


def apart(a: dict[int, dict], b: dict[int, dict], key: str = "loss") -> float:
    assert a.keys() == b.keys(), "the same steps are logged"
    return max(abs(a[s][key] - b[s][key]) / abs(a[s][key]) for s in a)


def losses(bars: Bars, runs: Runs, _: argparse.Namespace) -> None:
    one, two = runs.whole(1), runs.whole(2)
    for arm in ("sft", "kd"):
        a, b = lines_of(one, arm), lines_of(two, arm)
        print(f"{arm}: step, loss of one process, of two, gradient norm of one, of two")
        for step in (1, 2, 10, STEPS // 2, STEPS):
            x, y = a[step], b[step]
            print(f"{step:>5} {x['loss']:.9f} {y['loss']:.9f} {x['grad_norm']:.7f} {y['grad_norm']:.7f}")
        worst = apart(a, b)
        bars.check(f"processes.{arm}_losses_apart", worst, "<=1e-5", worst <= 1e-5)


def back(bars: Bars, runs: Runs, _: argparse.Namespace) -> None:
    out = runs.again("back", 2)
    for processes, step in ((2, 15), (1, 35)):
        run = start(out, processes)
        until_step(run, out, step)
        run.send_signal(signal.SIGINT)
        told = finish(run, 130).splitlines()[-1]
        print(f"{processes} process{'es' if processes > 1 else ''}: {told}")
    finish(start(out, 2))
    worst = apart(lines_of(runs.whole(1)), lines_of(out))
    bars.check("processes.two_one_two_losses_apart", worst, "<=1e-5", worst <= 1e-5)


def kills(bars: Bars, runs: Runs, asked: argparse.Namespace) -> None:
    chance, same, waits = random.Random(asked.seed), 0, []
    whole = runs.whole(2)
    want = hash_folder(whole / "arms" / "kd-0")
    for trial in range(asked.kills):
        out = runs.again(f"kill-{trial}", 2)
        run = start(out, 2)
        until_step(run, out, chance.randint(1, STEPS - 5))
        time.sleep(chance.uniform(0, 0.1))
        before, journal, rank = max(lines_of(out)), (out / "metrics.jsonl").stat().st_ino, chance.randrange(2)
        os.kill(sorted(workers(run.pid))[rank], signal.SIGKILL)
        killed = time.monotonic()
        while (out / "metrics.jsonl").stat().st_ino == journal:  # lines after the checkpoint are dropped: a new file
            if run.poll() is not None:
                break
            time.sleep(0.01)
        begun = max(lines_of(out), default=0)
        while run.poll() is None and max(lines_of(out), default=0) <= begun:
            time.sleep(0.01)
        waits.append(time.monotonic() - killed)
        told = run.communicate(timeout=600)[0]
        recovered = run.returncode == 0 and hash_folder(out / "arms" / "kd-0") == want and verify(str(out)).ok
        restarted = told.count("all have been started again")
        same += recovered
        print(
            f"rank {rank} killed after step {before:>2}: started again {restarted} time(s), exit {run.returncode}, "
            f"{'the same student' if recovered else 'ANOTHER student'}, a step {waits[-1]:.1f} s after the kill",
            flush=True,
        )
        shutil.rmtree(out)
    print(f"from the kill to the next step: {min(waits):.1f} to {max(waits):.1f} s")
    bars.check("processes.kills_recovered", same, f"={asked.kills}", same == asked.kills)


def memory(bars: Bars, runs: Runs, _: argparse.Namespace) -> None:
    held = {}
    print(
        "each of so many processes: weights, gradients and moments; resident beyond its start, freed memory given back"
    )
    for processes in (1, 2):
        out = runs.root / f"memory-{processes}.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += ["-m", "benchmarks.processes_memory", str(out)]
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600
        )
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        found = json.loads(out.read_text())
        held[processes] = found["held"]
        print(
            f"{processes}: {found['held'] / 1e6:,.0f} MB; {found['resident'] / 1e6:,.0f} MB, at most "
            f"{found['peak'] / 1e6:,.0f} MB in passing"
        )
    ratio = held[2] / held[1]
    bars.check("processes.memory_of_two_over_one", ratio, "<=0.55", ratio <= 0.55)


def main() -> None:
    parts = {"losses": losses, "back": back, "kills": kills, "memory": memory}
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", choices=[*parts, []], default=[])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    print(machine())
    bars = Bars()
    with tempfile.TemporaryDirectory() as root:
        for part in asked.parts or parts:
            parts[part](bars, Runs(Path(root)), asked)
    bars.finish()


if __name__ == "__main__":
    main()
