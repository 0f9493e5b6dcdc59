"""A run in progress: its folder and ledger, the bench its stages share, and where its measurements go."""

from __future__ import annotations

from typing import Any

from pennyweight.ledger.environment import environment
from pennyweight.report.trackers import trackers
from pennyweight.train.journal import Journal
from pennyweight.version import __version__


class Line:
    """What the stages of a run are handed."""

    def __init__(self, run: Any, bench: Any):
        self.run, self.recipe, self.folder = run, run.recipe, run.folder
        self.bench, self.compute = bench, bench.compute
        settings = self.recipe.model_dump(mode="json")
        self.trackers = trackers(list(self.recipe.log), self.recipe.name, self.folder, settings)
        self.journal = Journal(self.folder / "metrics.jsonl", [self.trackers])
        run.ledger.append("run", {"recipe": settings, "version": __version__})
        run.ledger.append("environment", environment(self.compute.hardware, bench.threads))

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *exc: object) -> None:
        self.trackers.close()
