"""A real teacher that nobody here trained, through the whole line in its smallest form."""

from __future__ import annotations

import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import pennyweight
from pennyweight.commands import verify

SMALL = [
    "data.source.count=60",
    "data.source.max_tokens=64",
    "data.context=96",
    "compute.threads=1",
    "compute.dtype=float32",
    "evaluate.shown=2",
]


def test_its_own_samples_teach_a_student_cut_from_it(stories, tmp_path):
    summary = pennyweight.distill(
        str(stories), cut="layers=2", steps=30, batch=8, seeds=1, settings=SMALL, out=tmp_path / "run"
    )
    assert summary["teacher"]["params"] == 260_032 and summary["arms"]["kd"]["params"] == 123_712
    before, after = (summary["arms"][a]["metrics"]["kl_to_teacher"]["mean"] for a in ("base", "kd"))
    assert after < 0.7 * before
    assert summary["data"]["authors"] == {"stories260K": summary["data"]["train"]}
    assert verify(str(tmp_path / "run")).ok
    sample = json.loads((tmp_path / "run" / "data" / "train.jsonl").read_text().splitlines()[0])
    assert sample["source"] == "samples of stories260K" and len(sample["response"]) > 40
    for name in ("student", "student-int8", "student-int4"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name, dtype=torch.float32)
        ids = AutoTokenizer.from_pretrained(tmp_path / "run" / name)("Once upon a time", return_tensors="pt").input_ids
        assert torch.isfinite(model(ids).logits).all()


def test_it_is_its_own_twin_and_reads_stories_better_than_its_student(stories, tmp_path):
    (tmp_path / "text.txt").write_text("Once upon a time, there was a little girl named Lily. She loved to play. " * 8)
    twin = pennyweight.compare(str(stories), str(stories), str(tmp_path / "text.txt"))
    assert twin["kl_a_to_b"]["mean"] == 0 and twin["agreement"]["mean"] == 1
    assert twin["bits_per_byte_a"]["mean"] == twin["bits_per_byte_b"]["mean"] < 2
