"""Looking into a run's targets, and helping to label, on a tiny run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import pennyweight
from pennyweight.commands import verify
from pennyweight.errors import RunError
from pennyweight.inspection import help_to_label, inspect_targets
from pennyweight.report.terminal import print_inspection

TINY = Path(__file__).with_name("tiny.toml")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspected") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENNYWEIGHT_CACHE", str(folder.parent / "cache"))
        pennyweight.run(TINY, ["seeds=[0]", "quantize.formats=[]"], folder)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_what_is_kept_is_measured_beside_the_other_ways(run, capsys):
    found = inspect_targets(str(run), 256)
    assert set(found["students"]) == {"the untouched student", "the trained student"} and found["tokens"] >= 256
    for rows in found["students"].values():
        ours = [r for r in rows if r["way"] == "sampled"]
        assert {r["way"] for r in rows} == {"sampled", "top-k, rescaled", "top-k + tail", "i.i.d. draws"}
        assert sum(r["chosen"] for r in rows) == 1
        assert [r["bytes_per_token"] for r in ours] == sorted(r["bytes_per_token"] for r in ours)
        assert ours[0]["gradient_error"] > ours[-1]["gradient_error"] > 0
        assert all(0 <= r["calibration_error"] < 1 and 0 <= r["mass"] <= 1 for r in rows)
    assert json.loads((run / "inspection.json").read_text())["said"] == found["said"]
    page = (run / "report.html").read_text()
    assert found["said"] in page and "error of the batch gradient" in page
    assert verify(str(run)).ok
    print_inspection(found)
    assert found["said"].split(";")[0] in " ".join(capsys.readouterr().out.split())


def test_helping_a_finished_run_makes_nothing_and_a_lost_shard_again(run):
    first = help_to_label(str(run))
    assert first["made"] == 0 and first["damaged"] == () and first["tokens"] > 0
    shards = {p.name: p.read_bytes() for p in (run / "targets").glob("*.targets")}
    assert len(shards) > 1
    lost = sorted(shards)[0]
    (run / "targets" / lost).unlink()
    assert help_to_label(str(run)) == {**first, "made": 1}
    assert {p.name: p.read_bytes() for p in (run / "targets").glob("*.targets")} == shards
    assert verify(str(run)).ok


@pytest.mark.parametrize("look", [inspect_targets, help_to_label])
def test_what_is_not_there_is_said(run, tmp_path, look):
    with pytest.raises(RunError, match="not a RUN folder"):
        look(str(tmp_path / "nowhere"))
    (run / "data" / "train.jsonl").write_text("{")
    with pytest.raises(RunError, match="damaged in line 1"):
        look(str(run))
    (run / "data" / "train.jsonl").unlink()
    with pytest.raises(RunError, match="no training samples yet"):
        look(str(run))
    (run / "recipe.json").write_text("{}")
    (run / "data" / "train.jsonl").write_text("")
    with pytest.raises(RunError, match="no recipe of this version"):
        look(str(run))


def test_a_live_teacher_leaves_nothing_to_label(run):
    recipe = json.loads((run / "recipe.json").read_text())
    (run / "recipe.json").write_text(json.dumps({**recipe, "targets": {"kind": "dense"}}))
    with pytest.raises(RunError, match="nothing to label"):
        help_to_label(str(run))
    assert inspect_targets(str(run), 128)["students"]
