"""What a training takes, foretold: FLOPs beside published ones, claims checked, hours of published runs foretold from
others.

    python -m benchmarks.forecast [flops|claims|published|runs [NAME ...] ...]

``flops``: FLOPs of a token in training, from a model's shapes, beside what Megatron-Bridge and NeMo publish: model
TFLOP/s over tokens/s of a device, both to whole numbers, which leaves "rounded" open. Megatron-Bridge counts half of
the keys and no routers; NeMo 24.07 counted all keys. Both are counted here as they are there, and beside it with
routers.

``claims``: the claims that come with Pennyweight, and what is found in each.

``published``: device-hours of the 17 runs of the table, each foretold from runs without it; then without its whole
family (the same makers, often the same machines). Bars are on the former; classes were drawn with the runs in view.

``runs``: recipes, or those that are named, planned, run and metered on this machine (``benchmarks/forecast_runs.py``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable
from statistics import median

from benchmarks.bars import Bars, run_parts
from benchmarks.forecast_runs import RECIPES, runs
from pennyweight.plan.claim import check
from pennyweight.plan.claim_file import read_claim, shipped
from pennyweight.plan.flops import Training, gating, training
from pennyweight.plan.forecast import COVERS, class_of, fit, held_out
from pennyweight.plan.hardware import catalogue
from pennyweight.plan.models import model
from pennyweight.plan.published import Published, published
from pennyweight.report.graded import aligned

BRIDGE, NEMO = "Megatron-Bridge", "NeMo 24.07"

RATES = [  # model, tokens in a row, modules of multi-token prediction, TFLOP/s and tokens/s of a device, who, where
    ("deepseek-v3", 4096, 1, 1636, 6288, BRIDGE, "26.08.01, GB300, MXFP8"),
    ("deepseek-v3", 4096, 0, 1088, 4357, BRIDGE, "25.11, GB300, MXFP8, without MTP"),
    ("kimi-k2", 4096, 0, 1097, 5360, BRIDGE, "26.08, GB300, MXFP8"),
    ("qwen3-30b-a3b", 4096, 0, 1037, 45056, BRIDGE, "26.08, GB300, MXFP8"),
    ("qwen3-235b-a22b", 4096, 0, 1337, 9040, BRIDGE, "26.08, GB300, MXFP8"),
    ("llama-3-8b", 8192, 0, 1933, 37556, BRIDGE, "25.11, GB300, FP8"),
    ("llama-3-70b", 8192, 0, 3147, 7002, BRIDGE, "26.02.01, GB300, NVFP4"),
    ("llama-3.1-405b", 8192, 0, 3428, 1358, BRIDGE, "26.02.01, GB300, NVFP4"),
    ("llama-2-7b", 4096, 0, 776, 16847, NEMO, "DGX H100, FP8"),
    ("llama-2-13b", 4096, 0, 754, 8646, NEMO, "DGX H100, FP8"),
    ("llama-2-70b", 4096, 0, 759, 1707, NEMO, "DGX H100, FP8"),
]


def flops(bars: Bars) -> None:
    rows: list[tuple[str, ...]] = [
        ("model", "", "published", "rounded", "counted", "apart", "with routers", "apart", "where")
    ]
    worst = with_routers = 0.0
    for name, length, mtp, tflops, tokens, who, where in RATES:
        shapes, said = model(name), 1e12 * tflops / tokens
        whole = training(shapes, length, Training(mtp=mtp), "half" if who == BRIDGE else "full").total
        same = whole - (6 * gating(shapes, mtp) if who == BRIDGE else 0)
        worst, with_routers = max(worst, abs(same / said - 1)), max(with_routers, abs(whole / said - 1))
        off, open_ = f"{100 * (same / said - 1):+.2f} %", f"{50 / tflops + 50 / tokens:.2f} %"
        cells = (f"{said / 1e9:.2f}", open_, f"{same / 1e9:.2f}", off)
        more = (f"{whole / 1e9:.2f}", f"{100 * (whole / said - 1):+.2f} %")
        rows.append((name, "MTP" * bool(mtp), *cells, *more, f"{who} {where}"))
    print("GFLOP a token, trained", *aligned(rows, left=(0, 1, 8)), sep="\n")
    bars.check("flops.models", len({r[0] for r in RATES}), ">=6", len({r[0] for r in RATES}) >= 6)
    bars.check("flops.furthest_apart_percent", 100 * worst, "<=0.5", worst <= 0.005)
    shapes = model("deepseek-v3")
    found = (training(shapes, 4096, Training(mtp=1), "half").total - 6 * gating(shapes, 1)) / 1e9
    bars.check("flops.deepseek_v3_with_mtp_gflop", found, "260.0+-0.5%", abs(found / 260.0 - 1) <= 0.005)
    print(f"with routers the furthest is {100 * with_routers:.2f} % apart, since those figures leave them out")


def claims(bars: Bars) -> None:
    found = {name: check(read_claim(name), catalogue(), published()) for name in shipped()}
    for name, claim in found.items():
        print(f"{name}: {'adds up' if claim['adds_up'] else 'does not add up'}")
        for f in claim["findings"]:
            if f["verdict"] != "holds":
                print(f"  {f['verdict']}: {f['of']}, {f['check']}: {f['text']}")
    v3, r1 = (read_claim(n) for n in ("deepseek-v3", "deepseek-r1"))
    for name, claim, said in (("deepseek_v3", v3, 5_576_000), ("deepseek_r1", r1, 294_000)):
        dollars = sum((p.device_hours or 0) * (p.price or 0) for p in claim.parts)
        bars.check(f"claims.{name}_dollars", dollars, f"{said}", dollars == said)
    retold = [f for f in found["deepseek-r1-648"]["findings"] if f["verdict"] == "fails"]
    bars.check("claims.648_devices_fail", len(retold), ">=1", not found["deepseek-r1-648"]["adds_up"])
    share = 100 * found["deepseek-v2-epoch"]["parts"][0]["shares"]["bf16"]["none"]
    row = found["deepseek-v2-epoch"]
    share = 100 * row["parts"][0]["shares"]["bf16"]["none"]
    bars.check("claims.deepseek_v2_row_percent", share, "166, flagged", round(share) == 166 and not row["adds_up"])
    part = next(p for p in found["llama-3.2"]["parts"] if "70B" in p["name"])
    needed = part["flops"]["none"] / (989.4e12 * 3600)
    bars.check(
        "claims.70b_labels_9t_tokens_hours_at_the_peak", needed, ">86000", part["name"] in found["llama-3.2"]["excused"]
    )


def foretold(bars: Bars) -> None:
    rows = published()
    shares = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in fit(rows).shares.items() if kind != "measured")
    print(f"shares of the bfloat16 peak: {shares}; a distilled token's own time: {1e6 * (fit(rows).own or 0):.0f} us")
    each = _shown("each without itself", rows, lambda row: row.run.name)
    family = _shown("each without its family", rows, lambda row: row.family)
    plain = [p.run.flops / (0.4e12 * p.run.chip["bf16"] * 3600) / p.hours for p in rows if p.table]
    off = 100 * median(abs(r - 1) for r in plain)
    print(f"\na constant 40 % of the peak: median error {off:.1f} %, at worst {1 / min(plain):.1f} times too few hours")
    for name, (error, inside), binding in (("", each, True), ("family_", family, False)):
        if not binding:
            print(f"without families: median error {100 * error:.1f} %, {inside} of 17 inside (no bar)")
            continue
        bars.check(f"published.{name}median_error_percent", 100 * error, "<=25", error <= 0.25)
        bars.check(f"published.{name}inside_percent", 100 * inside / 17, f">={100 * COVERS:.0f}", inside >= COVERS * 17)


def _shown(title: str, rows: tuple[Published, ...], group: Callable[[Published], Hashable]) -> tuple[float, int]:
    found = held_out(rows, group)
    table: list[tuple[str, ...]] = [("run", "class", "device-hours", "foretold", "apart", "low", "high", "")]
    for c in found:
        hours = (f"{h:,.0f}" for h in (c.row.hours, c.hours.middle))
        ends = (f"{h:,.0f}" for h in (c.hours.low, c.hours.high))
        error, where = f"{100 * c.error:+.0f} %", "" if c.inside else "outside"
        table.append((c.row.run.name, class_of(c.row.run), *hours, error, *ends, where))
    print(f"\n{title}", *aligned(table, left=(0, 1, 7)), sep="\n")
    return median(abs(c.error) for c in found), sum(c.inside for c in found)


if __name__ == "__main__":
    names = [a for a in sys.argv[1:] if a in RECIPES]
    known = {"flops": flops, "claims": claims, "published": foretold, "runs": lambda bars: runs(bars, names)}
    run_parts(known, [a for a in sys.argv[1:] if a not in RECIPES])
