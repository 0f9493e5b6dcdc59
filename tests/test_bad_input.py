"""Bad input through the command line: one clear sentence, exit code 2, nothing lost, no traceback."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from pennyweight.model.load import load, save
from pennyweight.model.tokenizer import train_tokenizer
from pennyweight.quant.export import export, formats_of
from pennyweight.quant.rounding import rounded_to

TEXTS = ["one two three four five six seven eight nine ten. " * 3, "what is 1 + 2?\n3", "나는 학생입니다"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A tiny random causal model with a chat template."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    tokenizer = train_tokenizer(TEXTS, 128, 64)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    save(LlamaForCausalLM(config), tokenizer, folder)
    return folder


@pytest.fixture
def rows(tmp_path):
    """A small JSONL of pairs."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"what is {i} + 2?", "response": "three"}) + "\n" for i in range(40)))
    return file


@pytest.fixture
def broken(teacher, tmp_path):
    """A copy of the teacher, to break."""
    return Path(shutil.copytree(teacher, tmp_path / "broken"))


@pytest.fixture
def says(typed):
    """Run a command that must fail with exit code 2; gives its one sentence."""

    def run(*argv, code=2) -> str:
        ended, _, err = typed(*argv)
        told = [x for x in err.splitlines() if x.startswith("pennyweight: ")]
        assert ended == code
        assert len(told) == 1, told
        return told[0]

    return run


def distill(teacher, *more, out):
    quick = ("--steps", 2, "--seeds", 1, "--set", "compute.threads=1")
    return ("distill", "--teacher", teacher, "--cut", "layers=1", *quick, *more, "--out", out)


def test_missing_model_folder(says, tmp_path):
    said = says(*distill("./nowhere", out=tmp_path / "r"))
    assert "no model folder at ./nowhere" in said and "give a folder" in said


def test_a_folder_that_is_no_model(says, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no config.json" in says(*distill(tmp_path / "empty", out=tmp_path / "r"))


def test_not_a_causal_model(says, broken, tmp_path):
    model = BertForMaskedLM(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    )
    model.save_pretrained(broken)
    assert "not a causal language model" in says(*distill(broken, out=tmp_path / "r"))


@pytest.mark.parametrize("keep", [0, 5, 200])
def test_broken_safetensors(says, broken, tmp_path, keep):
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    said = says(*distill(broken, out=tmp_path / "r"))
    assert "model.safetensors is not a whole safetensors file" in said and "again" in said


def test_missing_weights_are_not_made_up(says, broken, tmp_path):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert "lacks weights" in says("chat", broken, "--prompt", "hi")


def test_pickled_weights_are_refused(says, broken):
    (broken / "model.safetensors").unlink()
    torch.save({}, broken / "pytorch_model.bin")
    assert "convert them to safetensors" in says("chat", broken, "--prompt", "hi")


def test_code_that_comes_with_a_model_is_not_run(says, broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    (broken / "evil.py").write_text("raise SystemExit('ran')")
    assert "--trust-remote-code" in says("evaluate", broken, "--tasks", "chain_sum")


def test_a_tokenizer_that_knows_no_character_of_the_data(says, teacher, broken, rows, tmp_path):
    train_tokenizer(["ABC xyz"], 64, 64).save_pretrained(broken)
    said = says("distill", "--teacher", teacher, "--student", broken, "--data", rows, "--out", tmp_path / "r")
    assert "samples can be used: the student's tokenizer spells a text otherwise" in said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "no rows"),
        ("\n\n", "no rows"),
        ('{"prompt": "what is 1 + 2?", "response": "3"}\n{"prompt": \n', "line 2"),
        ('{"prompt": "what is 1 + 2?", "response": "3"}\n[1, 2]\n', "line 2"),
        ('{"prompt": "a", "response": "3"}\n\n{"prompt": 5, "response": "3"}\n', "line 3"),
        ('{"colour": "red"}\n', "colour"),
    ],
)
def test_malformed_jsonl(says, teacher, tmp_path, text, expected):
    (tmp_path / "data.jsonl").write_text(text)
    said = says(*distill(teacher, "--data", tmp_path / "data.jsonl", out=tmp_path / "r"))
    assert "data.jsonl" in said and expected in said


def test_missing_data(says, teacher, tmp_path):
    assert "nowhere.jsonl" in says(*distill(teacher, "--data", tmp_path / "nowhere.jsonl", out=tmp_path / "r"))


def test_a_prompt_longer_than_the_context(says, teacher, tmp_path):
    rows = [{"prompt": f"what is {i} + {i}?", "response": "3"} for i in range(20)] + [
        {"prompt": "one two " * 90, "response": "3"}
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = says(*distill(teacher, "--data", tmp_path / "data.jsonl", out=tmp_path / "r"))
    assert "context" in said and "drop" in said


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("run", "train.stepz=5"), "did you mean 'steps'"),
        (("run", "nowhere.toml"), "no recipe at nowhere.toml"),
        (("run", "a.toml", "b.toml"), "one recipe at a time"),
        (("run", "compute.device=cuda:9"), "cpu"),
        (("run", "compute.device=toaster"), "no device named 'toaster'"),
        (("run", "method.divergence=jsd"), "set targets.kind to dense"),
        (("distill", "--teacher", "x"), "say which student"),
        (("show", "nowhere"), "not a RUN folder"),
        (("report", "nowhere"), "not a RUN folder"),
        (("ledger", "verify", "nowhere"), "not a RUN folder"),
        (("evaluate", "x"), "nothing to evaluate on"),
        (("quantize", "x", "--out", "y", "--format", "int5"), "int5"),
        (("quantize", "x", "--out", "y"), "x is not a folder"),
        (("quantize", "x"), "give --out FOLDER"),
        (("quantize", "x", "--out", "y", "--method", "magic"), "magic"),
        (("quantize", "x", "--out", "y", "--min-agreement", "99"), "is no share; give a number from 0 to 1"),
        (("quantize", "x", "--out", "y", "--format", "mixed", "--budget", "lots"), "cannot read the budget"),
        (("fly",), "fly"),
        (("run", "--outt", "x"), "--out"),
    ],
)
def test_commands_and_settings(says, argv, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expected in says(*argv)
    assert not (tmp_path / "runs").exists()


def test_tasks_that_are_not_there(says, teacher):
    assert "chain_sum" in says("evaluate", teacher, "--tasks", "chain_sums")
    assert "min_terms" in says("evaluate", teacher, "--tasks", "chain_sum:min_trms=2")


def test_harder_problems_that_are_not_there_are_refused_before_anything_is_trained(says, teacher, rows, tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f'name = "r"\n[teacher]\nkind = "folder"\npath = "{teacher}"\n[student]\nkind = "cut"\nlayers = 1\n'
        f'[data.source]\nkind = "files"\npath = "{rows}"\n[[evaluate.harder]]\nname = "chain_sums"\n'
    )
    assert "chain_sum" in says("run", recipe, "--out", tmp_path / "runs")
    assert not (tmp_path / "runs" / "arms").exists()


def test_texts_that_cannot_be_used(says, teacher, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    assert "empty.txt" in says("compare", teacher, teacher, "--text", tmp_path / "empty.txt")
    assert "none.txt" in says("evaluate", teacher, "--text", tmp_path / "none.txt")


def test_layers_that_cannot_be_cut(says, teacher, rows, tmp_path):
    said = says(
        "distill",
        "--teacher",
        teacher,
        "--cut",
        "layers=9",
        "--data",
        rows,
        "--out",
        tmp_path / "r",
    )
    assert "teacher of 2 layers" in said


def test_read_only_output_folder(says, teacher):
    assert "cannot write the RUN folder /proc/nothing" in says(*distill(teacher, out="/proc/nothing"))


def test_out_is_a_file(says, teacher, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "choose another" in says(*distill(teacher, out=tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_so(says, teacher, rows, tmp_path, monkeypatch, number):
    def full(*args, **kw):
        raise OSError(number, "No space left on device", str(tmp_path / "r" / "x"))

    monkeypatch.setattr("pennyweight.stages.write_samples", full)
    said = says(*distill(teacher, "--data", rows, out=tmp_path / "r"))
    assert "disk is full" in said and "the same command goes on" in said


@pytest.mark.skipif(
    not shutil.which("mount") or os.geteuid() != 0,
    reason="mounting a small disk needs root",
)
def test_a_disk_that_is_really_full_loses_nothing(typed, teacher, rows, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        argv = [*map(str, distill(teacher, "--data", rows, out=disk / "r"))]
        run = subprocess.run([sys.executable, "-m", "pennyweight.cli", *argv], capture_output=True, text=True)
        assert run.returncode == 2 and "Traceback" not in run.stderr, run.stderr[-2000:]
        assert "full" in run.stderr.splitlines()[-1] or "space" in run.stderr.splitlines()[-1]
        subprocess.run(["mount", "-o", "remount,size=40m", disk], check=True)
        code, _, err = typed(*argv)
        assert code == 0, err[-2000:]
    finally:
        subprocess.run(["umount", "--lazy", disk])  # this process may hold files of it


def test_prompts_that_leave_no_room_are_refused_or_left_out_and_counted(says, typed, teacher, tmp_path):
    rows = [{"prompt": f"what is {i}?"} for i in range(60)] + [{"prompt": "what is " * 60 + f"{i}?"} for i in range(20)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    short = ("--set", "data.responses.max_tokens=4", "--set", "quantize.formats=[]", "--set", "data.eval_fraction=0.3")
    command = distill(teacher, "--data", tmp_path / "p.jsonl", *short, out=tmp_path / "r")
    said = says(*command)
    assert "prompts leave no room for a response in the context of 64 tokens; set data.too_long=drop" in said
    code, _, err = typed(*command, "--set", "data.too_long=drop")
    assert code == 0, err[-500:]
    kept = [json.loads(x) for x in (tmp_path / "r" / "data" / "train.jsonl").read_text().splitlines()]
    assert kept and all(len(x["prompt"][0]["content"]) < 20 for x in kept)


def test_a_student_of_the_same_tokenizer_and_another_padding_is_aligned(typed, teacher, rows, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(teacher)
    model.resize_token_embeddings(160)
    save(model, AutoTokenizer.from_pretrained(teacher), tmp_path / "padded")
    command = ("distill", "--teacher", teacher, "--student", tmp_path / "padded", "--data", rows, "--steps", 2)
    code, _, err = typed(*command, "--seeds", 1, "--out", tmp_path / "r")
    assert code == 0, err[-500:]
    assert "the student's vocabulary of 160 is set to " in err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "r" / "student").config.vocab_size < 160


def test_a_low_bit_folder_is_not_quantised_again(says, teacher, tmp_path):
    model = load(str(teacher)).model
    export(model, rounded_to(model, formats_of(model, "int4", 32))[0], teacher, tmp_path / "q")
    assert "low-bit copy already" in says("quantize", tmp_path / "q", "--format", "int8", "--out", tmp_path / "again")
    assert "groups of 500 divide none" in says("quantize", teacher, "--group", "500", "--out", tmp_path / "x")
