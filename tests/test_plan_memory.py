"""A memory plan against what torch and transformers really keep, allocate, cache and write; and how it is told."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import torch
import transformers as tf
from test_plan_architectures import CONFIGS, on_meta
from torch.profiler import ProfilerActivity, profile

from pennyweight import cli
from pennyweight.errors import ModelError, RecipeError
from pennyweight.loss.chunked import Terms, tiled_loss
from pennyweight.loss.divergence import Divergence
from pennyweight.model.cache import cache_argument
from pennyweight.model.head import forward_hidden, head_of
from pennyweight.plan.architectures import shapes_of
from pennyweight.plan.memory import ACCURACY, Row, copy_bytes, memory
from pennyweight.plan.sizes import WAYS, Way, activation_bytes, cache_bytes, cast_bytes, moment_bytes
from pennyweight.quant.export import formats_of
from pennyweight.quant.footprint import OF_EXPERTS, STORED, stored_bytes
from pennyweight.quant.formats import size
from pennyweight.quant.kv_cache import bytes_of, low_cache
from pennyweight.quant.linear import compute_in
from pennyweight.quant.packing import storable
from pennyweight.report.memory import stacked
from pennyweight.train.optim import adamw

V = 113
FP8_FROM_FLOAT32 = Way("fp8 Linears of float32", 4, "float32", fp8=True)

_SIZES = {
    "vocab_size": V,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {"vocab_size": V, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256, "bos_token_id": 1}
_NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
_LATENT = {
    **_SIZES, "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 16,
    "q_lora_rank": 24, "first_k_dense_replace": 1,
}  # fmt: skip

MODELS = {
    "llama": lambda **more: tf.LlamaConfig(**_SIZES | more),
    "gpt2": lambda **more: tf.GPT2Config(**_GPT2 | more),
    "gpt2-no-dropout": lambda **more: tf.GPT2Config(**_GPT2 | _NO_DROPOUT | more),
    "gpt2-gelu": lambda **more: tf.GPT2Config(**_GPT2 | {"activation_function": "gelu"} | more),
    "mistral-window": lambda **more: tf.MistralConfig(**_SIZES | {"sliding_window": 40} | more),
    "phi3": lambda **more: tf.Phi3Config(**_SIZES | more),
    "qwen3": lambda **more: tf.Qwen3Config(**_SIZES | {"head_dim": 16} | more),
    "gemma2": lambda **more: tf.Gemma2Config(**_SIZES | {"head_dim": 16} | more),
    "gemma3": lambda **more: tf.Gemma3TextConfig(**_SIZES | {"head_dim": 16} | more),
    "mixtral": lambda **more: tf.MixtralConfig(**_SIZES | {"num_local_experts": 4} | more),
    "qwen2-moe": lambda **more: tf.Qwen2MoeConfig(
        **_SIZES | {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48} | more
    ),
    "deepseek-v3": lambda **more: tf.DeepseekV3Config(**_LATENT | more),
}


def shapes(config):
    return shapes_of({**config.to_dict(), "architectures": None})


def in_training(config, way):
    """The model as the loop trains it in that way."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config)
    compute_in(model, "fp8" if way.fp8 else "full", "bfloat16" if way.weight == 2 else "float32")
    return model.train()


def forward(model, way, batch, length):
    ids = torch.randint(0, V, (batch, length))
    with torch.autocast("cpu", torch.bfloat16, enabled=way.autocast):
        return forward_hidden(model, ids, torch.arange(length).expand(batch, length))


def kept(model, way, batch, length):
    """Bytes of everything that autograd keeps of a forward pass, each storage once, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes(), t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        hidden = forward(model, way, batch, length)
    assert hidden.requires_grad
    return sum(n for n, _ in found.values())


def off(model_config, way, length):
    """Share by which the planned activations are off."""
    planned = activation_bytes(shapes(model_config), way, 2, length, "cpu") + cast_bytes(shapes(model_config), way)
    return planned / kept(in_training(model_config, way), way, 2, length) - 1


@pytest.mark.parametrize(
    ("name", "way"),
    [*(("llama", w) for w in (*WAYS, FP8_FROM_FLOAT32)), *(("gpt2", w) for w in WAYS[:3])],
    ids=lambda x: getattr(x, "name", x),
)
def test_activations_are_what_autograd_keeps(name, way):
    config = MODELS[name]()
    for length in (64, 192):  # not fused under autocast, and fused
        assert abs(off(config, way, length)) < 0.001
    other = {"n_inner": 96} if name == "gpt2" else {"num_attention_heads": 8, "head_dim": 24, "intermediate_size": 96}
    wider = MODELS[name](**other)
    assert abs(off(wider, way, 64)) < 0.001


@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("llama", "gpt2")])
def test_activations_of_other_architectures(name):
    config = MODELS[name]()
    for way in WAYS[:4]:
        if not way.fp8 or "gpt2" not in name:
            assert abs(off(config, way, 192)) < (0.005 if name == "mixtral" else 0.03) < ACCURACY, way.name


@pytest.mark.parametrize("way", WAYS, ids=lambda w: w.name)
def test_moments_are_what_the_optimizer_holds(way):
    config = MODELS["llama"]()
    model = in_training(config, way)
    optimizer = adamw(model, 1e-3, (0.9, 0.95), 0.1, way.moments)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    held = sum(
        x.numel() * x.element_size() for state in optimizer.state.values() for n, x in state.items() if n != "step"
    )
    assert moment_bytes(shapes(config), way.moments) == held
    assert sum(p.numel() * p.element_size() for p in model.parameters()) == way.weight * shapes(config).parameters


def peak_of(work) -> int:
    """The most bytes that were allocated at once in it, above what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    now = most = 0
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize(
    ("name", "way", "vocabulary"),
    [("llama", w, 4000) for w in WAYS] + [("gpt2", WAYS[0], 4096), ("llama", WAYS[4], 40_000)],
    ids=lambda x: getattr(x, "name", x),
)
def test_the_peak_is_what_a_step_of_two_micro_batches_allocates(name, way, vocabulary):
    config = MODELS[name](vocab_size=vocabulary)
    model = in_training(config, way)
    optimizer = adamw(model, 1e-3, (0.9, 0.95), 0.1, way.moments)
    batch, length = (1, 16) if vocabulary == 40_000 else (4, 192)

    def micro_batch():
        hidden = forward(model, way, batch, length).flatten(0, 1)
        n = batch * length
        terms = Terms(torch.randint(0, V, (n,)), torch.ones(n), torch.zeros(n), Divergence("forward_kl"))
        tiled_loss(hidden[torch.arange(n)], head_of(model), terms).loss.backward()

    def step():
        micro_batch()
        micro_batch()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # moments are there from here on
    there = way.weight * shapes(config).parameters + moment_bytes(shapes(config), way.moments)
    row = next(r for r in _plan(config, batch, length)["train"] if r["way"] == way.name)
    near = ACCURACY / 2 if row["way"] == "fp8 moments" else 0.005  # whose step takes a little by the size of a tensor
    assert row["peak"] == pytest.approx(there + peak_of(step), rel=near)
    assert (row["optimizer_step"] > row["activations"] + row["logits_tile"]) == (vocabulary == 40_000)


def _plan(config, batch, length, device="cpu"):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return memory(folder, batch, length, device)


@pytest.mark.parametrize("fmt", STORED)
def test_a_weight_takes_what_its_format_says(fmt):
    for rows, columns in [(128, 128), (256, 384), (5, 172), (3, 7), (48, 80), (1, 64), (129, 160), (2, 31)]:
        format_ = storable(fmt, (rows, columns), 32, torch.bfloat16)
        assert stored_bytes(fmt, rows, columns) == (None if format_ is None else size(rows, columns, format_))


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen2-moe", "deepseek-v3", "gpt2"])
@pytest.mark.parametrize("fmt", STORED)
def test_a_copy_takes_what_quantize_writes(name, fmt):
    wide = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8}
    wide |= {} if name in ("llama", "mixtral") else {"moe_intermediate_size": 48}  # which 128 does not divide
    wide |= {"q_lora_rank": 32} if name == "deepseek-v3" else {}  # so that a group divides every width
    config = MODELS[name](**({} if name == "gpt2" else wide))
    model = on_meta(config)
    params = sum(p.numel() for p in model.parameters())
    sparse = name not in ("llama", "gpt2")
    try:
        chosen = formats_of(model, fmt, 32, "deepseek" if sparse and fmt == "fp8_block" else "compressed-tensors")
    except ModelError:
        assert copy_bytes(shapes(config), fmt) is None and (name == "gpt2" or fmt not in (*OF_EXPERTS, "fp8_block"))
        return
    coded = {n: model.get_submodule(n).weight for n in chosen}  # experts have been taken apart
    rest = params - sum(w.numel() for w in coded.values())
    assert copy_bytes(shapes(config), fmt) == 2 * rest + sum(size(*coded[n].shape, f) for n, f in chosen.items())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_kv_cache_is_what_transformers_keeps(name):
    config = CONFIGS[name]()
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    for length in (6, 7):  # below their windows of 8, of which transformers keeps one less
        with torch.no_grad():
            cache, low = tf.DynamicCache(config=config), low_cache(config, "fp8")
            for one in (cache, low):
                model(torch.randint(0, V, (3, length)), use_cache=True, **{cache_argument(model): one})
        assert cache_bytes(shapes(config), 3, length, 16) == bytes_of(cache) / 2  # which is in float32
        assert cache_bytes(shapes(config), 3, length, 8) == bytes_of(low)
    assert cache_bytes(shapes(config), 3, 100, 16) <= 100 / 7 * cache_bytes(shapes(config), 3, 7, 16)


def test_a_window_bounds_the_cache_and_8_bits_have_scales():
    whole, windowed = (shapes(tf.MistralConfig(**_SIZES, sliding_window=w)) for w in (None, 10))
    assert cache_bytes(whole, 1, 40, 16) == 4 * cache_bytes(windowed, 1, 40, 16) == 40 * 3 * 2 * 2 * 16 * 2
    assert cache_bytes(whole, 1, 40, 8) == 40 * 3 * 2 * 2 * (16 + 2)


def test_the_peak_takes_what_is_there_at_once():
    row = Row("", "", weights=1, gradients=10, moments=100, activations=1000, logits_tile=10000, optimizer_step=5000)
    assert row.peak == 11111
    assert Row("", "", 1, 10, 100, 1000, optimizer_step=5000).peak == 5111
    assert Row("", "", 1, kv_cache=10, logits_tile=100).peak == 111


def test_a_gpu_has_larger_tiles_and_smaller_masks():
    config = MODELS["gpt2"](vocab_size=50_000)
    cpu, cuda = (_plan(config, 64, 256, d)["train"][1] for d in ("cpu", "cuda"))
    assert cuda["activations"] < cpu["activations"] and cuda["logits_tile"] > cpu["logits_tile"]
    assert (cuda["weights"], cuda["moments"]) == (cpu["weights"], cpu["moments"])


def test_what_cannot_be_done_is_left_out_and_said():
    found = _plan(MODELS["gpt2"](), 1, 64)
    assert [r["way"] for r in found["train"]] == ["float32", "bfloat16", "all bfloat16"]
    assert {r["way"] for r in found["use"]} == {"bfloat16"}
    assert any("has none: mxfp8, int8" in n for n in found["notes"]) and any(
        "train.precision=fp8" in n for n in found["notes"]
    )
    assert any("fp8_block" in n and "int8" not in n for n in _plan(MODELS["llama"](), 1, 64)["notes"])
    sparse = _plan(MODELS["mixtral"](), 1, 64)
    assert any("are experts" in n for n in sparse["notes"]) and {r["way"] for r in sparse["use"]} >= {"int8", "int4"}
    assert not {r["way"] for r in sparse["use"]} & {"nvfp4", "mxfp4"}


def test_the_settings_are_a_recipes():
    from pennyweight.settings import Compute, Schedule

    tables = {"compute": Compute, "train": Schedule}
    for way in WAYS:
        for setting in way.settings.split():
            (table, _, field), value = setting.partition("=")[0].partition("."), setting.partition("=")[2]
            assert getattr(tables[table](**{field: value}), field) == value


@pytest.fixture
def folder(tmp_path):
    MODELS["llama"]().save_pretrained(tmp_path / "a [bold] model")
    return tmp_path / "a [bold] model"


def told(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["pennyweight", "memory", *map(str, argv)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out = capsys.readouterr()
    return stopped.value.code, out.out, out.err


def test_the_command_prints_tables_of_80_columns_and_writes_a_page(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    page = tmp_path / "there" / "page.html"
    code, out, _ = told(monkeypatch, capsys, folder, "--batch", 2, "--length", 64, "--out", page)
    out = out.replace("\u00a0", " ")
    assert code == 0 and "a [bold] model, a llama of 0.14 M parameters, takes" in out and f"page: {page}" in out
    assert "2 rows of 64 tokens at a time on a GPU" in out and "an estimate to 10 %" in out
    tables = out[out.index("to train     ") : out.index("float32: ")]
    assert all(len(line) <= 80 for line in tables.splitlines()) and "int4, 8-bit KV" in tables
    text = page.read_text()
    assert text.startswith("<!doctype html>") and "<script" not in text and "http" not in text.replace("http-equiv", "")
    found = memory(str(folder), 2, 64)
    for row in (*found["train"], *found["use"]):
        assert row["way"] in text and (row["settings"] in text or row["settings"].startswith("KV cache"))
    assert text.count("<svg") == 4 and "optimizer&#x27;s step" in text


def test_bars_are_as_long_as_their_parts_and_stand_one_behind_the_other():
    rng = random.Random()
    parts = ("weights", "gradients", "moments", "activations", "logits_tile")
    rows = [{"way": w, "settings": "", "peak": 0, **{p: rng.randint(10**6, 10**9) for p in parts}} for w in "ab"]
    for row in rows:
        row["peak"] = sum(row[p] for p in parts)
    svg = ElementTree.fromstring(f"<div>{stacked('m', [(r, parts) for r in rows], 'bytes')}</div>")[0]
    found = []
    for path in svg.iter("path"):
        role = re.search(r"fill: var\(--(\w+)\)", path.get("style") or "")
        ends = [float(x) for x in re.findall(r"[ML] (-?[\d.]+) ", path.get("d") or "")]
        if role and path.get("clip-path"):
            found.append((role[1], min(ends), max(ends)))
    assert len(found) == 10
    bars = [found[i::2] for i in (0, 1)]  # part by part, each of both rows
    scale = (bars[0][-1][2] - bars[0][0][1]) / rows[0]["peak"]
    for row, bar in zip(rows, bars, strict=True):
        assert [end - start for _, start, end in bar] == pytest.approx([scale * row[p] for p in parts], abs=0.01)
        assert [start for _, start, _ in bar[1:]] == pytest.approx([end for _, _, end in bar[:-1]], abs=0.01)


def test_the_command_gives_json_of_bytes(folder, monkeypatch, capsys):
    code, out, _ = told(monkeypatch, capsys, folder / "config.json", "--json")
    found = json.loads(out)
    assert code == 0 and found == json.loads(json.dumps(memory(str(folder))))
    assert found["parameters"] == shapes(MODELS["llama"]()).parameters and found["length"] == 256
    for row in (*found["train"], *found["use"]):
        parts = ("activations", "kv_cache", "logits_tile")
        most = max(sum(row[p] for p in parts), row["optimizer_step"])
        assert row["peak"] == row["weights"] + row["gradients"] + row["moments"] + most


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["./nowhere"], "there is no nowhere; give a Hugging Face model folder, or its config.json"),
        (["FOLDER", "--length", "300"], "--length=300 is more than the 256 tokens that"),
        (["FOLDER", "--device", "tpu"], "for cuda or cpu, not for 'tpu'"),
        (["FOLDER", "--batch", "0"], "'--batch': Input should be greater than or equal to 1"),
    ],
)
def test_wrong_questions_get_one_sentence(argv, said, folder, monkeypatch, capsys):
    code, _, err = told(monkeypatch, capsys, *[folder if a == "FOLDER" else a for a in argv])
    lines = [x for x in err.splitlines() if x]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("pennyweight: ") and said in lines[0]


def test_a_plan_needs_no_torch(folder):
    code = (
        "import sys; sys.argv[0] = 'pennyweight'\nfrom pennyweight.cli import main\ntry: main()\n"
        "finally: print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    argv = ["memory", str(folder), "--out", str(folder / "page.html")]
    run = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.rstrip().endswith("[]"), run.stderr[-300:]


def test_refused_from_python_too(folder):
    with pytest.raises(RecipeError, match="more than the 256 tokens"):
        memory(str(folder), length=300)
