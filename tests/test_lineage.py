"""Whose traces a model was tuned on: written, carried along, and gone by before offline distillation."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_line import stages

from pennyweight.errors import MethodError, ModelError
from pennyweight.model.lineage import TAUGHT_BY, check_start, read_lineage, tuned_further
from pennyweight.model.load import taught_by
from pennyweight.records import Taught
from pennyweight.settings import GrpoMethod, KdMethod, OfflineMethod, OnPolicyMethod, SftMethod

A = {"name": "a", "fingerprint": "aa" * 32}
B = {"name": "b", "fingerprint": "bb" * 32}
NAMED_GIVEN = {"name": "given", "fingerprint": "dd" * 32}
BOTH = {"name": "a, b", "fingerprint": "cc" * 32, "members": {"x": A, "y": B}}
OF_A, OF_B = (Taught(t["name"], t["fingerprint"], "sft", "run") for t in (A, B))
UNKNOWN = Taught("r1.jsonl", None, "sft", "run")


def data(*authors):
    return {"authors": dict.fromkeys(authors, 3), "source": "r1.jsonl"}


@pytest.mark.parametrize(
    ("before", "method", "teacher", "authors", "after"),
    [
        (None, SftMethod(), A, ["a"], (OF_A,)),
        ((), SftMethod(), A, ["given"], (UNKNOWN,)),
        ((OF_B,), SftMethod(), A, ["a", "given"], (OF_B, OF_A, UNKNOWN)),
        ((), SftMethod(), NAMED_GIVEN, ["given"], (UNKNOWN,)),  # which may as well have come with the data
        ((OF_A,), SftMethod(), A, ["a"], (OF_A,)),
        ((), SftMethod(), BOTH, ["a", "b"], (OF_A, OF_B)),
        ((), KdMethod(), A, ["given"], (Taught("a", A["fingerprint"], "kd", "run"),)),
        (None, GrpoMethod(), A, ["a"], None),
        ((OF_A,), GrpoMethod(), B, ["given"], (OF_A,)),
        ((OF_A,), OnPolicyMethod(), B, ["b"], (OF_A,)),
        ((), OnPolicyMethod(given=0.5), B, ["b"], (Taught("b", B["fingerprint"], "on_policy", "run"),)),
        ((OF_A,), OfflineMethod(), A, ["given"], (OF_A,)),
    ],
)
def test_what_a_method_adds(before, method, teacher, authors, after):
    assert tuned_further(before, method, teacher, data(*authors), "run", False) == after


def test_a_start_of_another_teacher_is_refused_and_one_that_does_not_say_is_told():
    assert check_start((OF_A,), A) is None and check_start((OF_A, OF_A), A) is None
    with pytest.raises(MethodError) as e:
        check_start((OF_A, OF_B), A)
    said = str(e.value)
    assert "(sft of run run) on b (bbbbbbbbbbbb), and the teacher is a (aaaaaaaaaaaa)" in said
    assert "method.kind=sft with this teacher" in said and "method.kind=on_policy" in said and "\n" not in said
    for lineage, words in (
        (None, "the start's folder does not say"),
        ((), "has been tuned on nobody's"),
        ((OF_A, UNKNOWN), "those of r1.jsonl, which it was tuned on, are its teacher's"),
        ((Taught("deepseek", "dd", "sft", "run", served=True),), "nobody knows whether those of deepseek"),
    ):
        assert words in (check_start(lineage, A) or "")


def test_a_damaged_file_is_told(tmp_path):
    for text in ("", "[]", '{"taught_by": [{"nome": 1}]}'):
        (tmp_path / TAUGHT_BY).write_text(text)
        with pytest.raises(ModelError, match="is damaged.*or remove that file"):
            read_lineage(tmp_path)


def test_a_run_writes_it_and_its_copies_carry_it(tiny_run):
    out, summary = tiny_run
    mine = summary["teacher"]["fingerprint"]
    (kd,) = taught_by(str(out / "student")) or ()
    assert (kd.fingerprint, kd.method, kd.run, kd.served) == (mine, "kd", "tiny", False)
    (sft,) = taught_by(str(out / "arms" / "sft-0")) or ()
    assert sft.fingerprint is None and sft.name == summary["data"]["source"]  # worked solutions are no teacher's
    assert taught_by(str(out / "arms" / "base-0")) == ()
    for copy in ("student-int8", "student-int4"):
        assert taught_by(str(out / copy)) == (kd,)
    assert taught_by(str(out / "teacher")) is None


def test_offline_goes_by_it(tiny_run, tmp_path, typed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("teacher", "student"):
        shutil.copytree(tiny_run[0] / name, tmp_path / name)
    other = shutil.copytree(tmp_path / "teacher", tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights = {k: w + 0.01 * torch.ones_like(w) for k, w in weights.items()}
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    rows = [{"prompt": f"Calculate {i} + {j}.", "response": f"{i + j}"} for i in range(5) for j in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    asked = ["distill", "--data", "rows.jsonl", "--student", "student", "--method", "offline", "--steps", "2"]
    asked += ["--seeds", "1", "--batch", "4"]
    small = ("method.rollouts=8", "method.max_tokens=4", "targets.kind=top_k", "targets.k=4", "control=false")
    small += ("quantize.formats=[]", "evaluate.samples=0", "evaluate.max_tokens=4", "data.context=64")
    asked += [x for s in small for x in ("--set", s)]
    code, _, err = typed(*asked, "--teacher", "other", "--out", "refused")
    assert code == 2 and "this one was tuned (kd of run tiny) on teacher" in err and err.count("pennyweight: ") == 1
    assert not (tmp_path / "refused" / "data").exists() and not (tmp_path / "refused" / "arms").exists()

    code, _, err = typed(*asked, "--teacher", "teacher", "--out", "sound")
    assert code == 0 and "sound for a start" not in err, err
    assert taught_by("sound/student") == taught_by("student")
    summary = json.loads((tmp_path / "sound" / "summary.json").read_text())
    assert summary["start"] == {"unsure": None}
    lines = [json.loads(x) for x in (tmp_path / "sound" / "metrics.jsonl").read_text().splitlines()]
    (written,) = [x for x in lines if x["stage"] == "rollout"]  # which the summary of a chain counts tokens by
    assert (written["arm"], written["seed"], written["step"]) == ("offline", 0, 1) and written["generated"] > 0
    for changes, reruns in (
        (("targets.k=5",), {"targets", "offline-0"}),
        (("targets.k=5", "data.context=48"), {"data", "offline-0", "evaluate-offline-0", "evaluate-base-0"}),
    ):
        more, before = [x for s in changes for x in ("--set", s)], len(stages(tmp_path / "sound"))
        assert typed(*asked, *more, "--teacher", "teacher", "--out", "sound")[0] == 0
        assert reruns <= set(stages(tmp_path / "sound")[before:]), changes

    (tmp_path / "student" / TAUGHT_BY).unlink()  # as one that was downloaded
    code, _, err = typed(*asked, "--teacher", "other", "--out", "unsure")
    assert code == 0 and "start: offline distillation is sound for" in err
    told = json.loads((tmp_path / "unsure" / "summary.json").read_text())["start"]["unsure"]
    assert "does not say whose it was tuned on" in told and "does not say whose" in (
        tmp_path / "unsure" / "report.html"
    ).read_text(encoding="utf-8")
    assert taught_by("unsure/student") is None


def test_several_teachers_are_told_apart():
    assert tuned_further((), SftMethod(), BOTH, data("b"), "run", False) == (OF_B,)
    with pytest.raises(MethodError):
        check_start((OF_B,), A)
