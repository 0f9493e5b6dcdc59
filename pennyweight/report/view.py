"""summary.json as the report looks at it: models in order, each with a name; nothing is granted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

LEADING = ("accuracy", "kl_to_teacher", "bits_per_byte")
"""Metrics that can lead the page, the plainest first."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the run: its key in summary.json, its colour role in charts, its name for people, its facts."""

    key: str
    role: str
    label: str
    facts: Mapping[str, Any]

    def interval(self, metric: str) -> dict[str, Any] | None:
        """The interval of a metric, or None where it was not measured."""
        found = (self.facts.get("metrics") or {}).get(metric)
        if not isinstance(found, Mapping) or not _is_number(found.get("mean")):
            return None
        return dict(found)

    def mean(self, metric: str) -> float | None:
        found = self.interval(metric)
        return found["mean"] if found else None


@dataclass(frozen=True, slots=True)
class View:
    """A summary with its models sorted: teacher, before training, control, student, low-bit copies."""

    summary: Mapping[str, Any]
    models: tuple[Model, ...]
    method: str | None

    def find(self, key: str | None) -> Model | None:
        return next((m for m in self.models if m.key == key), None)

    @property
    def teacher(self) -> Model | None:
        return self.find("teacher")

    @property
    def student(self) -> Model | None:
        """The student that the run is about: of the recipe's method, or of what there is."""
        return self.find(self.method)

    @property
    def control(self) -> Model | None:
        return self.find("sft") if self.method != "sft" else None

    @property
    def copies(self) -> list[Model]:
        """Low-bit copies, the largest first."""
        found = [m for m in self.models if m.key in (self.summary.get("quantized") or {})]
        return sorted(found, key=lambda m: -(m.facts.get("bytes") or 0))

    @property
    def rounded(self) -> list[Model]:
        """Copies that were rounded only, each beside a copy of the same key that was taught as well."""
        found: Mapping[str, Any] = self.summary.get("rounded") or {}
        return [Model(fmt, _of_copy(fmt), f"{fmt}, rounded only", facts) for fmt, facts in found.items() if facts]

    @property
    def smallest(self) -> Model | None:
        """The smallest low-bit copy whose size is known."""
        return next((m for m in reversed(self.copies) if m.facts.get("bytes")), None)

    @property
    def leading(self) -> str | None:
        """The plainest metric that the student was measured on."""
        return next((m for m in LEADING if self.student and self.student.interval(m)), None)

    @property
    def unfinished(self) -> bool:
        """Whether the run said so, or no student of it has been measured."""
        measured = self.student is not None and bool(self.student.facts.get("metrics"))
        return bool(self.summary.get("unfinished")) or not measured

    def label(self, key: str) -> str:
        """A model's name for people, also where samples or metrics name a seed (``kd-0``) or a model not listed."""
        found = self.find(key)
        if found:
            return found.label
        seeded = re.fullmatch(r"(.+)-(\d+)", key)
        if seeded:
            return f"{self.label(seeded[1])}, seed {seeded[2]}"
        return _name(key, self.method)

    def role(self, key: str) -> str:
        return _role(re.sub(r"-\d+$", "", key))


def view(summary: Mapping[str, Any]) -> View:
    """What the report needs to know of ``summary``; parts that are missing are simply not there."""
    arms: Mapping[str, Any] = summary.get("arms") or {}
    copies: Mapping[str, Any] = summary.get("quantized") or {}
    others = [a for a in arms if a not in ("base", "sft")]
    method = others[0] if others else "sft" if "sft" in arms else None
    order = ["base", "sft", *others]
    listed: Iterable[tuple[str, Any]] = [("teacher", summary.get("teacher")), *((arm, arms.get(arm)) for arm in order)]
    models = [Model(key, _role(key), _name(key, method), facts) for key, facts in listed if facts]
    models += [
        Model(fmt, _of_copy(fmt), f"{fmt} copy", copies[fmt])
        for fmt in sorted(copies, key=lambda f: (f != "int8", f))
        if copies[fmt]
    ]
    return View(summary, tuple(models), method)


def _name(key: str, method: str | None) -> str:
    if key == "sft":
        return "Fine-tuned (sft)" if method == "sft" else "Control (sft)"
    if key in ("int8", "int4"):
        return f"{key} copy"
    return {"teacher": "Teacher", "base": "Before training", "kd": "Distilled (kd)"}.get(key, f"Student ({key})")


def _role(key: str) -> str:
    if key in ("teacher", "base", "int8", "int4"):
        return key
    return "control" if key == "sft" else "student"


def _of_copy(fmt: str) -> str:
    """Low-bit copies have two colours: of 8 bits, and of fewer."""
    return "int8" if "8" in fmt else "int4"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
