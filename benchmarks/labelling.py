"""Labelling that is killed, damaged, or shared: the same shards, byte for byte.

    python -m benchmarks.labelling [KILLS] [SEED]

``pennyweight targets label`` on a run of stories260K, shards of 8 samples. KILLS (10) times: from nothing, killed with
-9 at a random moment after its first shard, and started again. Then a byte of a random shard is changed, and at last
two processes label at once.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pennyweight
from benchmarks.bars import Bars, machine, real


def start(folder: Path) -> subprocess.Popen[str]:
    call = [sys.executable, "-m", "pennyweight.cli", "targets", "label", str(folder), "--json"]
    return subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def label(folder: Path) -> dict[str, Any]:
    """Label to the end; what was found."""
    process = start(folder)
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"labelling failed with exit code {process.returncode}")
    return json.loads(out)


def shards(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((folder / "targets").glob("*.targets"))}


def first_shard(folder: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a shard is there."""
    while process.poll() is None and not any((folder / "targets").glob("*.targets")):
        time.sleep(0.002)


def main(kills: str = "10", seed: str | None = None) -> None:
    chance = random.Random(int(seed) if seed else time.time_ns())
    teacher, bars = str(real("stories260K")), Bars()
    print(machine())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        settings = ["targets.shard=8", "data.source.count=1200", "train.steps=1", "compute.threads=1"]
        quick = ["quantize.formats=[]", "evaluate.samples=0", "evaluate.shown=0"]
        pennyweight.distill(teacher, cut="layers=2", seeds=1, settings=settings + quick, out=folder)
        want = shards(folder)
        shutil.rmtree(folder / "targets")
        process = start(folder)
        first_shard(folder, process)
        began = time.monotonic()
        process.communicate()
        lasts = time.monotonic() - began
        print(f"{len(want)} shards, {lasts:.1f} s from the first to the end")
        bars.check("labelling.same_from_nothing", float(shards(folder) == want), "=1", shards(folder) == want)
        same = 0
        for _ in range(int(kills)):
            shutil.rmtree(folder / "targets")
            process = start(folder)
            first_shard(folder, process)
            time.sleep(chance.uniform(0, 0.9 * lasts))
            process.kill()
            process.communicate()
            had = len(shards(folder))
            made = label(folder)["made"]
            same += shards(folder) == want
            print(f"killed with {had} of {len(want)} shards there; then made {made}", flush=True)
        bars.check("labelling.same_after_kill", same, f"={kills}", same == int(kills))
        name = chance.choice(sorted(want))
        content = bytearray(want[name])
        at = chance.randrange(len(content))
        content[at] ^= 1 << chance.randrange(8)
        (folder / "targets" / name).write_bytes(bytes(content))
        found = label(folder)
        print(f"changed byte {at} of {name}: named {', '.join(found['damaged']) or 'nothing'}, made {found['made']}")
        mended = found["damaged"] == [name] and found["made"] == 1 and shards(folder) == want
        bars.check("labelling.damage_named_and_mended", float(mended), "=1", mended)
        shutil.rmtree(folder / "targets")
        both = [start(folder), start(folder)]
        made = [json.loads(p.communicate()[0])["made"] for p in both]
        print(f"two at once made {made[0]} and {made[1]}")
        shared = sum(made) == len(want) and shards(folder) == want
        bars.check("labelling.two_make_each_once", float(shared), "=1", shared)
    bars.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
