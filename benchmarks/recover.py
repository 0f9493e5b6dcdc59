"""What rounding to few bits takes from a model, and how much of it calibration and recovery by distillation bring back.

    python -m benchmarks.recover [real|fewer|mixed|quickstart ...]

real: stories260K in int4, three seeds (of samples and order): bits a byte lost on its own held-out samples, by plain
rounding ("absmax": scales from the largest magnitude), by scales of the least squared error, by activation-aware
scaling, by GPTQ, and after the model has taught its copy for STEPS steps of 16 samples. Its own training took 100,000
steps of 128 x 512 tokens (llama2.c, doc/stories260K.md), so a recovery costs far below 10 % of it.

fewer: likewise, one seed, in NVFP4, MXFP4, 3 bits and ternary.

quickstart: the student of the quickstart recipe, trained here, accuracy on its held-out problems; recovery takes a
tenth of its training steps.

mixed: stories260K under three byte budgets, those of a uniform format and two between: KL of the mixture that is chosen
and of the largest uniform format within the budget, both rounded to nearest.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import pennyweight
from benchmarks.bars import Bars, real, run_parts
from pennyweight.model.device import choose
from pennyweight.model.load import load
from pennyweight.quantizing import quantize
from pennyweight.teacher.local import LocalTeacher
from pennyweight.teacher.own_samples import own_samples

SEEDS, STEPS, SAMPLES = 3, 400, 8192
TRAINED_ON = 100_000 * 128 * 512
WAYS: dict[str, dict[str, Any]] = {
    "absmax": {"method": "absmax"},
    "nearest": {"method": "nearest"},
    "awq": {"method": "awq"},
    "gptq": {"method": "gptq"},
    "taught": {"method": "gptq", "recover": STEPS},
}


def lost(found: dict[str, Any]) -> float:
    """Bits a byte that the copy is worse than its parent."""
    return found["copy"]["bits_per_byte"]["mean"] - found["parent"]["bits_per_byte"]["mean"]


@cache
def written(seed: int) -> str:
    """A file of the model's own samples: every way of a seed learns from the same, and is measured on the same."""
    parent = load(str(real("stories260K")))
    folder = Path(tempfile.mkdtemp())
    speaker = LocalTeacher(parent, choose("cpu", "auto"), rows=128, write_tokens=256, context=512)
    texts = own_samples(speaker, parent.tokenizer, SAMPLES, seed, folder, "its own")
    file = folder / "own.jsonl"
    file.write_text("".join(json.dumps({"text": s.response}) + "\n" for s in texts))
    return str(file)


def a_copy(fmt: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    how = {"data": written(seed), "samples": SAMPLES, "seed": seed, "threads": 1, **settings}
    with tempfile.TemporaryDirectory() as folder:
        return quantize(str(real("stories260K")), fmt, f"{folder}/copy", **how)


def of_formats(bars: Bars, formats: tuple[str, ...], seeds: int) -> None:
    heads = f"{'bytes':>8} {'KL':>7} {'agreement, %':>13} {'bits/byte lost':>15} {'least':>7} {'most':>7}"
    print(f"\n{'format':<8} {'way':<8} {heads} {'KL recovered, %':>16} {'bits, %':>8}")
    for fmt in formats:
        found: dict[str, list[dict[str, Any]]] = {}
        for way, settings in WAYS.items():
            found[way] = [a_copy(fmt, seed, settings) for seed in range(seeds)]
            pairs = list(zip(found[way], found["absmax"], strict=True))
            losses = [lost(f) for f in found[way]]
            bits = mean(100 * (1 - lost(now) / lost(plain)) for now, plain in pairs)
            back = mean(100 * (1 - now["kl"]["mean"] / plain["kl"]["mean"]) for now, plain in pairs)
            kl, same = (mean(f[k]["mean"] for f in found[way]) for k in ("kl", "agreement"))
            cells = f"{mean(losses):>15.4f} {min(losses):>7.4f} {max(losses):>7.4f} {back:>16.1f} {bits:>8.1f}"
            print(f"{fmt:<8} {way:<8} {found[way][0]['bytes']:>8,} {kl:>7.4f} {100 * same:>13.2f} {cells}", flush=True)
            if fmt == "int4" and way in ("gptq", "taught"):
                least = {"gptq": 50, "taught": 90}[way]
                bars.check(f"recover.{way}.bits_recovered_percent", bits, f">={least}", bits >= least)
            if fmt == "int4" and way == "taught":
                cost = 100 * found[way][0]["recovered"]["tokens"] / TRAINED_ON
                bars.check("recover.cost_percent_of_training", cost, "<=10", cost <= 10)


def of_quickstart(bars: Bars) -> None:
    """Copies as the run makes them (recovered) and by rounding alone, on the run's own held-out problems."""
    print(f"\n{'seed':>4} {'format':<8} {'way':<8} {'accuracy, %':>12} {'of the parent, %':>17} {'KL to it':>9}")
    with tempfile.TemporaryDirectory() as folder:
        shares: dict[str, list[float]] = {}
        for seed in range(SEEDS):
            for way in ("absmax", "taught"):  # into the same folder: the student is trained once
                how = ["quantize.method=absmax", "quantize.recover=0"] if way == "absmax" else []
                settings = ["compute.threads=1", f"seeds=[{seed}]", "evaluate.samples=0", *how]
                settings.append('quantize.formats=["int4","int3","ternary"]')
                found = pennyweight.run(None, settings, Path(folder) / str(seed))
                parent = found["arms"]["kd"]["metrics"]["accuracy"]["mean"]
                for fmt, copy in found["quantized"].items():
                    accuracy, kl = (copy["metrics"][k]["mean"] for k in ("accuracy", "kl_parent"))
                    shares.setdefault(f"{fmt} {way}", []).append(100 * accuracy / parent)
                    cells = f"{100 * accuracy:>12.1f} {100 * accuracy / parent:>17.2f} {kl:>9.4f}"
                    print(f"{seed:>4} {fmt:<8} {way:<8} {cells}", flush=True)
        kept = mean(shares["int4 taught"])
        bars.check("recover.quickstart.int4_accuracy_percent_of_parent", kept, ">=99.2", kept >= 99.2)


def of_mixtures(bars: Bars) -> None:
    model = str(real("stories260K"))
    print(f"\n{'budget':>8} {'copy':<8} {'bytes':>8} {'KL':>8} {'low':>8} {'high':>8}")
    with tempfile.TemporaryDirectory() as folder:

        def made(name: str, **settings: Any) -> dict[str, Any]:
            return quantize(model, out=f"{folder}/{name}", method="nearest", samples=1024, threads=1, **settings)

        uniform = {fmt: made(fmt, fmt=fmt) for fmt in ("int3", "int4", "int8")}
        sizes = {fmt: f["predicted"]["bytes"] for fmt, f in uniform.items()}
        for budget in (sizes["int4"], (sizes["int3"] + sizes["int4"]) // 2, (2 * sizes["int4"] + sizes["int8"]) // 3):
            fmt = max((f for f in sizes if sizes[f] <= budget), key=lambda f: sizes[f])
            mixed = made(f"mixed-{budget}", fmt="mixed", budget=budget)
            for name, found in ((fmt, uniform[fmt]), ("mixed", mixed)):
                kl = found["kl"]
                cells = f"{kl['mean']:>8.4f} {kl['low']:>8.4f} {kl['high']:>8.4f}"
                print(f"{budget:>8,} {name:<8} {found['bytes']:>8,} {cells}", flush=True)
            gain = mixed["kl"]["high"] / uniform[fmt]["kl"]["low"]
            bars.check(f"recover.mixed_over_{fmt}_at_{budget}_bytes", gain, "<1 (intervals apart)", gain < 1)


def main(*parts: str) -> None:
    known: dict[str, Callable[[Bars], None]] = {
        "real": lambda bars: of_formats(bars, ("int4",), SEEDS),
        "fewer": lambda bars: of_formats(bars, ("nvfp4", "mxfp4", "int3", "ternary"), 1),
        "mixed": of_mixtures,
        "quickstart": of_quickstart,
    }
    torch.set_num_threads(1)
    run_parts(known, parts)


if __name__ == "__main__":
    main(*sys.argv[1:])
