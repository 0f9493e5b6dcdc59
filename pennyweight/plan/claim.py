"""A published claim, checked: do its sums add up, can the hardware have done it, and what does it leave out?

Three kinds of finding: ``holds``, ``fails`` (exit 1 on the command line) and ``note``, what should be known beside it.
Where nothing holds and nothing fails, nothing was checked, and ``adds_up`` is None: neither yes nor no.
A figure is taken as rounded to its last digit that is not 0, so that 512 devices for 198 hours hold "101 K". A share of
the peak is never given alone: it comes with the precision of that peak and with the convention that attention is
counted by.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pennyweight.errors import RecipeError
from pennyweight.plan.architectures import shapes_of
from pennyweight.plan.claim_file import SCOPE, Claim, Part
from pennyweight.plan.flops import CONVENTIONS, Training, forward, multiplied, training
from pennyweight.plan.forecast import CONVENTION, Published, Run, forecast
from pennyweight.plan.hardware import Catalogue, Chip
from pennyweight.plan.models import model
from pennyweight.plan.shapes import Shapes

HIGHEST = 0.75
"""Of the bfloat16 peak: the highest share that was published, Llama 3 70B with fp8 on 64 H100 (Megatron-Bridge
26.02.01: 736 TFLOP/s). More is possible, and wants a reason."""

_MOST_ROUNDED = 0.02
_SUMMED = (("device_hours", "used", False), ("money", "cost", True), ("mwh", "mwh", False))  # said; made of; money
_NAMES = {"none": "no attention", "half": "causal attention", "full": "full attention", "exact": "exact attention"}


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check gave. ``of``: the part, or "total"; ``verdict``: holds, fails or note."""

    of: str
    check: str
    verdict: str
    text: str

    def to_json(self) -> dict[str, str]:
        return {"of": self.of, "check": self.check, "verdict": self.verdict, "text": self.text}


def check(claim: Claim, known: Catalogue, rows: Sequence[Published]) -> dict[str, Any]:
    """All findings about a claim, with the FLOPs of its parts and their shares of the peak under each convention.

    Args:
        known: chips.
        rows: published runs, from which the hours of a training are forecast; the claim's own are left out.

    Raises:
        RecipeError: it names a chip or a model that is not known.
    """
    findings: list[Finding] = []
    parts = []
    for part in claim.parts:
        findings += _sums(part, claim.currency)
        shown = _compute(part, known, rows, findings)
        parts.append(shown)
    findings += _totals(claim) + _ratios(claim)
    failed = {f.of for f in findings if f.verdict == "fails"}
    checked = any(f.verdict != "note" for f in findings)
    excused = _excused(claim, failed)
    return {
        "name": claim.name,
        "statement": claim.statement,
        "currency": claim.currency,
        "money_is": claim.money_is,
        "parts": parts,
        "totals": dict(claim.totals),
        "findings": [f.to_json() for f in findings],
        "adds_up": not (failed - set(excused)) if checked else None,
        "excused": excused,
        "covers": list(claim.covers),
        "leaves_out": list(claim.leaves_out),
        "not_said": [w for w in SCOPE if w not in (*claim.covers, *claim.leaves_out)],
        "notes": list(claim.notes),
        "sources": sorted({s for s in (*(p.source for p in claim.parts), claim.totals.get("source")) if s}),
    }


def _slack(*figures: float) -> float:
    """By how much the figures may be off, all together, for being rounded: half of the last digit that is not 0, and
    2 % at the most (30,000 is not meant as 25,000)."""
    total = 0.0
    for figure in figures:
        if figure != int(figure) or figure < 1000:
            digits = repr(float(figure)).rstrip("0").partition(".")[2]
            total += min(0.5 * 10.0 ** -len(digits), _MOST_ROUNDED * figure)
            continue
        unit = 1
        while figure % (10 * unit) == 0:
            unit *= 10
        total += min(0.5 * unit, _MOST_ROUNDED * figure)
    return total


def _compared(of: str, name: str, said: float, found: float, slack: float, how: str, unit: str = "") -> Finding:
    """Whether a figure is what others make of it. Hours and money are whole numbers here."""
    good = abs(said - found) <= slack + 1e-9 * abs(said)
    if good:
        rounded = "" if round(said) == round(found) else f", which is said as {unit}{said:,.0f}"
        return Finding(of, name, "holds", f"{how} = {unit}{found:,.0f}{rounded}")
    return Finding(of, name, "fails", f"{how} = {unit}{found:,.0f}, and not {unit}{said:,.0f}: {_apart(said, found)}")


def _apart(said: float, found: float) -> str:
    return f"{100 * abs(found - said) / said:.0f} % {'more' if found > said else 'less'}"


def _sums(p: Part, currency: str) -> list[Finding]:
    """Within a part: devices x hours, hours x price, and a rate x tokens."""
    out = []
    if p.devices and p.hours and p.device_hours:
        slack = p.devices * _slack(p.hours) + _slack(p.device_hours)
        how = f"{p.devices:,} devices x {p.hours:,g} hours"
        out.append(_compared(p.title, "devices x hours", p.device_hours, p.devices * p.hours, slack, how))
    hours = p.used
    if hours and p.price and p.money:
        slack = _slack(p.money) + p.price * _off(p, "device_hours")
        how = f"{hours:,.0f} device-hours x {currency} {p.price:,.2f}"
        out.append(_compared(p.title, "hours x price", p.money, hours * p.price, slack, how, f"{currency} "))
    said = p.device_hours or (p.devices or 0) * (p.hours or 0)
    if p.hours_per_trillion and p.tokens and said:
        found = p.hours_per_trillion * p.tokens / 1e12
        slack = _off(p, "device_hours") + _slack(p.hours_per_trillion) * p.tokens / 1e12
        how = f"{p.hours_per_trillion:,.0f} hours a trillion tokens x {p.tokens / 1e12:g}"
        out.append(_compared(p.title, "rate x tokens", said, found, slack, how))
        if p.device_hours and round(found) == round(p.device_hours):
            said = "exact: the hours are a rate times tokens, no meter's, so without restarts, idle time or evaluation"
            out.append(Finding(p.title, "rate x tokens", "note", said))
    return out


def _off(p: Part, name: str) -> float:
    """By how much a part's figure may be off for being rounded: its own, or those that it is made of."""
    if figure := getattr(p, name):
        return _slack(figure)
    if name == "money":
        return (p.price or 0.0) * _off(p, "device_hours")
    if p.devices and p.hours:
        return p.devices * _slack(p.hours)
    return _slack(p.hours_per_trillion) * p.tokens / 1e12 if p.hours_per_trillion and p.tokens else 0.0


def _once(parts: Iterable[Part]) -> list[Part]:
    """Parts, of several readings the first."""
    return list({p.name: p for p in reversed(list(parts))}.values())[::-1]


def _totals(claim: Claim) -> list[Finding]:
    """Each total beside what the parts come to. Of parts that do not all say it, as many as do must not be above it."""
    out, parts = [], _once(claim.parts)
    for name, made, unit in _SUMMED:
        said, known = claim.totals.get(name), [p for p in parts if getattr(p, made)]
        if not said or not known:
            continue
        found, slack = [getattr(p, made) for p in known], _slack(said) + sum(_off(p, name) for p in known)
        if len(known) < len(parts) and sum(found) <= said + slack:
            continue
        how = " + ".join(f"{f:,.0f}" for f in found)
        shown = f"{claim.currency} " if unit else ""
        out.append(_compared("total", name.replace("_", "-"), said, sum(found), slack, how, shown))
    return out


def _excused(claim: Claim, failed: set[str]) -> list[str]:
    """Readings that fail where another reading of the same figure does not."""
    stands = {p.name for p in claim.parts if p.reading and p.title not in failed}
    return [p.title for p in claim.parts if p.reading and p.title in failed and p.name in stands]


def _ratios(claim: Claim) -> list[Finding]:
    out, hours = [], {p.name: p.used for p in claim.parts}
    for row in claim.ratios:
        of, to, says = hours[row["of"]], hours[row["to"]], row["says"]
        if not of or not to:
            continue
        good = abs(of / to - says) <= _slack(says) + 0.02 * says
        text = f"{of:,.0f} / {to:,.0f} device-hours = {of / to:,.2f}"
        text += "" if good else f", and not {says:g}"
        out.append(Finding(f"{row['of']} / {row['to']}", "ratio", "holds" if good else "fails", text))
    return out


def _shapes(part: Part) -> Shapes | None:
    if part.model:
        return model(part.model)
    return shapes_of(part.config, f"config of {part.title}") if part.config else None


def _compute(part: Part, known: Catalogue, rows: Sequence[Published], findings: list[Finding]) -> dict[str, Any]:
    """FLOPs of a part and its shares of the peak; adds what they say to the findings."""
    shapes, hours = _shapes(part), part.used
    chip = known.chip(part.chip) if part.chip else None
    out: dict[str, Any] = {
        "name": part.title,
        "device_hours": hours,
        "money": part.cost,
        "source": part.source,
    }
    out |= {"tokens": part.tokens, "chip": chip.name if chip else None, "flops": {}, "shares": {}}
    if part.kind == "other" or not part.tokens or (shapes is None and part.active is None):
        return out
    if shapes is not None and not part.length:
        raise RecipeError(f"{part.title} has no length, the tokens in a row, by which attention is counted; add it")
    flops = _flops(part, shapes)
    out |= {"active": multiplied(shapes, part.mtp) if shapes else part.active, "flops": flops}
    if chip is None or not hours:
        return out
    peaks = {kind: 1e12 * chip[kind] for kind in dict.fromkeys(("bf16", part.precision)) if kind in chip.figures}
    used = 3600 * hours
    out["shares"] = {kind: {c: f / (used * peak) for c, f in flops.items()} for kind, peak in peaks.items()}
    findings += _possible(part, chip, flops, hours)
    findings += _said_share(part, out["shares"])
    if part.kind == "training":
        findings += _expected(part, chip, flops, hours, shapes, rows)
    if part.mwh:
        findings.append(_power(part, chip, hours))
    return out


def _flops(part: Part, shapes: Shapes | None) -> dict[str, float]:
    """Of all tokens, by convention; 6 N D alone where only parameters are known."""
    tokens = part.tokens or 0.0
    if shapes is None:
        return {"none": (6 if part.kind == "training" else 2) * (part.active or 0) * tokens}
    length = part.length or 1
    if part.kind == "forward":
        return {c: tokens * forward(shapes, length, c, part.mtp).total for c in CONVENTIONS}
    return {c: tokens * training(shapes, length, Training(mtp=part.mtp), c).total for c in CONVENTIONS}


def _possible(part: Part, chip: Chip, flops: dict[str, float], hours: float) -> list[Finding]:
    """Can that many device-hours hold that many FLOPs?"""
    least, used = min(flops.values()), 3600 * hours
    peak, kind = chip.peak(part.precision)
    share = least / (used * peak)
    if share > 1:
        needed = least / peak / 3600
        text = f"{100 * share:.0f} % of the {kind} peak, without attention: {needed:,.0f} device-hours at the least"
        trillions = (part.tokens or 0) / 1e12
        if trillions > 1 and 0.05 < share / trillions < HIGHEST and part.kind == "training":
            text += f"; as hours a trillion tokens it would be {100 * share / trillions:.1f} %, which runs do reach"
        elif part.kind == "forward":
            text += f"; at 50 % they label {0.5 * used * peak / least * trillions:.2f} T of {trillions:g} T tokens"
        return [Finding(part.title, "within the peak", "fails", text)]
    causal = flops.get(CONVENTION, least) / (used * 1e12 * chip["bf16"])
    said = f"{100 * causal:.1f} % of the bf16 peak, {'causal' if CONVENTION in flops else 'no'} attention"
    if causal > HIGHEST:
        return [Finding(part.title, "within the peak", "note", f"{said}: more than any published run reached")]
    return [Finding(part.title, "within the peak", "holds", said)]


def _said_share(part: Part, shares: dict[str, dict[str, float]]) -> list[Finding]:
    if part.share is None:
        return []
    near = [(abs(f - part.share), kind, c, f) for kind, row in shares.items() for c, f in row.items()]
    off, kind, convention, found = min(near)
    text = (
        f"{100 * part.share:g} % is said; nearest is {100 * found:.1f} %, of the {kind} peak with {_NAMES[convention]}"
    )
    return [Finding(part.title, "share of the peak", "holds" if off <= 0.01 else "fails", text)]


def _expected(
    part: Part, chip: Chip, flops: dict[str, float], hours: float, shapes: Shapes | None, rows: Sequence[Published]
) -> list[Finding]:
    """The hours beside a forecast from other runs."""
    others = [r for r in rows if (r.hours, r.run.tokens) != (hours, part.tokens)]
    own = [r for r in rows if r not in others]
    run = Run(
        name=part.title,
        flops=flops.get(CONVENTION, flops["none"]),
        tokens=part.tokens or 0.0,
        chip=chip,
        devices=part.devices or next((r.run.devices for r in own), None),
        precision=part.precision,
        experts=any(b.experts for b in shapes.blocks) if shapes else (part.parameters or 0) > 1.2 * (part.active or 0),
        distilled=any(r.run.distilled for r in own),
        vocabulary=shapes.vocabulary if shapes else 0,
    )
    expected = forecast(run, others)
    inside = expected.low <= hours <= expected.high
    low, high = (float(f"{end:.2g}") for end in (expected.low, expected.high))
    where = "within" if inside else "fewer than" if hours < expected.low else "more than"
    text = f"{hours:,.0f} device-hours, {where} the {low:,.0f}–{high:,.0f} that other runs let expect"
    return [Finding(part.title, "forecast", "holds" if inside else "note", text)]


def _power(part: Part, chip: Chip, hours: float) -> Finding:
    watts = 1e6 * (part.mwh or 0) / hours
    share = watts / chip["power"]
    text = f"{watts:,.0f} W a device on average, {100 * share:.0f} % of its limit of {chip['power']:,.0f} W"
    if share > 2:
        return Finding(part.title, "energy", "fails", f"{text}: more than device, node and building take together")
    return Finding(part.title, "energy", "note" if share > 1 else "holds", text)
