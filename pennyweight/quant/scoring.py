"""A teacher's forward pass in low precision: what labels tokens, without gradients.

In int8 each weight row has one scale and each token another, both from the largest magnitude (W8A8, dynamic; as the
vector-wise part of LLM.int8(), Dettmers et al., arXiv 2208.07339). Products of codes are summed exactly, in int32, and
become float32 when they are scaled back, so that logits are never rounded to 16 bits; residual stream, norms and
attention stay float32. What it gives and costs: benchmarks/scoring.py.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pennyweight.errors import ModelError, RecipeError
from pennyweight.model.head import Head, head_of
from pennyweight.model.loaded import refuse_low_bit

PRECISIONS = ("float32", "bfloat16", "int8")


def for_scoring(model: Any, precision: str) -> tuple[Any, Head]:
    """``model`` to score in ``precision``, and the head that makes float32 logits of its last hidden states.

    The given model is not changed, and is itself returned where it is in that precision already. A copy is in
    evaluation mode and shares every tensor that need not differ: in int8 it adds a byte for each weight of a
    layer, in bfloat16 two for each parameter. Give up the original, and what only that one holds is freed. Run a copy
    outside autocast. The copy's embedding and output layer are not coded.

    The head is the model's own, a float32 product: in bfloat16 a CPU gives 16-bit logits only, and rounding those
    costs more than it saves. In int8 it is coded too.

    Args:
        model: a Hugging Face causal LM with full-precision weights.
        precision: float32, bfloat16 or int8.

    Raises:
        RecipeError: no such precision, or int8 where there is no int8 product that is faster.
        ModelError: int8, and the model is a low-bit copy already or has no layer that could be coded.
    """
    if precision == "int8":
        return _int8(model)
    if precision not in PRECISIONS:
        raise RecipeError(f"no scoring precision named {precision!r}; choose one of {', '.join(PRECISIONS)}")
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    return _copy(model, dtype, set()), head_of(model)


class Int8Linear(nn.Module):
    """``x W^T + b`` with int8 codes of W and, made anew for each row, of x; scales in float32.

    ``weight`` (out, in) and ``bias`` (out) or None, of any float dtype. Forward takes (..., in) of any float dtype
    to (..., out) of the same dtype, without gradient; a row with a NaN or infinity gives no finite number.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        codes, scale = _by_row(weight.detach())
        self.codes = nn.Buffer(codes)
        self.scale = nn.Buffer(scale.flatten())
        self.bias = nn.Buffer(bias.detach().float()) if bias is not None else None

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        out = _product(x.reshape(-1, x.shape[-1]), self.codes, self.scale)
        if self.bias is not None:
            out.add_(self.bias)
        return out.to(x.dtype).view(*x.shape[:-1], len(self.codes))


@dataclass(frozen=True)
class Int8Head(Head):
    """A head whose ``weight`` (V, D) holds int8 codes, with ``row_scale`` (V,) float32; logits are float32."""

    row_scale: Tensor = field(kw_only=True)

    @torch.no_grad()
    def logits(self, hidden_ND: Tensor, out: Tensor | None = None) -> Tensor:
        """(N, D) hidden states of any float dtype -> (N, V) float32 logits, in ``out`` if given; without gradient."""
        out = _product(hidden_ND, self.weight, self.row_scale, out)
        if self.bias is not None:
            out.add_(self.bias)
        if self.scale != 1.0:
            out.mul_(self.scale)
        return out if self.softcap is None else out.div_(self.softcap).tanh_().mul_(self.softcap)


def _int8(model: Any) -> tuple[Any, Head]:
    refuse_low_bit(model)
    _check_int8_pays(model.device)
    head, output = head_of(model), model.get_output_embeddings()
    coded = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not output}
    if not coded:
        raise ModelError(
            f"a {type(model).__name__} has no Linear layer to score in int8 (its weights are in another kind of "
            "module); set the precision to bfloat16 or float32"
        )
    scoring = _copy(model, torch.float32, {id(m.weight) for m in coded.values()})
    for name, m in coded.items():
        weight = m.weight.T if isinstance(m, Conv1D) else m.weight
        scoring.set_submodule(name, Int8Linear(weight, m.bias))
    codes, scale = _by_row(head.weight.detach())
    return scoring, Int8Head(codes, head.bias, head.scale, head.softcap, row_scale=scale.flatten())


def _check_int8_pays(device: torch.device) -> None:
    # Without VNNI the same call runs too, up to a thousand times slower. On a GPU quantising would have to be fused
    # into its neighbours to gain anything, and mps has no such product.
    if device.type != "cpu" or not (torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()):
        here = "this processor has none" if device.type == "cpu" else f"the model is on {device}"
        raise RecipeError(
            f"scoring in int8 needs a CPU that multiplies int8 natively (AVX-512 VNNI), and {here}; set the precision "
            "to bfloat16 or float32"
        )


def _copy(model: Any, dtype: torch.dtype, shared: set[int]) -> Any:
    """``model`` with its parameters as ``dtype``, those that are so and the ids in ``shared`` not copied but shared."""
    if not shared and all(p.dtype == dtype for p in model.parameters()):
        return model
    parameters: dict[int, Any] = {
        id(p): p if p.dtype == dtype or id(p) in shared else nn.Parameter(p.detach().to(dtype), requires_grad=False)
        for p in model.parameters()
    }
    # deepcopy takes what it is told for the copies of these, ties included; buffers keep their dtype, as rotary
    # frequencies must.
    return copy.deepcopy(model, parameters).eval()


def _by_row(x: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) of any float dtype -> int8 codes from -127 to 127, and (rows, 1) float32 scales."""
    x = x.float()
    # Two reductions are faster than one of the magnitudes, which would have to be written first.
    largest = torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).neg_())
    largest.clamp_(min=128 * torch.finfo(torch.float32).tiny)  # so that zeros get codes 0, and nothing overflows
    return torch.mul(x, 127.0 / largest).round_().to(torch.int8), largest / 127.0


def _product(x: Tensor, codes: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
    """(N, D) times the (V, D) weight that codes and scales stand for -> (N, V) float32, in ``out`` if given."""
    rows, row_scale = _by_row(x)
    if out is None:
        out = x.new_empty((len(x), len(codes)), dtype=torch.float32)
    sums = out.view(torch.int32)
    torch._int_mm(rows, codes.T, out=sums)
    # Turned into float32 where they are: memory written for the first time is what costs here.
    return out.copy_(sums).mul_(scale).mul_(row_scale)
