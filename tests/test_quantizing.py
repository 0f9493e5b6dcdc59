"""``pennyweight quantize``: what is said before is borne out after; recovery recovers; the gate keeps out."""

from __future__ import annotations

import importlib.util
import json
import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from architectures import make, save_with_tokenizer
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from pennyweight import quantizing
from pennyweight.errors import ModelError, QualityError, RecipeError, RunError, Stopped
from pennyweight.ledger.hashing import hash_file
from pennyweight.model.load import load, save
from pennyweight.model.tokenizer import train_tokenizer
from pennyweight.quant import gguf_check, gguf_file
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
    data = str(parent.parent / "texts.jsonl")
    return {"model": str(parent), "data": data, "out": str(tmp_path / "copy"), "threads": 1}


def test_what_was_said_before_is_what_is_found_after(asked, parent, tmp_path):
    found = quantize(**asked, fmt="int4", method="nearest")
    size = (tmp_path / "copy" / "model.safetensors").stat().st_size
    assert found["bytes"] == size and 0.97 * size < found["predicted"]["bytes"] < 1.03 * size
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


def test_a_copy_that_is_not_good_enough_is_not_kept(asked, tmp_path, typed):
    argv = ["quantize", asked["model"], "--data", asked["data"], "--out", asked["out"], "--format", "ternary"]
    code, _, err = typed(*argv, "--min-agreement", "0.999")
    told = [x for x in err.splitlines() if x.startswith("pennyweight: ")]
    assert code == 2 and len(told) == 1 and "less than the 99.9 % of --min-agreement" in told[0]
    assert not (tmp_path / "copy").exists()
    with pytest.raises(QualityError):
        quantize(**asked, fmt="ternary", min_agreement=0.999)
    assert quantize(**asked, fmt="ternary", min_agreement=0.0)["agreement"]["mean"] < 0.999
    assert (tmp_path / "copy" / "config.json").exists()


def test_a_budget_is_kept_to_and_spent_well(asked, tmp_path):
    uniform = quantize(**{**asked, "out": str(tmp_path / "int4")}, fmt="int4", method="nearest")
    budget = uniform["predicted"]["bytes"]
    found = quantize(**asked, fmt="mixed", budget=budget, method="nearest")
    assert found["bytes"] <= budget and found["predicted"]["bytes"] <= budget and len(found["predicted"]["linears"]) > 1
    assert found["predicted"]["kl"]["mean"] < uniform["predicted"]["kl"]["mean"]
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


@pytest.mark.parametrize("on_policy", [0.0, 0.5])
def test_a_live_parent_teaches_too_and_the_copy_may_write_the_texts(asked, tmp_path, on_policy):
    kl = quantize(**{**asked, "out": str(tmp_path / "rounded")}, fmt="int3")["kl"]["mean"]
    found = quantize(**asked, fmt="int3", recover=60, targets="live", on_policy=on_policy)
    assert found["recovered"]["steps"] == 60 and found["kl"]["mean"] < 0.9 * kl
    with pytest.raises(RecipeError, match="--on-policy=2 is no share; give a number from 0 to 1"):
        quantize(**{**asked, "out": str(tmp_path / "other")}, recover=2, on_policy=2)


@pytest.mark.parametrize("how", [{}, {"targets": "live", "on_policy": 0.4}], ids=["kept", "on-policy"])
def test_a_stopped_recovery_goes_on_to_the_same_copy(asked, tmp_path, monkeypatch, how):
    how = {"recover": 12, "samples": 60, **how}
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
    found = quantize(str(parent), "int8", str(tmp_path / "copy"), samples=24, threads=1)
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


@pytest.mark.parametrize("fmt", ["bf16", "int8", "int4"])
def test_a_gguf_is_opened_by_transformers_and_llama_cpp(stories, tmp_path, fmt):
    pytest.importorskip("gguf", reason='needs gguf; pip install -e ".[gguf]"')
    found = quantize(str(stories), fmt, str(tmp_path / "copy"), layout="gguf", samples=24, method="nearest", threads=1)
    file = tmp_path / "copy" / f"stories260K-{fmt}.gguf"
    assert found["bytes"] == file.stat().st_size and (tmp_path / "copy" / "pennyweight.json").exists()
    if importlib.util.find_spec("llama_cpp"):
        assert "gives the same ids on 12 hard texts" in found["engine"]
    else:
        assert "not asked of llama.cpp" in found["engine"]


@pytest.mark.parametrize("broken", ["rotary order", "codes", "vocabulary"])
def test_a_broken_gguf_is_not_kept(stories, tmp_path, monkeypatch, broken):
    pytest.importorskip("gguf", reason='needs gguf; pip install -e ".[gguf]"')
    if broken == "rotary order":
        monkeypatch.setattr(gguf_file, "_turned", lambda x, heads: x)
    elif broken == "codes":
        whole = gguf_file.packed
        monkeypatch.setattr(gguf_file, "packed", lambda codes, scale, fmt: whole(codes.flip(1), scale, fmt))
    else:
        if not importlib.util.find_spec("llama_cpp"):
            pytest.skip('needs llama-cpp-python; pip install -e ".[llama]"')
        right = gguf_file.vocabulary_of
        other = lambda tokenizer, size: replace(right(tokenizer, size), scores=right(tokenizer, size).scores[::-1])  # noqa: E731
        monkeypatch.setattr(gguf_file, "vocabulary_of", other)
    said = "would cut" if broken == "vocabulary" else "computes something else than was meant"
    with pytest.raises(ModelError, match=said):
        quantize(str(stories), "int8", str(tmp_path / "copy"), layout="gguf", samples=24, method="nearest", threads=1)
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("broken", ["cut short", "no chat template"])
def test_a_gguf_that_is_not_whole_is_not_kept(tmp_path, monkeypatch, broken):
    gguf = pytest.importorskip("gguf", reason='needs gguf; pip install -e ".[gguf]"')
    parent = save_with_tokenizer(make("qwen2-biases"), tmp_path / "parent")
    if broken == "cut short":
        whole, said = gguf_check.write_gguf, "transformers does not open"

        def cut(model, tokenizer, codes, out, *more):
            whole(model, tokenizer, codes, out, *more)
            out.write_bytes(out.read_bytes()[:-5000])

        monkeypatch.setattr(gguf_check, "write_gguf", cut)
    else:
        said = "has another tokenizer.chat_template than its parent"
        monkeypatch.setattr(gguf.GGUFWriter, "add_chat_template", lambda self, text: None)
    with pytest.raises(ModelError, match=said):
        quantize(str(parent), "int8", str(tmp_path / "copy"), layout="gguf", samples=24, method="nearest", threads=1)
    assert not (tmp_path / "copy").exists()


def of_heads(swap, order):
    """A change of a stored Linear of queries: its rows, packed ones and scales, in another order."""

    def change(tensors):
        for name in tensors:
            if "q_proj.weight_" in name and "shape" not in name:
                heads = tensors[name].view(4, -1, tensors[name].shape[1])
                tensors[name] = (heads[[1, 0, 2, 3]] if swap else heads[:, order]).reshape(tensors[name].shape)

    return change


def turned_scales(tensors):
    for name in tensors:
        if name.endswith("o_proj.weight_scale"):  # 64 x 2
            tensors[name] = tensors[name].T.contiguous()


def scales_of_others(tensors):
    for name in tensors:
        if name.endswith("o_proj.weight_scale"):
            tensors[name] = tensors[name].T.reshape(tensors[name].shape).contiguous()


BROKEN = {
    "heads swapped": (of_heads(True, None), "computes something else than was meant"),
    "rotary layout": (of_heads(False, [i // 2 + i % 2 * 8 for i in range(16)]), "something else than was meant"),
    "scales transposed": (turned_scales, "lacks weights or has them in another shape"),
    "scales in another order": (scales_of_others, "computes something else than was meant"),
    "file cut short": ("cut", "is not a whole safetensors file"),
    "no chat template": ("chat_template.jinja", "has another chat template than its parent"),
    "no end of response": ("generation_config.json", "has another list of tokens that end a response"),
    "other special tokens": ("tokenizer_config.json", "than its parent"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_export_is_not_kept(asked, parent, tmp_path, monkeypatch, what):
    """The chat template and end tokens are the parent's, which here speaks by one and ends with two."""
    change, said = BROKEN[what]
    speaking = tmp_path / "speaking"
    shutil.copytree(parent, speaking)
    (speaking / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    (speaking / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    whole = quantizing.export

    def breaking(model, codes, parent, place, layout):
        made, weights = whole(model, codes, parent, place, layout), place / "model.safetensors"
        if change == "cut":
            weights.write_bytes(weights.read_bytes()[:-1000])
        elif isinstance(change, str):
            (place / change).unlink()
        else:
            tensors = load_file(weights)
            change(tensors)
            save_file(tensors, weights, metadata={"format": "pt"})
        return made

    monkeypatch.setattr(quantizing, "export", breaking)
    with pytest.raises(ModelError, match=said):
        quantize(**{**asked, "model": str(speaking)}, fmt="int4", method="nearest")
    assert not (tmp_path / "copy").exists()


def test_what_has_no_gguf_is_refused_before_anything_is_written(tmp_path):
    pytest.importorskip("gguf", reason='needs gguf; pip install -e ".[gguf]"')
    parent = save_with_tokenizer(make("gemma2-softcap-and-window"), tmp_path / "parent")
    with pytest.raises(ModelError, match="Gemma2ForCausalLM is not written as GGUF"):
        quantize(str(parent), "int4", str(tmp_path / "copy"), layout="gguf")
    for layout, fmt in (("gguf", "nvfp4"), ("deepseek", "int4"), ("compressed-tensors", "bf16")):
        with pytest.raises(RecipeError, match=f"no format in {layout} is named"):
            quantize(str(parent), fmt, str(tmp_path / "copy"), layout=layout)
    with pytest.raises(RecipeError, match="no layout is named"):
        quantize(str(parent), "int4", str(tmp_path / "copy"), layout="onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["parent"]


def test_a_kv_cache_in_8_bits_is_measured_too(asked, parent, tmp_path):
    found = quantize(**asked, fmt="int8", method="nearest", kv_cache="int8")
    cache = found["kv_cache"]
    assert cache["bytes"] == 3 * 2 * 4 * (16 + 2) and cache["bytes_in_16_bits"] == 3 * 2 * 4 * 16 * 2
    assert found["kl"]["mean"] < cache["kl"]["mean"] < 0.05
    with pytest.raises(RecipeError, match="no format of a KV cache is named 'int4'; use int8 or fp8"):
        quantize(str(parent), out=str(tmp_path / "other"), data=asked["data"], kv_cache="int4")


@pytest.mark.parametrize("fmt", ["fp8_block", "fp8_block_pow2"])
def test_deepseeks_layout_is_opened_again_too(tmp_path, fmt):
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = LlamaConfig(vocab_size=113, max_position_embeddings=128, initializer_range=0.15, **sizes, **tokens)
    parent = save_with_tokenizer(LlamaForCausalLM(config).eval(), tmp_path / "parent")
    found = quantize(str(parent), fmt, str(tmp_path / "copy"), layout="deepseek", samples=24, threads=1)
    assert 0 < found["kl"]["mean"] < 0.2
    opened = load(str(tmp_path / "copy")).model
    assert {p.dtype for p in opened.parameters()} == {torch.float32} and opened.low_bit
    assert type(opened.model.layers[0].mlp.up_proj) is torch.nn.Linear


@pytest.mark.parametrize("fmt", ["int4", "int8"])
def test_an_opened_copy_can_be_moved_to_another_device(asked, fmt):
    """compressed-tensors leaves layers that hold on to the device they were read on, and send their inputs there."""
    quantize(**asked, fmt=fmt, samples=24)
    moved = load(asked["out"]).model.to("meta")
    assert {t.device.type for t in (*moved.parameters(), *moved.buffers())} == {"meta"}
    ids = torch.zeros((1, 4), dtype=torch.long, device="meta")
    assert moved(input_ids=ids).logits.device.type == "meta"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"on_policy": 0.5}, "say how a copy is taught; give --recover STEPS, too"),
        ({"targets": "live"}, "say how a copy is taught; give --recover STEPS, too"),
        ({"targets": "alive", "recover": 3}, "no kind of targets is named 'alive'; use kept or live"),
        ({"kv_cache": "int4"}, "no format of a KV cache is named 'int4'; use int8 or fp8"),
        ({"method": "best"}, "no method is named 'best'; use absmax or nearest or awq or gptq"),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_model_is_opened(asked, monkeypatch, how, said):
    monkeypatch.setattr(quantizing, "load", None)
    with pytest.raises(RecipeError, match=said):
        quantize(**asked, **how)
