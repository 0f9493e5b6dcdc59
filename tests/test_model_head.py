"""Trunk and head apart give the model's own logits, packed or not, in every architecture that is claimed."""

from __future__ import annotations

import pytest
import torch
from architectures import MAKERS, V, make

from pennyweight.data.pack import collate, first_fit
from pennyweight.errors import ModelError
from pennyweight.model.head import Head, check_head, forward_hidden, head_of, keeps_samples_apart
from pennyweight.records import Encoded


def rows(count=6, seed=3):
    g = torch.Generator().manual_seed(seed)
    out = []
    for i in range(count):
        length = int(torch.randint(5, 24, (1,), generator=g))
        ids = torch.randint(3, V, (length,), generator=g).tolist()
        out.append(Encoded(f"{i:064x}", tuple(ids), tuple(j > 0 for j in range(length))))
    return out


@pytest.mark.parametrize("name", MAKERS)
@torch.no_grad()
def test_trunk_and_head_are_the_model(name):
    model = make(name, torch.seed() % 1000)
    check_head(model)
    ids = torch.randint(0, V, (2, 20))
    want = model(input_ids=ids, use_cache=False).logits
    hidden = forward_hidden(model, ids, torch.arange(20).expand(2, 20)).flatten(0, 1)
    got = head_of(model).logits(hidden)
    assert float(want.std()) > 0.1
    torch.testing.assert_close(got, want.float().flatten(0, 1), rtol=1e-4, atol=1e-4)
    out = torch.full_like(got, float("nan"))
    assert head_of(model).logits(hidden, out) is out and torch.equal(out, got)


@pytest.mark.parametrize("name", [n for n in MAKERS if n != "mixtral-experts"])
@torch.no_grad()
def test_packed_samples_are_blind_to_each_other(name):
    """Every sample alone, padded beside others, or packed in one row: the same hidden states."""
    model, data = make(name, 1), rows()
    packed, padded = collate(first_fit(data, 64), 0), collate([[s] for s in data], 0)
    assert len(packed.ids) < len(data)

    def states(batch):
        flat = forward_hidden(model, batch.ids, batch.positions).flatten(0, 1)[batch.selected]
        sizes = [len(s.loss_positions) for s in batch.placed]
        return dict(zip([s.id for s in batch.placed], flat.split(sizes), strict=True))

    a, b = states(packed), states(padded)
    for s in data:
        alone = states(collate([[s]], 0))[s.id]
        torch.testing.assert_close(a[s.id], alone, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(b[s.id], alone, rtol=1e-3, atol=1e-4)


def test_logits_are_float32_of_16_bit_weights():
    """Rounded once (the inputs), not again at the end: bf16 hidden and head against a float64 product of the same."""
    g = torch.Generator().manual_seed(torch.seed() % 10**6)
    hidden, weight = (torch.randn(n, 64, generator=g).bfloat16() for n in (40, 300))
    got = Head(weight).logits(hidden)
    truth = hidden.double() @ weight.double().T
    rival = (hidden @ weight.T).double()
    assert got.dtype == torch.float32
    error, theirs = ((x.double() - truth).norm() / truth.norm() for x in (got, rival))
    assert error < 1e-6 and theirs > 1e-4


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_the_slope_is_the_derivative_of_the_logits(softcap):
    """Against autograd in float64, at a head with a bias and a scale."""
    seed = torch.seed() % 10**6
    g = torch.Generator().manual_seed(seed)
    product = (torch.randn(9, 40, generator=g) * 5).double().requires_grad_(True)
    logits = 0.7 * product
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    (want,) = torch.autograd.grad(logits.sum(), product)
    head = Head(torch.zeros(40, 1), torch.zeros(40), 0.7, softcap)
    given = logits.detach().float()
    slope = head.slope(given)
    assert float((torch.as_tensor(slope).double() - want).abs().max()) < 1e-6, f"seed {seed}"
    assert torch.equal(given, logits.detach().float())


def test_a_head_that_does_more_is_refused():
    model = make("llama")
    model.lm_head.register_forward_hook(lambda module, args, out: out + args[0][..., :1] * 9)
    with pytest.raises(ModelError, match="output head of LlamaForCausalLM"):
        check_head(model)


def test_architectures_that_cannot_be_packed_are_told():
    import transformers as tf

    assert all(keeps_samples_apart(make(name)) for name in MAKERS)
    torch.manual_seed(0)
    bloom = tf.BloomForCausalLM(tf.BloomConfig(vocab_size=113, hidden_size=32, n_layer=2, n_head=4)).eval()
    assert not keeps_samples_apart(bloom)
    sizes = {"vocab_size": 113, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    mixes = tf.Lfm2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, layer_types=["conv", "full_attention"])
    for scale in (1, 10):  # as it is made at random a convolution over the border changes little, and more when trained
        model = tf.Lfm2ForCausalLM(mixes).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(scale if p.ndim > 1 else 1)
        assert not keeps_samples_apart(model)


def test_weights_that_are_no_numbers_are_named():
    model = make("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(ModelError, match=r"NaN or infinity.*model\.layers\.1\.mlp\.up_proj\.weight"):
        check_head(model)
