"""Final KL to the teacher against bytes a token: the same student trained on the teacher kept in different ways.

    python -m benchmarks.targets_curve [STEPS] [SEEDS]

stories260K cut to 2 layers, 300 steps of 16 of the teacher's own samples, 3 seeds: start, tokens, order and steps are
the same for all. One thread a training, as many at once as there are cores.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

import pennyweight
from benchmarks.bars import Bars, machine, real
from pennyweight.bench import Bench
from pennyweight.data.pack import Batch, collate
from pennyweight.evaluate.agreement import as_scorer, score
from pennyweight.evaluate.fidelity import Stand, drawn, sampled, top_k
from pennyweight.loss.signals import Sparse, TopK
from pennyweight.methods import METHODS
from pennyweight.recipe import Recipe
from pennyweight.records import Encoded
from pennyweight.run_folder import read_json
from pennyweight.settings import KdMethod, SftMethod
from pennyweight.train.checkpoint import Checkpoints
from pennyweight.train.loop import train

WAYS: dict[str, tuple[Any, ...]] = {
    "ours": (0.025, 0.05, 0.1, 0.2),
    "i.i.d. draws": (50, 12, 3),
    "top-k, rescaled": (12, 4),
    "top-k + tail": (4,),
}


@cache
def bench(folder: str) -> Bench:
    """The run's samples, teacher and untouched student, opened once in each process."""
    opened = Bench(Recipe.model_validate(read_json(Path(folder) / "recipe.json")), Path(folder))
    torch.set_num_threads(1)
    return opened


def stand(logits: Tensor, way: str, setting: Any, seed: int) -> Stand:
    if way == "ours":
        return sampled(logits, setting, 1, seed)
    if way == "i.i.d. draws":
        return drawn(logits, setting, 1, seed)
    return top_k(logits, setting, tail=way == "top-k + tail")


class Labelled:
    """Every training sample's targets, kept in one way; ``signal`` joins those of a batch."""

    def __init__(self, b: Bench, way: str, setting: Any):
        samples = list({e.token_hash: e for e in b.encoded}.values())
        self.of: dict[str, Sparse | TopK] = {}
        for i, e in enumerate(samples):
            target = stand(_logits(b, [e]), way, setting, i).targets[0]
            assert isinstance(target, Sparse | TopK)
            self.of[e.token_hash] = target
        # As in a real shard of 256 samples; a sample by itself would have a header of its own.
        self.bytes_per_token = stand(_logits(b, samples[:256]), way, setting, 0).bytes_per_token

    def signal(self, batch: Batch) -> Sparse | TopK:
        parts = [self.of[s.token_hash] for s in batch.placed]
        if isinstance(parts[0], TopK):
            return TopK(*(torch.cat([getattr(p, f) for p in parts]) for f in ("ids", "probs")))
        counts = torch.cat([p.starts.diff() for p in parts if isinstance(p, Sparse)])
        return Sparse.of(counts, *(torch.cat([getattr(p, f) for p in parts]) for f in ("ids", "weights", "entropy")))


def _logits(b: Bench, samples: list[Encoded]) -> Tensor:
    """(N, V) of the teacher at the samples' loss positions."""
    return b.local.head.logits(b.local.hidden(collate([[e] for e in samples], b.teacher.pad_id)))


@cache
def labelled(folder: str, way: str, setting: Any) -> Labelled:
    return Labelled(bench(folder), way, setting)


def final_kl(folder: str, way: str, setting: Any, seed: int, steps: int) -> tuple[str, Any, int, float, float]:
    """Train one student; way, setting, seed, bytes a token, and its KL on held-out samples."""
    b = bench(folder)
    student = b.opened(Path(folder) / "arms" / "base-0")
    schedule = b.recipe.train.model_copy(update={"steps": steps, "checkpoint_every": 10 * steps})
    batches, size = b.batches(schedule, seed), 0.0
    if way == "sft":
        weigh = lambda x: METHODS["sft"].apply(x, SftMethod(), None)  # noqa: E731
    else:
        given = b.local.dense
        if way != "dense":
            kept = labelled(folder, way, setting)
            given, size = kept.signal, kept.bytes_per_token
        weigh = lambda x: METHODS["kd"].apply(x, KdMethod(), given)  # noqa: E731
    with tempfile.TemporaryDirectory() as scratch:
        train(
            student.model,
            lambda step: [weigh(x) for x in batches(step)],
            schedule=schedule,
            tripwires=b.recipe.tripwires,
            compute=b.compute.measuring,
            checkpoints=Checkpoints(Path(scratch)),
            seed=seed,
            admit=lambda ids: None,
            log=lambda line: None,
        )
    sides = as_scorer(student, b.compute.measuring), as_scorer(b.teacher, b.compute.measuring)
    found = score(b.held_out.encoded, b.held_out.bytes, *sides, b.teacher.pad_id)
    return way, setting, seed, size, float(found.kl_to.sum() / found.tokens.sum())


def main(steps: str = "300", seeds: str = "3") -> None:
    teacher, bars = str(real("stories260K")), Bars()
    print(machine())
    jobs = [("sft", None), ("dense", None), *((w, s) for w, settings in WAYS.items() for s in settings)]
    with tempfile.TemporaryDirectory() as folder:
        quick = [
            "train.steps=1",
            "targets.kind=dense",
            "quantize.formats=[]",
            "evaluate.samples=0",
            "compute.threads=1",
        ]
        pennyweight.distill(teacher, cut="layers=2", seeds=1, settings=quick, out=folder)
        spawn, workers = multiprocessing.get_context("spawn"), max(1, len(os.sched_getaffinity(0)))
        with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
            asked = [
                pool.submit(final_kl, folder, w, s, seed, int(steps)) for w, s in jobs for seed in range(int(seeds))
            ]
            done = [a.result() for a in asked]
    rows: dict[tuple[str, Any], list[tuple[float, float]]] = {}
    for way, setting, _, size, found in done:
        rows.setdefault((way, setting), []).append((size, found))
    print(
        f"{'kept':<17} {'setting':>8} {'bytes/token':>12} {'final KL':>9} {'least':>8} {'most':>8} {'over dense':>11}"
    )
    dense = mean(kl for _, kl in rows["dense", None])
    small = []
    for (way, setting), found in rows.items():
        size, kls = found[0][0], [kl for _, kl in found]
        over = mean(kls) / dense
        cells = f"{mean(kls):>9.4f} {min(kls):>8.4f} {max(kls):>8.4f} {over:>11.4f}"
        print(f"{way:<17} {setting or '':>8} {size:>12.1f} {cells}")
        if way == "ours" and over <= 1.01:
            small.append(size)
    least = min(small, default=float("inf"))
    bars.check("targets_curve.bytes_within_1_percent_of_dense", least, "<=16", least <= 16)
    bars.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
