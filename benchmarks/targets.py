"""What is kept of a teacher: bytes a token, gradient error, bias and calibration beside i.i.d. draws and top-k at equal
bytes; and what sampling and decoding cost. benchmarks/targets_curve.py has final KL against bytes a token.

    python -m benchmarks.targets [unbiased|ids|size|cost|fidelity ...]

Teachers: stories260K on 4,096 of its own tokens, its student cut to 3 layers, before and after 60 steps of training;
and three synthetic ones of a vocabulary of 151,936 with Zipf-distributed unigrams, sharp (about 1.25 nats), medium
(about 3) and diffuse (about 5), 2,048 tokens, gradients of the head and a layer below it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.bars import Bars, real, run_parts
from pennyweight.data.pack import collate
from pennyweight.evaluate.fidelity import Gradient, Stand, compare, dense_of, drawn, k_for, sampled, top_k
from pennyweight.loss.chunked import Terms, tiled_loss
from pennyweight.loss.divergence import Divergence
from pennyweight.loss.signals import Sparse, Target
from pennyweight.model.device import choose
from pennyweight.model.generate import generate
from pennyweight.model.head import Head, forward_hidden, head_of
from pennyweight.model.load import load
from pennyweight.model.student import cut
from pennyweight.recipe import CutStudent, SampledTargets
from pennyweight.records import Encoded
from pennyweight.teacher.shards import Shard, encode
from pennyweight.teacher.targets import Keep, Kept, draw, expected_entries, join, restore, threshold_within, uniforms
from pennyweight.train.loop import batch_loss

V = 151_936
COLUMNS = {
    "setting": (9, ".4g"),
    "bytes_per_token": (17, ".1f"),
    "ids_per_token": (15, ".2f"),
    "mass": (7, ".3f"),
    "gradient_error": (16, ".4f"),
    "gradient_angle": (16, ".2f"),
    "gradient_bias": (15, ".5f"),
    "calibration_error": (19, ".5f"),
}
DEFAULT = Keep().threshold
SYNTHETIC = {"sharp": (9.0, 1.3), "medium": (5.0, 1.2), "diffuse": (3.0, 1.06)}  # scale and exponent of synthetic_case


def real_case(steps: int) -> tuple[Tensor, Gradient]:
    """(4096, V) logits of stories260K, and the gradient of a student of 3 of its layers after ``steps`` steps."""
    teacher = load(str(real("stories260K")), device=torch.device("cpu"), dtype=torch.float32)
    bos = teacher.tokenizer.bos_token_id
    given: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "eos_ids": {-1}, "pad_id": 0, "batch": 16}
    written = generate(teacher.model, [[bos]] * 16, max_tokens=256, seed=5, context=teacher.context, **given)
    rows = [[bos, *w.ids][:257] for w in written]
    encoded = [Encoded(str(i), tuple(r), (False, *[True] * (len(r) - 1))) for i, r in enumerate(rows)]
    batch, compute = collate([[e] for e in encoded], 0), choose("cpu", "float32")
    with torch.no_grad():
        states = forward_hidden(teacher.model, batch.ids, batch.positions).flatten(0, 1)[batch.selected]
        logits = head_of(teacher.model).logits(states)
    student = cut(teacher.model, CutStudent(layers=3)).float().train()

    def gradient(target: Target) -> list[Tensor]:
        student.zero_grad()
        weighed = batch.weighted(0.0, 1.0, Divergence(), target)
        batch_loss(student, head_of(student), weighed, compute).loss.backward()
        return [p.grad.clone() for p in student.parameters() if p.grad is not None]

    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    for _ in range(steps):
        gradient(dense_of(logits)[0])
        for p in student.parameters():
            assert p.grad is not None
            p.grad /= len(logits)
        optimizer.step()
    return logits, gradient


def synthetic_case(scale: float, zipf: float, noise: float = 0.5) -> tuple[Tensor, Gradient]:
    """Teacher logits = hidden W^T * scale - zipf log(rank): contexts that differ, over unigrams as words have them.

    The student is the teacher with ``noise`` on its hidden states, which a linear layer passes on. Gradients are those
    of that layer and of the head.
    """
    n, d, g = 2048, 64, torch.Generator().manual_seed(3)
    weight = torch.randn(V, d + 1, generator=g) / d**0.5
    weight[:, -1] = -zipf * torch.arange(1, V + 1).log()
    hidden = torch.cat([scale * torch.randn(n, d, generator=g), torch.ones(n, 1)], -1)
    wrong = hidden + noise * torch.cat([torch.randn(n, d, generator=g), torch.zeros(n, 1)], -1)
    layer, head = torch.eye(d + 1).requires_grad_(), weight.clone().requires_grad_()

    def gradient(target: Target) -> list[Tensor]:
        layer.grad = head.grad = None
        zeros = torch.zeros(n)
        terms = Terms(zeros.long(), zeros, torch.ones(n), Divergence(), target)
        tiled_loss(wrong @ layer, Head(head), terms).loss.backward()
        assert layer.grad is not None and head.grad is not None
        return [layer.grad.clone(), head.grad.clone()]

    return hidden @ weight.T, gradient


def settled(logits: Tensor, budget: float) -> float:
    """The threshold that a run settles on: the recipe's default, or what the budget of bytes a token makes of it."""
    expected = lambda tried: expected_entries(logits[:1024].clone(), tried, 1.0)  # noqa: E731
    return threshold_within(budget, DEFAULT, logits.shape[1], expected)


def size(bars: Bars) -> None:
    """Bytes a token in shards, of the recipe's default budget and of a smaller one."""
    print(f"\n{'teacher':<9} {'budget':>7} {'threshold':>10} {'bytes/token':>12} {'ids/token':>10}")
    for name, shape in SYNTHETIC.items():
        logits, _ = synthetic_case(*shape)
        for budget in (SampledTargets().budget, 36.0):
            found = sampled(logits, settled(logits, budget), 1)
            takes = found.bytes_per_token
            print(f"{name:<9} {budget:>7g} {found.setting:>10.4f} {takes:>12.1f} {found.ids_per_token:>10.1f}")
            bars.check(f"targets.{name}.bytes_at_budget_{budget:g}", takes, f"<={budget:g}", takes <= budget)


def count_for(logits: Tensor, bytes_per_token: float) -> int:
    """How many i.i.d. draws take as many bytes."""
    low, high = 1, 4096
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (
            (middle, high) if drawn(logits[:1024], middle, 1).bytes_per_token <= bytes_per_token else (low, middle - 1)
        )
    return low


def fidelity(bars: Bars) -> None:
    cases: dict[str, Callable[[], tuple[Tensor, Gradient]]] = {
        "stories260K": lambda: real_case(0),
        "stories260K, trained": lambda: real_case(60),
        **{name: lambda shape=shape: synthetic_case(*shape) for name, shape in SYNTHETIC.items()},
    }
    for name, make in cases.items():
        logits, gradient = make()
        whole, confidence = dense_of(logits)
        dense = [g.clone() for g in gradient(whole)]
        entropy = float(torch.distributions.Categorical(logits=logits[:512]).entropy().mean())
        threshold = settled(logits, 48.0)
        draws = 8 if logits.shape[1] < 4096 else 4
        ours = sampled(logits, threshold, draws)
        takes = ours.bytes_per_token
        k = k_for(takes, logits.shape[1])
        ways = [
            lambda ours=ours: ours,
            lambda logits=logits, takes=takes, draws=draws: drawn(logits, count_for(logits, takes), draws),
            lambda logits=logits, k=k: top_k(logits, k, tail=False),
            lambda logits=logits, k=k: top_k(logits, k, tail=True),
        ]
        print(f"\n{name}: entropy {entropy:.2f} nats, V = {logits.shape[1]}, {len(logits)} tokens")
        print(f"{'kept':<17}" + "".join(f"{h:>{w}}" for h, (w, _) in COLUMNS.items()))
        found: dict[str, dict[str, Any]] = {}
        for way in ways:
            stand: Stand = way()
            r = found[stand.way] = compare(stand, dense, gradient, confidence)
            print(f"{r['way']:<17}" + "".join(f"{r[h]:>{w}{f}}" for h, (w, f) in COLUMNS.items()), flush=True)
        mine, iid, topk = (found[w] for w in ("sampled", "i.i.d. draws", "top-k, rescaled"))
        label = name.replace(", ", "_")
        ratio = mine["gradient_error"] / iid["gradient_error"]
        bars.check(f"targets.{label}.error_over_iid", ratio, "<=0.4", ratio <= 0.4)
        ratio = mine["gradient_bias"] / topk["gradient_bias"]
        bars.check(f"targets.{label}.bias_over_top_k", ratio, "<=0.1", ratio <= 0.1)
        for what in ("calibration_error", "gradient_angle"):
            rival = min(iid[what], topk[what])
            bars.check(f"targets.{label}.{what}", mine[what], f"<{rival:.4g}", mine[what] < rival)
    layouts = {128: (16, 6), 50: (1, 3)}  # k: exact values of 16 bits, terms of 32 bits; ids of 18 bits
    sizes = [f"{(16 * e + 32 * t + 18 * k) / 8:.0f} (k = {k})" for k, (e, t) in layouts.items()]
    print(f"\nDistillKit's documented layouts at V = {V:,}, bytes a token: {', '.join(sizes)}")


def unbiased(bars: Bars) -> None:
    """Is E[weight] the probability? Every id that is expected often enough, 4,000 draws, a fresh teacher each run.

    Each id's mean deviates from its probability by a known variance; the largest of all such deviations, in standard
    errors, is compared with the bound that a true sampler exceeds once in a million runs (Bonferroni).
    """
    seed = int(time.time())
    g = torch.Generator().manual_seed(seed)
    logits, t, draws = 2.5 * torch.randn(32, 2000, generator=g), 0.025, 4000
    p = torch.softmax(logits.double(), -1)
    steps = (1 << Keep(threshold=t).bits) - 1
    total = torch.zeros_like(p)
    many = logits.repeat(125, 1)
    for r in range(draws // 125):
        kept = draw(many.clone(), t, 1.0, uniforms(len(many), seed + r))
        counts, ids, weights, _ = restore(kept, t, Keep(threshold=t).bits)
        row = torch.repeat_interleave(torch.arange(len(many)), counts) % 32
        total.index_put_((row, ids), weights.double(), accumulate=True)
    scaled = p * steps
    variance = torch.where(p < t, p * (t - p), (scaled - scaled.floor()) * (1 - scaled + scaled.floor()) / steps**2)
    often = (p / t * draws > 50) & (variance > 0)
    z = ((total / draws - p) / (variance / draws).sqrt())[often]
    tests = int(often.sum())
    bound = float(torch.special.ndtri(torch.tensor(1 - 0.5e-6 / tests, dtype=torch.float64)))
    worst = float(z.abs().max())
    print(f"\nunbiased: seed {seed}, {tests} ids of 32 positions, {draws} draws; deviations in standard errors:")
    print(
        f"largest {worst:.2f} (level 1e-6 allows {bound:.2f}), mean {float(z.mean()):+.3f}, spread {float(z.std()):.3f}"
    )
    bars.check("targets.largest_deviation", worst, f"<={bound:.2f}", worst <= bound)


def cost(bars: Bars) -> None:
    """Sampling beside a softmax over the same logits, and decoding, on one thread by thread CPU time."""
    torch.set_num_threads(1)
    print(f"\n{'teacher':<9} {'softmax, ms':>12} {'sampling, ms':>13} {'entries':>8} {'decoded tokens/s':>17}")
    for name in ("sharp", "diffuse"):
        logits, _ = synthetic_case(*SYNTHETIC[name])
        some = logits[:128]
        times: dict[str, list[float]] = {"softmax": [], "sampling": []}
        for r in range(6):
            for what in times:
                x = some.clone()
                began = time.thread_time()
                kept = torch.softmax(x, -1) if what == "softmax" else draw(x, DEFAULT, 1.0, uniforms(128, r))
                if r:
                    times[what].append(time.thread_time() - began)
                del x
        ratio = median(b / a for a, b in zip(times["softmax"], times["sampling"], strict=True))
        keep = Keep()
        kept = draw(logits.clone(), DEFAULT, 1.0, uniforms(len(logits), 1))
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "shard"
            file.write_bytes(encode(kept.split([256] * 8), V, keep))
            shard, rates = Shard(file), []
            for r in range(4):
                began = time.thread_time()
                for i in range(8):
                    restore(shard.read(i), DEFAULT, keep.bits)
                if r:
                    rates.append(len(kept) / (time.thread_time() - began))
        entries = len(kept.ids) / len(kept)
        ms = [1e3 * median(times[w]) for w in ("softmax", "sampling")]
        print(f"{name:<9} {ms[0]:>12.1f} {ms[1]:>13.1f} {entries:>8.1f} {median(rates):>17,.0f}", flush=True)
        bars.check(f"targets.{name}.sampling_over_softmax", ratio, "<=2", ratio <= 2)
        bars.check(f"targets.{name}.decoded_tokens_per_second", median(rates), ">=1e5", median(rates) >= 1e5)
    step_share(bars)


def step_share(bars: Bars) -> None:
    """Decoding beside the training step that uses it: 4,096 tokens of a student of 3 layers of stories260K."""
    logits, gradient = real_case(0)
    keep = Keep()
    kept = draw(logits.clone(), DEFAULT, 1.0, uniforms(len(logits), 1))
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "shard"
        file.write_bytes(encode(kept.split([256] * 16), logits.shape[1], keep))
        shard, times = Shard(file), []
        for _ in range(8):
            began = time.thread_time()
            counts, ids, weights, entropy = restore(join([shard.read(i) for i in range(16)]), DEFAULT, keep.bits)
            decoded = time.thread_time()
            gradient(Sparse.of(counts, ids, weights, entropy))
            times.append(((decoded - began), (time.thread_time() - decoded)))
    share = median(d / (d + g) for d, g in times[1:])
    decoding, rest = (1e3 * median(t[i] for t in times[1:]) for i in (0, 1))
    print(f"decoding 4,096 tokens {decoding:.1f} ms, forward and backward pass on them {rest:.0f} ms")
    bars.check("targets.decoding_share_of_a_step", share, "<0.05", share < 0.05)


def ids(bars: Bars) -> None:
    """Bits of an id in a shard where ids recur as the words of a real text do: one tail a token, the token itself."""
    file = real("tokenizers") / "smollm2" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    rows = [json.loads(line) for line in (real("gsm8k") / "train.jsonl").read_text().splitlines()[:400]]
    texts = [tokenizer.encode(r["question"] + r["answer"]).ids for r in rows]
    kept = []
    for text in texts:
        n = len(text)
        one, none = torch.ones(n, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
        kept.append(Kept(0 * one, one, torch.tensor(text, dtype=torch.int32), none, torch.zeros(n, dtype=torch.uint8)))
    vocabulary, tokens = tokenizer.get_vocab_size(), sum(map(len, texts))
    bits = 8 * (len(encode(kept, vocabulary, Keep())) / tokens - 1)  # less the byte of an entropy
    width = (vocabulary - 1).bit_length()
    print(
        f"\nids of {tokens:,} tokens of GSM8K, vocabulary {vocabulary:,}: {bits:.1f} bits each, of a width of {width}"
    )
    bars.check("targets.bits_of_an_id_over_its_width", bits / width, "<1", bits < width)


def main(*parts: str) -> None:
    known: dict[str, Callable[[Bars], None]] = {
        "unbiased": unbiased,
        "ids": ids,
        "size": size,
        "cost": cost,
        "fidelity": fidelity,
    }
    run_parts(known, parts)


if __name__ == "__main__":
    main(*sys.argv[1:])
