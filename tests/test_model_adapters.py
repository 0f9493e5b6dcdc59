"""LoRA and QLoRA: what is frozen, what is trained, and what is left when the factors are merged."""

from __future__ import annotations

import sys

import pytest
import torch
from architectures import make, save_with_tokenizer
from safetensors import safe_open

from pennyweight.data.pack import Packer
from pennyweight.errors import MissingExtra, RecipeError, Stopped
from pennyweight.methods.sft import sft
from pennyweight.model.adapters import FrozenLinear, merge
from pennyweight.model.device import choose
from pennyweight.model.load import load
from pennyweight.model.options import ready
from pennyweight.quant.formats import FORMATS, decode, encode
from pennyweight.records import Encoded
from pennyweight.settings import Lora, Schedule, SftMethod, Tripwires
from pennyweight.train.checkpoint import Checkpoints
from pennyweight.train.loop import train

pytest.importorskip("peft", reason="needs peft: pip install 'pennyweight[lora]'")


def attach(model, lora, seed):
    ready(model, Schedule(lora=lora), seed)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 60).unsqueeze(0)).logits


def moved(model, seed: int):
    """The factors, away from where they begin."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape, generator=g)


@pytest.mark.parametrize("name", ["llama", "qwen2-biases", "gemma3-window", "phi-head-bias"])
def test_factors_begin_with_nothing_and_end_in_plain_weights(name, tmp_path):
    model = make(name, 3)
    before, keys = logits(model), set(model.state_dict())
    frozen = {n: p.detach().clone() for n, p in model.named_parameters()}
    attach(model, Lora(rank=4), 1)
    assert torch.equal(logits(model), before)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained)
    moved(model, 7)
    with_factors = logits(model)
    assert not torch.allclose(with_factors, before, atol=1e-3)
    merge(model)
    assert set(model.state_dict()) == keys and all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(logits(model), with_factors, atol=1e-4, rtol=1e-4)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, frozen[n])}
    assert changed and all(n.endswith("weight") and ("proj" in n or "fc" in n or "dense" in n) for n in changed), (
        changed
    )
    again = load(str(save_with_tokenizer(model, tmp_path / "merged"))).model
    torch.testing.assert_close(logits(again), with_factors, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("base", ["int8", "int4", "nvfp4"])
@pytest.mark.parametrize("shape", [(5, 32), (16, 48), (7, 96)])
def test_a_frozen_linear_is_its_codes(base, shape):
    """Value and gradient are those of a Linear with the decoded weight; what is kept is no more than the codes."""
    seed = torch.seed() % 10**6
    g = torch.Generator().manual_seed(seed)
    plain = torch.nn.Linear(shape[1], shape[0])
    plain.weight.data = torch.randn(shape, generator=g)
    to = FORMATS[base] if base == "nvfp4" else FORMATS[base].grouped(16)
    low = FrozenLinear(plain, to)
    plain.weight.data = decode(encode(plain.weight, to, search=True))
    assert torch.equal(low.weight, plain.weight), f"seed {seed}"
    x = torch.randn((3, shape[1]), generator=g)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    made, want = low(ours), plain(theirs)
    out = torch.randn(made.shape, generator=g)
    made.backward(out)
    want.backward(out)
    torch.testing.assert_close(made, want)
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert not list(low.parameters()) or all(not p.requires_grad for p in low.parameters())
    kept = sum(b.numel() * b.element_size() for b in low.buffers())
    assert kept <= plain.weight.numel() * (1 if base == "int8" else 0.5) + plain.weight.numel() / 16 * 2 + 1


def test_quantised_bases_learn_through_their_codes():
    """The gradient of the factors is that of a model with the decoded weights, and merging keeps what was learnt."""
    model, same = make("llama", 3), make("llama", 3)
    attach(model, Lora(rank=4, base="int4"), 1)
    for name, layer in model.named_modules():
        if isinstance(layer, FrozenLinear):
            same.get_submodule(name.removesuffix(".base_layer")).weight.data = layer.weight
    attach(same, Lora(rank=4), 1)
    moved(model, 5)
    moved(same, 5)
    ids = torch.arange(3, 60).unsqueeze(0)
    for m in (model, same):
        m(input_ids=ids, labels=ids).loss.backward()
    others = dict(same.named_parameters())
    for name, a in model.named_parameters():
        assert (a.grad is None) == (not a.requires_grad)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, others[name].grad)
    with_factors = logits(model)
    merge(model)
    torch.testing.assert_close(logits(model), with_factors, atol=1e-4, rtol=1e-4)


def test_the_factors_come_from_the_seed_alone():
    def first(seed):
        torch.manual_seed(torch.seed() % 1000)
        model = make("llama", 3)
        before = torch.get_rng_state()
        attach(model, Lora(rank=4), seed)
        assert torch.equal(torch.get_rng_state(), before)
        return next(p for n, p in model.named_parameters() if "lora_A" in n).detach()

    assert torch.equal(first(1), first(1)) and not torch.equal(first(1), first(2))


def test_what_cannot_be_is_refused(monkeypatch):
    with pytest.raises(RecipeError, match=r"16 weights, which does not divide the 40 columns.*train.lora.base=int4"):
        odd = make("llama", 3)
        odd.model.layers[1].mlp.down_proj = torch.nn.Linear(40, 32)
        attach(odd, Lora(base="nvfp4"), 1)
    with pytest.raises(RecipeError, match="have no Linears"):
        attach(make("gpt2", 3), Lora(), 1)
    with pytest.raises(ValueError, match="lora trains in compute.dtype only"):
        Schedule(lora=Lora(), precision="fp8")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtra, match=r"pip install 'pennyweight\[lora\]'"):
        attach(make("llama", 3), Lora(), 1)


@pytest.mark.parametrize("base", ["full", "int4"])
def test_checkpoints_hold_the_factors_only_and_training_goes_on_from_them(base, tmp_path):
    """Stopped and resumed is never stopped, bit for bit."""

    def trained(folder, steps, stop_at=None):
        model = make("llama", 3)
        attach(model, Lora(rank=4, base=base), 1)
        g = torch.Generator().manual_seed(5)
        made = [
            Encoded(f"s{i}", tuple(torch.randint(3, 100, (9,), generator=g).tolist()), (True,) * 9) for i in range(8)
        ]
        packer, seen = Packer(made, 4, 4, 0, 0), []
        settings = {"compute": choose("cpu", "float32"), "checkpoints": Checkpoints(folder), "seed": 0}
        settings |= {"admit": list, "log": seen.append, "tripwires": Tripwires()}
        settings["should_stop"] = lambda: len(seen) == stop_at
        train(
            model, lambda step: [sft(b, SftMethod()) for b in packer(step)], schedule=Schedule(steps=steps), **settings
        )
        return {n: p.detach() for n, p in model.named_parameters()}

    whole = trained(tmp_path / "whole", 6)
    with pytest.raises(Stopped):
        trained(tmp_path / "parts", 6, stop_at=3)
    again = trained(tmp_path / "parts", 6)
    assert all(torch.equal(whole[n], p) for n, p in again.items())
    with safe_open(Checkpoints(tmp_path / "parts").newest() / "tensors.safetensors", "pt") as f:
        assert all("lora_" in key or key.startswith("random") for key in f.keys())  # noqa: SIM118
