"""What training a model will take, before it runs: from its config.json, tokens and hardware alone. No weights, no
torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from pennyweight.plan.asked import length_within, price_as_given
from pennyweight.plan.assumed import read_or_assume
from pennyweight.plan.flops import Flops, Training, forward, multiplied, training
from pennyweight.plan.forecast import CLASSES, CONVENTION, COVERS, Published, Run, class_of, energy, forecast, money
from pennyweight.plan.hardware import Catalogue, Chip, PriceRange, price_range
from pennyweight.plan.memory import memory
from pennyweight.plan.precision import checked
from pennyweight.plan.shapes import Shapes

_LENGTH = 4096  # tokens in a row, where none are asked for and the model takes as many


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be planned.

    Attributes:
        model, teacher: folders or config.json; with a teacher its distribution is learnt, and made first.
        tokens: that are trained on.
        length: tokens in a row.
        rank: of LoRA's factors; 0: all weights are trained.
        price: of a device for an hour, in place of the catalogue's.
    """

    model: str
    tokens: float
    chip: Chip
    devices: int
    length: int | None = None
    teacher: str | None = None
    precision: str = "bf16"
    rank: int = 0
    price: float | None = None


def outlook(asked: Asked, known: Catalogue, rows: Sequence[Published], today: date) -> dict[str, Any]:
    """FLOPs, hours, energy and money of each part and of all, as ranges with their reasons; what fits; what is cheaper.

    Raises:
        ModelError: a config.json cannot be read, or has not the settings of any architecture that is known.
        RecipeError: what is asked for cannot be.
    """
    asked.chip.peak(checked(asked.precision))
    shapes, assumed = read_or_assume(asked.model)
    teacher, of_teacher = read_or_assume(asked.teacher) if asked.teacher else (None, None)
    length = length_within(asked.length or min(shapes.context, _LENGTH), shapes.context, "the model takes")
    price = _price(asked, known, today)
    parts = _parts(asked, shapes, teacher, length, asked.chip, rows, price)
    fits = [] if assumed else _fits(asked, length)
    return {
        "model": _named(asked.model),
        "teacher": _named(asked.teacher) if asked.teacher else None,
        "architecture": shapes.architecture,
        "parameters": shapes.parameters,
        "multiplied": multiplied(shapes),
        "tokens": asked.tokens,
        "length": length,
        "chip": asked.chip.name,
        "devices": asked.devices,
        "precision": asked.precision,
        "class": CLASSES[class_of(_run(asked, shapes, asked.chip, 0.0))],
        "covers": COVERS,
        "parts": parts,
        "total": _added(parts),
        "currency": price.currency if price else None,
        "stale": price.stale if price else False,
        "memory": fits,
        "cheaper": _cheaper(asked, shapes, teacher, length, known, rows, today) if price and fits else [],
        "assumed": [note for note in (assumed, of_teacher) if note],
    }


def _named(path: str) -> str:
    place = Path(path).expanduser().resolve()
    return place.parent.name if place.name == "config.json" else place.name


def _price(asked: Asked, known: Catalogue, today: date) -> PriceRange | None:
    if asked.price is not None:
        return price_as_given(asked.price)
    return price_range(known.prices_of(asked.chip), today) if known.is_priced(asked.chip) else None


def _run(asked: Asked, shapes: Shapes, chip: Chip, flops: float) -> Run:
    return Run(
        name=asked.model,
        flops=flops,
        tokens=asked.tokens,
        chip=chip,
        devices=asked.devices,
        precision=asked.precision,
        experts=any(b.experts for b in shapes.blocks),
        distilled=asked.teacher is not None,
        vocabulary=shapes.vocabulary,
    )


def _parts(
    asked: Asked,
    shapes: Shapes,
    teacher: Shapes | None,
    length: int,
    chip: Chip,
    rows: Sequence[Published],
    price: PriceRange | None,
) -> list[dict[str, Any]]:
    """Labelling, where there is a teacher, and training. A forward pass is taken to reach the share of
    training."""
    out = []
    if teacher is not None:
        each = forward(teacher, length, CONVENTION)
        run = Run(
            name="labelling",
            flops=asked.tokens * each.total,
            tokens=asked.tokens,
            chip=chip,
            devices=asked.devices,
            precision=asked.precision,
            experts=any(b.experts for b in teacher.blocks),
        )
        out.append(_part("the teacher labels", each, run, rows, price))
    each = training(shapes, length, Training(rank=asked.rank), CONVENTION)
    out.append(_part("training", each, _run(asked, shapes, chip, asked.tokens * each.total), rows, price))
    return out


def _part(name: str, each: Flops, run: Run, rows: Sequence[Published], price: PriceRange | None) -> dict[str, Any]:
    hours = forecast(run, rows)
    ranges = {
        "device_hours": hours,
        "hours": hours.times(1 / (run.devices or 1), f"on {run.devices:,} devices at once"),
    }
    if "power" in run.chip.figures:
        ranges["kwh"] = energy(hours, run.chip)
    if price is not None:
        ranges["money"] = money(hours, price)
    token = {k: v for k, v in asdict(each).items() if v} | {"total": each.total}
    return {"part": name, "flops": run.flops, "token": token} | {k: asdict(r) for k, r in ranges.items()}


def _added(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All parts together: what makes one dearer makes the others so, and their ends add up."""
    total: dict[str, Any] = {"flops": sum(p["flops"] for p in parts)}
    for name in ("device_hours", "hours", "kwh", "money"):
        if all(name in p for p in parts):
            total[name] = {end: sum(p[name][end] for p in parts) for end in ("low", "middle", "high")}
    return total


def _fits(asked: Asked, length: int) -> list[dict[str, Any]]:
    """Bytes of a device for each way to train, float32 if asked for: weights, gradients and moments are cut over
    all devices, and each has a row at a time."""
    if asked.rank or "memory" not in asked.chip.figures:
        return []
    there = 1e9 * asked.chip["memory"]
    out = []
    for way in memory(asked.model, 1, length, "cuda")["train"]:
        if way["way"] == "float32" and asked.precision != "fp32":
            continue
        kept = way["weights"] + way["gradients"] + way["moments"]
        takes = (kept + max(0, way["optimizer_step"] - way["activations"] - way["logits_tile"])) / asked.devices
        takes += way["activations"] + way["logits_tile"]
        out.append({"way": way["way"], "settings": way["settings"], "bytes": takes, "fits": takes <= 0.9 * there})
    return out


def _cheaper(
    asked: Asked,
    shapes: Shapes,
    teacher: Shapes | None,
    length: int,
    known: Catalogue,
    rows: Sequence[Published],
    today: date,
) -> list[dict[str, Any]]:
    """The three cheapest chips of the catalogue on which it fits, as many of them, by the middle of the price."""
    out = []
    for chip in known.chips.values():
        if not known.is_priced(chip, offered=True) or not any(w["fits"] for w in _fits(_on(asked, chip), length)):
            continue
        price = price_range(known.prices_of(chip), today)
        total = _added(_parts(_on(asked, chip), shapes, teacher, length, chip, rows, price))
        out.append({"chip": chip.name, "key": chip.key, "hours": total["hours"], "money": total["money"]})
    return sorted(out, key=lambda row: row["money"]["middle"])[:3]


def _on(asked: Asked, chip: Chip) -> Asked:
    return replace(asked, chip=chip)
