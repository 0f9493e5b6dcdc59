"""The tiled loss beside plain autograd, TRL 1.16's chunked divergence and Liger 0.8.5's chunked loss: forward and
backward of a live-teacher divergence from hidden states and heads, on the same inputs.

    python -m benchmarks.loss [speed|precision|memory|sampled ...] [VOCABULARY ...] [DIVERGENCE ...]

2,048 tokens, hidden 1,024 (student) and 2,048 (teacher), vocabularies of 65,536 and 151,936, float32. One thread,
thread CPU time, sides interleaved, medians of three after a warm-up. Without arguments, all four parts (about an hour).
On a CUDA device: 8,192 tokens, hidden 2,048 and 4,096, a vocabulary of 128,256, bfloat16, device time.
"""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor

from benchmarks.bars import Bars, machine
from pennyweight.loss.chunked import Terms, tiled_loss
from pennyweight.loss.divergence import Divergence
from pennyweight.loss.signals import Dense, Sparse
from pennyweight.model.head import Head

KINDS = ("forward_kl", "reverse_kl", "jsd")
BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}  # as TRL and Liger name them
ROUNDS = 3


@dataclass
class Inputs:
    """(N, D) hidden states and (V, D) heads of both sides; the student's take gradients."""

    student: Tensor
    student_head: Tensor
    teacher: Tensor
    teacher_head: Tensor

    def learning(self) -> Inputs:
        for x in (self.student, self.student_head):
            x.requires_grad_()
        return self

    @staticmethod
    def drawn(n: int, v: int, ds: int, dt: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Inputs:
        g = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, device=device)

        student, teacher = normal(n, ds), normal(n, dt)
        heads = normal(v, ds) / ds**0.5, normal(v, dt) / dt**0.5
        leaves = (x.to(dtype).requires_grad_() for x in (student, heads[0]))
        return Inputs(next(leaves), next(leaves), teacher.to(dtype), heads[1].to(dtype))

    @staticmethod
    def near(n: int, v: int, d: int, noise: float) -> Inputs:
        """One head for both, the student's hidden states the teacher's with noise."""
        g = torch.Generator().manual_seed(1)
        teacher, head = torch.randn(n, d, generator=g), torch.randn(v, d, generator=g) / d**0.5
        student = (teacher + noise * torch.randn(n, d, generator=g)).requires_grad_()
        return Inputs(student, head.clone().requires_grad_(), teacher, head)


def ours(x: Inputs, kind: str) -> Tensor:
    ones, zeros = torch.ones(len(x.student), device=x.student.device), torch.zeros(1, device=x.student.device)
    head = Head(x.teacher_head)
    target = Dense(lambda rows, out: head.logits(x.teacher[rows], out))
    labels = torch.zeros(len(ones), dtype=torch.long, device=ones.device)
    terms = Terms(labels, zeros.expand(len(ones)), ones, Divergence(kind), target)
    return tiled_loss(x.student, Head(x.student_head), terms).loss


def trl(x: Inputs, kind: str) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # type: ignore

    given = (x.student, x.student_head, None, x.teacher, x.teacher_head, None, BETA[kind])
    return ChunkedDivergenceFunction.apply(*given)[0].sum()


def liger(x: Inputs, kind: str) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # type: ignore

    loss = LigerFusedLinearJSDLoss(0.0, 1.0, BETA[kind], compiled=False)
    labels = torch.zeros(len(x.student), dtype=torch.long, device=x.student.device)
    return loss(x.student, x.student_head, x.teacher, x.teacher_head, labels) * len(labels)


def autograd(x: Inputs, kind: str) -> Tensor:
    """Full logits of both sides, in float32 (in float64 when given it)."""
    wide = x.student.dtype if x.student.dtype == torch.float64 else torch.float32
    log_q = torch.log_softmax((x.student @ x.student_head.T).to(wide), -1)
    with torch.no_grad():
        log_p = torch.log_softmax((x.teacher @ x.teacher_head.T).to(wide), -1)
    if kind == "forward_kl":
        return (log_p.exp() * (log_p - log_q)).sum(-1).sum()
    if kind == "reverse_kl":
        return (log_q.exp() * (log_q - log_p)).sum(-1).sum()
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1).sum()


SIDES: dict[str, Callable[[Inputs, str], Tensor]] = {"ours": ours, "trl": trl, "liger": liger, "autograd": autograd}


def backward(x: Inputs, side: str, kind: str) -> tuple[float, Tensor, Tensor]:
    """Loss and the two gradients."""
    x.student.grad = x.student_head.grad = None
    loss = SIDES[side](x, kind)
    loss.backward()
    assert x.student.grad is not None and x.student_head.grad is not None
    return float(loss.detach()), x.student.grad, x.student_head.grad


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds: thread CPU time, or a GPU's own."""
    if device == "cpu":
        began = time.thread_time()
        work()
        return time.thread_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def product_rate(x: Inputs, device: str) -> float:
    """FLOP/s of the loss's own matrix products, plain: 2 N V (D_teacher + 3 D_student) over their time."""
    rows = slice(0, min(len(x.student_head), 16000))  # no power of two, which would slow it down
    ws, wt = x.student_head.detach()[rows], x.teacher_head[rows]
    hs, ht = x.student.detach(), x.teacher
    g = hs @ ws.T

    def products() -> None:
        for a, b in ((ht, wt.T), (hs, ws.T), (g, ws), (g.T, hs)):
            torch.mm(a, b)

    products()
    flop = 2 * len(hs) * len(ws) * (ht.shape[1] + 3 * hs.shape[1])
    return flop / median(timed(products, device) for _ in range(3))


def speed(bars: Bars, vocabularies: list[int], kinds: tuple[str, ...] = KINDS) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    shapes = [(8192, 128_256, 2048, 4096)] if device == "cuda" else [(2048, v, 1024, 2048) for v in vocabularies]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    bound = {"forward_kl": (1.3, 0.0), "jsd": (1.7, 0.0)} if device == "cuda" else {"forward_kl": (1.8, 1.2)}
    bound.setdefault("jsd", (2.5, 1.8))
    share = 0.65 if device == "cuda" else 0.75
    rivals = ("ours", "trl", "liger") if device == "cuda" else ("ours", "trl", "liger", "autograd")
    for n, v, ds, dt in shapes:
        x = Inputs.drawn(n, v, ds, dt, dtype, device)
        small = Inputs.drawn(64, 4096, ds, dt, dtype, device) if device == "cpu" else x
        rate, flop = product_rate(x, device), 2 * n * v * (dt + 3 * ds)
        print(
            f"\n{n} tokens, V = {v}, hidden {ds} and {dt}; products alone {rate / 1e9:.0f} GFLOP/s, {flop / rate:.4g} s"
        )
        print(f"{'divergence':<12} {'side':<9} {'s':>8} {'GFLOP/s':>8} {'of products':>12} {'ours faster':>12}")
        for kind in kinds:
            seconds: dict[str, list[float]] = {s: [] for s in rivals}
            for side in rivals:
                backward(small, side, kind)
            for r in range(ROUNDS if kind in bound else 1):  # what has no bar runs once
                for side in rivals if r == 0 else rivals[:3]:
                    seconds[side].append(timed(partial(backward, x, side, kind), device))
            middle = {s: median(t) for s, t in seconds.items()}
            for side, t in middle.items():
                ratio = f"{t / middle['ours']:.2f}" if side != "ours" else ""
                print(
                    f"{kind:<12} {side:<9} {t:>8.4g} {flop / t / 1e9:>8.0f} {flop / t / rate:>12.0%} {ratio:>12}",
                    flush=True,
                )
            if kind in bound:
                for rival, least in zip(("trl", "liger"), bound[kind], strict=True):
                    if least:
                        won = median(a / b for a, b in zip(seconds[rival], seconds["ours"], strict=True))
                        bars.check(f"loss.{kind}.{v}.{rival}_over_ours", won, f">={least}", won >= least)
            if kind == "forward_kl":
                got = flop / middle["ours"] / rate
                bars.check(f"loss.{kind}.{v}.share_of_product_rate", got, f">={share}", got >= share)


def precision(bars: Bars, vocabularies: list[int]) -> None:
    """Relative errors against float64 autograd from the same inputs, far apart and where both sides nearly agree."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"\n{'KL':>8} {'divergence':<12} {'side':<9} {'loss':>9} {'d hidden':>9} {'d head':>9}")
    cases = [Inputs.drawn(256, 65_536, 512, 1024), Inputs.near(256, 65_536, 512, 0.057)]
    worst = dict.fromkeys(("loss", "gradient"), 0.0)
    for x in cases:
        wide = Inputs(*(t.detach().double() for t in (x.student, x.student_head, x.teacher, x.teacher_head)))
        wide.learning()
        low = x if device == "cpu" else _on_gpu(x)
        if device == "cuda":
            wide = Inputs(
                *(t.detach().double().cpu() for t in (low.student, low.student_head, low.teacher, low.teacher_head))
            )
            wide.learning()
        distance = backward(wide, "autograd", "forward_kl")[0] / len(x.student)
        for kind in KINDS:
            truth = backward(wide, "autograd", kind)
            for side in SIDES:
                got = backward(low, side, kind)
                error = [abs(got[0] - truth[0]) / abs(truth[0])]
                error += [
                    float((a.double().cpu() - b).norm() / b.norm()) for a, b in zip(got[1:], truth[1:], strict=True)
                ]
                print(f"{distance:>8.4f} {kind:<12} {side:<9} " + " ".join(f"{e:>9.1e}" for e in error), flush=True)
                if side == "ours":
                    worst = {"loss": max(worst["loss"], error[0]), "gradient": max(worst["gradient"], *error[1:])}
    most = (1e-6, 1e-5) if device == "cpu" else (2e-3, 2e-3)
    for (what, error), bound in zip(worst.items(), most, strict=True):
        bars.check(f"loss.{what}_error", error, f"<={bound:g}", error <= bound)


def _on_gpu(x: Inputs) -> Inputs:
    moved = Inputs(*(t.detach().bfloat16().cuda() for t in (x.student, x.student_head, x.teacher, x.teacher_head)))
    return moved.learning()


def memory(bars: Bars, vocabularies: list[int]) -> None:
    """Peak memory above the inputs, each side in a process of its own."""
    print(f"\n{'V':>7} {'divergence':<12} {'side':<9} {'peak, MB':>9} {'of full logits':>15}")
    for v in vocabularies:
        for kind in KINDS:
            peak = {}
            for side in ("autograd", "ours", "liger", "trl"):
                call = [sys.executable, "-m", "benchmarks.loss", "peak", side, kind, str(v)]
                peak[side] = float(subprocess.run(call, capture_output=True, text=True, check=True).stdout.split()[-1])
                share = peak[side] / peak["autograd"]
                print(f"{v:>7} {kind:<12} {side:<9} {peak[side] / 1e6:>9.0f} {share:>15.2f}", flush=True)
            share = peak["ours"] / peak["autograd"]
            bars.check(f"loss.{kind}.{v}.peak_memory", share, "<=0.35", share <= 0.35)


def peak(side: str, kind: str, v: str) -> None:
    """Bytes that one call takes at most, above what was there before it."""
    x = Inputs.drawn(2048, int(v), 1024, 2048)
    backward(Inputs.drawn(64, 4096, 1024, 2048), side, kind)
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # starts the count of the most resident memory anew
    before = _status("VmRSS")
    backward(x, side, kind)
    print(_status("VmHWM") - before)


def _status(name: str) -> int:
    with open("/proc/self/status") as f:
        return next(1024 * int(line.split()[1]) for line in f if line.startswith(name))


def sampled(bars: Bars, vocabularies: list[int]) -> None:
    """KL to a sample of the teacher's distribution, beside cross-entropy alone, both tiled."""
    torch.set_num_threads(1)
    print(f"\n{'V':>7} {'loss':<14} {'s':>8}")
    for v in vocabularies:
        x, g = Inputs.drawn(2048, v, 1024, 8), torch.Generator().manual_seed(2)
        counts = torch.randint(4, 13, (2048,), generator=g)
        ids = torch.randint(0, v, (int(counts.sum()),), generator=g)
        target = Sparse.of(counts, ids, torch.full(ids.shape, 0.12), torch.zeros(2048))
        ones, zeros, labels = torch.ones(2048), torch.zeros(2048), torch.randint(0, v, (2048,), generator=g)
        terms = {
            "cross-entropy": Terms(labels, ones, zeros, Divergence()),
            "sampled KL": Terms(labels, zeros, ones, Divergence(), target),
        }

        def work(which: str, x: Inputs = x, terms: dict[str, Terms] = terms) -> None:
            tiled_loss(x.student, Head(x.student_head), terms[which]).loss.backward()

        seconds: dict[str, list[float]] = {name: [] for name in terms}
        for r in range(ROUNDS + 1):
            for name in terms:
                took = timed(lambda name=name: work(name), "cpu")
                if r:
                    seconds[name].append(took)
        for name, t in seconds.items():
            print(f"{v:>7} {name:<14} {median(t):>8.3f}", flush=True)
        ratio = median(a / b for a, b in zip(seconds["sampled KL"], seconds["cross-entropy"], strict=True))
        bars.check(f"loss.sampled_over_cross_entropy.{v}", ratio, "<=1.15", ratio <= 1.15)


def main(*parts: str) -> None:
    if parts and parts[0] == "peak":
        return peak(*parts[1:])
    try:
        import liger_kernel  # type: ignore  # noqa: F401
        import trl  # type: ignore  # noqa: F401
    except ImportError:
        print('skipped: needs the peers it measures against; pip install -e ".[peers]"')
        return None
    print(machine())
    bars = Bars()
    known = {"precision": precision, "sampled": sampled, "memory": memory, "speed": speed}
    sizes = [int(p) for p in parts if p.isdigit()] or [65_536, 151_936]
    if kinds := tuple(p for p in parts if p in KINDS):
        known["speed"] = partial(speed, kinds=kinds)
    for part in [p for p in parts if not p.isdigit() and p not in KINDS] or known:
        known[part](bars, sizes)
    return bars.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
