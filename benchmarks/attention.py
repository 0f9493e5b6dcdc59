"""Attention in training on a CPU as `model/head.py` chooses it: fused or unfused by row length and precision, and
heads of 8 numbers padded to 16 or as they are.

    python -m benchmarks.attention

Forward and backward of small Llamas, one thread, the two sides interleaved in one process after a warm-up; medians
of thread CPU time. The bars are the choice that `forward_hidden` makes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import LlamaModel

from benchmarks.bars import Bars, machine
from pennyweight.model.head import forward_hidden

TOKENS = 4096
ROUNDS = 7


def seconds(model: LlamaModel, ids: Tensor, bf16: bool, backend: SDPBackend) -> float:
    began = time.thread_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), sdpa_kernel(backend):
        states = model(input_ids=ids, use_cache=False).last_hidden_state
    states.float().square().mean().backward()
    model.zero_grad(set_to_none=True)
    return time.thread_time() - began


def llama(hidden: int, heads: int) -> LlamaModel:
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        num_hidden_layers=4,
        num_attention_heads=heads,
        intermediate_size=3 * hidden,
    )
    return LlamaForCausalLM(config).model


def interleaved(sides: list[Callable[[], float]]) -> list[float]:
    """Medians of seconds, the sides taking turns, after a warm-up."""
    rounds = [[side() for side in sides] for _ in range(ROUNDS + 2)]
    return [statistics.median(times) for times in zip(*rounds[2:], strict=True)]


def backends(bars: Bars) -> None:
    print(f"{'dtype':<9} {'row':>5} {'fused, ms':>10} {'unfused, ms':>12} {'fused / unfused':>16}")
    model = llama(128, 4)
    for bf16 in (True, False):
        for length in (32, 64, 128, 256, 512):
            ids = torch.randint(0, 512, (TOKENS // length, length))
            both = (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)
            fused, unfused = interleaved([partial(seconds, model, ids, bf16, b) for b in both])
            kind = "bfloat16" if bf16 else "float32"
            print(
                f"{kind:<9} {length:>5} {1e3 * fused:>10.1f} {1e3 * unfused:>12.1f} {fused / unfused:>16.2f}",
                flush=True,
            )
            chosen_unfused = bf16 and length <= 128
            gain = fused / unfused if chosen_unfused else unfused / fused
            bars.check(f"attention.{kind}.{length}.other_over_chosen", gain, ">=0.95", gain >= 0.95)


def plain(model: LlamaModel, ids: Tensor) -> float:
    return seconds(model, ids, False, SDPBackend.FLASH_ATTENTION)


def as_trained(model: LlamaModel, ids: Tensor) -> float:
    began = time.thread_time()
    forward_hidden(model, ids, torch.arange(ids.shape[1]).expand_as(ids)).square().mean().backward()
    model.zero_grad(set_to_none=True)
    return time.thread_time() - began


def widths(bars: Bars) -> None:
    print(f"{'head':>5} {'row':>5} {'as it is, ms':>13} {'as trained, ms':>15} {'as it is / as trained':>22}")
    for width in (8, 16):
        model = llama(8 * width, 8)
        for length in (64, 256):
            ids = torch.randint(0, 512, (TOKENS // length, length))
            one, other = interleaved([partial(plain, model, ids), partial(as_trained, model, ids)])
            print(f"{width:>5} {length:>5} {1e3 * one:>13.1f} {1e3 * other:>15.1f} {one / other:>22.2f}", flush=True)
            bars.check(
                f"attention.head_of_{width}.{length}.plain_over_chosen", one / other, ">=0.95", one / other >= 0.95
            )


def main() -> None:
    torch.set_num_threads(1)
    print(machine())
    bars = Bars()
    backends(bars)
    widths(bars)
    bars.finish()


if __name__ == "__main__":
    main()
