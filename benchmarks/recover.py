"""What rounding to few bits takes from a model, and how much of it calibration and recovery by distillation bring back.

    python -m benchmarks.recover [real|quickstart|mixed ...]

real: stories260K, three seeds (of samples and order): bits a byte lost on its own held-out samples, by plain rounding
("absmax": scales from the largest magnitude), by scales of the least squared error, by GPTQ, and after the model has
taught its copy for STEPS steps of 16 samples. Its own training took 100,000 steps of 128 x 512 tokens (llama2.c,
doc/stories260K.md), so a recovery costs far below 10 % of it.

quickstart: the student of the quickstart recipe, trained here, accuracy on its held-out problems; recovery takes a
tenth of its training steps.

mixed: stories260K under three byte budgets, those of a uniform format and two between: KL of the mixture that is chosen
and of the largest uniform format within the budget, both rounded to nearest.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import pennyweight
from benchmarks.bars import Bars, real, run_parts
from pennyweight.quantizing import quantize

SEEDS, STEPS, SAMPLES = 3, 400, 4096
TRAINED_ON = 100_000 * 128 * 512
WAYS: dict[str, dict[str, Any]] = {
    "absmax": {"method": "absmax"},
    "nearest": {"method": "nearest"},
    "gptq": {"method": "gptq"},
    "taught": {"method": "gptq", "recover": STEPS},
}


def lost(found: dict[str, Any]) -> float:
    """Bits a byte that the copy is worse than its parent."""
    return found["copy"]["bits_per_byte"]["mean"] - found["parent"]["bits_per_byte"]["mean"]


def of_real(bars: Bars) -> None:
    model = str(real("stories260K"))
    heads = f"{'bytes':>8} {'KL':>7} {'agreement, %':>13} {'bits/byte lost':>15} {'least':>7} {'most':>7}"
    print(f"\n{'format':<8} {'way':<8} {heads} {'recovered, %':>13}")
    for fmt in ("int4", "nvfp4", "mxfp4", "int3", "ternary"):
        losses: dict[str, list[float]] = {}
        for way, settings in WAYS.items():
            with tempfile.TemporaryDirectory() as folder:
                found = [
                    quantize(model, fmt, f"{folder}/{seed}", samples=SAMPLES, seed=seed, threads=1, **settings)
                    for seed in range(SEEDS)
                ]
            losses[way] = [lost(f) for f in found]
            back = [100 * (1 - now / plain) for now, plain in zip(losses[way], losses["absmax"], strict=True)]
            kl, same = (mean(f[k]["mean"] for f in found) for k in ("kl", "agreement"))
            spread = f"{mean(losses[way]):>15.4f} {min(losses[way]):>7.4f} {max(losses[way]):>7.4f} {mean(back):>13.1f}"
            print(f"{fmt:<8} {way:<8} {found[0]['bytes']:>8,} {kl:>7.4f} {100 * same:>13.2f} {spread}", flush=True)
            if fmt == "int4" and way in ("gptq", "taught"):
                least = {"gptq": 50, "taught": 90}[way]
                bars.check(f"recover.{way}.recovered_percent", mean(back), f">={least}", mean(back) >= least)
            if fmt == "int4" and way == "taught":
                cost = 100 * found[0]["recovered"]["tokens"] / TRAINED_ON
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
    known: dict[str, Callable[[Bars], None]] = {"real": of_real, "mixed": of_mixtures, "quickstart": of_quickstart}
    torch.set_num_threads(1)
    run_parts(known, parts)


if __name__ == "__main__":
    main(*sys.argv[1:])
