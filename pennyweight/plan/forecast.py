"""Before a run: hours, energy and money, each as a range with its reason. Arithmetic, no torch.

FLOPs are exact (``plan/flops.py``); what share of its peak a chip reaches is not known before a run, and published runs
tell how far it may be off. They fall into classes that are known before a run, too:

    few           up to 16 devices: little time goes to other devices, or to their failures
    dense         many devices, chips of up to 200 FLOP of peak for a byte of memory bandwidth (A100: 153)
    dense, new    the same on chips above that (H100: 295), which wait for memory and network more
    experts       mixtures of experts, whose tokens travel between devices
    measured      a machine whose own products were timed first (``--on this``), so that its peak is what it really
    gives distillation  a small student that learns a teacher's distribution: besides its FLOPs each token takes a time
                  of its own, which is fitted; that it goes with the vocabulary over the bandwidth is assumed, not
                  measured

Of a class the median share counts, since two of the eight runs of "dense, new" are off by half. Runs with Linears in
fp8 are taken to be faster by ``FP8_GAIN``. Hours of published runs hold what went into restarts and evaluation, as a
rule, so a range does as well.

Ends of a range are those of a conformal interval (Vovk et al.; jackknife+, arXiv 1905.02928) of 90 %: each published
run is forecast from all others, and the ends are the ratios of actual to forecast hours that lie at both ends of these.
It is called a range of 80 %, since the classes were drawn with the same runs in view. ``held_out`` tells what it is
worth, one run or a whole family of runs left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from pennyweight.plan.hardware import Chip, PriceRange

CONVENTION = "half"
"""How attention is counted where shares of a peak are compared (``plan/flops.py``)."""

FP8_GAIN = {"dense": 8532 / 6667, "experts": 4357 / 3848}
"""How much faster a run with Linears in fp8 is than one in bfloat16. Dense: torchtitan on 8 H100, Llama 3.1 8B,
compiled (benchmarks/llama3_h100_202412_torchtitan.md). With experts: Megatron-Bridge 25.11 on GB300, DeepSeek-V3."""


COVERS = 0.8
"""Share of runs that a range is meant to cover."""

_ENDS = 0.9  # of the conformal interval that is called COVERS
FEW, INTENSE = 16, 200.0  # devices; FLOP for a byte
_VOCABULARY, _BANDWIDTH = 128_256, 3350.0  # what a distilled token's own time is fitted at

CLASSES = {
    "few": f"up to {FEW} devices",
    "dense": f"dense, many devices, up to {INTENSE:.0f} FLOP a byte",
    "dense, new": f"dense, many devices, over {INTENSE:.0f} FLOP a byte",
    "experts": "a mixture of experts",
    "measured": "a machine that was measured first",
    "distillation": "a small student of a teacher's distribution",
}
_INSTEAD = {"few": "dense, new", "dense": "dense, new", "experts": "dense, new", "dense, new": "dense"}

MEASURED = 0.83
"""Share of a measured matrix product's speed that training reaches: four models on two cores of an AMD EPYC, float32,
whose step times this met within 8 %."""

POWER = (0.75, 0.91, 1.0)
"""Share of the chip's power limit: Olmo 3 had 89 and 93 % on average, BLOOM's energy is that of 100 %; below, a
guess."""

AROUND = "devices only: node and building take 0.1 to 0.74 times that besides"
"""What a datacentre takes for each kWh of a device: up to 1.74 in all (Olmo 3, arXiv 2605.01158). No counter of a
device sees it, so that forecasts leave it out as well as meters."""


@dataclass(frozen=True, slots=True)
class Run:
    """A training, whether it has been or is to be.

    Attributes:
        flops: of all tokens, causal attention counted by ``CONVENTION``; 6 N D where only parameters are known.
        devices: how many train together; None: not said, and taken to be many.
        experts: whether it is a mixture.
        distilled: whether a small student learns a teacher's distribution.
    """

    name: str
    flops: float
    tokens: float
    chip: Chip
    devices: int | None = None
    precision: str = "bf16"
    experts: bool = False
    distilled: bool = False
    vocabulary: int = 0


@dataclass(frozen=True, slots=True)
class Published:
    """A run that was published with its device-hours. ``table``: one of the 17 that forecasts are held to."""

    run: Run
    family: str
    hours: float
    table: bool
    source: str

    @property
    def share(self) -> float:
        """Of the chip's dense bfloat16 peak."""
        return self.run.flops / (3600 * self.hours * 1e12 * self.run.chip["bf16"])


@dataclass(frozen=True, slots=True)
class Range:
    """Three numbers and why."""

    low: float
    middle: float
    high: float
    reason: str

    def times(self, factor: float, reason: str) -> Range:
        """All three scaled."""
        return Range(self.low * factor, self.middle * factor, self.high * factor, reason)


@dataclass(frozen=True, slots=True)
class Fit:
    """What published runs say. ``shares``: of the bfloat16 peak, by class; ``own``: seconds of a distilled token
    besides its FLOPs, at a vocabulary of 128,256 and 3,350 GB/s; ``runs``: how many each class has."""

    shares: dict[str, float]
    own: float | None
    runs: dict[str, int]

    def hours(self, run: Run) -> float:
        """Device-hours, in the middle."""
        kind = basis_of(run)
        seconds = run.flops / (_speed(run) * self.shares[kind])
        if run.distilled and self.own is not None:
            seconds += run.tokens * self.own * _scale(run)
        return seconds / 3600


@dataclass(frozen=True, slots=True)
class Checked:
    """A published run, and what would have been said of it before it was known."""

    row: Published
    hours: Range

    @property
    def error(self) -> float:
        """Of the middle, as a share of the actual hours."""
        return self.hours.middle / self.row.hours - 1

    @property
    def inside(self) -> bool:
        return self.hours.low <= self.row.hours <= self.hours.high


def class_of(run: Run) -> str:
    """A key of ``CLASSES``."""
    if run.chip.key == "this":
        return "measured"
    if run.distilled:
        return "distillation"
    if run.experts:
        return "experts"
    if run.devices is not None and run.devices <= FEW:
        return "few"
    return "dense" if intensity(run.chip) <= INTENSE else "dense, new"


def basis_of(run: Run) -> str:
    """The class whose share it is taken to reach: a small student's is that of a dense run of many devices."""
    return "dense, new" if class_of(run) == "distillation" else class_of(run)


def intensity(chip: Chip) -> float:
    """FLOP of the bfloat16 peak for a byte of memory bandwidth."""
    return 1000 * chip["bf16"] / chip["bandwidth"]


def gain_of(run: Run) -> float:
    """How much faster than in bfloat16 it is taken to be."""
    if run.precision not in ("fp8", "fp4") or run.chip.peak(run.precision)[1] == "bf16":
        return 1.0
    return FP8_GAIN["experts" if run.experts else "dense"]


def fit(rows: Sequence[Published]) -> Fit:
    """Shares of each class, from some published runs; a class that has none takes those of its nearest."""
    of: dict[str, list[float]] = {kind: [] for kind in CLASSES}
    for row in rows:
        of[class_of(row.run)].append(row.share / gain_of(row.run))
    every = median(share for kind, found in of.items() if kind != "distillation" for share in found)
    shares = {kind: median(found) for kind, found in of.items() if found and kind != "distillation"}
    shares["measured"] = MEASURED
    for kind, other in _INSTEAD.items():
        shares.setdefault(kind, shares.get(other, every))
    plain = Fit(shares, None, {})
    left = [
        3600 * (row.hours - plain.hours(row.run)) / row.run.tokens / _scale(row.run)
        for row in rows
        if row.run.distilled
    ]
    own = max(0.0, median(left)) if left else None
    return Fit(shares, own, {kind: len(found) for kind, found in of.items()})


def ratios(rows: Sequence[Published]) -> list[float]:
    """Actual over forecast hours of each run, forecast from all others; in order."""
    return sorted(row.hours / fit([r for r in rows if r is not row]).hours(row.run) for row in rows)


def ends_of(rows: Sequence[Published]) -> tuple[float, float]:
    """Ends of a forecast from these runs, as times its middle."""
    spread = ratios(rows)
    skip = max(1, math.floor((1 - _ENDS) / 2 * (len(spread) + 1))) - 1
    return spread[skip], spread[-1 - skip]


def said_of(run: Run, found: Fit) -> str:
    """What runs of each kind are taken to reach on such devices, in words."""
    shares = {kind: found.shares[class_of(replace(run, experts=kind == "experts"))] for kind in ("dense", "experts")}
    text = f"{shares['dense']:.0%} of the {run.chip.name}'s bfloat16 peak"
    if gain_of(run) > 1:
        text += f", {gain_of(run):.2f} times as fast in {run.precision}"
    text += f" ({shares['experts']:.0%} of it a mixture of experts)"
    if found.own is None or run.chip.key == "this":
        return text
    taught, own = found.shares[basis_of(replace(run, distilled=True))], 1e6 * found.own * _scale(run)
    text += f"; of a student that learns a distribution {taught:.0%}"
    return f"{text}, and {own:.0f} microseconds a token for a vocabulary of {_VOCABULARY:,}"


def forecast(run: Run, rows: Sequence[Published]) -> Range:
    """Device-hours of a run, from published ones, with the reason in words."""
    found, (low, high) = fit(rows), ends_of(rows)
    middle, kind = found.hours(run), class_of(run)
    return Range(middle * low, middle, middle * high, _reason(run, kind, found, (low, high)))


def held_out(
    rows: Sequence[Published], group: Callable[[Published], Hashable] = lambda row: row.run.name
) -> list[Checked]:
    """The runs of the table, each forecast from runs of other groups only."""
    return [Checked(row, forecast(row.run, [r for r in rows if group(r) != group(row)])) for row in rows if row.table]


def energy(hours: Range, chip: Chip) -> Range:
    """kWh of the devices themselves, as their counters see them."""
    low, middle, high = (chip["power"] / 1000 * p for p in POWER)
    ends = [
        _apart(*pair) for pair in ((hours.middle / hours.low, middle / low), (hours.high / hours.middle, high / middle))
    ]
    most = hours.middle * middle
    return Range(
        most / ends[0],
        most,
        most * ends[1],
        f"{100 * POWER[0]:.0f}, {100 * POWER[1]:.0f} or {100 * POWER[2]:.0f} % of {chip['power']:,.0f} W; {AROUND}",
    )


def money(hours: Range, price: PriceRange) -> Range:
    """What the hours cost at such prices, of which both may be off; what is free costs nothing."""
    if not price.low:
        return Range(
            0.0, hours.middle * price.middle, hours.high * price.high, f"{price.reason} for a device and an hour"
        )
    middle = hours.middle * price.middle
    low = _apart(hours.middle / hours.low, price.middle / price.low)
    high = _apart(hours.high / hours.middle, price.high / price.middle)
    return Range(middle / low, middle, middle * high, f"{price.reason} for a device and an hour")


def _apart(a: float, b: float) -> float:
    """Two ratios that have nothing to do with each other, together."""
    return math.exp(math.hypot(math.log(a), math.log(b)))


def _speed(run: Run) -> float:
    """FLOP/s that a share is of, fp8's gain in it."""
    if run.chip.key == "this" or run.precision == "fp32":
        return run.chip.peak(run.precision)[0]
    return 1e12 * run.chip["bf16"] * gain_of(run)


def _scale(run: Run) -> float:
    return (run.vocabulary or _VOCABULARY) / _VOCABULARY * _BANDWIDTH / run.chip["bandwidth"]


def _reason(run: Run, kind: str, found: Fit, ends: tuple[float, float]) -> str:
    if kind == "measured":
        return f"{100 * MEASURED:.0f} % of what its matrix products were measured at; ends as published runs have them"
    count = found.runs[kind]
    what = f"{100 * found.shares[basis_of(run)]:.0f} % of the {run.chip.name}'s bfloat16 peak"
    if gain_of(run) > 1:
        what += f", {gain_of(run):.2f} times as fast in {run.precision}"
    if kind == "distillation" and found.own is not None:
        what += f", and {1e6 * found.own * _scale(run):.0f} microseconds a token besides"
    of = (
        f"{count} published run{'s' * (count != 1)} of its kind ({CLASSES[kind]})"
        if count
        else (f"no published run of its kind ({CLASSES[kind]}), so from its nearest")
    )
    return f"{what}: the middle of {of}; published runs took {ends[0]:.2f} to {ends[1]:.2f} times their forecast"
