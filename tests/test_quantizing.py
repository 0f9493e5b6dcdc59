"""``pennyweight quantize``: what is said before is borne out after; recovery recovers; the gate keeps out."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pennyweight import cli, quantizing
from pennyweight.errors import QualityError, RecipeError, RunError, Stopped
from pennyweight.ledger.hashing import hash_file
from pennyweight.model.load import load, save
from pennyweight.model.tokenizer import train_tokenizer
from pennyweight.quant.planning import bytes_of
from pennyweight.quantizing import quantize

TEXTS = [f"{a} plus {b} makes {a + b} and {a * b} when multiplied" for a in range(9) for b in range(9)]


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A small random model with large weights, so that rounding costs something, and texts for it."""
    folder = tmp_path_factory.mktemp("quantizing")
    tokenizer = train_tokenizer(TEXTS, 128, 64)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.15, **sizes)
    save(LlamaForCausalLM(config), tokenizer, folder / "parent")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return folder / "parent"


@pytest.fixture
def asked(parent, tmp_path):
    """Keyword arguments of a quick quantisation, with a place for the copy."""
    return {"model": str(parent), "data": str(parent.parent / "texts.jsonl"), "out": str(tmp_path / "copy")}


def test_what_was_said_before_is_what_is_found_after(asked, parent, tmp_path):
    found = quantize(**asked, fmt="int4", method="nearest")
    size = (tmp_path / "copy" / "model.safetensors").stat().st_size
    assert found["bytes"] == size and 0.9 * size < found["predicted"]["bytes"] < size
    kl, predicted = found["kl"]["mean"], found["predicted"]["kl"]["mean"]
    assert 0.5 < predicted / kl < 2, f"{predicted:.4f} predicted, {kl:.4f} found"
    assert 0 < found["agreement"]["low"] <= found["agreement"]["mean"] < 1
    assert set(found["copy"]) == set(found["parent"]) == {"bits_per_byte", "ece"}
    kept = json.loads((tmp_path / "copy" / "pennyweight.json").read_text())
    assert kept["parent"]["fingerprint"] == load(str(parent)).fingerprint and kept["kl"] == found["kl"]
    assert [p.name for p in tmp_path.iterdir() if "copy" in p.name] == ["copy"]
    with pytest.raises(RunError, match="is there already"):
        quantize(**asked)


@pytest.mark.parametrize("fmt", ["int3", "nvfp4", "mxfp4"])
def test_calibration_and_recovery_each_bring_the_copy_nearer(asked, tmp_path, fmt):
    kl = {}
    for name, how in {"nearest": {"method": "nearest"}, "gptq": {}, "taught": {"recover": 60}}.items():
        found = quantize(**{**asked, "out": str(tmp_path / name)}, fmt=fmt, **how)
        kl[name] = found["kl"]["mean"]
    assert found["recovered"]["steps"] == 60 and found["recovered"]["tokens"] > 0
    assert kl["gptq"] < 0.95 * kl["nearest"] and kl["taught"] < 0.9 * kl["gptq"], kl


def test_a_copy_that_is_not_good_enough_is_not_kept(asked, tmp_path, monkeypatch, capsys):
    argv = ["quantize", asked["model"], "--data", asked["data"], "--out", asked["out"], "--format", "ternary"]
    monkeypatch.setattr(sys, "argv", ["pennyweight", *argv, "--min-agreement", "0.999"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    told = [x for x in capsys.readouterr().err.splitlines() if x.startswith("pennyweight: ")]
    assert stopped.value.code == 2 and len(told) == 1 and "less than the 99.9 % of --min-agreement" in told[0]
    assert not (tmp_path / "copy").exists()
    with pytest.raises(QualityError):
        quantize(**asked, fmt="ternary", min_agreement=0.999)
    assert quantize(**asked, fmt="ternary", min_agreement=0.0)["agreement"]["mean"] < 0.999
    assert (tmp_path / "copy" / "config.json").exists()


def test_a_budget_is_kept_to_and_spent_well(asked, tmp_path):
    uniform = quantize(**{**asked, "out": str(tmp_path / "int4")}, fmt="int4", method="nearest")
    budget = uniform["predicted"]["bytes"]
    found = quantize(**asked, fmt="mixed", budget=budget, method="nearest")
    assert found["predicted"]["bytes"] <= budget and len(found["predicted"]["linears"]) > 1
    assert found["predicted"]["kl"]["mean"] <= uniform["predicted"]["kl"]["mean"]
    with pytest.raises(RecipeError, match=r"the smallest copy takes [\d,]+ bytes, more than the budget of 5,000"):
        quantize(**{**asked, "out": str(tmp_path / "x")}, fmt="mixed", budget="5kB")
    with pytest.raises(RecipeError, match="there is nothing to quantise"):
        quantize(**{**asked, "out": str(tmp_path / "x")}, fmt="mixed", budget="1GB")
    for wrong in ({"fmt": "mixed"}, {"budget": "1MB"}):
        with pytest.raises(RecipeError, match="give both"):
            quantize(**{**asked, "out": str(tmp_path / "x")}, **wrong)


def test_a_plan_writes_nothing(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = quantize(**{**asked, "out": None}, fmt="nvfp4", plan=True)
    assert found["predicted"]["kl"]["mean"] > 0 and "copy" not in found
    assert not list(tmp_path.iterdir())


def test_a_stopped_recovery_goes_on_to_the_same_copy(asked, tmp_path, monkeypatch):
    how = {"recover": 12, "samples": 60}
    quantize(**{**asked, "out": str(tmp_path / "whole")}, **how)

    @contextmanager
    def after_five():
        steps = iter(range(100))
        yield lambda: next(steps) >= 4

    with monkeypatch.context() as m, pytest.raises(Stopped):
        m.setattr(quantizing, "stoppable", after_five)
        quantize(**asked, **how)
    assert not (tmp_path / "copy").exists()
    assert quantize(**asked, **how)["recovered"]["steps"] == 12
    weights = [hash_file(tmp_path / name / "model.safetensors") for name in ("whole", "copy")]
    assert weights[0] == weights[1]


def test_the_models_own_samples_do_where_there_are_no_data(parent, tmp_path):
    found = quantize(str(parent), "int8", str(tmp_path / "copy"), samples=24)
    assert found["samples"] == "samples of parent" and found["kl"]["mean"] < 0.01


@pytest.mark.parametrize(
    ("text", "want"),
    [("1.2GB", 1_200_000_000), ("800 MB", 800_000_000), ("2KiB", 2048), ("300k", 300_000), ("77", 77), (99, 99)],
)
def test_budgets_are_read(text, want):
    assert bytes_of(text) == want


@pytest.mark.parametrize("text", ["", "much", "-3GB", "1.2.3MB", "0", "5 elephants"])
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(RecipeError, match="cannot read the budget"):
        bytes_of(text)
