"""Metrics lines -> experiment trackers, for those who have one: TensorBoard, Weights & Biases, trackio.

Each is an optional package, imported only when a recipe names it. metrics.jsonl stays the record; these are views.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pennyweight.errors import MissingExtra, RunError

_PROJECT = "pennyweight"
_LABELS = ("stage", "arm", "seed", "step")


@dataclass(frozen=True)
class Tracker:
    """One open tracker: ``log`` takes values by name and the step they belong to; ``close`` sends what is left."""

    log: Callable[[dict[str, float], int], None]
    close: Callable[[], None]


@dataclass(frozen=True)
class Trackers:
    """Hands each metrics line to every tracker. Values are named ``arm-seed/metric``, so that arms stay apart."""

    open: list[Tracker] = field(default_factory=list)

    def __call__(self, line: dict) -> None:
        """Pass on the finite numbers of one line of metrics.jsonl; labels, null and text are not values."""
        place = "-".join(str(line[k]) for k in ("arm", "seed") if line.get(k) is not None) or str(
            line.get("stage", "run")
        )
        values = {f"{place}/{k}": float(v) for k, v in line.items() if k not in _LABELS and _is_number(v)}
        if values:
            for tracker in self.open:
                tracker.log(values, int(line.get("step") or 0))

    def close(self) -> None:
        """Close every tracker, also when one of them fails; the first failure is raised at the end."""
        failures = []
        while self.open:
            try:
                self.open.pop().close()
            except Exception as e:
                failures.append(e)
        if failures:
            raise RunError(
                f"a tracker could not be closed: {_first_line(failures[0])}; metrics.jsonl holds every value"
            )


def trackers(names: list[str], run_name: str, folder: Path, config: dict) -> Trackers:
    """Open the named trackers.

    Args:
        names: of ``tensorboard``, ``wandb`` and ``trackio``; one named twice is opened once.
        run_name: what the run is called there, in the project ``pennyweight``.
        folder: the RUN folder; TensorBoard's and Weights & Biases' files go into it.
        config: the recipe as a plain dict, kept beside the values where a tracker has a place for it.

    Returns:
        A callable that takes one metrics line, with ``close()``.

    Raises:
        MissingExtra: the package of a named tracker is not installed.
        RunError: a name is not known, or a tracker is there but does not start.
    """
    opened = Trackers()
    for name in dict.fromkeys(names):
        if name not in TRACKERS:
            raise RunError(f"no tracker is called {name!r}; log takes {', '.join(TRACKERS)}")
        try:
            opened.open.append(TRACKERS[name](run_name, folder, config))
        except MissingExtra:
            opened.close()
            raise
        except Exception as e:
            opened.close()
            raise RunError(f"{name} does not start: {_first_line(e)}; set it up, or leave it out of log") from e
    return opened


def _tensorboard(run_name: str, folder: Path, config: Mapping[str, Any]) -> Tracker:
    """Event files under ``folder/tensorboard``, written by TensorBoard's own writer, which needs no torch."""
    files = _load("tensorboard.summary.writer.event_file_writer", "tensorboard")
    events = _load("tensorboard.compat.proto.event_pb2", "tensorboard")
    summaries = _load("tensorboard.compat.proto.summary_pb2", "tensorboard")
    writer = files.EventFileWriter(str(folder / "tensorboard" / run_name))

    def log(values: dict[str, float], step: int) -> None:
        points = [summaries.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        writer.add_event(events.Event(wall_time=time.time(), step=step, summary=summaries.Summary(value=points)))

    return Tracker(log, writer.close)


def _wandb(run_name: str, folder: Path, config: Mapping[str, Any]) -> Tracker:
    wandb = _load("wandb", "wandb")
    run = wandb.init(project=_PROJECT, name=run_name, dir=str(folder), config=dict(config))
    placed: set[str] = set()

    def log(values: dict[str, float], step: int) -> None:
        # Its own step only ever grows, but every arm counts from one: so each arm brings its step along as a value.
        place = next(iter(values)).partition("/")[0]
        if place not in placed:
            placed.add(place)
            run.define_metric(f"{place}/*", step_metric=f"{place}/step")
        run.log({**values, f"{place}/step": step})

    return Tracker(log, run.finish)


def _trackio(run_name: str, folder: Path, config: Mapping[str, Any]) -> Tracker:
    trackio = _load("trackio", "trackio")
    run = trackio.init(project=_PROJECT, name=run_name, config=dict(config))
    return Tracker(lambda values, step: run.log(values, step=step), run.finish)


TRACKERS: dict[str, Callable[[str, Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}


def _load(module: str, extra: str) -> Any:
    """An optional module, or the line that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise MissingExtra(extra, extra, f"log = [{extra!r}]") from e


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".;")
