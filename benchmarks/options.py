"""The options of training beside the plain run: packing, gradient checkpointing, torch.compile, LoRA and QLoRA.

    python -m benchmarks.options [tiny|large|same|adapted ...]

stories260K teaches a student cut from it (4 of its 5 layers, inner width 160 of 172, so that tiles of NVFP4 divide it)
by kd on texts of its own, of 24 to 192 tokens: 100 steps of 8, once over all of them, float32, 3 seeds (of texts, order
and factors); a thread each, as many trainings at once as there are cores. Every way gets the same start, texts, order
and steps through the one loop.

``same``: what must change nothing but rounding: the loss of every step of packing (rows of 256 tokens), checkpointing,
compile and all three beside that of the plain run; at most 1e-5 apart, relatively, as ``benchmarks.processes`` has it.
Packing deals the same samples to a step, checkpointing computes the same numbers again, and the compiler only adds
them up in another order.

``adapted``: what trains fewer numbers: bits a byte that each way gains on held-out texts, in percent of what the plain
run gains. A cut student is far from its teacher, so much has to be learnt: rank 32 (half the width of 64) is to give
95 % of it, on an int8 base, too; on a base in 4 bits 90 %, since what is lost by rounding stays in the merged weights.
Ranks 8 and 16 are there to be seen. Each rank's rate, and the plain run's, is the best of three to five, found on
another seed.

``tiny`` and ``large``: what each way costs and saves in time and memory, on that student and on a Llama of 63 M
parameters made from nothing (bfloat16, 4 rows of 256 tokens). Ways take turns step by step, medians after two steps
of warm-up, thread CPU time; "first" is the first step by the clock, where compilation falls. Bytes of weights,
gradients and moments are those of tensors; activations are what autograd keeps of a forward pass; the peak is weights
and moments and the most that a step allocates beyond. "resident" is by how much a process of its own grows over two
steps at its highest, making the model included.
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.allocations import kept, most_allocated
from benchmarks.bars import Bars, real, run_parts
from benchmarks.bf16 import Way, a_batch, a_step
from benchmarks.processes_memory import bytes_of, resident
from pennyweight.data.pack import Batch, packer
from pennyweight.data.render import encode_all
from pennyweight.errors import RecipeError
from pennyweight.evaluate.agreement import as_scorer, score
from pennyweight.evaluate.held_out import learnt_bytes
from pennyweight.methods.kd import kd
from pennyweight.model.adapters import merge
from pennyweight.model.device import choose
from pennyweight.model.load import load
from pennyweight.model.options import ready
from pennyweight.model.student import cut
from pennyweight.recipe import CutStudent
from pennyweight.records import Encoded
from pennyweight.settings import KdMethod, Lora, Schedule, Tripwires
from pennyweight.teacher.local import LocalTeacher
from pennyweight.teacher.own_samples import own_samples
from pennyweight.train.checkpoint import Checkpoints
from pennyweight.train.loop import train
from pennyweight.train.optim import adamw

SEEDS, STEPS, BATCH, CONTEXT = 3, 100, 8, 256
LENGTHS, HELD_OUT = (24, 48, 96, 192), 9  # tokens of a text, at most; one of so many is not trained on
RATE, RATES = 2e-3, {8: 1e-2, 16: 6e-3, 32: 3e-3}  # of all weights, and of factors by rank
FLOAT32, SPAWN = choose("cpu", "float32"), multiprocessing.get_context("spawn")

SAME: dict[str, dict[str, Any]] = {
    "packing": {"pack": True},
    "checkpointing": {"gradient_checkpointing": True},
    "compile": {"compile": True},
    "all three": {"pack": True, "gradient_checkpointing": True, "compile": True},
}
FEWER: dict[str, dict[str, Any]] = {
    "LoRA, rank 8": {"lora": Lora(rank=8)},
    "LoRA, rank 16": {"lora": Lora(rank=16)},
    "LoRA, rank 32": {"lora": Lora(rank=32)},
    **{f"QLoRA {base}, 32": {"lora": Lora(rank=32, base=base)} for base in ("int8", "int4", "nvfp4")},
}
GAIN = {"LoRA, rank 32": 95, "QLoRA int8, 32": 95, "QLoRA int4, 32": 90, "QLoRA nvfp4, 32": 90}
LARGE: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "compile": {"compile": True},
    "LoRA, rank 16": {"lora": Lora(rank=16)},
    "QLoRA int4, 16": {"lora": Lora(rank=16, base="int4")},
    "QLoRA int4, checkpointing": {"lora": Lora(rank=16, base="int4"), "gradient_checkpointing": True},
}


@dataclass
class Trained:
    """What came of a training: the loss of each step, and bits a byte on held-out texts."""

    losses: list[float] = field(default_factory=list)
    bits: float = math.nan


@cache
def teacher() -> LocalTeacher:
    return LocalTeacher(load(str(real("stories260K"))), FLOAT32, rows=128, context=512)


@cache
def texts(seed: int) -> tuple[list[Encoded], list[Encoded]]:
    """The teacher's own texts of a seed: those to train on, and those held out."""
    speaker, each = teacher(), STEPS * BATCH * HELD_OUT // (HELD_OUT - 1) // len(LENGTHS)
    with tempfile.TemporaryDirectory() as folder:
        told = [
            own_samples(
                replace(speaker, write_tokens=n),
                speaker.tokenizer,
                each,
                len(LENGTHS) * seed + i,
                Path(folder, f"{i}"),
                "",
            )
            for i, n in enumerate(LENGTHS)
        ]
    encoded = encode_all([s for some in told for s in some], speaker.tokenizer, 512, "refuse")
    return [e for i, e in enumerate(encoded) if i % HELD_OUT], encoded[::HELD_OUT]


@cache
def the_start() -> Any:
    return cut(teacher().loaded.model, CutStudent(layers=4, intermediate=160))


def schedule_of(settings: dict[str, Any]) -> Schedule:
    rate = RATES[settings["lora"].rank] if "lora" in settings else RATE
    return Schedule(steps=STEPS, batch=BATCH, lr=rate, checkpoint_every=10 * STEPS, **settings)


def lessons(settings: dict[str, Any], seed: int) -> Callable[[int], list[Batch]]:
    """Batches by step, each with the teacher's distributions."""
    given = packer(texts(seed)[0], schedule_of(settings), seed, teacher().loaded.pad_id, CONTEXT)
    return lambda step: [kd(b, KdMethod(), teacher().dense) for b in given(step)]


def bits_of(model: Any, seed: int) -> float:
    """Bits a byte on the held-out texts of a seed."""
    loaded, held = teacher().loaded, texts(seed)[1]
    found = score(
        held,
        learnt_bytes(held, loaded.tokenizer),
        as_scorer(replace(loaded, model=model), FLOAT32),
        None,
        loaded.pad_id,
    )
    return float(found.bits_per_byte().mean)


def trained(settings: dict[str, Any], seed: int) -> Trained:
    """A student trained in that way, through the loop.

    Raises:
        RecipeError: it cannot be had here.
    """
    student, out = copy.deepcopy(the_start()), Trained()
    ready(student, schedule_of(settings), seed)
    with tempfile.TemporaryDirectory() as folder:
        train(
            student,
            lessons(settings, seed),
            schedule=schedule_of(settings),
            tripwires=Tripwires(),
            compute=FLOAT32,
            checkpoints=Checkpoints(Path(folder)),
            seed=seed,
            admit=lambda ids: None,
            log=lambda line: out.losses.append(line["loss"]),  # of every step, since there are no more than 100
        )
    merge(student)
    out.bits = bits_of(student, seed)
    return out


@cache
def workers() -> ProcessPoolExecutor:
    """One for each core, on one thread; each keeps the texts it has written."""
    count = len(os.sched_getaffinity(0))
    return ProcessPoolExecutor(count, SPAWN, initializer=torch.set_num_threads, initargs=(1,))


def all_trained(ways: dict[str, dict[str, Any]]) -> dict[str, list[Trained] | RecipeError]:
    """Each way's trainings by seed, or why there are none."""
    jobs = {way: [workers().submit(trained, s, seed) for seed in range(SEEDS)] for way, s in ways.items()}
    found: dict[str, list[Trained] | RecipeError] = {}
    for way, some in jobs.items():
        try:
            found[way] = [job.result() for job in some]
        except RecipeError as e:
            found[way] = e
    return found


@cache
def plain() -> list[Trained]:
    found = all_trained({"plain": {}})["plain"]
    assert isinstance(found, list)
    return found


def name_of(way: str) -> str:
    return "options." + way.lower().replace(", ", "_").replace(" ", "_")


def same(bars: Bars) -> None:
    print(f"\n{'way':<16} {'losses apart, at most':>22} {'in the mean':>12} {'bits/byte apart':>16} {'bits/byte':>10}")
    for way, found in all_trained(SAME).items():
        if isinstance(found, RecipeError):
            print(f"{way}: {found}")
            bars.check(f"{name_of(way)}.losses_apart", math.nan, "<=1e-5", False)
            continue
        pairs = list(zip(found, plain(), strict=True))
        apart = [abs(a / b - 1) for x, y in pairs for a, b in zip(x.losses, y.losses, strict=True)]
        bits = max(abs(x.bits - y.bits) for x, y in pairs)
        cells = f"{max(apart):>22.2e} {mean(apart):>12.2e} {bits:>16.1e} {mean(x.bits for x in found):>10.4f}"
        print(f"{way:<16} {cells}", flush=True)
        bars.check(f"{name_of(way)}.losses_apart", max(apart), "<=1e-5", max(apart) <= 1e-5)


def adapted(bars: Bars) -> None:
    starts = [bits_of(the_start(), seed) for seed in range(SEEDS)]
    own = mean(bits_of(teacher().loaded.model, seed) for seed in range(SEEDS))
    print(f"\nbits a byte: {own:.4f} of the teacher, {mean(starts):.4f} of the student before training")
    print(f"{'way':<18} {'bits/byte':>10} {'gain':>7} {'of the plain, %':>16} {'least':>6} {'most':>6}")
    for way, found in {"plain": plain(), **all_trained(FEWER)}.items():
        if isinstance(found, RecipeError):
            raise found
        gains = [start - x.bits for start, x in zip(starts, found, strict=True)]
        shares = [100 * g / (s - x.bits) for g, s, x in zip(gains, starts, plain(), strict=True)]
        cells = f"{mean(shares):>16.1f} {min(shares):>6.1f} {max(shares):>6.1f}"
        print(f"{way:<18} {mean(x.bits for x in found):>10.4f} {mean(gains):>7.4f} {cells}", flush=True)
        if way in GAIN:
            least = GAIN[way]
            bars.check(f"{name_of(way)}.gain_percent", min(shares), f">={least}", min(shares) >= least)


def a_way(name: str, model: Any, settings: dict[str, Any], dtype: str) -> Way:
    """A model that is ready to be trained in a way, and its optimizer."""
    schedule = schedule_of(settings)
    ready(model.train(), schedule, 0)
    return Way(name, model, choose("cpu", dtype), adamw(model, schedule.lr, (0.9, 0.95), schedule.weight_decay))


def cost(ways: Iterable[Way], batch_of: Callable[[Way, int], Batch], steps: int, grown: dict[str, int]) -> None:
    """The table of time and memory; ``grown``: how much a process of its own grew, by way."""
    ways, firsts = list(ways), dict[str, float]()
    for step in range(2 + steps):
        for way in ways:
            batch = batch_of(way, step)
            began, now = time.thread_time(), time.perf_counter()
            a_step(way, batch)
            way.seconds.append(time.thread_time() - began)
            firsts.setdefault(way.name, time.perf_counter() - now)  # compilers are other processes
    base = median(ways[0].seconds[2:])
    heads = ["weights", "gradients", "moments", "activations", "peak"]
    print(f"{'way':<26} {'s/step':>7} {'over plain':>11} {'first':>6} " + " ".join(f"{h:>11}" for h in heads), end="")
    print(f" {'resident':>11}, MB" if grown else ", MB")
    for way in ways:
        batch, parameters = batch_of(way, 0), list(way.model.parameters())
        weights = bytes_of((*parameters, *way.model.buffers()))
        moments = bytes_of(t for state in way.optimizer.state.values() for k, t in state.items() if k != "step")
        sizes = [weights, bytes_of(p.grad for p in parameters), moments, kept(way.model, batch, way.compute)]
        way.optimizer.zero_grad(set_to_none=True)
        sizes += [weights + moments + most_allocated(lambda w=way, b=batch: a_step(w, b))]
        sizes += [grown[way.name]] if grown else []
        took = median(way.seconds[2:])
        cells = f"{took:>7.3f} {took / base:>11.2f} {firsts[way.name]:>6.1f}"
        print(f"{way.name:<26} {cells} " + " ".join(f"{n / 1e6:>11.2f}" for n in sizes), flush=True)


def tiny(bars: Bars) -> None:
    known = {"plain": {}, **SAME, **{k: v for k, v in FEWER.items() if "32" in k}}
    made, given = [], {}
    for name, settings in known.items():
        try:
            made.append(a_way(name, copy.deepcopy(the_start()), settings, "float32"))
            given[name] = lessons(settings, 0)
        except RecipeError as e:
            print(f"{name}: {e}")
    print(f"\nthe student of {sum(p.numel() for p in the_start().parameters()):,} parameters, float32")
    cost(made, lambda way, step: given[way.name](step)[0], 30, {})


def a_large_one() -> Any:
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12}
    return LlamaForCausalLM(LlamaConfig(vocab_size=8192, tie_word_embeddings=True, **sizes))


def grown_by(name: str) -> int:
    """Bytes by which this process, which does nothing else, grows at most when the large model is trained."""
    torch.set_num_threads(1)
    begun = resident("VmRSS:")
    way = a_way(name, a_large_one(), LARGE[name], "bfloat16")
    for step in range(2):
        a_step(way, a_batch(step))
    return resident("VmHWM:") - begun


def large(bars: Bars) -> None:
    model = a_large_one()
    print(f"\na Llama of {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters, bfloat16")
    ways = []
    for name, settings in LARGE.items():
        try:
            ways.append(a_way(name, copy.deepcopy(model), settings, "bfloat16"))
        except RecipeError as e:
            print(f"{name}: {e}")
    with ProcessPoolExecutor(1, SPAWN, max_tasks_per_child=1) as pool:
        grown = {way.name: pool.submit(grown_by, way.name).result() for way in ways}
    cost(ways, lambda way, step: a_batch(step), 3, grown)


PARTS = {f.__name__: f for f in (tiny, large, same, adapted)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # so that compilation is timed as it is the first time
        run_parts(PARTS, sys.argv[1:])
