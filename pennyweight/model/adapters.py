"""LoRA and QLoRA students: low-rank factors are trained beside frozen weights, and merged into them at the end.

LoRA (Hu et al., arXiv 2106.09685) by peft. QLoRA (Dettmers et al., arXiv 2305.14314) keeps the frozen weights in few
bits while it trains; here they are in a format of ours, decoded where they are used, so that it runs on any device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from pennyweight.errors import MissingExtra, RecipeError
from pennyweight.quant.formats import FORMATS, Coded, Float, Format, decode, encode
from pennyweight.settings import Lora

FormatOf = Callable[[tuple[int, int]], Format | None]
"""A weight's shape (out, in) -> its format; None where the format's tiles do not divide it"""


class FrozenLinear(nn.Linear):
    """An nn.Linear whose weight is kept in the codes of a low-bit format and cannot be trained.

    ``weight`` is decoded anew whenever it is asked for; the backward pass decodes it once more and keeps nothing.
    """

    def __init__(self, layer: nn.Linear, to: Format):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.dtype = layer.in_features, layer.out_features, layer.weight.dtype
        coded = encode(layer.weight, to, search=True)
        self.format, self.whole = to, coded.whole
        self.register_buffer("codes", _packed(coded.codes, to), persistent=False)
        self.register_buffer("scale", coded.scale.to(_storage(to)), persistent=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(out, in) numbers of the codes, of the dtype that the weight had."""
        codes, shape = cast(Tensor, self.codes), (self.out_features, self.in_features)
        whole = Coded(_unpacked(codes, self.format, shape), cast(Tensor, self.scale).float(), self.format, self.whole)
        return decode(whole).to(self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        made = _Decoded.apply(input.to(dtype), self)
        return made if self.bias is None else made + self.bias.to(made.dtype)


class _Decoded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return x @ layer.weight.to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.layer.weight.to(grads[0].dtype), None


def bases_of(model: Any, blocks: tuple[str, nn.Module], lora: Lora, format_of: FormatOf) -> dict[str, Format | None]:
    """Names of the Linears of ``model``'s blocks (their name, and they themselves) -> the format that ``lora.base``
    keeps them in; None where that is full.

    Raises:
        MissingExtra: peft is not installed.
        RecipeError: its blocks have no Linears, none has the rank that is asked for, or the format's tiles do not
            divide one.
    """
    _peft()
    linears = {f"{blocks[0]}.{name}": m for name, m in blocks[1].named_modules() if isinstance(m, nn.Linear)}
    if not linears:
        raise RecipeError(
            f"the blocks of a {type(model).__name__} have no Linears for train.lora; leave train.lora out"
        )
    most = max(min(m.weight.shape) for m in linears.values())
    if lora.rank > most:
        raise RecipeError(
            f"train.lora.rank={lora.rank} is more than any Linear of the student's blocks has, which is {most} at "
            "most; set a smaller train.lora.rank, or leave train.lora out to train all weights"
        )
    if lora.base == "full":
        return dict.fromkeys(linears)
    formats = {name: format_of((m.out_features, m.in_features)) for name, m in linears.items()}
    for name, to in formats.items():
        if to is None:
            raise RecipeError(
                f"train.lora.base={lora.base} shares a scale among {FORMATS[lora.base].tile[1]} weights, which does "
                f"not divide the {linears[name].in_features} columns of {name}; set train.lora.base=int4"
            )
    return formats


def attach(model: Any, blocks: tuple[str, nn.Module], lora: Lora, seed: int, format_of: FormatOf) -> None:
    """Freeze ``model`` and give every Linear of its ``blocks`` (their name, and they themselves) low-rank factors A
    (rank, in), random, and B (out, rank), zero; the Linears themselves are kept in ``lora.base``.

    Args:
        format_of: ``lora.base`` for a weight of some shape, where that is a low-bit format.

    Raises:
        MissingExtra, RecipeError: as of ``bases_of``.
    """
    formats, peft = bases_of(model, blocks, lora, format_of), _peft()
    model.requires_grad_(False)
    for name, to in formats.items():
        if to is not None:
            _replace(model, name, FrozenLinear(model.get_submodule(name), to))
    alpha = 2 * lora.rank if lora.alpha is None else lora.alpha
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=cast(int, alpha), lora_dropout=lora.dropout, target_modules=list(formats)
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model)


def _peft() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import peft
    except ImportError:
        raise MissingExtra("peft", "lora", "train.lora") from None
    return peft


def merge(model: Any) -> None:
    """Add the factors' product to the weights, and leave plain Linears; nothing where there are no factors."""
    for name, layer in list(_adapted(model)):
        base = layer.get_base_layer()
        plain = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        delta = layer.get_delta_weight("default").detach()
        weight = base.weight.detach().to(delta.device)  # codes stay where they were; factors may have been gathered
        plain.weight = nn.Parameter(weight + delta.to(weight.dtype))
        plain.bias = base.bias
        _replace(model, name, plain)
    if hasattr(model, "peft_config"):
        del model.peft_config
    model.requires_grad_(True)


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, m) for name, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "get_base_layer"))


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def _storage(to: Format) -> torch.dtype:
    """What scales are kept in; each is exact in it."""
    return {"bfloat16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}.get(to.scale, torch.float32)


def _packed(codes: Tensor, to: Format) -> Tensor:
    """Codes of 4 bits, two to a byte, the first in the low half; others as they are."""
    if to.element_bits != 4:
        return codes
    flat = nn.functional.pad(codes.flatten(), (0, codes.numel() % 2)).to(torch.uint8) & 15
    return flat[0::2] | (flat[1::2] << 4)


def _unpacked(codes: Tensor, of: Format, shape: tuple[int, int]) -> Tensor:
    if of.element_bits != 4:
        return codes
    flat = torch.stack([codes & 15, codes >> 4], -1).flatten()[: shape[0] * shape[1]].view(shape)
    return flat if isinstance(of.element, Float) else (flat ^ 8).to(torch.int8) - 8
