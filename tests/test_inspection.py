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


@pytest.fixture
def run(tiny_run, tmp_path):
    return Path(shutil.copytree(tiny_run[0], tmp_path / "run"))


SMALL = ["seeds=[0]", "quantize.formats=[]", "evaluate.samples=0", "evaluate.problems=2"]


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """The folder of a finished run of one seed and no copies in few bits; to be copied."""
    out = tmp_path_factory.mktemp("small") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENNYWEIGHT_CACHE", str(out.parent / "cache"))
        pennyweight.run(TINY, SMALL, out)
    return out


def test_what_is_kept_is_measured_beside_the_other_ways(run, capsys):
    found = inspect_targets(str(run), 256)
    assert set(found["students"]) == {"the untouched student", "the trained student"} and found["tokens"] >= 256
    for rows in found["students"].values():
        ours = [r for r in rows if r["way"] == "sampled"]
        assert {r["way"] for r in rows} == {
            "sampled",
            "top-k, rescaled",
            "top-k + tail",
            "i.i.d. draws",
            "hidden states",
        }
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


@pytest.mark.parametrize(
    ("settings", "way", "said"),
    [
        (["method.temperature=3"], "sampled", "The sample at threshold 0.0"),
        (["targets.kind=top_k", "targets.k=5", "method.temperature=2"], "top-k + tail", "Top-5 with the rest as one"),
        (["targets.kind=hidden", "targets.precision=bfloat16"], "hidden states", "The last hidden states take"),
    ],
)
def test_what_is_measured_is_what_the_run_keeps(small_run, tmp_path, no_charts, settings, way, said):
    run = Path(shutil.copytree(small_run, tmp_path / "run"))
    summary = pennyweight.run(TINY, [*SMALL, *settings], run)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    found = inspect_targets(str(run))
    assert found["tokens"] == summary["targets"]["tokens"] and found["said"].startswith(said)
    for rows in found["students"].values():
        mine = next(r for r in rows if r["chosen"])
        assert mine["way"] == way
        # The run's shards have a header each and an index; the measure has one of 256 positions a sample.
        assert mine["bytes_per_token"] == pytest.approx(summary["targets"]["bytes_per_token"], rel=0.35)
        if way == "sampled":
            assert mine["ids_per_token"] == pytest.approx(summary["targets"]["entries_per_token"], rel=0.05)
    changed = {p.name for p, content in before.items() if p.read_bytes() != content}
    assert changed <= {"report.html"}, "looking has changed what the run wrote"
    assert verify(str(run)).ok


def test_what_was_found_of_other_settings_is_not_drawn(run):
    inspect_targets(str(run), 256)
    assert "error of the batch gradient" in (run / "report.html").read_text()
    pennyweight.run(TINY, ["seeds=[0]", "quantize.formats=[]", "targets.threshold=0.1"], run)
    assert "error of the batch gradient" not in (run / "report.html").read_text()
    inspect_targets(str(run), 256)
    assert "error of the batch gradient" in (run / "report.html").read_text()


def test_a_student_that_is_its_teacher_has_no_gradient_to_measure(run):
    for student in (run / "student", run / "arms" / "base-0"):
        shutil.rmtree(student)
    shutil.copytree(run / "teacher", run / "student")
    try:
        found = inspect_targets(str(run), 128)
    except RunError as e:
        assert "no gradient to measure" in str(e)
    else:  # rounding leaves something of a gradient that is zero
        assert list(found["students"]) == ["the trained student"]


def test_help_from_another_kind_of_device_is_refused_and_from_old_settings_harms_nothing(run, monkeypatch):
    file = run / "labelling.json"
    known = json.loads(file.read_text())
    shards = sorted((run / "targets").iterdir())
    file.write_text(json.dumps({**known, "made_from": {**known["made_from"], "compute": "cuda:0 bfloat16"}}))
    with pytest.raises(RunError, match="labelled on cuda:0 bfloat16 and this process would on cpu float32"):
        help_to_label(str(run))
    file.write_text(json.dumps(known))
    recipe = json.loads((run / "recipe.json").read_text())
    (run / "recipe.json").write_text(json.dumps({**recipe, "targets": {**recipe["targets"], "threshold": 0.2}}))
    assert help_to_label(str(run))["made"] > 0
    assert set(shards) < set((run / "targets").iterdir())

    def gone(*_, **__):
        raise FileNotFoundError(2, "No such file", "a.targets")

    monkeypatch.setattr("pennyweight.bench.TargetCache.fill", gone)
    with pytest.raises(RunError, match="a.targets was removed meanwhile"):
        help_to_label(str(run))


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
