"""How long passes take: seconds = overhead of each layer + FLOPs over a rate + bytes of activations over a bandwidth.

Small models are bound by neither peak nor bandwidth: each layer of each step has its own time in which operations are
started, and what a step keeps for its backward pass is written and read many times. The constants were fitted to
sixteen steps of training of one thread of an AMD EPYC (``SHIPPED``), 2 to 6 layers of width 32 to 256, rows of 24 to
512 tokens, vocabularies of 64 to 32,000, in float32 and under bfloat16 (``python -m benchmarks.pace``): the fit is
within 20 % of each of them. A machine that was measured (``--on this``) has the same constants by what it was measured
at. On chips of the catalogue each pass takes what published runs of its kind let expect (``plan/forecast.py``), and
what a layer takes besides is assumed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pennyweight.plan.flops import Training, forward, generation, training
from pennyweight.plan.hardware import Chip, Figure
from pennyweight.plan.passes import Ends, Pass, Work
from pennyweight.plan.sizes import WAYS, Way, activation_bytes, loss_bytes

SHIPPED = Chip(
    "this",
    "a thread of an AMD EPYC",
    {
        name: Figure(value, "measured on a virtual machine with two cores of an AMD EPYC", "2026-11-26")
        for name, value in (("fp32", 0.0884), ("bf16", 0.196), ("bandwidth", 20.7), ("operation", 2.68))
    },
)
"""What one thread of the machine gives that the constants are fitted on; ``operation``: microseconds of a small one."""

_LAYER = 3.0e-3  # seconds of a layer's operations in a step of training, forward and backward
_LINEAR, _ATTENTION = 0.54, 4.5  # times what products of large matrices take
_BYTES = 23.7  # times what is kept is copied
_PARAMETER = 95.0  # bytes copied for each, of gradients, clipping and the optimizer
_WRITING = 1.0e-3  # seconds of a layer's operations for a token of all rows that are written at once
OPENING = 0.1  # seconds: a model is opened, or saved
DRAWING = 1.2  # seconds until a process begins to draw problems
_ROW, _TOKEN = 2e-4, 5e-6  # seconds of a row that is drawn or read, and of each of its tokens
_MORE_THREADS = 0.85  # of each thread after the first
_GPU_LAYER, _GPU_WRITING = 1.0e-3, 0.3e-3  # seconds, assumed: about 100 kernels of 10 microseconds, 30 of them

Rate = Callable[[Pass, float, float], float]
"""A pass, its FLOPs, padding's among them, and its tokens -> seconds of a device"""

GROWS = {"before": 70e6, "training": 25e6}
"""Bytes that a run's process has come to beyond its trial, which does less of everything: middles of six recipes on a
processor (``python -m benchmarks.forecast runs``), which took 0 to 118 MB more; and what is left of it once training
has taken its first steps. A GPU's tensors take what they took."""

SPREAD = {"measured": (0.75, 1.35), "shipped": (0.6, 2.0)}
"""Ends of a time on this machine, as times the middle: what is left when rows are as long as they are taken to be."""


@dataclass(frozen=True, slots=True)
class Pace:
    """A device, and how fast it is taken to be. ``spread``: ends of a time by its middle; ``reason`` says so.
    ``factors``: how many times what the formulas have was taken when it was tried, by what was done
    (``train kd``, ``targets``, ``score``, ``write student``, ``data``, ``prepare``, ``draw``; of a teacher ``train
    teacher``, ``score teacher``, ``write teacher``, ``prepare teacher``); ``peaks``: the most bytes that
    each of these took; ``watts``: of the whole trial, where a counter told."""

    chip: Chip
    devices: int
    threads: int
    autocast: bool
    spread: tuple[float, float]
    reason: str
    rate: Rate | None = None  # of chips of the catalogue
    factors: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    watts: float | None = None

    @property
    def peak(self) -> float | None:
        """The most bytes that a trial took; None where none was made."""
        return max(self.peaks.values(), default=None)

    def grown(self, size: float, when: str) -> float:
        """A trial's bytes as a run comes to them; ``when`` is of ``GROWS``."""
        return size + GROWS[when] if self.on_cpu else size

    @property
    def on_cpu(self) -> bool:
        return self.threads > 0

    @property
    def peak_rate(self) -> float:
        """FLOP/s of all devices: what a product of large matrices was measured at here, or the maker's figure."""
        if self.on_cpu:
            return 1e12 * self.chip["bf16" if self.autocast else "fp32"] * (1 + _MORE_THREADS * (self.threads - 1))
        return 1e12 * self.devices * self.chip["bf16"]

    def seconds(self, p: Pass, end: int) -> float:
        """Of a pass, with rows as long as that end has them."""
        return self._own(p, end) if self.on_cpu else self._peak(p, end)

    def _own(self, p: Pass, end: int) -> float:
        """On a processor."""
        part = 1.0 if p.kind == "train" else 1 / 3
        tokens, layers = p.padded * p.tokens(end), len(p.shapes.blocks)
        length = max(1, round(p.padded * (p.length[end] + p.new[end])))
        rows = max(1, round(p.rows))
        product = 1e12 * self.chip["bf16" if self.autocast and p.kind == "train" else "fp32"]
        plain = 1e12 * self.chip["fp32"]
        flops, attention = p.padded * flops_of(p, end), _attention(p, length) * tokens
        way = _way(self.autocast and p.kind == "train")
        kept = activation_bytes(p.shapes, way, rows, length, "cpu")
        kept += loss_bytes(p.shapes, way, max(1, round(p.learnt * rows * length)), "cpu") * (p.learnt > 0)
        steps, copy = p.steps[end], 1e9 * self.chip["bandwidth"]
        work = _LINEAR * max(0.0, flops - attention) / product + _ATTENTION * attention / plain
        work += steps * part * _BYTES * kept / copy
        work += steps * _PARAMETER * p.shapes.parameters / copy if p.kind == "train" else 0.0
        operation = self.chip["operation"] / SHIPPED["operation"]
        layer = _WRITING * p.new[end] if p.kind == "write" else part * _LAYER
        return work / (1 + _MORE_THREADS * (self.threads - 1)) + steps * p.turns() * layers * layer * operation

    def _peak(self, p: Pass, end: int) -> float:
        """On devices of the catalogue, all together: what is cut over them, and what none of them goes without."""
        layers, steps = len(p.shapes.blocks), p.steps[end]
        assert self.rate is not None
        busy = self.rate(p, p.padded * flops_of(p, end), p.tokens(end)) / self.devices
        if p.kind == "write":
            once = max(layers * _GPU_WRITING, 2 * p.shapes.parameters / (1e9 * self.chip["bandwidth"]))
            return busy + steps * p.new[end] * once / self.devices
        return busy + steps * p.turns(self.devices) * layers * _GPU_LAYER * (1 if p.kind == "train" else 1 / 3)

    def factor(self, stage: str, p: Pass) -> float:
        """Of a stage's pass; where just this was not tried, that of what is nearest to it."""
        arm = stage.rpartition("-")[0] or stage
        wanted = {
            "train": [f"train {arm}", *(k for k in reversed(self.factors) if k.startswith("train "))],
            "forward": [
                *([f"train {arm}"] if arm == "kd" else []),  # beside its steps, and timed with them
                {"targets": stage, "evaluate teacher": "score teacher"}.get(stage, "score"),
                "score",
                "targets",
            ],
            "write": ["data" if stage == "data" else f"write {p.who}", f"write {p.who}", "write student"],
        }[p.kind]
        return next((self.factors[k] for k in wanted if k in self.factors), 1.0)

    def preparing(self, rows: float, tokens: float) -> float:
        """Seconds in which so many rows of so many tokens are drawn or read, judged, divided and encoded."""
        operation = self.chip["operation"] / SHIPPED["operation"] if self.on_cpu else 1.0
        return rows * (_ROW + _TOKEN * tokens) * operation

    def ends(self, work: Work) -> Ends:
        """Hours by the clock of a stage: low, middle, high. A server takes its own, which nobody here knows."""
        prepares = self.factors.get("prepare", 1.0)
        if work.stage == "teacher":
            prepares = self.factors.get("prepare teacher", prepares)
        besides = OPENING * work.opens + self.factors.get("draw", 1.0) * DRAWING * work.tasks
        if "data" not in self.factors or work.stage != "data":  # else timed with what was written
            besides += prepares * self.preparing(*work.prepared)
        low, middle, high = (
            besides + sum(self.factor(work.stage, p) * self.seconds(p, end) for p in work.passes) for end in (0, 1, 2)
        )
        return self.spread[0] * low / 3600, middle / 3600, self.spread[1] * high / 3600


def on_this(measured: Chip | None, threads: int, autocast: bool) -> Pace:
    """This machine, by what its products were measured at with all its threads, or as ``SHIPPED`` has one of them."""
    low, high = SPREAD["measured" if measured else "shipped"]
    ends = f"{low:g} to {high:g} times that, others' work on it included"
    if measured is None:
        said = f"as threads of an AMD EPYC are, which --on this measures of yours; {ends}"
        return Pace(SHIPPED, 1, threads, autocast, (low, high), said)
    said, more = f"as this machine was measured; {ends}", 1 + _MORE_THREADS * (usable_threads() - 1)
    each = {
        k: Figure(f.value / (more if k in ("fp32", "bf16") else 1), f.source, f.date)
        for k, f in measured.figures.items()
    }
    return Pace(Chip("this", measured.name, each), 1, threads, autocast, (low, high), said)


def usable_threads() -> int:
    """Cores that this process may use."""
    return (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) or 1


def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 (Linux), as training looks at before it takes it."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_tile" in flags


def on_chips(chip: Chip, devices: int, rate: Rate, autocast: bool, spread: tuple[float, float], reason: str) -> Pace:
    """Devices of the catalogue, at the ``rate`` that published runs let expect, for that ``reason``; and how far those
    were off."""
    reason += ", and 1 ms for each layer of a forward and backward pass besides (assumed)"
    reason += f"; published runs took {spread[0]:.2f} to {spread[1]:.2f} times their forecast"
    return Pace(chip, devices, 0, autocast, spread, reason, rate)


def flops_of(p: Pass, end: int) -> float:
    """Of a pass's tokens, without padding, attention as it is."""
    length, rows = max(1, round(p.length[end])), p.steps[end] * p.rows
    if p.kind == "write":
        return rows * generation(p.shapes, length, max(1, round(p.new[end]))).total
    if p.kind == "forward":
        return rows * length * forward(p.shapes, length, learnt=p.learnt).total
    return rows * length * training(p.shapes, length, Training(p.rank, p.recompute, learnt=p.learnt)).total


def _attention(p: Pass, length: int) -> float:
    """FLOPs of a token's scores and sums, forward or in training."""
    times = 3 if p.kind == "train" else 1
    each = sum(2 * b.attention.heads * (b.attention.key + b.attention.value) for b in p.shapes.blocks)
    return times * each * (length + 1) / 2


def _way(autocast: bool) -> Way:
    return WAYS[1] if autocast else WAYS[0]
