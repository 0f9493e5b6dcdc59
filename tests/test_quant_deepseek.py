"""DeepSeek's fp8 layout, and shards that go from one precision to another: exact where they can be, one tensor at a
time, resumable, and refused where scales do not belong to their weights."""

from __future__ import annotations

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from architectures import save_with_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from truth import fresh

from pennyweight.errors import ModelError, RecipeError, RunError
from pennyweight.model.load import load
from pennyweight.quant import convert as converting
from pennyweight.quant.convert import convert
from pennyweight.quant.deepseek import fp4_to_fp8, from_fp8, to_fp8
from pennyweight.quant.deepseek import tensors_of as deepseek_tensors
from pennyweight.quant.export import export, formats_of
from pennyweight.quant.formats import FORMATS, decode, encode
from pennyweight.quant.linear import reading_in_codes
from pennyweight.quant.packing import tensors_of as compressed_tensors
from pennyweight.quant.rounding import coded_for_storage


@contextmanager
def quiet(label, total, unit):
    yield SimpleNamespace(advance=lambda n: None)


def a_model(hidden=128, intermediate=256):
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": 4, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=113, initializer_range=0.2, **sizes))


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 99).view(8, 12)).logits.float()


def apart(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("fmt", ["fp8_block", "fp8_block_pow2"])
def test_transformers_opens_an_export_and_computes_what_was_meant(fmt, tmp_path):
    parent = save_with_tokenizer(a_model(), tmp_path / "parent")
    model = load(str(parent)).model
    codes = coded_for_storage(model, formats_of(model, fmt, 32, "deepseek"), torch.bfloat16)
    export(model, codes, parent, tmp_path / "copy", "deepseek")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fp8" and config["weight_block_size"] == [128, 128]
    stored = load_file(tmp_path / "copy" / "model.safetensors")
    scale = stored["model.layers.0.mlp.down_proj.weight_scale_inv"]
    assert scale.dtype == (torch.float32 if fmt == "fp8_block" else torch.float8_e8m0fnu) and scale.shape == (1, 2)
    assert apart(logits(load(str(tmp_path / "copy")).model), logits(model)) < 1e-5
    with reading_in_codes(model, codes):
        assert 0 < apart(logits(model), logits(load(str(parent)).model)) < 0.3


@pytest.mark.parametrize("pow2", [False, True])
def test_ragged_edges_go_there_and_back(pow2):
    seed = fresh()
    w = torch.randn(200, 300, generator=torch.Generator().manual_seed(seed))
    codes, scale = to_fp8(w, pow2)
    assert scale.shape == (2, 3) and codes.dtype == torch.float8_e4m3fn
    back = from_fp8(codes, scale)
    assert torch.equal(back, decode(encode(w, FORMATS["fp8_block_pow2" if pow2 else "fp8_block"]))), f"seed {seed}"
    with pytest.raises(ValueError, match=r"scales of shape \(3, 2\), not \(2, 3\)"):
        from_fp8(codes, scale.T)


@pytest.mark.parametrize("of", ["compressed-tensors", "deepseek"])
def test_bytes_of_scales_are_e8m0_with_a_bias_of_127(of):
    """OCP MX 1.0, section 5.4.1, and torch's own dtype: every power of two that a float32 tile can have."""
    k = torch.arange(-127, 120)  # 448 * 2^120 is no float32 number
    powers = torch.tensor([2.0**i for i in k.tolist()])
    if of == "deepseek":
        coded = encode((448 * powers).repeat_interleave(128)[:, None], FORMATS["fp8_block_pow2"])
        stored = deepseek_tensors(coded)["weight_scale_inv"].view(torch.uint8)
    else:
        coded = encode(448 * powers[:, None], FORMATS["mxfp8"])
        stored = compressed_tensors(coded)["weight_scale"]
    assert torch.equal(coded.scale[:, 0], powers) and bool((coded.codes == 0x7E).all())
    assert torch.equal(stored[:, 0].int(), (k + 127).int())
    assert torch.equal(stored.view(torch.float8_e8m0fnu).float(), coded.scale)


def test_every_byte_of_a_scale_is_read_as_the_power_it_is_and_255_as_nan():
    every = torch.arange(256, dtype=torch.uint8)
    ones = torch.full((256 * 128, 1), 0x38, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for scale in (every, every.view(torch.float8_e8m0fnu)):
        read = from_fp8(ones, scale[:, None])[::128, 0]
        assert read[:255].tolist() == [2.0**k for k in range(-127, 128)] and bool(read[255].isnan())


def packed(values):
    codes = encode(values, FORMATS["mxfp4"])
    pairs = codes.codes.view(len(values), -1, 2)
    exponents = torch.frexp(codes.scale).exponent.add(126).to(torch.uint8)
    return (pairs[..., 0] | (pairs[..., 1] << 4)).view(torch.int8), exponents.view(torch.float8_e8m0fnu), decode(codes)


def test_fp4_becomes_fp8_without_loss_or_is_refused():
    seed = fresh()
    x = torch.randn(130, 192, generator=torch.Generator().manual_seed(seed))
    codes, scale, values = packed(x)
    assert torch.equal(from_fp8(*fp4_to_fp8(codes, scale)), values), f"seed {seed}"
    codes, scale, values = packed(x * torch.logspace(-6, 6, 192, base=10.0))
    with pytest.raises(ValueError, match="too far apart"):
        fp4_to_fp8(codes, scale)


def sharded(model, folder):
    """The model in two shards, scales of one in the other where it has any."""
    save_with_tokenizer(model, folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(state)
    for i in (1, 2):
        save_file({n: state[n] for n in names[i - 1 :: 2]}, folder / f"model-0000{i}-of-00002.safetensors")
    where = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


@pytest.mark.parametrize("to", ["fp8", "fp8_ue8m0"])
def test_to_fp8_and_back_through_shards(to, tmp_path):
    parent = sharded(a_model().bfloat16(), tmp_path / "parent")
    convert(str(parent), to, str(tmp_path / "fp8"), quiet)
    low = load(str(tmp_path / "fp8")).model
    with torch.no_grad():
        want = load(str(parent)).model
        for module in want.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(from_fp8(*to_fp8(module.weight, to == "fp8_ue8m0")))
    assert apart(logits(low), logits(want)) < 1e-6
    convert(str(tmp_path / "fp8"), "bf16", str(tmp_path / "back"), quiet)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    assert apart(logits(back), logits(want)) < 2e-2
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization_config" not in config and not list(tmp_path.rglob("*.converting"))
    # power-of-two scales: bfloat16 holds every number, and so fp8 comes out again as it was
    if to == "fp8_ue8m0":
        convert(str(tmp_path / "back"), to, str(tmp_path / "again"), quiet)
        for shard in sorted((tmp_path / "fp8").glob("*.safetensors")):
            first, second = load_file(shard), load_file(tmp_path / "again" / shard.name)
            for name in first:
                if name.endswith("_inv"):
                    continue
                scales = [f.get(f"{name}_scale_inv") for f in (first, second)]
                if scales[0] is not None:
                    assert torch.equal(from_fp8(first[name], scales[0]), from_fp8(second[name], scales[1])), name


def test_experts_in_fp4_go_over_whole(tmp_path):
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(fresh()))
    codes, scale, values = packed(x)
    folder = tmp_path / "v4"
    folder.mkdir()
    tensors = {"layers.0.ffn.experts.0.w1.weight": codes, "layers.0.ffn.experts.0.w1.scale": scale}
    save_file({**tensors, "norm.weight": torch.ones(8)}, folder / "model.safetensors")
    convert(str(folder), "fp8_ue8m0", str(tmp_path / "out"), quiet)
    out = load_file(tmp_path / "out" / "model.safetensors")
    name = "layers.0.ffn.experts.0.w1"
    assert set(out) == {f"{name}.weight", f"{name}.weight_scale_inv", "norm.weight"}
    assert torch.equal(from_fp8(out[f"{name}.weight"], out[f"{name}.weight_scale_inv"]), values)
    convert(str(folder), "bf16", str(tmp_path / "bf16"), quiet)
    assert torch.equal(load_file(tmp_path / "bf16" / "model.safetensors")[f"{name}.weight"].float(), values)


def test_a_stopped_conversion_goes_on_and_foreign_folders_are_left_alone(tmp_path, monkeypatch):
    parent = sharded(a_model().bfloat16(), tmp_path / "parent")
    done, whole = [], converting._convert_shard

    def one_only(shard, *rest):
        if done:
            raise KeyboardInterrupt
        done.append(shard)
        whole(shard, *rest)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(converting, "_convert_shard", one_only)
        convert(str(parent), "fp8", str(tmp_path / "out"), quiet)
    stamp = (tmp_path / "out" / done[0].name).stat().st_mtime_ns
    convert(str(parent), "fp8", str(tmp_path / "out"), quiet)
    assert (tmp_path / "out" / done[0].name).stat().st_mtime_ns == stamp
    assert load(str(tmp_path / "out")).params > 0
    with pytest.raises(RunError, match="is there already"):
        convert(str(parent), "bf16", str(tmp_path / "out"), quiet)


def test_what_cannot_be_converted_is_said(tmp_path):
    parent = sharded(a_model().bfloat16(), tmp_path / "parent")
    with pytest.raises(RecipeError, match="nothing is converted to 'int4'"):
        convert(str(parent), "int4", str(tmp_path / "x"), quiet)
    with pytest.raises(ModelError, match="there is no folder"):
        convert(str(tmp_path / "nowhere"), "fp8", str(tmp_path / "x"), quiet)
    convert(str(parent), "fp8", str(tmp_path / "fp8"), quiet)
    shard = next((tmp_path / "fp8").glob("*.safetensors"))
    tensors = load_file(shard)
    wide = next(n for n in tensors if n.endswith("_inv") and tensors[n].shape[0] != tensors[n].shape[1])
    save_file({**tensors, wide: tensors[wide].T.contiguous()}, shard)
    with pytest.raises(ModelError, match="cannot be converted: scales of shape"):
        convert(str(tmp_path / "fp8"), "bf16", str(tmp_path / "y"), quiet)
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ModelError, match="is not a whole safetensors file"):
        convert(str(tmp_path / "fp8"), "bf16", str(tmp_path / "z"), quiet)
