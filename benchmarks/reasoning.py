"""The R1 recipe, and four ways to teach one start, each over several seeds.

    python -m benchmarks.reasoning [r1] [ways] [seeds=0,1,2] [out=FOLDER] [threads=1]

``r1`` runs recipes/r1.toml: reinforcement has to lift its base by 15 points with intervals apart, and the small student
that learns from traces has to be better than the same small model under reinforcement alone. ``ways`` runs
recipes/four_ways.toml: fine-tuning on a teacher's verified traces (``sft_long``: for as many seconds as on-policy
takes), reinforcement, on-policy distillation live and offline, all from one start; reinforcement has to end above it.
What each cost is the time of the stages that make its student: prompts or traces, targets, training; not the start, the
teacher and the evaluation, the same for all.
``metered`` is the same by the run's meter, which counts what a stage took in all tries. With ``out`` the runs are kept
there, and go on from where they stopped. Bars on an interval over seeds are short where there is one seed alone.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.bars import Bars, machine
from pennyweight.api import run
from pennyweight.evaluate.intervals import over_seeds
from pennyweight.report.view import view
from pennyweight.run_folder import read_json

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SEEDS, MINUTES = [0, 1, 2], 25
WAYS = ("sft", "sft_long", "rl", "on_policy", "offline")
POINTS = ("accuracy", "pass_at_k", "accuracy_harder", "pass_at_k_harder")

Made = dict[str, dict[str, Any]]
"""Of one seed, by stage: summary.json."""


def made(name: str, seeds: list[int], out: Path, threads: int) -> tuple[list[Made], list[float]]:
    """Run a recipe for each seed: summaries by stage, and the seconds that all stages took."""
    found, seconds = [], []
    for seed in seeds:
        folder = out / f"{name}-{seed}"
        settings = {"seed": seed, "seeds": [seed], "compute.threads": threads}
        told = run(RECIPES / f"{name}.toml", [f"defaults.{k}={v}" for k, v in settings.items()], out=folder)
        found.append({stage: read_json(folder / stage / "summary.json") for stage in told["chain"]})
        seconds.append(told["seconds"])
    return found, seconds


def arm(summary: dict[str, Any], before: bool = False) -> dict[str, Any]:
    """The student of a stage, or what it began as."""
    return summary["arms"]["base" if before else str(view(summary).method)]


def points(summary: dict[str, Any], metric: str, before: bool = False) -> float:
    return 100 * arm(summary, before)["metrics"][metric]["mean"]


def work(summary: dict[str, Any], *names: str) -> list[dict[str, Any]]:
    """Of the stages that make a stage's student (prompts or traces, targets, training), those so named; else all."""
    own = names or ("data", "targets", f"{view(summary).method}-")
    return [s for name, s in summary["stages"].items() if name.startswith(own)]


def cost(summary: dict[str, Any]) -> float:
    """Seconds of the stages that make a stage's student."""
    return sum(s["seconds"] for s in work(summary))


def metered(summary: dict[str, Any]) -> float:
    """Seconds of the same, by the run's meter."""
    return sum((s.get("metered") or {}).get("seconds", 0.0) for s in work(summary))


def lines(folder: Path, stage: str) -> list[dict[str, Any]]:
    """Lines of a run's metrics, of one stage of them."""
    read = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in read if line.get("stage") == stage]


def checks(folder: Path, summary: dict[str, Any]) -> list[tuple[float, float]]:
    """Of a run's held-out checks, three at a time since they are of few problems: what a way had cost before the last
    of them, and their mean accuracy."""
    before, trained = sum(s["seconds"] for s in work(summary, "data", "targets")), lines(folder, "train")
    found = lines(folder, "held_out")
    cost = [before + max((t["seconds"] for t in trained if t["step"] < x["step"]), default=0.0) for x in found]
    return [(cost[i], fmean(x["held_out_accuracy"] for x in found[i - 2 : i + 1])) for i in range(2, len(found))]


def surely_above(values: list[float]) -> bool:
    """Whether the interval over seeds lies above 0; never of one seed."""
    return len(values) > 1 and over_seeds(values).low > 0


def spread(values: list[float]) -> str:
    """``97.4 (96.0-98.1)``: mean, least and largest."""
    return f"{sum(values) / len(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def told(found: list[Made], stages: list[tuple[str, str, bool]]) -> None:
    """A table: of each row (label, stage, before its training) the four accuracies in points, and the seconds."""
    print(f"{'':24} {'parameters':>10} {'pass@1':>18} {'pass@4':>18} {'harder':>18} {'pass@4':>18} {'seconds':>20}")
    for label, stage, before in stages:
        of = [m[stage] for m in found]
        cells = [spread([points(s, metric, before) for s in of]) for metric in POINTS]
        took = "" if before else spread([cost(s) for s in of])
        print(
            f"{label:24} {arm(of[0], before)['params']:>10,} {' '.join(f'{c:>18}' for c in cells)} {took:>20}",
            flush=True,
        )


def r1(bars: Bars, seeds: list[int], out: Path, threads: int) -> None:
    found, seconds = made("r1", seeds, out, threads)
    after = [(stage, stage, False) for stage in found[0]]
    told(found, [("base", "zero", True), *after[:5], ("small base", "small_zero", True), *after[5:]])
    print(f"whole run, minutes: {spread([s / 60 for s in seconds])}")
    lifts = [points(m["zero"], "accuracy") - points(m["zero"], "accuracy", True) for m in found]
    apart = all(
        arm(m["zero"])["metrics"]["accuracy"]["low"] > arm(m["zero"], True)["metrics"]["accuracy"]["high"]
        for m in found
    )
    bars.check("r1.lift", min(lifts), ">=15, intervals apart", min(lifts) >= 15 and apart)
    better = [points(m["small"], "accuracy") - points(m["small_zero"], "accuracy") for m in found]
    print(f"distilled less reinforced, points: {', '.join(f'{b:+.1f}' for b in better)}")
    sure = min(better) > 0 and surely_above(better)
    bars.check("r1.distilled_over_reinforced", sum(better) / len(better), ">0, interval over seeds", sure)
    bars.check("r1.minutes", max(seconds) / 60, f"<={MINUTES}", max(seconds) <= 60 * MINUTES)


def ways(bars: Bars, seeds: list[int], out: Path, threads: int) -> None:
    found, _ = made("four_ways", seeds, out, threads)
    told(found, [("start", "sft", True), *((w, w, False) for w in WAYS)])
    for way in WAYS:
        of = [m[way] for m in found]
        trained = [sum(w["tokens"] for w in work(s, f"{view(s).method}-")) for s in of]
        wrote = [sum(x["generated"] for x in lines(out / f"four_ways-{n}" / way, "rollout")) for n in seeds]
        samples = fmean(s["data"]["train"] for s in of)
        print(
            f"{way}: {samples:,.0f} samples, tokens trained {sum(trained) / len(of):,.0f}, written by the student "
            f"{sum(wrote) / len(of):,.0f}; metered seconds {spread([metered(s) for s in of])}"
        )
    lift = [points(m["rl"], "accuracy") - points(m["rl"], "accuracy", True) for m in found]
    print(f"rl less its start, points: {', '.join(f'{d:+.1f}' for d in lift)}")
    bars.check("ways.rl_over_start", sum(lift) / len(lift), ">0, interval over seeds", surely_above(lift))
    matched(bars, found, seeds, out)
    mean = {w: sum(points(m[w], "accuracy") for m in found) / len(found) for w in WAYS}
    paid = {w: sum(cost(m[w]) for m in found) / len(found) for w in WAYS}
    on_rl = [points(m["on_policy"], "accuracy") - points(m["rl"], "accuracy") for m in found]
    print(f"on_policy less rl, points: {', '.join(f'{d:+.1f}' for d in on_rl)}")
    less = mean["on_policy"] - mean["rl"]
    bars.check("ways.on_policy_less_rl", less, ">=0 points", less >= 0)
    share = paid["on_policy"] / paid["rl"]
    bars.check("ways.on_policy_cost_of_rl", share, "<=0.333", share <= 1 / 3)
    less = mean["on_policy"] - mean["offline"]
    bars.check("ways.offline_behind_live", less, "<=2 points", less <= 2)
    share = paid["offline"] / paid["on_policy"]
    bars.check("ways.offline_cost_of_live", share, "<=0.5", share <= 0.5)
    for way, sft in itertools.product(("on_policy", "offline"), ("sft", "sft_long")):
        over = [points(m[way], "accuracy") - points(m[sft], "accuracy") for m in found]
        print(f"{way} less {sft}, points: {', '.join(f'{d:+.1f}' for d in over)}")
        bars.check(f"ways.{way}_over_{sft}", min(over), ">0 in each seed", min(over) > 0)


def matched(bars: Bars, found: list[Made], seeds: list[int], out: Path) -> None:
    """What live on-policy distillation has cost where its checks first are as good as those that reinforcement settled
    at, its last, beside what that had cost when it first was. The others have no such checks."""
    shares = []
    for seed, m in zip(seeds, found, strict=True):
        of = {way: checks(out / f"four_ways-{seed}" / way, m[way]) for way in ("rl", "on_policy")}
        score = of["rl"][-1][1] if of["rl"] else float("inf")
        took = {way: next((t for t, accuracy in known if accuracy >= score), None) for way, known in of.items()}
        told = ", ".join(f"{way} {'never' if t is None else f'after {t:.1f} s'}" for way, t in took.items())
        print(f"seed {seed}: {100 * score:.1f} % on held-out checks, where rl settled, is reached by {told}")
        rl, mine = took["rl"], took["on_policy"]
        shares.append(mine / rl if rl and mine is not None else float("inf"))
    bars.check("ways.on_policy_cost_to_where_rl_settled", max(shares), "<=0.333 in each seed", max(shares) <= 1 / 3)


PARTS = {"r1": r1, "ways": ways}


def main(argv: list[str]) -> None:
    settings = dict(a.split("=", 1) for a in argv if "=" in a)
    seeds = [int(s) for s in settings["seeds"].split(",")] if "seeds" in settings else SEEDS
    print(machine())
    bars = Bars()
    with tempfile.TemporaryDirectory() as scratch:
        for part in [a for a in argv if "=" not in a] or list(PARTS):
            PARTS[part](bars, seeds, Path(settings.get("out", scratch)), int(settings.get("threads", 0)))
    bars.finish()


if __name__ == "__main__":
    main(sys.argv[1:])
