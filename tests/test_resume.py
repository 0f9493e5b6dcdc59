"""Stopped and resumed equals never stopped, bit for bit: the loop after a stop, the whole line after kill -9."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_train_loop import fit

import pennyweight
from pennyweight.commands import verify
from pennyweight.errors import Stopped
from pennyweight.ledger.hashing import hash_folder
from pennyweight.train.checkpoint import Checkpoints

TINY = Path(__file__).with_name("tiny.toml")


@pytest.mark.parametrize("stop_at", [1, 5, 8])
def test_stopped_and_resumed_is_never_stopped_bit_for_bit(tmp_path, stop_at):
    never, lines, outcome = fit(tmp_path / "a")
    with pytest.raises(Stopped):
        fit(tmp_path / "b", stop_at=stop_at)
    torch.manual_seed(999)  # what happened meanwhile must not matter
    resumed, more, again = fit(tmp_path / "b")
    assert more[0] == {"rewind": stop_at}
    for (name, a), (_, b) in zip(never.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert again.tokens == outcome.tokens
    losses = {x["step"]: x["loss"] for x in lines if "loss" in x}
    assert all(losses[x["step"]] == x["loss"] for x in more if "loss" in x)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path):
    with pytest.raises(Stopped):
        fit(tmp_path, stop_at=9)
    newest = Checkpoints(tmp_path).newest()
    (newest / "tensors.safetensors").write_bytes(b"torn")
    resumed, more, _ = fit(tmp_path)
    assert more[0] == {"rewind": 8}
    never, _, _ = fit(tmp_path.with_name("other"))
    assert all(torch.equal(a, b) for a, b in zip(never.parameters(), resumed.parameters(), strict=True))


def test_killed_anywhere_it_ends_in_the_same_student(tmp_path):
    """kill -9 at random moments, until a session finishes: same student, same targets, a ledger that verifies.

    Here a few kills on a warm teacher cache; `python -m benchmarks.kill` does twenty.
    """
    out, whole = tmp_path / "run", tmp_path / "whole"
    pennyweight.run(TINY, out=whole)
    command = [sys.executable, "-m", "pennyweight.cli", "run", str(TINY), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    chance = random.Random(time.time_ns())
    for _ in range(3):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        time.sleep(chance.uniform(3.0, 8.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    for name in ("student", "student-int4", "targets", "teacher"):
        assert hash_folder(out / name) == hash_folder(whole / name), name
    assert verify(str(out)).ok


@pytest.mark.parametrize("stage", ["data: ...", "sft-0: ...", "evaluate-teacher: ..."])
def test_interrupted_in_any_stage_it_says_so_once_and_goes_on(stage, tmp_path):
    command = [sys.executable, "-m", "pennyweight.cli", "run", str(TINY), "seeds=[0]", "train.steps=200"]
    command += ["--out", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    hear = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 - a shell's background jobs ignore it
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=hear) as process:
        assert process.stderr is not None
        before = next(line for line in process.stderr if line.startswith(stage))
        process.send_signal(signal.SIGINT)
        told = before + process.stderr.read()
    assert process.returncode == 130 and "Traceback" not in told
    assert [x for x in told.splitlines() if x.startswith("pennyweight: stopped")] == [told.splitlines()[-1]]
    again = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert "teacher: finished before, skipped" in again.stderr
    assert verify(str(tmp_path / "run")).ok
