"""A student of another tokenizer than its teacher's: does distillation beat fine-tuning on the same tokens?

    python -m benchmarks.across [cuts|gpt2|smollm2 ...] (default: cuts and gpt2)

stories260K (512 tokens of SentencePiece) writes TEXTS texts; a Llama made from nothing learns them in the 50,257 tokens
of GPT-2, or the 49,152 of SmolLM2, for STEPS steps of 8 texts. Start, tokens, order and steps are the same in every arm
of a seed; bits a byte on texts that the teacher wrote besides. "sft" learns the text; "across" the teacher's
distribution carried over; "names" only what the teacher gives to tokens whose strings both vocabularies have, where
both have a boundary, and the text elsewhere. One thread a training, as many at once as there are cores.

cuts: how real tokenizers cut real texts: the share of the student's positions that lie inside a teacher token, and of
those whose label is not where the tables say (the text decides there, which biases what is next to it a little).
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

from benchmarks.bars import Bars, real, run_parts
from pennyweight.data.pack import Batch, Packer
from pennyweight.data.render import encode, learnt_bytes
from pennyweight.evaluate.agreement import as_scorer, score
from pennyweight.loss.divergence import Divergence
from pennyweight.loss.signals import Sparse
from pennyweight.model.device import choose
from pennyweight.model.load import load
from pennyweight.model.loaded import Loaded
from pennyweight.model.student import from_shape
from pennyweight.model.token_bytes import spelling_of
from pennyweight.records import Encoded, Sample
from pennyweight.settings import Schedule, Shape, Tripwires
from pennyweight.teacher.across import AcrossTeacher
from pennyweight.teacher.alignment import Vocabularies, align, compare
from pennyweight.teacher.cache import TargetCache
from pennyweight.teacher.local import LocalTeacher
from pennyweight.teacher.own_samples import own_samples
from pennyweight.teacher.targets import Keep
from pennyweight.teacher.vocabulary_trie import Place
from pennyweight.train.checkpoint import Checkpoints
from pennyweight.train.loop import train

TEXTS, HELD_OUT, STEPS, SEEDS, CONTEXT = 768, 128, 200, 3, 256
ARMS = ("sft", "across", "names")
SHAPE = Shape(hidden=64, layers=3, heads=4, intermediate=192)
SCHEDULE = Schedule(steps=STEPS, batch=8, lr=3e-3, checkpoint_every=10 * STEPS)
COMPUTE = choose("cpu", "float32")


def tokenizer_of(name: str) -> Any:
    path = real(f"tokenizers/{name}")
    if name == "gpt2":
        return GPT2Tokenizer.from_pretrained(str(path))
    return PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"), eos_token="<|endoftext|>")


@dataclass(frozen=True)
class Desk:
    """What one pair of tokenizers needs: the texts in both, and the teacher carried over."""

    tokenizer: Any
    train: list[Encoded]
    held_out: list[Encoded]
    theirs: dict[str, Encoded]
    across: AcrossTeacher
    cache: TargetCache
    teacher: LocalTeacher


@cache
def desk(folder: str, name: str) -> Desk:
    """Opened once in each process; texts and targets are made by the first and read by the others."""
    torch.set_num_threads(1)
    loaded, tokenizer = load(str(real("stories260K"))), tokenizer_of(name)
    teacher = LocalTeacher(loaded, COMPUTE, write_tokens=CONTEXT - 1, context=CONTEXT)
    texts = own_samples(teacher, loaded.tokenizer, TEXTS + HELD_OUT, 1, Path(folder) / "texts", "MIT")
    pairs = [(read(s, tokenizer), read(s, loaded.tokenizer)) for s in texts]
    theirs = {mine.token_hash: other for mine, other in pairs}
    vocabularies = compare(
        spelling_of(tokenizer), spelling_of(loaded.tokenizer), [tokenizer.eos_token_id],
        sorted(loaded.eos_ids | {loaded.tokenizer.bos_token_id}), len(tokenizer), loaded.vocabulary,
    )  # fmt: skip
    across = AcrossTeacher(teacher, vocabularies, lambda s: theirs[s.token_hash])
    outcomes = vocabularies.trie.outcomes
    cache = TargetCache(Path(folder) / name / "targets", across.fingerprint, Keep(), outcomes, 64, across.targets)
    mine = [m for m, _ in pairs]
    return Desk(tokenizer, mine[HELD_OUT:], mine[:HELD_OUT], theirs, across, cache, teacher)


def read(sample: Sample, tokenizer: Any) -> Encoded:
    found = encode(sample, tokenizer)
    assert found is not None  # without a context nothing is dropped
    return found


def by_names(d: Desk) -> Callable[[Batch], Sparse]:
    """What the teacher gives to tokens that both vocabularies have, above 0.005; cross-entropy elsewhere."""
    v = d.across.vocabularies
    of_name = {p: i for i, p in enumerate(v.student.pieces) if p}
    shared = torch.tensor([of_name.get(p or b"", -1) for p in v.teacher.pieces])
    known: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    with torch.no_grad():
        for group, states in d.teacher.states([d.theirs[s.token_hash] for s in d.train]):
            rows = states.split([len(s.loss_positions) for s in group])
            known |= {s.token_hash: named(d.teacher.head.logits(r), shared) for s, r in zip(group, rows, strict=True)}

    def entries(sample: Encoded) -> tuple[Tensor, Tensor, Tensor]:
        theirs = d.theirs[sample.token_hash]
        starts, named_ids, given = known[theirs.token_hash]
        parts = []
        for place in align(sample, theirs, v):
            if place.row >= 0 and place.remainder is None:
                some = slice(int(starts[place.row]), int(starts[place.row + 1]))
                parts.append((named_ids[some], given[some]))
            else:
                parts.append((torch.tensor([place.label]), torch.ones(1)))
        ids, weights = (torch.cat(x) for x in zip(*parts, strict=True))
        return torch.tensor([len(i) for i, _ in parts]), ids, weights

    made = {s.token_hash: entries(s) for s in d.train}

    def signal(batch: Batch) -> Sparse:
        counts, ids, weights = (torch.cat(x) for x in zip(*(made[s.token_hash] for s in batch.placed), strict=True))
        return Sparse.of(counts, ids, weights, torch.zeros(len(counts)))

    return signal


def named(logits: Tensor, shared: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where each row's entries begin; student ids and probabilities of the teacher tokens that are shared."""
    p = torch.softmax(logits, -1)
    kept = (p > 0.005) & (shared >= 0)
    starts = torch.nn.functional.pad(kept.sum(-1).cumsum(0), (1, 0))
    _, token = kept.nonzero(as_tuple=True)
    return starts, shared[token], p[kept]


def weigher(d: Desk, arm: str) -> Callable[[Batch], Batch]:
    if arm == "sft":
        return lambda b: b.weighted(1.0, 0.0, Divergence(), None)
    if arm == "names":
        named_ones = by_names(d)
        return lambda b: b.weighted(0.0, 1.0, Divergence(), named_ones(b))
    d.cache.fill(d.train, clean=False)

    def carried(batch: Batch) -> Batch:
        sample = d.cache.signal(batch, COMPUTE.device, lambda: d.teacher.head)
        assert isinstance(sample, Sparse)
        return batch.weighted(0.0, 1.0, Divergence(), d.across.signal(batch.placed, sample))

    return carried


def trained(folder: str, name: str, arm: str, seed: int) -> tuple[str, int, float]:
    """Bits a byte of one student on the held-out texts."""
    d = desk(folder, name)
    model = from_shape(SHAPE, d.tokenizer, CONTEXT, seed)
    batches = Packer(d.train, SCHEDULE.batch, SCHEDULE.batch, seed, d.tokenizer.eos_token_id)
    weigh = weigher(d, arm)
    with tempfile.TemporaryDirectory() as scratch:
        train(
            model,
            lambda step: [weigh(b) for b in batches(step)],
            schedule=SCHEDULE,
            tripwires=Tripwires(),
            compute=COMPUTE,
            checkpoints=Checkpoints(Path(scratch)),
            seed=seed,
            admit=lambda ids: None,
            log=lambda line: None,
        )
    return arm, seed, bits(model, d.tokenizer, d.held_out)


def bits(model: Any, tokenizer: Any, samples: list[Encoded]) -> float:
    opened = Loaded(model, tokenizer, "", "", "", 0, 0, CONTEXT)
    sides = as_scorer(opened, COMPUTE), None
    return score(samples, learnt_bytes(samples, tokenizer), *sides, opened.pad_id).bits_per_byte().mean


def of_tokenizer(bars: Bars, name: str) -> None:
    workers = max(1, len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder:
        d = desk(folder, name)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
            jobs = [pool.submit(trained, folder, name, arm, seed) for seed in range(SEEDS) for arm in ARMS]
            told(d, name)
            found = {(arm, seed): value for arm, seed, value in (j.result() for j in jobs)}
    print(
        f"{'bits a byte':<12} "
        + " ".join(f"{f'seed {s}':>8}" for s in range(SEEDS))
        + f" {'mean':>8} {'below sft':>10}"
    )
    for arm in ARMS:
        values = [found[arm, s] for s in range(SEEDS)]
        less = mean(found["sft", s] - found[arm, s] for s in range(SEEDS))
        print(
            f"{arm:<12} " + " ".join(f"{x:>8.4f}" for x in values) + f" {mean(values):>8.4f} {less:>10.4f}", flush=True
        )
    for rival in ("sft", "names"):
        least = min(found[rival, s] - found["across", s] for s in range(SEEDS))
        bars.check(f"across.{name}.least_bits_a_byte_below_{rival}", least, ">0", least > 0)


def told(d: Desk, name: str) -> None:
    """What the alignment looks like and what the targets take."""
    facts = d.cache.fill(d.train, clean=False)
    places = [p for s in d.train[:128] for p in align(s, d.theirs[s.token_hash], d.across.vocabularies)]
    inside = mean(p.remainder is not None for p in places)
    teacher = bits(d.teacher.loaded.model, d.teacher.loaded.tokenizer, [d.theirs[s.token_hash] for s in d.held_out])
    print(
        f"\n{name}: {facts.tokens:,} positions, {facts.bytes_per_token:.1f} bytes and "
        f"{facts.entries / facts.tokens:.1f} entries each; {100 * inside:.2f} % lie inside a teacher token; "
        f"the teacher itself: {teacher:.4f} bits a byte",
        flush=True,
    )


def of_cuts(bars: Bars) -> None:
    """GSM8K's answers, whose digits the one cuts singly and the other does not, and Korean ones."""
    texts = {
        "gsm8k": [json.loads(line)["answer"] for line in real("gsm8k/train.jsonl").read_text().splitlines()[:300]],
        "korean": [row[1] for row in csv.reader(real("korean/ChatbotData.csv").open())][1:600],
    }
    spelling = {name: spelling_of(tokenizer_of(name)) for name in ("gpt2", "smollm2")}
    print(f"{'teacher':<9} {'student':<9} {'texts':<7} {'positions':>9} {'inside, %':>10} {'elsewhere, %':>13}")
    for teacher, student in (("smollm2", "gpt2"), ("gpt2", "smollm2")):
        mine, theirs = spelling[student], spelling[teacher]
        v = compare(mine, theirs, [], [], len(mine.pieces), len(theirs.pieces))
        for name, some in texts.items():
            one, other = ([as_learnt(ids or []) for ids in s.cut([x.encode() for x in some])] for s in (mine, theirs))
            places = [p for a, b in zip(one, other, strict=True) for p in align(a, b, v)]
            inside = 100 * mean(p.remainder is not None for p in places)
            elsewhere = 100 * mean(bool(is_elsewhere(p, v)) for p in places)
            print(
                f"{teacher:<9} {student:<9} {name:<7} {len(places):>9,} {inside:>10.2f} {elsewhere:>13.2f}", flush=True
            )
            bars.check(f"across.cuts.{teacher}_{student}_{name}.elsewhere_percent", elsewhere, "<=1", elsewhere <= 1)


def as_learnt(ids: list[int]) -> Encoded:
    return Encoded("", (0, *ids), (False, *[True] * len(ids)))


def is_elsewhere(place: Place, v: Vocabularies) -> bool:
    """Whether the label is not the token that the tables give for the teacher's actual ones."""
    if place.remainder is not None:
        return place.label not in place.remainder.student[place.remainder.teacher == place.actual]
    rank, trie, node = v.trie.rank[place.label], v.trie, place.way[-1] if place.way else 0
    last = place.then[-1] if place.way else place.actual
    node = trie.child.get((node, last), node)
    ended = v.ended[node] if node else v.first[place.actual]
    return place.label != ended and not trie.low[node] <= rank < trie.low[node] + trie.ends[node]


def main(*parts: str) -> None:
    known: dict[str, Callable[[Bars], None]] = {
        "cuts": of_cuts,
        "gpt2": lambda bars: of_tokenizer(bars, "gpt2"),
        "smollm2": lambda bars: of_tokenizer(bars, "smollm2"),
    }
    run_parts(known, parts or ("cuts", "gpt2"))


if __name__ == "__main__":
    main(*sys.argv[1:])
