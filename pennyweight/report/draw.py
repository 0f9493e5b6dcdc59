"""A finished RUN folder -> its report.html."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pennyweight.atomic import write_whole
from pennyweight.report.page import render


def draw(root: Path) -> Path:
    """Write report.html from summary.json, metrics.jsonl and evaluation/shown.json of ``root``; its path."""
    metrics = (root / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    summary = json.loads((root / "summary.json").read_text(encoding="utf-8"))
    shown = json.loads((root / "evaluation" / "shown.json").read_text(encoding="utf-8"))
    if (root / "inspection.json").exists():
        inspection = json.loads((root / "inspection.json").read_text(encoding="utf-8"))
        if inspection.get("made_from") == [summary["recipe_hash"], summary["teacher"]["fingerprint"]]:
            summary["inspection"] = inspection  # not what was found of another recipe or teacher
    lines = [json.loads(line) for line in metrics if line.strip()]
    of_this_run = [x for x in lines if x.get("arm") == "teacher" or _trained(summary, x)]
    page = render(summary, of_this_run, shown)
    write_whole(root / "report.html", page)
    return root / "report.html"


def _trained(summary: dict[str, Any], line: dict[str, Any]) -> bool:
    """Whether a line of metrics is of an arm and a seed that the summary still holds."""
    return line.get("seed") in summary["arms"].get(line.get("arm"), {}).get("seeds", [])
