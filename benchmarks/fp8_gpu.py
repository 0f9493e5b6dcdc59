"""The fp8 products of a Linear on a GPU's tensor cores, beside torch's in bfloat16.

    python -m benchmarks.fp8_gpu [codes|linear|memory|scoring ...]

codes: those that the kernels make, and those of the emulation, on the same GPU.

linear: forward and backward, casts included, of a Linear with bfloat16 weights; events of the device, three inputs in
turn so that none is found in a cache, sides interleaved, medians. Each product alone beside it, and our own kernel for
chips whose cuBLAS has no such scaling.

memory: what a Linear and a whole block hold between forward and backward pass.

scoring: hidden states and float32 logits of a Llama with random weights, as a teacher labels, in bfloat16 and in fp8;
and how far apart the two are.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from itertools import cycle
from statistics import median

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.bars import Bars, run_parts
from pennyweight.loss.divergence import kl
from pennyweight.model.head import forward_hidden, head_of
from pennyweight.quant import kernels
from pennyweight.quant.formats import FORMATS, decode, encode
from pennyweight.quant.linear import SCHEMES, Scheme, compute_by, swap
from pennyweight.quant.scoring import for_scoring

M, SIDE, ROUNDS, AT_ONCE = 16_384, 4096, 9, 8
BFLOAT16 = torch.bfloat16


def drawn(*shape: int, seed: int) -> Tensor:
    g = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=g, device="cuda").to(BFLOAT16)


def a_linear(inputs: int, outputs: int, scheme: Scheme | None) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False, device="cuda", dtype=BFLOAT16)
    if scheme is not None:
        compute_by(scheme, layer)
    return layer


def milliseconds(sides: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Medians of each, taking turns, after three rounds of warm-up; ``AT_ONCE`` calls at a time, as a model makes them,
    so that the device need not wait for Python."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for r in range(ROUNDS + 3):
        for name, work in sides.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(AT_ONCE):
                work()
            end.record()
            torch.cuda.synchronize()
            if r >= 3:
                found[name].append(start.elapsed_time(end) / AT_ONCE)
    return {name: median(times) for name, times in found.items()}


def codes(bars: Bars) -> None:
    x = drawn(M, SIDE, seed=1) * torch.exp(2 * drawn(M, 1, seed=2))
    w = drawn(SIDE, SIDE, seed=3).float()
    print(f"\n{'scales':<8} {'operand':<22} {'codes that differ':>18} {'scales that differ':>19}")
    for pow2 in (True, False):
        name = "_pow2" if pow2 else ""
        act, block = FORMATS["fp8_act" + name], FORMATS["fp8_block" + name]
        rows, columns = kernels.tiles(x, pow2, "of numbers")
        _, anew = kernels.tiles(x, pow2, "of codes")
        as_is, over = kernels.blocks(w, pow2), kernels.blocks(w, pow2, turned=True)
        along, across, blocks = encode(x, act), encode(x.T.contiguous(), act), encode(w, block)
        again = encode(decode(along).T.contiguous(), act)
        wrong = 0
        for what, got, want, scale in (
            ("tiles along rows", rows, along.codes, along.scale),
            ("tiles along columns", columns, across.codes, across.scale),
            ("the same, of codes", anew, again.codes, again.scale),
            ("blocks", as_is, blocks.codes, blocks.scale.T),
            ("blocks, turned", over, blocks.codes.T, blocks.scale),
        ):
            off = int((got.codes != want).sum()), int((got.scale[: scale.shape[0]] != scale).sum())
            wrong += sum(off)
            print(f"{'2^k' if pow2 else 'float32':<8} {what:<22} {off[0]:>18,} {off[1]:>19,}", flush=True)
        bars.check(f"fp8_gpu.codes_that_differ.{'pow2' if pow2 else 'float32'}", wrong, "=0", wrong == 0)


def linear(bars: Bars) -> None:
    print(f"\n{'rows':>6} {'width':>6} {'what':<36} {'ms':>8} {'TFLOP/s':>8} {'bfloat16 / it':>14}")
    for m, side in ((M, SIDE), (M, 2048), (M, 1024), (4096, SIDE)):
        xs = [drawn(m, side, seed=i).requires_grad_() for i in range(3)]
        gs = cycle(drawn(m, side, seed=9 + i) for i in range(3))
        layers = {n: a_linear(side, side, SCHEMES.get(n)) for n in ("bfloat16", "fp8", "fp8_v3")}

        def step(layer: nn.Linear, turn: cycle[Tensor], gs: cycle[Tensor] = gs) -> None:
            x = next(turn)
            x.grad = layer.weight.grad = None
            layer(x).backward(next(gs))

        took = milliseconds({n: partial(step, layer, cycle(xs)) for n, layer in layers.items()})
        for name, ms in took.items():
            row = f"{m:>6} {side:>6} {name + ', forward and backward':<36} {ms:>8.3f}"
            print(f"{row} {6 * m * side * side / ms / 1e9:>8.0f} {took['bfloat16'] / ms:>14.2f}", flush=True)
        if (m, side) == (M, SIDE):
            won = took["bfloat16"] / took["fp8"]
            bars.check("fp8_gpu.linear_over_bfloat16", won, ">=1.25", won >= 1.25)
            parts(xs[0].detach(), layers["bfloat16"].weight.detach())


def parts(x: Tensor, w: Tensor) -> None:
    """What the time is made of: casts, and products by cuBLAS and by our own kernel."""
    (rows, columns), as_is = kernels.tiles(x, True, "of numbers"), kernels.blocks(w, True)
    chosen = kernels.by_cublas
    try:
        sides: dict[str, Callable[[], object]] = {
            "product in bfloat16": lambda: x @ w.T,
            "product, tiles by blocks": lambda: kernels.product(rows, as_is, BFLOAT16),
            "product, tiles by tiles": lambda: kernels.product(columns, columns, BFLOAT16),
            "tiles along rows": lambda: kernels.tiles(x, True),
            "tiles both ways": lambda: kernels.tiles(x, True, "of numbers"),
            "tiles both ways, the second of codes": lambda: kernels.tiles(x, True, "of codes"),
            "blocks": lambda: kernels.blocks(w, True),
            "blocks, turned": lambda: kernels.blocks(w, True, turned=True),
        }
        took = milliseconds(sides)
        kernels.by_cublas = lambda device: False  # type: ignore[assignment]
        took |= milliseconds({"product, tiles by blocks, our kernel": lambda: kernels.product(rows, as_is, BFLOAT16)})
    finally:
        kernels.by_cublas = chosen
    for name, ms in took.items():
        flop = 2 * w.shape[1] ** 2 * len(x) if "by tiles" in name else 2 * x.numel() * len(w)
        rate = f"{flop / ms / 1e9:>8.0f}" if "product" in name else f"{'':>8}"
        print(f"{len(x):>6} {len(w):>6} {name:<36} {ms:>8.3f} {rate}", flush=True)


def held(work: Callable[[], object]) -> int:
    """Bytes that what ``work`` returns keeps."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = work()
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before
    del out
    return kept


def memory(bars: Bars) -> None:
    x = drawn(M, SIDE, seed=1).requires_grad_()
    kept = {}
    for name in ("bfloat16", "fp8"):
        layer = a_linear(SIDE, SIDE, SCHEMES.get(name))
        layer(x * 1)  # compiles
        kept[name] = held(lambda layer=layer: layer(x + 0)) - 2 * M * SIDE  # less its output
    share = kept["fp8"] / kept["bfloat16"]
    print(f"\nkept for the backward pass of a Linear: {kept['bfloat16']:,} bytes in bfloat16, {kept['fp8']:,} in fp8")
    bars.check("fp8_gpu.activation_memory", share, "<=0.55", share <= 0.55)
    model = a_llama(2).train()
    low = copy.deepcopy(model)
    swap(low, SCHEMES["fp8"])
    ids = torch.randint(0, 1000, (4, 2048), device="cuda")
    place = torch.arange(2048, device="cuda").expand_as(ids)
    for m in (model, low):
        forward_hidden(m, ids, place)
    whole = [held(lambda m=m: forward_hidden(m, ids, place)) for m in (model, low)]
    print(f"of two whole blocks of a Llama: {whole[0]:,} bytes, and {whole[1]:,}: {whole[1] / whole[0]:.2f}")


def a_llama(layers: int) -> nn.Module:
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=SIDE, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=8,
        intermediate_size=14_336, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=BFLOAT16, attn_implementation="sdpa")


@torch.no_grad()
def scoring(bars: Bars) -> None:
    teacher = a_llama(8).eval()
    batches = [torch.randint(0, 32_000, (8, 2048), device="cuda") for _ in range(3)]
    place = torch.arange(2048, device="cuda").expand(8, 2048)
    out = torch.empty(4096, 32_000, device="cuda")
    made = {precision: for_scoring(teacher, precision) for precision in ("bfloat16", "fp8")}

    def label(precision: str, ids: Tensor) -> None:
        model, head = made[precision]
        for part in forward_hidden(model, ids, place).flatten(0, 1).split(len(out)):
            head.logits(part, out)

    turns = {p: cycle(batches) for p in made}
    took = milliseconds({p: lambda p=p: label(p, next(turns[p])) for p in made})
    print(f"\n{'scoring in':<10} {'ms for 16,384 tokens':>21} {'tokens/s':>10}")
    for precision, ms in took.items():
        print(f"{precision:<10} {ms:>21.1f} {M / ms * 1000:>10,.0f}", flush=True)
    states = [forward_hidden(model, batches[0][:1], place[:1])[0] for model, _ in made.values()]
    apart = float(kl(*(head_of(teacher).logits(s) for s in states)).mean())
    print(f"fp8 is {apart:.2g} nats a token from bfloat16")
    won = took["bfloat16"] / took["fp8"]
    bars.check("fp8_gpu.scoring_over_bfloat16", won, ">=1.3", won >= 1.3)


def main(*names: str) -> None:
    if not torch.cuda.is_available() or not kernels.runs_on(torch.device("cuda", torch.cuda.current_device())):
        print("skipped: needs a GPU with fp8 tensor cores (NVIDIA, compute capability 8.9 or more)")
        return
    run_parts({"codes": codes, "linear": linear, "memory": memory, "scoring": scoring}, names)


if __name__ == "__main__":
    main(*sys.argv[1:])
