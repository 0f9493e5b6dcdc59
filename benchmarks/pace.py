"""What a step of training takes of one thread, and the terms that it is made of: the constants of ``plan/pace.py``.

    python -m benchmarks.pace

Seconds are those of the thread itself, so that others' work on the machine counts little. A step's time is fitted, with
relative errors, by five terms, none below zero: layers, products with weights, attention, bytes that are kept, and
parameters.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pennyweight.data.pack import collate
from pennyweight.loss.divergence import Divergence
from pennyweight.model.device import choose
from pennyweight.model.head import head_of
from pennyweight.plan.architectures import shapes_of
from pennyweight.plan.flops import Training, training
from pennyweight.plan.sizes import WAYS, activation_bytes, loss_bytes
from pennyweight.records import Encoded
from pennyweight.train.group import ALONE
from pennyweight.train.loop import _step, batch_loss
from pennyweight.train.optim import adamw

SHAPES = (  # width, layers, heads, inner width, vocabulary, rows, tokens in a row
    (128, 4, 4, 384, 256, 64, 48),
    (64, 3, 4, 128, 256, 64, 48),
    (32, 2, 2, 64, 64, 8, 24),
    (48, 2, 4, 128, 256, 64, 80),
    (128, 2, 4, 384, 256, 128, 80),
    (256, 6, 8, 768, 512, 16, 128),
    (64, 4, 4, 172, 512, 16, 512),
    (128, 2, 4, 384, 32_000, 8, 64),
)
STEPS, LEARNT = 6, 0.5
WAY = {"float32": WAYS[0], "bfloat16": WAYS[1]}


def best(work: Callable[[], object], rounds: int) -> float:
    """Seconds of this thread in the fastest round."""
    took = []
    for _ in range(rounds):
        began = time.thread_time()
        work()
        took.append(time.thread_time() - began)
    return min(took)


def machine() -> dict[str, float]:
    """FLOP/s of a product in both precisions, bytes a second of a copy, seconds of a small operation."""
    source, few, out = torch.ones(1 << 25), torch.ones(8), {}
    target = torch.empty_like(source)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a, b = (torch.randn(1024, 1024).to(dtype) for _ in range(2))
        out[name] = 2 * 1024**3 / best(lambda a=a, b=b: a @ b, 5)
    out["copy"] = 8 * source.numel() / best(lambda: target.copy_(source), 5)
    out["operation"] = best(lambda: [torch.mul(few, 1.0) for _ in range(200)], 20) / 200
    return out


def step(shape: tuple[int, ...], dtype: str, speed: dict[str, float]) -> tuple[list[float], float]:
    """The terms of a step, each in the unit of its constant, and its seconds."""
    width, layers, heads, inner, vocabulary, rows, length = shape
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, intermediate_size=inner,
        num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=True, max_position_embeddings=1024,
    )  # fmt: skip
    model, compute, shapes = LlamaForCausalLM(config).train(), choose("cpu", dtype), shapes_of(config.to_dict())
    ids = torch.randint(3, vocabulary, (rows, length)).tolist()
    mask = tuple(i >= length * LEARNT for i in range(length))
    samples = [[Encoded(f"{i:064x}", tuple(row), mask)] for i, row in enumerate(ids)]
    optimizer = adamw(model, 1e-3, (0.9, 0.95), 0.05, "float32")
    loss_of = lambda batch, measured: batch_loss(model, head_of(model), batch, compute, measured)  # noqa: E731

    def once() -> None:
        batch = collate(samples, 0).weighted(1.0, 0.0, Divergence(), None)
        _step(model, optimizer, [batch], loss_of, 1.0, False, ALONE)

    once()
    each, tokens = training(shapes, length, Training(learnt=LEARNT)), rows * length
    kept = activation_bytes(shapes, WAY[dtype], rows, length, "cpu")
    kept += loss_bytes(shapes, WAY[dtype], round(LEARNT * tokens), "cpu")
    linear = tokens * (each.blocks + each.head) / speed[dtype]
    attention, copied = tokens * each.attention / speed["float32"], kept / speed["copy"]
    return [layers, linear, attention, copied, shapes.parameters / speed["copy"]], best(once, STEPS)


def fitted(terms: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Constants, none below zero, of the least squared relative error: one after another, until they rest."""
    a = terms / seconds[:, None]
    square, right, x = a.T @ a, a.sum(0), np.zeros(terms.shape[1])
    for _ in range(20_000):
        for j in range(len(x)):
            x[j] = max(0.0, x[j] + (right[j] - square[j] @ x) / square[j, j])
    return x


def main() -> None:
    """Measure, fit, and print both."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    speed = machine()
    print({k: f"{v:.4g}" for k, v in speed.items()})
    rows = [(shape, dtype, *step(shape, dtype, speed)) for shape in SHAPES for dtype in WAY]
    terms, seconds = np.array([r[2] for r in rows]), np.array([r[3] for r in rows])
    found = fitted(terms, seconds)
    for (shape, dtype, *_), said, took in zip(rows, terms @ found, seconds, strict=True):
        print(f"{shape} {dtype}: {1000 * took:.1f} ms, fitted {1000 * said:.1f} ms, {said / took:.2f} times")
    names = ("seconds a layer", "x linear", "x attention", "copies of what is kept", "bytes a parameter")
    print({name: f"{x:.3g}" for name, x in zip(names, found, strict=True)})


if __name__ == "__main__":
    main()
