"""No product of float8 tensors and no cast to float8: torch sums the one in float8 on a CPU, and before 2.12 the other
made NaN of what is too large. Codes are bytes, and what is multiplied are the numbers they stand for."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from architectures import save_with_tokenizer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM
from truth import fresh

from pennyweight.model.load import load
from pennyweight.quant.export import export, formats_of
from pennyweight.quant.formats import FORMATS, decode, encode
from pennyweight.quant.learned import learn_to_be_rounded
from pennyweight.quant.linear import SCHEMES, compute_by, reading_in_codes
from pennyweight.quant.rounding import coded_for_storage

FLOAT8 = {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}
PRODUCTS = ("mm", "matmul", "linear", "dot", "mv", "addr", "ger", "conv", "attention")


class Watched(TorchDispatchMode):
    """Every product below autograd and autocast with the dtypes of its operands, and casts from wider to float8."""

    def __init__(self):
        super().__init__()
        self.products, self.casts = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        operands = [t.dtype for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        name = func.overloadpacket.__name__
        if any(word in name.split(".")[-1] for word in PRODUCTS):
            self.products.append((name, operands))
        out = func(*args, **(kwargs or {}))
        made = {t.dtype for t in tree_leaves(out) if isinstance(t, torch.Tensor)} & FLOAT8
        if made and any(d.is_floating_point and d.itemsize > 1 for d in operands):
            self.casts.append((name, operands))
        return out


@contextmanager
def watched(at_least: int):
    with Watched() as seen:
        yield seen
    assert len(seen.products) >= at_least, f"{seen.products}: the test sees nothing"
    wrong = [(name, dtypes) for name, dtypes in seen.products if FLOAT8 & set(dtypes)]
    assert not wrong and not seen.casts, f"{wrong[:3]}, {seen.casts[:3]}"


@pytest.mark.parametrize(
    "multiply",
    [
        lambda a, b: a @ b.T,
        lambda a, b: torch._scaled_mm(a, b.T, torch.ones(()), torch.ones(()), out_dtype=torch.float32),
        lambda a, b: torch.nn.functional.linear(a, b),
    ],
    ids=["@", "_scaled_mm", "linear"],
)
def test_a_product_of_float8_would_be_seen(multiply):
    a, b = (torch.randn(16, 16).to(torch.float8_e4m3fn) for _ in range(2))
    with pytest.raises(AssertionError, match="float8_e4m3fn"), watched(1):
        multiply(a, b)


def test_a_cast_to_float8_would_be_seen_and_a_view_of_bytes_is_none():
    with pytest.raises(AssertionError, match="_to_copy"), watched(0):
        torch.randn(16).to(torch.float8_e5m2)
    with watched(0):
        torch.zeros(16, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def test_a_product_of_float8_on_a_cpu_is_wrong_which_is_why():
    seed = fresh()
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(64, 64, generator=g).to(torch.float8_e4m3fn) for _ in range(2))
    exact = a.double() @ b.double()
    try:
        off = ((a @ b).double() - exact).abs() > 1e-3 * exact.abs()
    except RuntimeError:
        pytest.skip("this torch refuses to multiply float8 tensors on a CPU")
    assert float(off.double().mean()) > 0.5, f"seed {seed}"
    assert torch.equal((a.float() @ b.float()).double(), exact), f"seed {seed}"


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_low_linear_multiplies_no_float8_forward_or_backward(name, autocast):
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 32))
    compute_by(SCHEMES[name], model[1])
    with watched(6) as seen:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(torch.randn(40, 64, requires_grad=True)).float().square().sum()
        loss.backward()
    low = [set(dtypes) for _, dtypes in seen.products if set(dtypes) == {torch.float32}]
    assert len(low) >= 3  # of the LowLinear: its operands are float32 under autocast, too
    assert model[1].weight.grad is not None and bool(model[0].weight.grad.isfinite().all())


@pytest.mark.parametrize("name", FORMATS)
def test_encoding_decoding_and_learning_to_be_rounded_cast_nothing_to_float8(name):
    model = nn.Sequential(nn.Linear(64, 16, bias=False))
    with watched(2):
        coded = encode(model[0].weight * 1e9, FORMATS[name], search=True)
        decode(encode(model[0].weight, FORMATS[name], torch.rand(16, 64)))
        layer = learn_to_be_rounded(model, {"0": coded})["0"]
        layer(torch.randn(8, 64)).sum().backward()


def a_folder(where):
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 1}
    return save_with_tokenizer(LlamaForCausalLM(LlamaConfig(vocab_size=113, **sizes)), where)


@pytest.mark.parametrize(
    ("fmt", "layout"),
    [
        ("fp8_row", "compressed-tensors"),
        ("fp8_block", "compressed-tensors"),
        ("mxfp8", "compressed-tensors"),
        ("fp8_block", "deepseek"),
        ("fp8_block_pow2", "deepseek"),
    ],
)
@torch.no_grad()
def test_a_copy_stored_in_fp8_is_read_without_a_product_of_float8(fmt, layout, tmp_path):
    parent = a_folder(tmp_path / "parent")
    model = load(str(parent)).model
    codes = coded_for_storage(model, formats_of(model, fmt, 32, layout), torch.bfloat16)
    tokens = torch.arange(3, 99).view(8, 12)
    with watched(7), reading_in_codes(model, codes):
        model(input_ids=tokens)
    export(model, codes, parent, tmp_path / "copy", layout)
    copy = load(str(tmp_path / "copy")).model
    with Watched() as seen:  # transformers may round what it reads by a cast of its own
        copy(input_ids=tokens)
    assert len(seen.products) >= 7 and not [p for p in seen.products if FLOAT8 & set(p[1])]
