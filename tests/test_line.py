"""The whole line on a tiny recipe: what a RUN folder holds, what runs again after a change, and what a kill leaves."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import pennyweight
from pennyweight.commands import verify
from pennyweight.errors import DataError, MethodError, ModelError, RunError
from pennyweight.ledger.hashing import hash_folder
from pennyweight.records import METRICS

TINY = Path(__file__).with_name("tiny.toml")
MODELS = ("student-int8", "student-int4", "student")


def stages(out) -> list[str]:
    """Names of the stages that were started, in order."""
    import sqlite3

    with sqlite3.connect(out / "ledger.sqlite") as db:
        rows = db.execute("SELECT body FROM entries WHERE kind = 'stage' ORDER BY seq").fetchall()
    return [b["name"] for b in map(json.loads, (r[0] for r in rows)) if b["status"] == "started"]


def test_the_folder_holds_what_is_promised(tiny_run):
    out, summary = tiny_run
    for name in ("recipe.json", "ledger.sqlite", "metrics.jsonl", "summary.json", "report.html", "targets", *MODELS):
        assert (out / name).exists(), name
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert not list(out.rglob(".making-*")) and not list((out / "work").iterdir())


def test_the_summary_has_teacher_arms_copies_targets_and_stages(tiny_run):
    _, summary = tiny_run
    assert set(summary["arms"]) == {"base", "sft", "kd"} and set(summary["quantized"]) == {"int8", "int4"}
    assert set(summary["rounded"]) == {"int4"}  # int8 copies are not taught, so there is nothing to set beside them
    copies = (*summary["quantized"].values(), *summary["rounded"].values())
    assert [c["recovered"] for c in copies] == [0, 1, 0]
    for model in (summary["teacher"], *summary["arms"].values(), *copies):
        assert model["params"] > 0 and model["bytes"] > 0
        for name, row in model["metrics"].items():
            assert name in METRICS and row["low"] <= row["mean"] <= row["high"]
    for arm in ("sft", "kd"):
        assert summary["arms"][arm]["seeds"] == [0, 1]
        assert summary["arms"][arm]["steps"] == 12
        assert "t interval over 2 seeds" in summary["arms"][arm]["metrics"]["kl_to_teacher"]["how"]
    assert summary["arms"]["sft"]["tokens"] == summary["arms"]["kd"]["tokens"] > 0
    assert summary["targets"]["tokens"] > 0 and summary["targets"]["bytes_per_token"] > 0
    assert all(s["seconds"] >= 0 and s["peak_memory_bytes"] > 1e6 for s in summary["stages"].values())
    assert (
        summary["quantized"]["int4"]["bytes"] < summary["quantized"]["int8"]["bytes"] < summary["arms"]["kd"]["bytes"]
    )
    assert set(summary["gap_recovered"]) >= {"accuracy", "kl_to_teacher", "bits_per_byte"}


def test_a_copy_that_was_rounded_only_is_measured_beside_the_one_that_was_taught(tiny_run):
    out, summary = tiny_run
    taught, rounded = (summary[k]["int4"] for k in ("quantized", "rounded"))
    assert taught["bytes"] == rounded["bytes"] and rounded["path"] == "student-int4-rounded"
    assert set(taught["metrics"]) == {*rounded["metrics"], "pass_at_k"}
    assert taught["metrics"]["kl_parent"]["mean"] != rounded["metrics"]["kl_parent"]["mean"]
    weights = [(out / m["path"] / "model.safetensors").read_bytes() for m in (taught, rounded)]
    assert weights[0] != weights[1]
    shown = json.loads((out / "evaluation" / "shown.json").read_text())
    assert set(shown[0]["outputs"]) == {"teacher", "base-0", "sft-0", "sft-1", "kd-0", "kd-1", "int8", "int4"}


def test_the_ledger_knows_every_training_record_and_verifies(tiny_run):
    out, summary = tiny_run
    found = verify(str(out))
    assert found.ok and found.problem is None
    assert (
        summary["ledger"]["train"]
        == summary["data"]["train"]
        == len((out / "data/train.jsonl").read_text().splitlines())
    )
    assert summary["ledger"]["teacher-train"] > 0


def test_models_open_in_a_fresh_process(tiny_run):
    out, _ = tiny_run
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T\n"
        "chat = [{'role': 'user', 'content': 'Calculate 1 + 2.'}]\n"
        "for folder in sys.argv[1:]:\n"
        "    m, t = M.from_pretrained(folder), T.from_pretrained(folder)\n"
        "    ids = t.apply_chat_template(chat, return_tensors='pt')['input_ids']\n"
        "    made = m.generate(ids, max_new_tokens=4, do_sample=False)\n"
        "    print(made.shape[1] > ids.shape[1], m.generation_config.eos_token_id)"
    )
    command = [sys.executable, "-c", code, *(str(out / name) for name in MODELS)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.stdout.splitlines() == ["True 2"] * len(MODELS), run.stderr[-500:]


def test_arms_start_alike_and_end_apart(tiny_run):
    out, _ = tiny_run
    weights = {
        n: AutoModelForCausalLM.from_pretrained(out / "arms" / n).state_dict()
        for n in ("base-0", "sft-0", "kd-0", "kd-1")
    }
    assert all(
        not torch.equal(weights["base-0"]["model.embed_tokens.weight"], w["model.embed_tokens.weight"])
        for n, w in weights.items()
        if n != "base-0"
    )
    assert not torch.equal(weights["sft-0"]["model.norm.weight"], weights["kd-0"]["model.norm.weight"])
    student = AutoModelForCausalLM.from_pretrained(out / "student").state_dict()
    assert all(torch.equal(student[k], v) for k, v in weights["kd-0"].items())
    assert (
        AutoTokenizer.from_pretrained(out / "student").get_vocab()
        == AutoTokenizer.from_pretrained(out / "teacher").get_vocab()
    )


def test_metrics_lines_are_unique_and_in_order(tiny_run):
    out, _ = tiny_run
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    keys = [(x["arm"], x["seed"], x["step"]) for x in lines]
    assert len(set(keys)) == len(keys)
    assert {(a, s) for a, s, _ in keys} == {("teacher", 0), ("sft", 0), ("sft", 1), ("kd", 0), ("kd", 1), ("int4", 0)}
    assert all(x["entropy"] > 0 and x["grad_norm"] > 0 for x in lines)


@pytest.fixture
def copy(tiny_run, tmp_path, no_charts):
    shutil.copytree(tiny_run[0], tmp_path / "run")
    return tmp_path / "run"


def test_a_second_call_runs_nothing(copy):
    before = stages(copy)
    again = pennyweight.run(TINY, out=copy)
    assert stages(copy) == before
    assert again["arms"] == json.loads((copy / "summary.json").read_text())["arms"]


@pytest.mark.parametrize(
    ("setting", "reruns", "keeps"),
    [
        (
            "method.temperature=2.0",
            {"targets", "kd-0", "kd-1", "student", "int4", "evaluate-kd-0"},
            {"data", "sft-0", "start-0", "evaluate-sft-0"},
        ),
        (
            "quantize.group=16",
            {"int8", "int4", "int4-rounded", "evaluate-int4", "evaluate-int4-rounded"},
            {"kd-0", "student", "evaluate-kd-0"},
        ),
        ("evaluate.problems=4", {"evaluate-teacher", "evaluate-kd-1"}, {"kd-0", "int4", "data"}),
        ("seeds=[0,1,2]", {"sft-2", "kd-2", "evaluate-kd-2"}, {"kd-0", "kd-1", "data", "evaluate-kd-0"}),
        ("seed=5", {"data", "evaluate-teacher", "evaluate-int4"}, {"kd-0", "targets", "int4"}),
        ("data.context=40", {"data", "start-0", "evaluate-kd-0"}, {"targets", "kd-0"}),  # every sample fits in both
        ("compute.dtype=bfloat16", {"teacher", "kd-0"}, set()),
        ("tripwires.loss_spike=9.0", set(), {"teacher", "kd-0", "data", "evaluate-kd-0"}),
        ("train.checkpoint_every=3", set(), {"kd-0", "data", "evaluate-kd-0"}),
    ],
)
def test_a_changed_value_reruns_just_what_depends_on_it(copy, setting, reruns, keeps):
    before = len(stages(copy))
    pennyweight.run(TINY, [setting], copy)
    again = set(stages(copy)[before:])
    assert reruns <= again and not keeps & again
    assert verify(str(copy)).ok


def test_damage_is_repaired(copy):
    want = hash_folder(copy / "arms" / "kd-0")
    shutil.rmtree(copy / "arms" / "kd-0")
    shard = next((copy / "targets").glob("*.targets"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    before = len(stages(copy))
    pennyweight.run(TINY, out=copy)
    assert {"targets", "kd-0"} <= set(stages(copy)[before:])
    assert hash_folder(copy / "arms" / "kd-0") == want
    assert verify(str(copy)).ok


def test_a_tampered_run_does_not_verify(copy):
    file = copy / "student" / "config.json"
    file.write_text(file.read_text() + " ")
    found = verify(str(copy))
    assert not found.ok and "student" in found.problem


def test_dense_targets_store_nothing(tmp_path, no_charts):
    summary = pennyweight.run(
        TINY, ["targets.kind=dense", "method.divergence=jsd", "seeds=[0]", "quantize.formats=[]"], tmp_path / "r"
    )
    assert summary["targets"]["bytes"] == 0 and summary["arms"]["kd"]["steps"] == 12 and not summary["quantized"]


def test_an_evaluation_text_is_read_first_and_checked_against_the_training_data(copy, tmp_path):
    rows = [json.loads(x) for x in (copy / "data" / "train.jsonl").read_text().splitlines()]
    text = tmp_path / "text.txt"
    text.write_text(rows[0]["prompt"][0]["content"])
    summary = pennyweight.run(TINY, [f"evaluate.text={text}"], copy)
    assert summary["data"]["text_overlap"] == {"eval": 1, "normalised": 1, "ngram": 1}
    assert summary["teacher"]["metrics"]["bits_per_byte"]["low"] is None  # one window has no interval
    with pytest.raises(DataError, match="missing.txt"):
        pennyweight.run(TINY, ["evaluate.text=missing.txt"], tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_a_start_that_was_killed_or_mistyped_blocks_nobody(tmp_path, no_charts):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / ".making-recipe.json").write_text("{")
    with pytest.raises(ModelError, match="no model folder at ./nowhere"):
        pennyweight.run(TINY, ["teacher.kind=folder", "teacher.path=./nowhere", "name=wrong"], tmp_path / "r")
    pennyweight.run(TINY, ["seeds=[0]", "train.steps=1", "quantize.formats=[]", "evaluate.problems=1"], tmp_path / "r")


def test_a_wrong_combination_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(MethodError, match=r"targets.kind to dense"):
        pennyweight.run(TINY, ["method.divergence=reverse_kl"], tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_folders_of_others_are_left_alone(copy, tmp_path):
    with pytest.raises(RunError, match="holds a run of the recipe 'tiny', not 'other'"):
        pennyweight.run(TINY, ["name=other"], copy)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("dear")
    with pytest.raises(RunError, match="not a RUN folder"):
        pennyweight.run(TINY, out=tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir() if p.name != ".lock"] == ["thesis.tex"]


def test_a_changed_chat_template_makes_the_data_anew(copy, tmp_path, monkeypatch):
    """The teacher's weights are the same, but not how its text is framed."""
    teacher = shutil.copytree(copy / "teacher", tmp_path / "given")
    settings = ["seeds=[0]", "quantize.formats=[]", "train.steps=2", "evaluate.samples=0"]
    given = ["teacher.kind=folder", f"teacher.path={teacher}", *settings]
    pennyweight.run(TINY, given, tmp_path / "r")
    before = len(stages(tmp_path / "r"))
    template = teacher / "chat_template.jinja"
    template.write_text(template.read_text().replace("{{ bos_token }}", "{{ bos_token }}+"))
    pennyweight.run(TINY, given, tmp_path / "r")
    assert {"teacher", "data", "start-0", "kd-0"} <= set(stages(tmp_path / "r")[before:])
    again = len(stages(tmp_path / "r"))
    pennyweight.run(TINY, given, tmp_path / "r")
    assert len(stages(tmp_path / "r")) == again and verify(str(tmp_path / "r")).ok
