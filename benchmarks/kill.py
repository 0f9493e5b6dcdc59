"""kill -9 at random moments of a short run, then the same command again: the same student, and a ledger that verifies.

    python -m benchmarks.kill [KILLS] [SEED]

Each trial starts anew, teacher included, is killed once at a moment drawn evenly over the length of a whole run, and
is then started again until it ends. What it made is compared byte for byte with a run that was never stopped.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.bars import Bars, machine
from pennyweight.commands import verify
from pennyweight.ledger.hashing import hash_folder

RECIPE = Path(__file__).resolve().parents[1] / "tests" / "tiny.toml"
COMPARED = ("teacher", "targets", "student", "student-int8", "student-int4")


def start(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pennyweight.cli", "run", str(RECIPE), "--out", str(folder / "run")]
    environment = {**os.environ, "PENNYWEIGHT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, told = process.communicate()
    if process.returncode:
        sys.exit(f"the run failed:\n{told.decode()[-2000:]}")


def last_stage(folder: Path) -> str:
    """The stage that a killed run was in: the last one that its ledger says was started."""
    import sqlite3

    file = folder / "run" / "ledger.sqlite"
    if not file.exists():
        return "before the ledger"
    with sqlite3.connect(file) as db:
        row = db.execute(
            "SELECT json_extract(body, '$.name') || ' ' || json_extract(body, '$.status') FROM entries "
            "WHERE kind = 'stage' ORDER BY seq DESC LIMIT 1"
        ).fetchone()
    return row[0] if row else "before the first stage"


def main(kills: int = 20, seed: int = 0) -> None:
    print(machine())
    chance, bars = random.Random(seed), Bars()
    same = verified = 0
    with tempfile.TemporaryDirectory() as root:
        whole = Path(root) / "whole"
        began = time.monotonic()
        finish(start(whole))
        length = time.monotonic() - began
        want = {name: hash_folder(whole / "run" / name) for name in COMPARED}
        print(f"a run that is never stopped takes {length:.1f} s")
        for trial in range(kills):
            folder = Path(root) / str(trial)
            moment = chance.uniform(0, length)
            process = start(folder)
            time.sleep(moment)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            where = last_stage(folder)
            finish(start(folder))
            got = {name: hash_folder(folder / "run" / name) for name in COMPARED}
            found = verify(str(folder / "run"))
            same, verified = same + (got == want), verified + found.ok
            differ = [n for n in COMPARED if got[n] != want[n]]
            print(
                f"killed at {moment:5.1f} s ({where}): "
                f"{'the same' if not differ else 'DIFFERS in ' + ', '.join(differ)}, "
                f"ledger {'verifies' if found.ok else found.problem}",
                flush=True,
            )
    bars.check("kill.same_student", same, f"={kills}", same == kills)
    bars.check("kill.ledger_verifies", verified, f"={kills}", verified == kills)
    bars.finish()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
