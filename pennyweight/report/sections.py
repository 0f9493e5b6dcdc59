"""The middle parts of the report: size and speed, training, sample outputs, and what the run took."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pennyweight.report.charts import Mark, Panel, bars, curves
from pennyweight.report.markup import Html, element, figure, judged, pre, section, table
from pennyweight.report.view import Model, View
from pennyweight.report.wording import (
    MISSING,
    count,
    duration,
    finite,
    number,
    part_of,
    share_of,
    size,
    size_unit,
)


def size_and_speed(view: View, quality: Html | None = None) -> Html | None:
    """Bytes and decoding speed of the teacher, the student and its low-bit copies.

    ``quality``: a picture of what they are worth against their bytes, in the place of one of bytes alone.
    """
    rows = _sizes(view)
    if not rows:
        return None
    whole = teacher_bytes(view)
    return section(
        "size",
        "How small and how fast?",
        quality or _bytes_alone(view, rows),
        table(
            "Sizes and decoding speed",
            ["model", "parameters", "size on disk", "of the teacher", "speed, tokens/s"],
            [
                [
                    label,
                    count(m.facts.get("params")),
                    size(n),
                    part_of(n, whole) or MISSING,
                    number(m.facts.get("decode_tokens_per_second")),
                ]
                for label, m, n in rows
            ],
        ),
        _machine(view),
    )


def _bytes_alone(view: View, rows: list[tuple[str, Model, float]]) -> Html:
    whole = teacher_bytes(view)
    unit, one = size_unit(max(n for _, _, n in rows))
    marks = [Mark(m.role, label, n / one, size(n) if m is view.teacher else _beside(n, whole)) for label, m, n in rows]
    smallest_label, smallest, least = min(rows, key=lambda r: r[2])
    part = share_of(least, whole, "the teacher’s bytes")
    finding = (
        f"The {smallest_label} takes {part}"
        if part and smallest.role in ("int8", "int4")
        else "How many bytes do the models take?"
    )
    said = "Size on disk. " + "; ".join(f"{label} {size(n)}" for label, _, n in rows) + "."
    return figure(finding, bars("size-bytes", marks, f"size on disk, {unit}", said))


def teacher_bytes(view: View) -> float | None:
    """What sizes are compared with: the teacher as it is stored, which never flatters; in 32 bit if that is unknown."""
    known = view.teacher.facts if view.teacher else {}
    return finite(known.get("bytes")) or finite(known.get("bytes_fp32"))


def _sizes(view: View) -> list[tuple[str, Model, float]]:
    """Label, model and bytes; the teacher twice where it is not stored in 32 bit."""
    out = []
    if view.teacher:
        full, stored = (finite(view.teacher.facts.get(k)) for k in ("bytes_fp32", "bytes"))
        twice = bool(full and stored and abs(full - stored) > 0.05 * full)
        if full and (twice or not stored):
            out.append(("Teacher, in 32 bit", view.teacher, full))
        if stored:
            out.append(("Teacher, as stored" if twice else "Teacher", view.teacher, stored))
    for m in [view.student, *view.copies]:
        n = finite(m.facts.get("bytes")) if m else None
        if m and n:
            out.append(("Student" if m is view.student else m.label, m, n))
    return out


def _beside(n: float, whole: float | None) -> str:
    part = part_of(n, whole)
    return f"{size(n)}, {part}" if part else size(n)


def _machine(view: View) -> Html | None:
    if not any(m.facts.get("decode_tokens_per_second") for m in view.models):
        return None
    device = (view.summary.get("environment") or {}).get("device")
    where = f", {device}" if device else ""
    return element(
        "p",
        f"Speed is tokens generated per second, measured on this run’s machine{where}; another gives other numbers.",
        class_="small",
    )


def training(view: View, metrics: Sequence[Mapping[str, Any]]) -> Html | None:
    """Loss curves: a panel for each arm, a thin line for each seed."""
    arms: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for line in metrics:
        step, loss = finite(line.get("step")), finite(line.get("loss"))
        if line.get("arm") is not None and step is not None and loss is not None:
            arms.setdefault(str(line["arm"]), {}).setdefault(str(line.get("seed", 0)), []).append((step, loss))
    if not arms:
        return None
    order = sorted(arms, key=lambda a: (a != "teacher", a != "sft", a))
    panels, said = [], []
    for arm in order:
        seeds = {seed: _columns(points) for seed, points in sorted(arms[arm].items())}
        first, last = (sum(v[i] for _, v in seeds.values()) / len(seeds) for i in (0, -1))
        panels.append(Panel(view.role(arm), view.label(arm), seeds, f"ends at {number(last)}"))
        said.append(f"{view.label(arm)} from {number(first)} to {number(last)}")
    several = any(len(p.seeds) > 1 for p in panels)
    below = any(min(v) < 0 for p in panels for _, v in p.seeds.values())
    estimate = " From sampled targets it is an unbiased estimate, which may fall below zero." if below else ""
    shapes = "Each arm has a loss and a scale of its own, so compare the shapes, not the heights."
    shapes = shapes if len(panels) > 1 else ""
    if any("clipped" in x for x in metrics):
        estimate += " A policy’s loss is near zero whether it learns or not; its reward is what tells."
    thin = "Thin lines are single seeds, the thick line is their mean. " if several else ""
    return section(
        "training",
        "How did training go?",
        figure(
            f"Did the loss{' of each arm' if len(panels) > 1 else ''} come down and settle?",
            curves(
                "training-loss", panels, "training step", "loss, nats per token", f"Training loss: {'; '.join(said)}."
            ),
            f"{thin}{shapes}{estimate}".strip(),
        ),
    )


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Steps in order and their losses; the last word on a step counts, should it have been logged twice."""
    ordered = sorted(dict(points).items())
    return [s for s, _ in ordered], [v for _, v in ordered]


def outputs(view: View, samples: Sequence[Mapping[str, Any]]) -> Html | None:
    """Sample prompts with every model's answer side by side."""
    if not samples:
        return None
    return section(
        "samples",
        "What do they write?",
        element(
            "p",
            "The first held-out samples, not picked by hand, with each model’s most likely answer. "
            "An arm of several seeds answers by its first.",
            class_="small",
        ),
        *(_sample(view, i, s) for i, s in enumerate(samples, 1)),
    )


def _sample(view: View, index: int, sample: Mapping[str, Any]) -> Html:
    asked = [(element("dt", "Prompt"), element("dd", pre(sample.get("prompt")), dir="auto"))]
    if sample.get("gold") is not None:
        asked.append((element("dt", "Right answer"), element("dd", pre(sample["gold"]), dir="auto")))
    given: Mapping[str, Any] = sample.get("outputs") or {}
    ranked = _one_seed_each(view, given)
    answers = [
        element(
            "li",
            element("p", element("b", view.label(key)), " ", judged((given[key] or {}).get("correct")), class_="who"),
            pre((given[key] or {}).get("text")),
        )
        for key in ranked
    ]
    return element(
        "article",
        element("h3", f"Sample {index}"),
        element("dl", *(part for pair in asked for part in pair), class_="asked"),
        element("ul", *answers, class_="outputs") if answers else None,
        class_="sample",
    )


def _one_seed_each(view: View, names: Iterable[str]) -> list[str]:
    """Names of outputs in the order of the models, with the first seed of each arm (``kd-0``) to stand for it."""
    order = ["teacher", view.method, "sft", *(m.key for m in view.copies), "base"]
    seen: dict[str, str] = {}
    for name in sorted(names, key=lambda n: [int(p) if p.isdigit() else -1 for p in n.split("-")]):
        seen.setdefault(re.sub(r"-\d+$", "", name), name)
    return [seen[k] for k in sorted(seen, key=lambda k: (order.index(k) if k in order else len(order), k))]


def cost(view: View) -> Html | None:
    """Time, tokens and peak memory of each stage."""
    stages: Mapping[str, Any] = view.summary.get("stages") or {}
    known = {name: s for name, s in stages.items() if isinstance(s, Mapping)}
    if not known:
        return None
    seconds = {name: finite(s.get("seconds")) or 0.0 for name, s in known.items()}
    longest = max(seconds.values()) or 1.0
    rows = [
        [
            name,
            element("span", duration(s.get("seconds")), _bar(seconds[name] / longest)),
            count(s.get("tokens")) if s.get("tokens") else MISSING,
            _memory(s),
        ]
        for name, s in known.items()
    ]
    peaks = [p for s in known.values() if (p := finite(s.get("peak_memory_bytes"))) is not None]
    tokens = sum(finite(s.get("tokens")) or 0 for s in known.values())
    foot = ["all stages", duration(sum(seconds.values())), count(tokens), size(max(peaks)) if peaks else MISSING]
    slowest = max(seconds, key=lambda n: seconds[n])
    return section(
        "cost",
        "What did it take?",
        element(
            "p",
            f"{duration(sum(seconds.values()))} in all",
            f"; {slowest} took the most, {duration(seconds[slowest])}." if len(known) > 1 else ".",
        ),
        table("Time, tokens and peak memory of each stage", ["stage", "time", "tokens", "peak memory"], rows, foot),
    )


def _memory(stage: Mapping[str, Any]) -> Any:
    """Main memory, and that of the device below it."""
    device = finite(stage.get("peak_device_memory_bytes"))
    below = element("small", f"{size(device)} on the device") if device is not None else None
    return element("span", size(stage.get("peak_memory_bytes")), below)


def _bar(share: float) -> Html:
    return element("i", class_="bar", style=f"width:{max(1.0, 100 * share):.0f}%", aria_hidden="true")
