"""A finished RUN folder -> its report.html."""

from __future__ import annotations

import json
from pathlib import Path

from pennyweight.report.page import render


def draw(root: Path) -> Path:
    """Write report.html from summary.json, metrics.jsonl and evaluation/shown.json of ``root``; its path."""
    metrics = (root / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    summary = json.loads((root / "summary.json").read_text(encoding="utf-8"))
    shown = json.loads((root / "evaluation" / "shown.json").read_text(encoding="utf-8"))
    page = render(summary, [json.loads(line) for line in metrics if line.strip()], shown)
    making = root / ".making-report.html"
    making.write_text(page, encoding="utf-8")
    making.replace(root / "report.html")
    return root / "report.html"
