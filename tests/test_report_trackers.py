"""Trackers: each gets every line under its arm's name; a missing package names its extra; close closes all."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pennyweight.errors import MissingExtra, RunError
from pennyweight.recipe import Recipe
from pennyweight.report.trackers import TRACKERS, trackers

LINE = {"stage": "train", "arm": "kd", "seed": 1, "step": 10, "loss": 0.5, "divergence": None, "lr": 1e-3, "note": "x"}


class Calls(list):
    """What a fake module was asked, in order."""

    def to(self, name: str) -> Any:
        return lambda *args, **kwargs: self.append((name, args, kwargs))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Fake tensorboard, wandb and trackio modules that write down their calls."""
    made = Calls()

    def module(name: str, **members: Any) -> None:
        fake = ModuleType(name)
        fake.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, fake)

    class Writer:
        def __init__(self, folder: str) -> None:
            made.append(("writer", (folder,), {}))
            self.add_event = made.to("event")
            self.close = made.to("tensorboard close")

    def init(name: str) -> Any:
        def start(**kwargs: Any) -> SimpleNamespace:
            made.append((f"{name} init", (), kwargs))
            members = ("log", "finish", "define_metric")
            return SimpleNamespace(**{m: made.to(f"{name} {m}") for m in members})

        return start

    parents = ("tensorboard", "tensorboard.summary", "tensorboard.summary.writer", "tensorboard.compat")
    for parent in (*parents, "tensorboard.compat.proto"):
        module(parent)
    module("tensorboard.summary.writer.event_file_writer", EventFileWriter=Writer)
    module("tensorboard.compat.proto.event_pb2", Event=lambda **kw: SimpleNamespace(**kw))
    summary = type("Summary", (SimpleNamespace,), {"Value": SimpleNamespace})
    module("tensorboard.compat.proto.summary_pb2", Summary=summary)
    module("wandb", init=init("wandb"))
    module("trackio", init=init("trackio"))
    return made


def test_every_tracker_gets_the_numbers_of_a_line(calls: Calls, tmp_path: Path) -> None:
    also = trackers(["tensorboard", "wandb", "trackio", "wandb"], "quick", tmp_path, {"seed": 0})
    also(LINE)
    also.close()
    said = {name: (args, kwargs) for name, args, kwargs in calls}
    values = {"kd-1/loss": 0.5, "kd-1/lr": 1e-3}

    event = said["event"][0][0]
    assert event.step == 10 and {v.tag: v.simple_value for v in event.summary.value} == values
    assert Path(said["writer"][0][0]).is_relative_to(tmp_path)
    assert said["wandb log"][0][0] == {**values, "kd-1/step": 10}
    assert said["wandb define_metric"] == (("kd-1/*",), {"step_metric": "kd-1/step"})
    assert said["trackio log"] == ((values,), {"step": 10})
    for name in ("wandb", "trackio"):
        assert said[f"{name} init"][1]["name"] == "quick" and said[f"{name} init"][1]["config"] == {"seed": 0}
    assert said["wandb init"][1]["dir"] == str(tmp_path)
    assert {"tensorboard close", "wandb finish", "trackio finish"} <= set(said)
    assert [name for name, _, _ in calls].count("wandb init") == 1


def test_arms_stay_apart_and_each_brings_its_own_steps(calls: Calls, tmp_path: Path) -> None:
    also = trackers(["wandb"], "quick", tmp_path, {})
    for arm in ("sft", "kd"):
        for step in (1, 2):
            also({"arm": arm, "seed": 0, "step": step, "loss": 1.0})
    logged = [args[0] for name, args, _ in calls if name == "wandb log"]
    assert [row.get("sft-0/step") for row in logged] == [1, 2, None, None]
    assert [row.get("kd-0/step") for row in logged] == [None, None, 1, 2]
    assert [name for name, _, _ in calls].count("wandb define_metric") == 2


def test_a_line_without_numbers_says_nothing(calls: Calls, tmp_path: Path) -> None:
    also = trackers(["trackio"], "quick", tmp_path, {})
    also({"arm": "kd", "seed": 0, "step": 1, "loss": float("nan"), "divergence": None, "ok": True})
    assert not [c for c in calls if c[0] == "trackio log"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_names_its_extra(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for known in [m for m in sys.modules if m.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, known)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=rf"pip install 'pennyweight\[{name}\]'"):
        trackers([name], "quick", tmp_path, {})


def test_what_was_opened_is_closed_when_a_later_one_is_missing(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtra):
        trackers(["trackio", "wandb"], "quick", tmp_path, {})
    assert "trackio finish" in [name for name, _, _ in calls]


def test_a_tracker_that_does_not_start_is_one_sentence(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(**_: Any) -> None:
        raise ValueError("api_key not configured.\nmore lines")

    monkeypatch.setattr(sys.modules["wandb"], "init", fail)
    with pytest.raises(RunError, match="wandb does not start: api_key not configured; ") as caught:
        trackers(["wandb"], "quick", tmp_path, {})
    assert "\n" not in str(caught.value)
    with pytest.raises(RunError, match="no tracker is called 'mlflow'"):
        trackers(["mlflow"], "quick", tmp_path, {})


def test_closing_goes_on_past_a_failure_and_reports_it(calls: Calls, tmp_path: Path) -> None:
    also = trackers(["trackio", "wandb"], "quick", tmp_path, {})

    def fail() -> None:
        raise OSError("no route to host")

    also.open[1] = type(also.open[1])(also.open[1].log, fail)
    with pytest.raises(RunError, match="no route to host"):
        also.close()
    assert "trackio finish" in [name for name, _, _ in calls]
    also.close()


def test_the_rows_are_what_a_recipe_may_name() -> None:
    accepted = Recipe.model_json_schema()["properties"]["log"]["items"]["enum"]
    assert set(TRACKERS) == set(accepted)
