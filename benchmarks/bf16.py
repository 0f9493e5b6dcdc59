"""Training in bfloat16 beside float32 on a CPU: time of a step, and the loss; and optimizers that store less.

    python -m benchmarks.bf16

A Llama of 26 M parameters from nothing, 1,024 tokens a step of random walks over a vocabulary of 8,192 (so that there
is something to learn), one thread, thread CPU time. Ways take turns step by step from the same weights on the same
batches; medians of the steps after the first two. "bfloat16" is autocast with float32 weights, as every run trains
where the processor has it. Loss: mean of the last quarter of the steps. What can be gained at all is said first: the
rate of a product in bfloat16 over that in float32, which is 2 on a processor whose vector units do twice the numbers,
and more where it has units for matrices or its float32 product is slow.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.bars import Bars, machine
from pennyweight.data.pack import Batch, collate
from pennyweight.methods import METHODS
from pennyweight.model.device import Compute, choose
from pennyweight.model.head import head_of
from pennyweight.quant.linear import compute_in
from pennyweight.records import Encoded
from pennyweight.settings import SftMethod
from pennyweight.train.loop import batch_loss
from pennyweight.train.optim import adamw

STEPS, WARM_UP, ROWS, LENGTH, VOCABULARY, LR = 60, 2, 8, 128, 8192, 3e-4


@dataclass
class Way:
    """One way to train: its model, its optimizer, and what its steps took and came to."""

    name: str
    model: Any
    compute: Compute
    optimizer: torch.optim.Optimizer
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def a_model() -> Any:
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 7, "num_attention_heads": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, **sizes))


def a_batch(step: int) -> Batch:
    g = torch.Generator().manual_seed(step)
    walks = torch.randint(-3, 4, (ROWS, LENGTH + 1), generator=g).cumsum(1) + torch.randint(
        0, 256, (ROWS, 1), generator=g
    )
    rows = [[Encoded(f"{step}.{i}", tuple((w % 256).tolist()), (True,) * (LENGTH + 1))] for i, w in enumerate(walks)]
    return METHODS["sft"].apply(collate(rows, 0), SftMethod(), None)


def ways() -> list[Way]:
    made, first = [], a_model()
    asked = {
        "float32": ("float32", "float32", "float32"),
        "bfloat16": ("bfloat16", "float32", "float32"),
        "bfloat16, weights too": ("bfloat16", "bfloat16", "bfloat16"),
        "bfloat16, moments bfloat16": ("bfloat16", "float32", "bfloat16"),
        "bfloat16, moments fp8": ("bfloat16", "float32", "fp8"),
    }
    for name, (dtype, weights, moments) in asked.items():
        model = copy.deepcopy(first).train()
        compute_in(model, "full", weights)
        made.append(Way(name, model, choose("cpu", dtype), adamw(model, LR, (0.9, 0.95), 0.05, moments)))
    return made


def a_step(way: Way, batch: Batch) -> float:
    """One optimizer step, as the loop takes it; its loss."""
    way.optimizer.zero_grad(set_to_none=True)
    loss = batch_loss(way.model, head_of(way.model), batch, way.compute).loss / batch.count
    loss.backward()
    torch.nn.utils.clip_grad_norm_(way.model.parameters(), 1.0)
    way.optimizer.step()
    return float(loss.detach())


def stored(way: Way) -> float:
    """Bytes a parameter of weights, gradients and moments."""
    params = sum(p.numel() for p in way.model.parameters())
    kept = [t for state in way.optimizer.state.values() for k, t in state.items() if k != "step"]
    kept += [t for p in way.model.parameters() for t in (p, p.grad) if t is not None]
    return sum(t.numel() * t.element_size() for t in kept) / params


def product_gain() -> float:
    """How many times the float32 rate a product of a training step has in bfloat16."""
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    x, w = torch.randn(ROWS * LENGTH, 512), torch.randn(512, 1376)
    for _ in range(30):
        for dtype, took in seconds.items():
            a, b = x.to(dtype), w.to(dtype)
            began = time.thread_time()
            torch.mm(a, b)
            took.append(time.thread_time() - began)
    return median(seconds[torch.float32][5:]) / median(seconds[torch.bfloat16][5:])


def main() -> None:
    torch.set_num_threads(1)
    print(machine())
    print(f"a product alone is {product_gain():.2f} times as fast in bfloat16 as in float32")
    made = ways()
    print(
        f"{sum(p.numel() for p in made[0].model.parameters()) / 1e6:.1f} M parameters, {ROWS * LENGTH:,} tokens a step"
    )
    for step in range(STEPS):
        batch = a_batch(step)
        for way in made:
            began = time.thread_time()
            loss = a_step(way, batch)
            way.seconds.append(time.thread_time() - began)
            way.losses.append(loss)
    bars = Bars()
    base = made[0]
    print(f"\n{'way':<28} {'tokens/s':>9} {'over float32':>13} {'bytes/parameter':>16} {'loss':>8} {'gap, %':>8}")
    for way in made:
        rate = ROWS * LENGTH / median(way.seconds[WARM_UP:])
        gain = median(base.seconds[WARM_UP:]) / median(way.seconds[WARM_UP:])
        last = [mean(w.losses[-STEPS // 4 :]) for w in (way, base)]
        gap = 100 * (last[0] / last[1] - 1)
        print(
            f"{way.name:<28} {rate:>9.0f} {gain:>13.2f} {stored(way):>16.2f} {last[0]:>8.4f} {gap:>+8.3f}", flush=True
        )
        if way.name == "bfloat16":
            bars.check("bf16.over_float32", gain, ">=2.5", gain >= 2.5)
            bars.check("bf16.loss_gap_percent", abs(gap), "<=0.5", abs(gap) <= 0.5)
    bars.finish()


if __name__ == "__main__":
    main()
