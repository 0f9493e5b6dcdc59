"""The output head of a causal language model apart from its trunk, so that full logits need never exist.

Logits are float32 whatever the model's dtype. Rounded to bfloat16 they make the gradient of a divergence 8 % wrong
where student and teacher are 0.04 nats apart, and 79 % at 0.0004 nats (benchmarks/logits_dtype.py).
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from pennyweight.errors import ModelError, RecipeError
from pennyweight.model.cache import cache_argument
from pennyweight.model.trunk import trunk_of

_ENTRIES = 8192  # of the head multiplied at once: a CPU's product of all is up to a tenth slower


@dataclass(frozen=True)
class Head:
    """``logits = softcap(scale * (hidden W^T + b))``; weight (V, D), bias (V) or None."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @torch.no_grad()
    def logits(self, hidden_ND: Tensor, out: Tensor | None = None) -> Tensor:
        """(N, D) hidden states of any float dtype -> (N, V) float32 logits, in ``out`` if given; without gradient."""
        if hidden_ND.is_cuda and hidden_ND.dtype in (torch.bfloat16, torch.float16):
            weight = self.weight.to(hidden_ND.dtype)
            out = torch.mm(hidden_ND, weight.T, out_dtype=torch.float32, out=out)
        elif out is None:
            out = torch.matmul(hidden_ND.float(), self.weight.float().T)
        else:
            hidden, weight = hidden_ND.float(), self.weight.float()
            for a in range(0, len(weight), _ENTRIES):
                part = weight[a : a + _ENTRIES]
                torch.mm(hidden, part.T, out=out[:, a : a + len(part)])
        if self.bias is not None:
            out.add_(self.bias)
        if self.scale != 1.0:
            out.mul_(self.scale)
        return out if self.softcap is None else out.div_(self.softcap).tanh_().mul_(self.softcap)

    def slope(self, logits: Tensor) -> Tensor | float:
        """The derivative of logits with respect to hidden states times weight (plus bias), at ``logits``."""
        if self.softcap is None:
            return self.scale
        return (logits / self.softcap).square_().neg_().add_(1.0).mul_(self.scale)


def head_of(model: Any) -> Head:
    """The head of a Hugging Face causal LM: its output embedding, with the scaling its architecture applies.

    Gemma caps logits (``final_logit_softcapping``), Cohere multiplies (``logit_scale``), Granite divides
    (``logits_scaling``). A mixture (``model/mixture.py``) has its own.
    """
    if (own := getattr(model, "own_head", None)) is not None:
        return own
    layer = model.get_output_embeddings()
    if layer is None or not hasattr(layer, "weight"):
        raise ModelError(
            f"{type(model).__name__} has no output head that could be found; it is not a causal language model"
        )
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, getattr(layer, "bias", None), scale, float(cap) if cap else None)


def forward_hidden(model: Any, ids_BT: Tensor, positions_BT: Tensor, cache: Any = None) -> Tensor:
    """(B, T, D) last hidden states, after the final norm.

    ``cache``: an empty key-value cache to attend through, as in generation; rows then hold one sample each.

    No attention mask is given: rows are padded on the right, where causal attention never looks, and transformers
    reads from positions that restart where one packed sample ends, and keeps samples blind to each other.
    """
    trunk = trunk_of(model)
    given: dict[str, Any] = {"input_ids": ids_BT, "use_cache": cache is not None}
    if cache is not None:
        given[cache_argument(trunk)] = cache
    if "position_ids" in inspect.signature(trunk.forward).parameters:
        given["position_ids"] = positions_BT
    with nullcontext() if getattr(model, "plain_attention", False) else _attention_for(ids_BT):
        return trunk(**given).last_hidden_state


def check_packing(model: Any) -> None:
    """Raise RecipeError where samples in one row of a model would see each other."""
    if not keeps_samples_apart(model):
        raise RecipeError(
            f"train.pack=true, but samples in one row of a {type(model).__name__} would see each other; set "
            "train.pack=false"
        )


@torch.no_grad()
def keeps_samples_apart(model: Any) -> bool:
    """Whether two samples packed into one row, positions restarting, are blind to each other in this architecture."""
    if "position_ids" not in inspect.signature(trunk_of(model).forward).parameters:
        return False
    device = next(model.parameters()).device
    ids = torch.arange(12, device=device).unsqueeze(0) % model.config.get_text_config().vocab_size
    alone = forward_hidden(model, ids[:, 4:], torch.arange(8, device=device).unsqueeze(0))
    positions = torch.cat([torch.arange(4, device=device), torch.arange(8, device=device)]).unsqueeze(0)
    packed = forward_hidden(model, ids, positions)[:, 4:]
    beside_another = forward_hidden(model, torch.cat([ids[:, 4:8], ids[:, 4:]], 1), positions)[:, 4:]
    close, same = (1e-3, 1e-5) if alone.dtype == torch.float32 else (0.02, 0.02)
    # In a model that is hardly trained a convolution over the border may be small; but it is there.
    is_blind = (packed - beside_another).norm() < same * alone.norm()
    return bool(is_blind and (packed - alone).norm() < close * alone.norm())


def _attention_for(ids_BT: Tensor) -> AbstractContextManager[object]:
    """Attention as it is fastest on a CPU.

    In bfloat16 and rows of up to 128 tokens that is the unfused one, where forward and backward of a small model take 9
    to 15 % less time; in float32 the fused one, its heads padded to a vector's width (benchmarks/attention.py).
    """
    if ids_BT.device.type != "cpu":
        return nullcontext()
    if not torch.is_autocast_enabled("cpu"):
        return _WholeVectors()
    return sdpa_kernel(SDPBackend.MATH) if torch.is_grad_enabled() and ids_BT.shape[1] <= 128 else nullcontext()


class _WholeVectors(TorchFunctionMode):
    """Within it, float32 attention of heads of 8 to 15 numbers works on 16: zeros change nothing, and the kernel goes
    by whole vectors instead of number by number."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or len(args) < 3 or not 8 <= args[0].shape[-1] < 16:
            return func(*args, **kwargs)
        query, key, value, *others = args
        width = query.shape[-1]
        if kwargs.get("scale") is None:
            kwargs = {**kwargs, "scale": width**-0.5}
        padded = (F.pad(x, (0, 16 - x.shape[-1])) for x in (query, key, value))
        return func(*padded, *others, **kwargs)[..., : value.shape[-1]]


@torch.no_grad()
def check_head(model: Any) -> None:
    """Raise ModelError unless trunk and head together give the model's own logits on a few tokens."""
    device = next(model.parameters()).device
    ids = torch.arange(8, device=device).unsqueeze(0) % model.config.get_text_config().vocab_size
    positions = torch.arange(8, device=device).unsqueeze(0)
    want = model(input_ids=ids, use_cache=False).logits.float()[0]
    got = head_of(model).logits(forward_hidden(model, ids, positions)[0])
    # Compared by cosine and size: 16-bit models round their own logits, which is no misunderstanding.
    error = float((got - want).norm() / want.norm().clamp(min=1e-6))
    broken = next((n for n, p in model.named_parameters() if not torch.isfinite(p).all()), None)
    if broken is not None:
        raise ModelError(
            f"the weights hold values that are no numbers (NaN or infinity), first in {broken}; copy them again"
        )
    if not error < 0.05:
        raise ModelError(
            f"the output head of {type(model).__name__} does more than this version of Pennyweight knows (its logits "
            f"differ by {100 * error:.0f} % from the model's own); use another architecture, or report it"
        )
