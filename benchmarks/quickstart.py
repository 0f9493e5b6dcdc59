"""What the quickstart promises, checked on a run of it.

    python -m benchmarks.quickstart [RECIPE] [FOLDER]

RECIPE is quickstart (default) or quickstart_seeds. FOLDER is a RUN folder: a finished one is read, not run again.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import pennyweight
from benchmarks.bars import Bars, machine
from pennyweight.recipe_file import shipped
from pennyweight.report.terminal import print_summary


def accuracy(model: dict[str, Any]) -> float:
    return model["metrics"]["accuracy"]["mean"]


def main(recipe: str = "quickstart", folder: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        summary = pennyweight.run(shipped(recipe), out=folder or f"{scratch}/run")
    print(machine())
    print_summary(summary)
    teacher, student, copies = summary["teacher"], summary["arms"]["kd"], summary["quantized"]
    first = summary["arms"]["kd"]["per_seed"][str(summary["seeds"][0])]["accuracy"]  # the one that is copied
    bars = Bars()
    parts = teacher["params"] / student["params"]
    bars.check(f"{recipe}.teacher_params_over_student_params", parts, ">=6", parts >= 6)
    bars.check(f"{recipe}.teacher_accuracy", accuracy(teacher), ">=0.8", accuracy(teacher) >= 0.8)
    kept = accuracy(student) / accuracy(teacher)
    bars.check(f"{recipe}.accuracy_kept", kept, ">=0.9", kept >= 0.9)
    lost = first - accuracy(copies["int8"])
    bars.check(f"{recipe}.int8_accuracy_lost", lost, "<=0.01", lost <= 0.01)
    smaller = teacher["bytes_fp32"] / copies["int4"]["bytes"]
    bars.check(f"{recipe}.teacher_bytes_over_int4_bytes", smaller, ">=30", smaller >= 30)
    print(f"int4 loses {100 * (first - accuracy(copies['int4'])):.1f} points of accuracy")
    bars.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
