"""Two processes train as one does, go on from each other's checkpoints, and survive the loss of one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from several import LINE, LINE_STEPS, TINY
from test_train_loop import samples
from truth import fresh

from pennyweight.data.pack import Packer, dealt
from pennyweight.ledger.hashing import hash_folder

HERE = Path(__file__).resolve().parent


def environment() -> dict[str, str]:
    known = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return {**known, "PYTHONPATH": str(HERE.parent)}


def start(out: Path, *settings: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pennyweight", "run", str(TINY), *LINE, *settings]
    command += ["--processes", "2", "--out", str(out)]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def worker_of(agent: int, rank: int) -> int:
    """Process id of a rank, of those that an agent started."""
    for children in Path(f"/proc/{agent}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
                return child
    raise AssertionError("no such process")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder that several.py has filled."""
    folder = tmp_path_factory.mktemp("several")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*launch, str(HERE / "several.py"), str(folder)], env=environment(), capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def found(ran):
    return json.loads((ran / "found.json").read_text())


@pytest.mark.parametrize(
    "case",
    ["sft", "kd", "kd, packed, untied", "hidden states through a map", "fewer rows than processes"],
)
def test_two_processes_train_as_one(found, case):
    assert found[case]["steps"] == 10
    assert found[case]["losses"] < 1e-5 and found[case]["weights"] < 1e-5, found[case]


def test_in_few_bits_too_as_far_as_their_rounding_lets_them(found):
    """fp8 tiles along the tokens of a micro-batch, and bfloat16 is rounded at random: neither is the same twice."""
    assert 0 < found["fp8"]["losses"] < 0.1 and 0 < found["bfloat16"]["losses"] < 0.1
    assert "train.moments=bfloat16" in found["fp8 moments"]


@pytest.mark.parametrize("case", ["LoRA", "QLoRA, checkpointing, packed", "compile, packed"])
def test_by_each_option_of_training_too(found, case):
    """Down to the merged weights; and what is compiled is so in each process."""
    if "LoRA" in case:
        pytest.importorskip("peft", reason="needs peft: pip install 'pennyweight[lora]'")
    assert found[case]["steps"] == 10
    assert found[case]["losses"] < 1e-5 and found[case]["weights"] < 1e-5, found[case]
    assert (found[case]["graphs"] > 0) == ("compile" in case)


def test_stopped_and_resumed_by_as_many_is_never_stopped_bit_for_bit(found):
    assert found["resumed"] == {"steps": 5, "losses": 0.0, "weights": 0.0, "first": 6}


def test_a_part_that_is_damaged_makes_all_pass_over_the_checkpoint(found):
    assert found["damaged"] == {"steps": 2, "losses": 0.0, "weights": 0.0, "first": 9}


def test_a_checkpoint_of_two_is_gone_on_from_by_one_and_that_again_by_two(found):
    case = found["there and back"]
    assert case["first"] == 9 and case["losses"] < 1e-5 and case["weights"] < 1e-5, case


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_the_shares_of_a_step_are_the_step(pack, ranks):
    seed = fresh()
    whole = Packer(samples(50, seed), 13, 3, seed, 0, pack, 64)
    shares = [Packer(samples(50, seed), 13, 3, seed, 0, pack, 64, rank, ranks) for rank in range(ranks)]
    for step in range(4):
        want = sorted(s.id for b in whole(step) for s in b.placed)
        batches = [share(step) for share in shares]
        counted = [b for mine in batches for b in mine if not b.spare]
        assert sorted(s.id for b in counted for s in b.placed) == want, f"seed {seed}"
        assert sum(b.count for b in counted) == sum(b.count for b in whole(step)), f"seed {seed}"
        assert len({len(mine) for mine in batches}) == 1 and all(mine for mine in batches), f"seed {seed}"
        assert all(len(b.ids) <= 3 for mine in batches for b in mine)


def test_rows_are_dealt_evenly_in_number_and_tokens():
    seed = fresh()
    rows = [[s] for s in samples(40, seed)]
    hands = dealt(rows, 4)
    assert [len(h) for h in hands] == [10] * 4
    tokens = [sum(len(s.ids) for row in h for s in row) for h in hands]
    longest = max(len(s.ids) for row in rows for s in row)
    assert max(tokens) - min(tokens) <= longest, f"seed {seed}: {tokens}"


def newest_checkpoint(out: Path) -> str:
    return max((p.name for p in out.glob("work/kd-0-*/step-*")), default="")


def at_work(run: subprocess.Popen[str], out: Path) -> None:
    """Wait until the student's training has written a checkpoint."""
    before, deadline = newest_checkpoint(out), time.monotonic() + 200
    while newest_checkpoint(out) <= before:
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds a worker in /proc, which only Linux has")
def test_stopped_by_the_user_and_robbed_of_a_worker_it_ends_in_the_same_student(ran, tmp_path):
    """Ctrl-C stops all with a checkpoint; after a kill -9 all are started again, and go on from one."""
    out = tmp_path / "stopped"
    stopped = start(out)
    at_work(stopped, out)
    stopped.send_signal(signal.SIGINT)
    told = stopped.communicate(timeout=600)[0]
    assert stopped.returncode == 130 and told.count("pennyweight: stopped after step") == 1, told
    assert "Traceback" not in told
    killed = start(out)
    at_work(killed, out)
    os.kill(worker_of(killed.pid, 1), signal.SIGKILL)
    told = killed.communicate(timeout=600)[0]
    assert killed.returncode == 0, told
    assert "a process was lost; all have been started again" in told and "Traceback" not in told
    for name in ("targets", "arms/sft-0", "arms/kd-0", "student"):
        assert hash_folder(out / name) == hash_folder(ran / "whole" / name), name
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if x["arm"] == "kd"] == list(range(1, LINE_STEPS + 1))


def test_an_error_in_a_stage_is_said_once_and_ends_all_with_exit_code_2(tmp_path):
    run = start(tmp_path / "run", "targets.kind=top_k", "targets.k=1000")
    told = run.communicate(timeout=600)[0]
    said = [line for line in told.splitlines() if line.startswith("pennyweight:")]
    assert run.returncode == 2 and len(said) == 1 and "targets.k=1000" in said[0], told
    assert "Traceback" not in told and "started again" not in told
