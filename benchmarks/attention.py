"""Fused against unfused attention in training on a CPU: what `model/head.py` chooses by row length and precision.

    python -m benchmarks.attention

Forward and backward of a small Llama, one thread, the two sides interleaved in one process after a warm-up; medians
of thread CPU time. The bars are the choice that `forward_hidden` makes.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.bars import Bars, machine

TOKENS = 4096
ROUNDS = 7


def seconds(model, ids, bf16: bool, backend: SDPBackend) -> float:
    began = time.thread_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), sdpa_kernel(backend):
        states = model(input_ids=ids, use_cache=False).last_hidden_state
    states.float().square().mean().backward()
    model.zero_grad(set_to_none=True)
    return time.thread_time() - began


def main() -> None:
    torch.set_num_threads(1)
    print(machine())
    print(f"{'dtype':<9} {'row':>5} {'fused, ms':>10} {'unfused, ms':>12} {'fused / unfused':>16}")
    bars = Bars()
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=384
    )
    model = LlamaForCausalLM(config).model
    for bf16 in (True, False):
        for length in (32, 64, 128, 256, 512):
            ids = torch.randint(0, 512, (TOKENS // length, length))
            sides = {b: [] for b in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)}
            for round_ in range(ROUNDS + 2):
                for backend, times in sides.items():
                    taken = seconds(model, ids, bf16, backend)
                    if round_ >= 2:
                        times.append(taken)
            fused, unfused = (1000 * statistics.median(t) for t in sides.values())
            kind = "bfloat16" if bf16 else "float32"
            print(f"{kind:<9} {length:>5} {fused:>10.1f} {unfused:>12.1f} {fused / unfused:>16.2f}", flush=True)
            chosen_unfused = bf16 and length <= 128
            gain = fused / unfused if chosen_unfused else unfused / fused
            bars.check(f"attention.{kind}.{length}.other_over_chosen", gain, ">=0.95", gain >= 0.95)
    bars.finish()


if __name__ == "__main__":
    main()
