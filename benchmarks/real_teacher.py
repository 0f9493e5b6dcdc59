"""A real teacher that nobody here trained, its own samples as data: does distillation beat fine-tuning, and do cached
sampled targets give what the live dense distribution gives?

    python -m benchmarks.real_teacher [FOLDER]

stories260K cut to 2 of its 5 layers, 300 steps, 3 seeds; twice, with sampled and with dense targets. Start, tokens,
order and steps are the same in every arm. FOLDER keeps the two RUN folders; a second call then measures nothing anew.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import pennyweight
from benchmarks.bars import Bars, machine, real

METRICS = ("kl_to_teacher", "bits_per_byte", "agreement")


def row(name: str, metrics: dict[str, Any]) -> str:
    cells = [f"{metrics[m]['mean']:.4f} ({metrics[m]['low']:.4f} to {metrics[m]['high']:.4f})" for m in METRICS]
    return f"{name:<12} " + " ".join(f"{c:<28}" for c in cells)


def main(folder: str | None = None) -> None:
    teacher = str(real("stories260K"))
    bars = Bars()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(folder or scratch)
        runs = {
            kind: pennyweight.distill(
                teacher, cut="layers=2", seeds=3, settings=[f"targets.kind={kind}"], out=root / kind
            )
            for kind in ("sampled", "dense")
        }
    print(machine())
    print(f"{'':<12} " + " ".join(f"{m:<28}" for m in METRICS))
    arms = {
        "before": runs["sampled"]["arms"]["base"],
        "sft": runs["sampled"]["arms"]["sft"],
        "kd, sampled": runs["sampled"]["arms"]["kd"],
        "kd, dense": runs["dense"]["arms"]["kd"],
    }
    for name, arm in arms.items():
        print(row(name, arm["metrics"]))
    print(f"targets: {runs['sampled']['targets']['bytes_per_token']:.1f} bytes a token")
    sft, kd, dense = (arms[n]["metrics"] for n in ("sft", "kd, sampled", "kd, dense"))
    for metric in ("kl_to_teacher", "bits_per_byte"):
        room = sft[metric]["low"] - kd[metric]["high"]
        bars.check(f"real_teacher.{metric}_intervals_apart_by", room, ">0", room > 0)
    ratio = kd["kl_to_teacher"]["mean"] / dense["kl_to_teacher"]["mean"]
    bars.check("real_teacher.sampled_kl_over_dense_kl", ratio, "0.99..1.01", abs(ratio - 1) <= 0.01)
    bars.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
