"""Stopped and resumed equals never stopped, bit for bit: the loop after a stop, the whole line after kill -9."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_train_loop import fit
from truth import fresh

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


COMMAND = [sys.executable, "-m", "pennyweight.cli", "run", str(TINY)]


def test_killed_anywhere_it_ends_in_the_same_student(tiny_run, tmp_path, no_charts):
    """kill -9 at random moments of the line, then to its end: same student, same targets, a ledger that verifies.

    Here a few kills on a warm teacher cache; `python -m benchmarks.kill` does twenty.
    """
    out, seed = tmp_path / "run", fresh()
    chance = random.Random(seed)
    for _ in range(2):
        with subprocess.Popen([*COMMAND, "--out", str(out)], stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            for _ in range(chance.randrange(1, 30)):  # stages, begun or skipped
                process.stderr.readline()
            time.sleep(chance.uniform(0.0, 0.3))
            process.send_signal(signal.SIGKILL)
    pennyweight.run(TINY, out=out)
    for name in ("student", "student-int4", "targets", "teacher"):
        assert hash_folder(out / name) == hash_folder(tiny_run[0] / name), f"seed {seed}: {name}"
    assert verify(str(out)).ok


def test_interrupted_in_any_stage_it_says_so_once_and_goes_on(tmp_path, no_charts, capsys):
    out = tmp_path / "run"
    settings = ["seeds=[0]", "train.steps=60", "quantize.formats=[]", "evaluate.problems=2", "evaluate.samples=0"]
    hear = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 - a shell's background jobs ignore it
    skipped = "teacher: finished before, skipped"
    for stage in ("data: ...", "sft-0: ...", "evaluate-teacher: ..."):
        command = [*COMMAND, *settings, "--out", str(out)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=hear) as process:
            assert process.stderr is not None
            told = ""
            for line in process.stderr:
                told += line
                if line.startswith(stage):
                    break
            process.send_signal(signal.SIGINT)
            told += process.stderr.read()
        assert process.returncode == 130 and stage in told and "Traceback" not in told, told
        assert [x for x in told.splitlines() if x.startswith("pennyweight: stopped")] == [told.splitlines()[-1]]
        assert (skipped in told) == (stage != "data: ..."), told
    pennyweight.run(TINY, settings, out)
    assert skipped in capsys.readouterr().err
    assert verify(str(out)).ok
