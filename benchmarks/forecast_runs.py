"""Own runs, foretold and then made: ``python -m benchmarks.forecast runs [NAME ...]``.

Each recipe is planned by ``pennyweight plan --on this``, in a process of its own, and then run, in another; both have
an empty cache to themselves, so that the run finds what its plan has tried, and no teacher. Beside what was metered
stand the time that was foretold, the one that the run told anew 20 steps (of a short training half of them), or a
minute, after its first student began to train, and the same of the most memory, of a GPU that of its tensors; and the
bytes of kept targets. Times are those of stages and what is between them, as the bill has them: the process's start and
the drawing of the report are left out. Recipes are small, and of seven shapes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.bars import Bars, real
from pennyweight.report.graded import aligned

ROOT = Path(__file__).resolve().parents[1]

_SUMS = """
name = "basic_arithmetic"
size = {size}
[{of}.config]
min_terms = 40
max_terms = 60
min_digits = 1
max_digits = 1
operators = ["+"]
allow_parentheses = false
allow_negation = false
"""

LONG = f"""
name = "long-context"
quantize = {{ formats = ["int8"] }}
evaluate = {{ problems = 32, samples = 0, max_tokens = 900 }}
train = {{ steps = 80, batch = 8, lr = 3e-3 }}
[teacher]
kind = "trained"
shape = {{ hidden = 64, layers = 2, heads = 4, intermediate = 172 }}
schedule = {{ steps = 60, batch = 8, lr = 3e-3 }}
context = 1024
[[teacher.tasks]]{_SUMS.format(size=2000, of="teacher.tasks")}
[data]
context = 1024
[data.source]
kind = "tasks"
seed = 1
[[data.source.tasks]]{_SUMS.format(size=1000, of="data.source.tasks")}
[student]
kind = "shape"
shape = {{ hidden = 48, layers = 2, heads = 4, intermediate = 128 }}
"""

REAL = """
name = "real-teacher"
teacher = {{ kind = "folder", path = "{stories}" }}
student = {{ kind = "cut", layers = 2 }}
"""

LORA = """
name = "lora"
teacher = {{ kind = "folder", path = "{stories}" }}
student = {{ kind = "cut", layers = 3 }}
targets = {{ kind = "top_k", k = 16 }}
quantize = {{ formats = [] }}
[train]
steps = 200
lora = {{ rank = 16 }}
"""

WIDE = """
name = "wide-vocabulary"
teacher = {{ kind = "folder", path = "{wide}" }}
targets = {{ kind = "top_k", k = 32 }}
train = {{ steps = 40, batch = 16 }}
quantize = {{ formats = ["int8"] }}
[data]
context = 256
too_long = "truncate"
source = {{ kind = "files", path = "{gsm8k}/train.jsonl", limit = 1500 }}
[student]
kind = "shape"
shape = {{ hidden = 64, layers = 2, heads = 4, intermediate = 172 }}
"""

PACKED = """
name = "packed"
teacher = {{ kind = "folder", path = "{stories}" }}
targets = {{ kind = "dense" }}
method = {{ kind = "kd", divergence = "reverse_kl" }}
train = {{ steps = 40, batch = 32, micro_batch = 8, gradient_checkpointing = true, pack = true }}
quantize = {{ formats = [] }}
[data]
context = 512
too_long = "drop"
source = {{ kind = "files", path = "{gsm8k}/test.jsonl" }}
[student]
kind = "shape"
shape = {{ hidden = 64, layers = 3, heads = 4, intermediate = 172 }}
"""

SHORTER = [
    *("zero.train.steps=8", "cold.train.steps=50", "rl.train.steps=4"),
    *("select.train.steps=60", "rl2.train.steps=4", "small_zero.train.steps=10"),
    *("small.train.steps=100", "small.train.lr=1e-3"),  # at 3e-3 a warm-up of three steps trips
]

RECIPES: dict[str, tuple[str, list[str]]] = {
    "quickstart": ("recipes/quickstart.toml", ["teacher.schedule.steps=300", "train.steps=300"]),
    "real-teacher": (REAL, []),
    "r1": ("recipes/r1.toml", SHORTER),
    "long-context": (LONG, []),
    "wide-vocabulary": (WIDE, []),
    "lora": (LORA, []),
    "packed": (PACKED, []),
}


class Failed(Exception):
    """A plan or a run ended with an error."""


def runs(bars: Bars, names: Sequence[str] = ()) -> None:
    table: list[tuple[str, ...]] = [
        ("recipe", "metered", "before", "apart", "low", "high", "anew", "apart", "memory", "before", "anew", "targets")
    ]
    before, anew, memory, later, kept = [], [], [], [], []
    for name in names or RECIPES:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                plan, summaries, told = _made(name, Path(scratch))
            except Failed as e:  # the others are measured all the same
                print(e)
                bars.check(f"runs.{name}_made", 0, "=1", False)
                continue
        whole = sum(s["bill"]["whole"] for s in summaries)
        ends = {end: 3600 * h for end, h in plan["total"]["hours"].items()}
        taken = [st for s in summaries for st in s["stages"].values()]
        of = "peak_memory_bytes" if taken[0]["peak_device_memory_bytes"] is None else "peak_device_memory_bytes"
        peak = max(st[of] or 0 for st in taken)
        again = _told_anew(plan["runs"], told)
        before.append(ends["middle"] / whole - 1)
        anew.append(again[0] / whole - 1)
        memory.append(plan["total"]["memory"]["middle"] / peak - 1)
        later.append(again[1] / peak - 1)
        cached = [(r, s) for r, s in zip(plan["runs"], summaries, strict=True) if s["targets"]["bytes"]]
        cells = []
        for run, s in cached:
            stage = next(st for st in run["stages"] if st["stage"] == "targets")
            kept.append(stage["disk"]["middle"] / s["targets"]["bytes"] - 1)
            cells.append(f"{100 * kept[-1]:+.2f} %")
        times = [f"{x:,.1f} s" for x in (whole, ends["middle"])] + [f"{100 * before[-1]:+.1f} %"]
        times += [f"{ends['low']:,.1f} s", f"{ends['high']:,.1f} s", f"{again[0]:,.1f} s", f"{100 * anew[-1]:+.1f} %"]
        sizes = [f"{peak / 1e6:,.0f} MB", f"{100 * memory[-1]:+.1f} %", f"{100 * later[-1]:+.1f} %"]
        table.append((name, *times, *sizes, ", ".join(cells) or "–"))
        print(*aligned([table[0], table[-1]]), sep="\n", flush=True)
    print(*aligned(table), sep="\n")
    bars.check("runs.recipes", len(before), ">=6", len(before) >= 6)
    for what, errors, most in (
        ("time_before", before, 25),
        ("time_anew", anew, 10),
        ("memory_before", memory, 10),
        ("memory_anew", later, 3),
        ("bytes_of_targets", kept, 1),
    ):
        if not errors:
            continue
        worst = 100 * max(map(abs, errors))
        within = sum(100 * abs(e) <= most for e in errors)
        print(f"{what}: {within} of {len(errors)} within {most} %")
        bars.check(f"runs.{what}_percent", worst, f"<={most}", worst <= most)


def _made(name: str, scratch: Path) -> tuple[dict[str, Any], list[dict[str, Any]], list[list[dict[str, Any]]]]:
    """The plan, with ``runs`` of a chain or its one; the summaries of its runs; and what each told anew."""
    text, settings = RECIPES[name]
    file = ROOT / text
    if "\n" in text:
        folders = {"stories": real("stories260K"), "gsm8k": real("gsm8k"), "wide": scratch / "wide"}
        _wide(folders["wide"])
        file = scratch / f"{name}.toml"
        file.write_text(text if text is LONG else text.format(**folders))
    plan = json.loads(_said(scratch / "cache", "plan", str(file), *settings, "--on", "this", "--json"))
    plan["runs"] = list(plan.get("runs", {"": dict(plan)}).values())
    out = scratch / "run"
    _said(scratch / "cache", "run", str(file), *settings, "--out", str(out))
    chain = (out / "chain.json").exists()
    stages = [out / r["name"].removeprefix("r1-") for r in plan["runs"]] if chain else [out]
    summaries = [json.loads((s / "summary.json").read_text()) for s in stages]
    return plan, summaries, [s["bill"]["anew"] for s in summaries]


def _said(cache: Path, *words: str) -> str:
    """What a command prints, which finds no model that another run has kept."""
    env = {**os.environ, "PENNYWEIGHT_CACHE": str(cache), "XDG_CACHE_HOME": str(cache)}
    done = subprocess.run([sys.executable, "-m", "pennyweight", *words], capture_output=True, text=True, env=env)
    if done.returncode:
        raise Failed(f"pennyweight {' '.join(words)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def _told_anew(plans: Sequence[dict[str, Any]], told: Sequence[list[dict[str, Any]]]) -> tuple[float, float]:
    """Seconds and bytes as first told anew; of a chain each run's own, and the plan's of one that is too short."""
    seconds = size = 0.0
    for plan, t in zip(plans, told, strict=True):
        total = plan["total"]
        seconds += t[0]["whole_seconds"] if t else 3600 * total["hours"]["middle"]
        size = max(size, t[0]["peak_memory_bytes"] if t else total["memory"]["middle"])
    return seconds, size


def _wide(folder: Path) -> None:
    """A small Llama with the 49,152 entries of a real tokenizer, and random weights."""
    from transformers import AutoTokenizer

    from pennyweight.model.load import save
    from pennyweight.model.student import from_shape
    from pennyweight.settings import Shape

    tokenizer = AutoTokenizer.from_pretrained(str(real("tokenizers/smollm2")))
    save(from_shape(Shape(hidden=96, layers=3, heads=4, intermediate=256), tokenizer, 256, 0), tokenizer, folder)
