"""Published trainings, from ``published.toml`` beside this file: what forecasts are made from and held to."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path

from pennyweight.plan.flops import Training, training
from pennyweight.plan.forecast import CONVENTION, Published, Run
from pennyweight.plan.hardware import catalogue
from pennyweight.plan.models import model


@cache
def published() -> tuple[Published, ...]:
    """All of them, those of the table first."""
    said = tomllib.loads(Path(__file__).with_name("published.toml").read_text(encoding="utf-8"))
    return tuple(sorted((_row(row) for row in said["run"]), key=lambda p: not p.table))


def _row(row: dict) -> Published:
    shapes = model(row["model"]) if "model" in row else None
    if shapes is not None:
        flops = row["tokens"] * training(shapes, row["length"], Training(mtp=row.get("mtp", 0)), CONVENTION).total
        experts = any(b.experts for b in shapes.blocks)
    else:
        flops, experts = row.get("flops") or 6 * row["active"] * row["tokens"], row.get("experts", False)
    run = Run(
        name=row["name"],
        flops=flops,
        tokens=row["tokens"],
        chip=catalogue().chip(row["chip"]),
        devices=row.get("devices"),
        precision=row.get("precision", "bf16"),
        experts=experts,
        distilled=row.get("kind") == "distillation",
        vocabulary=shapes.vocabulary if shapes else 0,
    )
    return Published(run, row["family"], row["hours"], row.get("table", False), row["source"])
