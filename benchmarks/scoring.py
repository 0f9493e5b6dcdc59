"""A teacher's forward pass in float32, bfloat16 and int8 on a CPU: how fast it labels, and what it costs in KL.

    python -m benchmarks.scoring

A Llama of 267 M parameters at random, 512 tokens a pass, one thread; the time is that of hidden states and float32
logits of every position, written to one buffer again and again, as labelling does it. Precisions take turns in one
process after a warm-up; thread CPU time, medians. KL is of each one's distributions to those of float32. "bfloat16,
rounded" makes the logits in 16 bits, which Pennyweight does not do: it is the fastest that bfloat16 can be, and int8
has to be faster than that. The bars are those of rows of 128 tokens; in longer ones attention, float32 in int8 scoring
too, takes a larger share.

Random as a new model is: embeddings from N(0, 1), other weights from N(0, 0.02), those that write to the residual
stream smaller by the root of their number, and the output layer wide enough for distributions of a few nats. Where
layers outweigh the embeddings, errors are larger than here; what they are in a real teacher, if a tiny one, shows
stories260K, measured where it is there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.bars import REAL, Bars, machine
from pennyweight.loss.divergence import kl
from pennyweight.model.head import Head, forward_hidden
from pennyweight.quant.scoring import for_scoring

TOKENS, ROUNDS, WARM_UP = 512, 9, 2
ROUNDED = "bfloat16, rounded"


@dataclass(frozen=True)
class Rounded(Head):
    """The rival: logits in 16 bits, then widened."""

    def logits(self, hidden_ND: Tensor, out: Tensor | None = None) -> Tensor:
        logits = hidden_ND @ self.weight.T
        return logits.float() if out is None else out.copy_(logits)


def a_teacher() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=1024,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=8,
        intermediate_size=4096,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()
        model.lm_head.weight.normal_(std=0.1)
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.div_((2 * config.num_hidden_layers) ** 0.5)
    return model


def scorers(model: Any) -> dict[str, tuple[Any, Head]]:
    made = {p: for_scoring(model, p) for p in ("float32", "bfloat16", "int8")}
    low = made["bfloat16"][0]
    return made | {ROUNDED: (low, Rounded(made["float32"][1].weight.bfloat16()))}


@torch.no_grad()
def logits_of(model: Any, head: Head, ids: Tensor, out: Tensor | None = None) -> Tensor:
    """(B, T) ids -> (B * T, V) float32 logits."""
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return head.logits(forward_hidden(model, ids, positions).flatten(0, 1), out)


def distances(made: dict[str, tuple[Any, Head]], ids: Tensor) -> tuple[float, dict[str, float]]:
    """Entropy of the float32 distributions, and the KL of each precision to them; nats, means in float64."""
    truth = logits_of(*made["float32"], ids)
    log_p = torch.log_softmax(truth, -1)
    entropy = -float((log_p.exp() * log_p).sum(-1).double().mean())
    found = {}
    for name, scorer in made.items():
        logits = logits_of(*scorer, ids)
        parts = [kl(p.double(), q.double()) for p, q in zip(truth.split(64), logits.split(64), strict=True)]
        found[name] = float(torch.cat(parts).mean())
    return entropy, found


def seconds(run: Callable[[], object]) -> float:
    began = time.thread_time()
    run()
    return time.thread_time() - began


def times(made: dict[str, tuple[Any, Head]], ids: Tensor) -> dict[str, float]:
    """Median CPU seconds of a pass, precisions in turn."""
    buffer = torch.empty(ids.numel(), made["float32"][1].weight.shape[0])
    taken: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(WARM_UP + ROUNDS):
        for name, scorer in made.items():
            taken[name].append(seconds(lambda s=scorer: logits_of(*s, ids, buffer)))
    return {name: statistics.median(t[WARM_UP:]) for name, t in taken.items()}


def main() -> None:
    torch.set_num_threads(1)
    print(machine())
    model = a_teacher()
    made = scorers(model)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters")
    print(f"{'row':>4} {'precision':<18} {'tokens/s':>9} {'over float32':>13} {'KL to float32':>14} {'entropy':>8}")
    bars = Bars()
    for row in (128, 512):
        ids = torch.randint(0, 32_000, (TOKENS // row, row))
        entropy, far = distances(made, ids)
        taken = times(made, ids)
        for name, t in taken.items():
            cells = f"{TOKENS / t:>9.0f} {taken['float32'] / t:>13.2f} {far[name]:>14.2e} {entropy:>8.2f}"
            print(f"{row:>4} {name:<18} {cells}", flush=True)
        if row == 128:
            gain, over = taken["float32"] / taken["int8"], taken[ROUNDED] / taken["int8"]
            bars.check("scoring.int8_over_float32", gain, ">=3.5", gain >= 3.5)
            bars.check("scoring.int8_over_bfloat16_rounded", over, ">=1.15", over >= 1.15)
            bars.check("scoring.int8_kl", far["int8"], "<=1e-3", far["int8"] <= 1e-3)
    if (REAL / "stories260K").exists():
        of_stories()
    bars.finish()


def of_stories() -> None:
    """KL on what a real, tiny teacher writes."""
    teacher: Any = AutoModelForCausalLM.from_pretrained(REAL / "stories260K", dtype=torch.float32).eval()
    torch.manual_seed(0)
    start = torch.full((16, 1), teacher.config.bos_token_id)
    ids = teacher.generate(start, max_new_tokens=127, min_new_tokens=127, do_sample=True, pad_token_id=0)
    entropy, far = distances(scorers(teacher), ids)
    print(f"stories260K on its own text, entropy {entropy:.2f} nats; KL to float32:")
    print(", ".join(f"{name} {k:.2e}" for name, k in far.items() if name != "float32"), flush=True)


if __name__ == "__main__":
    main()
