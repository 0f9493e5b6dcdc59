"""A finished RUN folder -> its report.html."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pennyweight.atomic import write_whole
from pennyweight.report.language import in_language
from pennyweight.report.page import render


def draw(root: Path, lang: str = "en") -> Path:
    """Write report.html from what ``root`` holds: summary and recipe, metrics, outputs on problems and rollouts; its
    path. ``lang`` is one of ``report.language.LANGUAGES``."""
    metrics = (root / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    summary = json.loads((root / "summary.json").read_text(encoding="utf-8"))
    summary["recipe"] = json.loads((root / "recipe.json").read_text(encoding="utf-8"))
    shown = json.loads((root / "evaluation" / "shown.json").read_text(encoding="utf-8"))
    if (root / "inspection.json").exists():
        inspection = json.loads((root / "inspection.json").read_text(encoding="utf-8"))
        if inspection.get("made_from") == [summary["recipe_hash"], summary["teacher"]["fingerprint"]]:
            summary["inspection"] = inspection  # not what was found of another recipe or teacher
    lines = [json.loads(line) for line in metrics if line.strip()]
    of_this_run = [x for x in lines if x.get("arm") == "teacher" or _trained(summary, x)]
    page = render(summary, of_this_run, shown, [x for x in _rollouts(root) if _trained(summary, x)])
    write_whole(root / "report.html", in_language(lang).page(page))
    return root / "report.html"


def draw_unfinished(root: Path, known: dict[str, Any], lang: str = "en") -> Path:
    """Write report.html of a run that is not finished, from its recipe and stages so far (``known``) and its metrics;
    its path."""
    metrics = (root / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    seen = {**known, "stages": dict.fromkeys(known["stages"])}
    page = render(seen, [*_whole(metrics)], [], [*_rollouts(root)])
    write_whole(root / "report.html", in_language(lang).page(page))
    return root / "report.html"


def _whole(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Lines of JSON, less one that a kill cut short."""
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _rollouts(root: Path) -> Iterator[dict[str, Any]]:
    """Responses early and late, with the arm and the seed that the names of their files tell."""
    for file in sorted((root / "rollouts").glob("*.jsonl")):
        arm, _, seed = file.stem.rpartition("-")
        for row in _whole(file.read_text(encoding="utf-8").splitlines()):
            yield {**row, "arm": arm, "seed": int(seed)}


def _trained(summary: dict[str, Any], line: dict[str, Any]) -> bool:
    """Whether a line of metrics is of an arm and a seed that the summary still holds."""
    return line.get("seed") in summary["arms"].get(line.get("arm"), {}).get("seeds", [])
