"""What ``pennyweight plan`` found, on the terminal: a claim that was checked, an outlook, and what the catalogue has.

Money comes with its currency, thousands with separators, ranges with a dash; nothing is wider than the terminal.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.cells import cell_len

from pennyweight.plan.claim_file import MONEY, SCOPE
from pennyweight.report.graded import aligned, paragraph
from pennyweight.report.language import ENGLISH, Language
from pennyweight.report.serving import serving_lines
from pennyweight.report.wording import MISSING, count, parameters, plural, size

_CONVENTIONS = {"none": "none", "half": "causal", "full": "full", "exact": "exact"}
_CONVENTIONS_SAID = (
    "none: 6 N D (forward only: 2 N D); causal: half of a row's tokens, as in FLOPs above; full: all of them"
)
_MARKS = {"holds": "holds", "fails": "FAILS", "note": "note"}
_WORDS = {True: "adds up", False: "DOES NOT ADD UP", None: "cannot be checked"}
_PARTS = {"blocks": "blocks", "head": "output head", "attention": "attention", "predictions": "multi-token prediction"}


def print_claim(found: Mapping[str, Any], spoken: Language = ENGLISH) -> None:
    """A claim's parts, its shares of the peak, every check, and what its scope leaves out."""
    _say(f"{found['name']}: {found['statement']}")
    print()
    print(*aligned(_parts(found, spoken)), sep="\n")
    if any(p["shares"] for p in found["parts"]):
        chips = {p["chip"] for p in found["parts"] if p["shares"]}
        whose = f"the {chips.pop()}'s" if len(chips) == 1 else "the chips'"
        _say(spoken(f"\nshare of {whose} peak that the hours imply, by how attention is counted"))
        print(*aligned(_shares(found["parts"], spoken)), sep="\n")
        _say(spoken(_CONVENTIONS_SAID))
    print(spoken("\nchecks"))
    marks = aligned([[spoken(mark), "|"] for mark in _MARKS.values()])
    for f in found["findings"]:
        of = spoken("total") if f["of"] == "total" else f["of"]
        mark = marks[list(_MARKS).index(f["verdict"])].rstrip("|")
        _say(f"{of}, {spoken(f['check'])}: {spoken(f['text'])}", f"  {mark}")
    if not found["findings"]:
        print(spoken("  none: no figure of it can be made of others"))
    print()
    _say(spoken(_verdict(found)))
    print()
    if found["money_is"]:
        _say(spoken(f"the money is {found['money_is']}: {MONEY[found['money_is']]}"))
    for title, words in (("covers", "covers"), ("leaves out", "leaves_out")):
        if found[words]:
            _say(f"{spoken(title)}: {'; '.join(spoken(SCOPE[w]) for w in found[words])}")
    _say(f"{spoken('does not say whether it covers')}: {', '.join(map(spoken, found['not_said']))}")
    for note in found["notes"]:
        _say(f"{spoken('note')}: {note}")
    lead = f"{spoken('sources')}: "
    for i, source in enumerate(found["sources"] or [spoken("none named")]):
        _say(source, lead if i == 0 else " " * cell_len(lead))


def print_claims(claims: Mapping[str, Mapping[str, Any]], spoken: Language = ENGLISH) -> None:
    """Names of shipped claims, what each says, and whether it adds up."""
    for name, found in claims.items():
        print(f"{name}: {spoken(_WORDS[found['adds_up']])}")
        _say(found["statement"], "  ")
    _say(spoken("\nOne of them in full: pennyweight plan --claim NAME; one of your own: --claim FILE.toml"))


def print_chips(chips: Sequence[Mapping[str, Any]], stale: bool, spoken: Language = ENGLISH) -> None:
    """The catalogue: peaks, memory, power, and the range of prices."""
    head = ("chip", "bf16", "fp8", "fp4", "GB", "GB/s", "W", "an hour")
    rows = [
        (c["key"], *(_plain(c.get(k)) for k in ("bf16", "fp8", "fp4", "memory", "bandwidth", "power")), _price(c))
        for c in chips
    ]
    print(*aligned([[*map(spoken, head)], *rows]), sep="\n")
    _say(spoken("\nbf16, fp8, fp4: dense TFLOP/s. GB and GB/s: memory and its bandwidth. W: the maker's limit."))
    _say(
        spoken(
            "an hour: cheapest and dearest dated price of one device; – where none is known. Sources and dates: --json"
        )
    )
    if stale:
        _say(spoken("Prices older than 90 days are marked *; give newer ones with --catalogue FILE.toml."))


def print_outlook(found: Mapping[str, Any], spoken: Language = ENGLISH) -> None:
    """Hours, energy and money of each part as ranges, with their reasons; what fits, and what is cheaper."""
    _say(spoken(_lead(found)))
    for note in found["assumed"]:
        _say(spoken(f"assumed: {note}"))
    names = {"device_hours": "device-hours", "hours": f"hours on {found['devices']:,}", "kwh": "kWh"}
    if found["currency"]:
        names["money"] = found["currency"]
    together = [found["total"] | {"part": "together"}] if len(found["parts"]) > 1 else []
    for p in [*found["parts"], *together]:
        print(f"\n{spoken(p['part'])}, {p['flops']:.3g} FLOPs")
        rows = [
            (spoken(label), *(_rounded(p[name][end], 3) for end in ("low", "middle", "high")))
            for name, label in names.items()
            if name in p
        ]
        print(*(f"  {line}" for line in aligned([("", *map(spoken, ("low", "middle", "high"))), *rows])), sep="\n")
    print()
    for p in found["parts"]:
        token = ", ".join(f"{_PARTS[k]} {_flops(v)}" for k, v in p["token"].items() if k in _PARTS)
        each = f"{_flops(p['token']['total'])} a token ({token}); attention is causal"
        _say(f"{spoken(p['part'])}: {spoken(each)}")
        _say(f"{spoken('device-hours')}: {spoken(p['device_hours']['reason'])}", "  ")
    for name in ("kwh", "money"):
        if name in p:
            _say(f"{names[name]}: {spoken(p[name]['reason'])}")
    _say(spoken(f"ranges: meant to hold {100 * found['covers']:.0f} % of runs; docs/bill.md has how often they did"))
    if not found["currency"]:
        _say(spoken("no price is known, so no money: give one with --price, or --catalogue FILE.toml"))
    if found["stale"]:
        _say(spoken("the newest price is more than 90 days old: give one with --price, or --catalogue FILE.toml"))
    _fits(found, spoken)
    if found.get("serving"):
        print("", *serving_lines(found["serving"], _span, spoken), "", sep="\n")
        _say(f"{spoken('serving')}: {spoken(found['serving']['reason'])}")
    if found["cheaper"]:
        each = [f"{c['chip']} {found['currency']} {_rounded(c['money']['middle'], 3)}" for c in found["cheaper"]]
        _say(spoken(f"cheapest of the catalogue on which it fits, {found['devices']:,} of them: {'; '.join(each)}"))


def _lead(found: Mapping[str, Any]) -> str:
    total, taught = found["total"], f" on what {found['teacher']} gives" if found["teacher"] else ""
    ends = total["hours"]
    what = f"{found['model']}, {parameters(found['parameters'])} parameters, trained{taught}"
    rows = f"{_tokens(found['tokens'])} tokens in rows of {found['length']:,}"
    text = f"{what} on {rows}, takes {_lasts(ends)} on {found['devices']:,} x {found['chip']}"
    if "money" in total:
        text += f" and costs {found['currency']} {_span(total['money'])}"
    return f"{text}. Counted as {found['class']}."


def _fits(found: Mapping[str, Any], spoken: Language) -> None:
    ways = found["memory"]
    if not ways:
        return
    good = next((w for w in ways if w["fits"]), None)
    first = f"{size(ways[0]['bytes'])} a device with {ways[0]['settings']}"
    if good is None:
        least = size(min(w["bytes"] for w in ways))
        said = (
            f"memory: a row does not fit, {least} a device at the least with weights cut over all of them; recompute "
            "activations, cut layers over devices as well, or take larger ones"
        )
    elif good is ways[0]:
        said = f"memory: fits, {first}, cut over all of them, a row at a time"
    else:
        said = f"memory: {first} does not fit; {good['settings']} does, with {size(good['bytes'])}, a row at a time"
    _say(spoken(said))


def _parts(found: Mapping[str, Any], spoken: Language) -> list[tuple[str, ...]]:
    """A table of parts: what is known of none is left out."""
    known = {
        "device_hours": ("device-hours", _plain),
        "money": (found["currency"], _plain),
        "tokens": ("tokens", _tokens),
        "flops": ("FLOPs", lambda v: f"{v:.2e}".replace("e+", "e")),
    }
    lines = [dict(p, flops=p["flops"].get("half", p["flops"].get("none"))) for p in found["parts"]]
    lines += [{"name": spoken("total"), **found["totals"]}] if found["totals"] else []
    shown = [k for k in known if any(line.get(k) for line in lines)]
    rows = [("", *(spoken(known[k][0]) for k in shown))]
    for line in lines:
        name = textwrap.shorten(line["name"], 40, placeholder="…")
        rows.append((name, *(known[k][1](line[k]) if line.get(k) else MISSING for k in shown)))
    return rows


def _shares(parts: Iterable[Mapping[str, Any]], spoken: Language) -> list[tuple[str, ...]]:
    rows = [("", *map(spoken, ("peak", *_CONVENTIONS.values())))]
    for part in parts:
        for kind, shares in part["shares"].items():
            cells = (f"{100 * shares[c]:.1f} %" if c in shares else MISSING for c in _CONVENTIONS)
            rows.append((textwrap.shorten(part["name"], 40, placeholder="…"), kind, *cells))
    return rows


def _verdict(found: Mapping[str, Any]) -> str:
    bad = [f for f in found["findings"] if f["verdict"] == "fails" and f["of"] not in found["excused"]]
    if bad:
        return f"It does not add up: {plural(len(bad), 'check fails', 'checks fail')}."
    if found["adds_up"] is None:
        return "It cannot be checked: give more of devices, hours, price, tokens and totals, or a model and a chip."
    if found["excused"]:
        return f"It adds up, but not so read: {'; '.join(found['excused'])}."
    return "It adds up."


def _say(text: str, before: str = "") -> None:
    """A paragraph in the terminal's width, 120 columns at most."""
    width = min(shutil.get_terminal_size().columns, 120)
    lead = "\n" if text.startswith("\n") else ""
    print(lead + paragraph(text.strip(), width, before, " " * max(2, cell_len(before))))


def _plain(value: float | None) -> str:
    """Three digits that mean something, with separators: 2,664,000, 31.4, 0.25."""
    if value is None:
        return MISSING
    return count(value) if value >= 100 or value == int(value) else f"{value:.3g}"


def _span(ends: Mapping[str, float]) -> str:
    return f"{_rounded(ends['low'])}–{_rounded(ends['high'])}"


def _lasts(hours: Mapping[str, float]) -> str:
    """A range of time in the unit that suits its middle."""
    units = (("days", 1 / 24, 100.0), ("hours", 1.0, 1.0), ("minutes", 60.0, 1 / 60))
    unit, one = next(((u, one) for u, one, least in units if hours["middle"] >= least), ("seconds", 3600.0))
    return f"{_span({end: one * hours[end] for end in ('low', 'high')})} {unit}"


def _rounded(value: float, digits: int = 2) -> str:
    """So many digits: more would say more than a forecast knows."""
    return _plain(float(f"{value:.{digits}g}"))


def _tokens(value: float) -> str:
    for letter, one in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if value >= one:
            return f"{value / one:g} {letter}"
    return count(value)


def _flops(value: float) -> str:
    for unit, one in (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)):
        if value >= one:
            return f"{value / one:.4g} {unit}"
    return f"{value:,.0f} FLOP"


def _price(chip: Mapping[str, Any]) -> str:
    price = chip.get("price")
    if price is None:
        return MISSING
    ends = f"{price['low']:.2f}" + (f"–{price['high']:.2f}" if price["high"] > price["low"] else "")
    return f"{price['currency']} {ends}{'*' if price['stale'] else ''}"
