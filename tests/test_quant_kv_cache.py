"""A key-value cache in 8 bits: what it holds, what it gives, and that it follows its rows."""

from __future__ import annotations

import pytest
import torch
from architectures import MAKERS, V, make, save_with_tokenizer
from transformers import DynamicCache, MambaConfig
from truth import fresh

from pennyweight import commands
from pennyweight.errors import ModelError, RecipeError
from pennyweight.model.generate import generate, stream
from pennyweight.model.head import forward_hidden
from pennyweight.quant.kv_cache import KV_FORMATS, bytes_of, low_cache, packed, unpacked


@pytest.mark.parametrize("fmt", KV_FORMATS)
def test_a_vector_comes_back_to_within_its_format(fmt):
    seed = fresh()
    x = (
        torch.randn(3, 2, 5, 16, generator=torch.Generator().manual_seed(seed))
        * torch.tensor([1e-3, 1, 300])[:, None, None, None]
    )
    stored = packed(x, KV_FORMATS[fmt])
    assert stored.dtype == torch.uint8 and stored.shape == (3, 2, 5, 18)
    back = unpacked(stored, KV_FORMATS[fmt], torch.float32)
    step = {"int8": 1 / 127, "fp8": 2**-3}[fmt]  # of the largest of a vector; of each number
    most = x.abs().amax(-1, keepdim=True) if fmt == "int8" else x.abs() + x.abs().amax(-1, keepdim=True) * 2**-9
    assert bool(((back - x).abs() <= 0.52 * step * most).all()), f"seed {seed}"
    assert not unpacked(packed(torch.zeros(1, 1, 1, 8), KV_FORMATS[fmt]), KV_FORMATS[fmt], torch.float32).any()


@pytest.mark.parametrize("fmt", KV_FORMATS)
@pytest.mark.parametrize("name", MAKERS)
@torch.no_grad()
def test_a_model_reads_through_it_and_hardly_changes(name, fmt):
    """In one pass and token by token alike, sliding windows and latent attention included."""
    model, ids = make(name), torch.randint(3, V, (2, 20), generator=torch.Generator().manual_seed(5))
    positions = torch.arange(20).expand(2, 20)
    want = forward_hidden(model, ids, positions)
    cache = low_cache(model.config, fmt)
    got = forward_hidden(model, ids, positions, cache)
    whole = DynamicCache(config=model.config)
    assert torch.allclose(forward_hidden(model, ids, positions, whole), want, atol=1e-4)
    assert 0 < float((got - want).norm() / want.norm()) < {"int8": 0.05, "fp8": 0.25}[fmt]
    assert bytes_of(cache) < 0.7 * bytes_of(whole) / 2  # of 16 bits, heads here being of 8 to 16 numbers
    again = low_cache(model.config, fmt)
    steps = [forward_hidden(model, ids[:, i : i + 1], positions[:, i : i + 1], again) for i in range(20)]
    assert (torch.cat(steps, 1) - got).norm() < 0.02 * got.norm()  # codes at a midpoint may fall otherwise


def test_rows_that_leave_take_their_bytes_along():
    model = make("llama")
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [13], [14, 15]]
    settings = {"max_tokens": 12, "temperature": 0, "eos_ids": {3, 4, 20, 30, 40, 50}, "pad_id": 0, "seed": 0}
    low = lambda config: low_cache(config, "int8")  # noqa: E731
    together = [g.ids for g in generate(model, prompts, **settings, new_cache=low)]
    alone = [generate(model, [p], **settings, new_cache=low)[0].ids for p in prompts]
    assert together == alone
    del settings["pad_id"]
    assert tuple(stream(model, prompts[1], **settings, new_cache=low)) == alone[1]


def test_what_is_no_format_or_no_cache_of_keys_is_refused():
    with pytest.raises(RecipeError, match="no format of a KV cache is named 'int4'; use int8 or fp8"):
        low_cache(make("llama").config, "int4")
    with pytest.raises(ModelError, match="a mamba remembers more than keys and values"):
        low_cache(MambaConfig(num_hidden_layers=2), "int8")


def test_a_conversation_goes_through_one(tmp_path, monkeypatch):
    folder = save_with_tokenizer(make("llama"), tmp_path / "model")
    made = []
    monkeypatch.setattr(commands, "low_cache", lambda *a: made.append(low_cache(*a)) or made[-1])
    talk = commands.Chat(str(folder), temperature=0.0, max_tokens=6, kv_cache="int8")
    "".join(talk.say("the thing"))
    assert bytes_of(made[-1]) > 0 and all(layer.keys.dtype == torch.uint8 for layer in made[-1].layers)
    with pytest.raises(RecipeError, match="no format of a KV cache is named 'int4'"):
        commands.Chat(str(folder), kv_cache="int4")
