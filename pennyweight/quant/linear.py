"""Linears that compute in few bits while they train: all three products in fp8.

Shape letters: N rows (tokens), I input and O output features. A recipe names the format of activations (tiles along I),
weights and gradients (tiles along O); the weight gradient sums over N, so there both operands are tiled along N.

DeepSeek-V3's tiles and blocks run on a GPU's fp8 tensor cores (``quant/kernels.py``) where it has them. Everything else
is emulated: operands are rounded to the same codes, and multiplied and summed in float32. So a laptop sees what the
codes do to a training run. Accumulation is better than a tensor core's; DeepSeek-V3 promotes partial sums to float32
every 128 elements for that reason (arXiv 2412.19437, section 3.3). ``@`` of two float8 tensors is never used: on a CPU
torch sums it in float8 and gets nearly everything wrong.
"""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.errors import first_line
from pennyweight.quant.formats import (
    E4M3,
    FORMATS,
    Coded,
    Format,
    decode,
    encode,
)

try:
    from pennyweight.quant import kernels as _kernels
except ImportError:  # no Triton, as beside a torch without CUDA
    _kernels = None

kernels: Any = _kernels
"""``quant/kernels.py``, or None."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a Linear computes in training.

    ``cached``: the activation that the backward pass needs is kept as its forward codes, and tiled anew along N for the
    weight gradient; otherwise it is kept as it came. ``noisy``: gradients are rounded stochastically.
    """

    name: str
    activation: Format
    weight: Format
    gradient: Format
    cached: bool = True
    noisy: bool = False

    @property
    def of_tensor_cores(self) -> bool:
        """Whether ``quant/kernels.py`` has it."""
        formats = [f.name for f in (self.activation, self.weight, self.gradient)]
        known = [[f"fp8_act{p}", f"fp8_block{p}", f"fp8_act{p}"] for p in ("", "_pow2")]
        return self.cached and not self.noisy and formats in known

    @property
    def pow2(self) -> bool:
        return self.weight.scale == "pow2"


def _along_rows(f: Format) -> Format:
    """The format for an operand whose rows are summed over: its tiles turned."""
    return replace(f, tile=(f.tile[1], f.tile[0]))


SCHEMES: dict[str, Scheme] = {
    s.name: s
    for s in (
        Scheme("fp8", FORMATS["fp8_act_pow2"], FORMATS["fp8_block_pow2"], FORMATS["fp8_act_pow2"]),
        Scheme("fp8_v3", FORMATS["fp8_act"], FORMATS["fp8_block"], FORMATS["fp8_act"]),
        Scheme("fp8_tensor", FORMATS["fp8_tensor"], FORMATS["fp8_tensor"], FORMATS["fp8_tensor_e5m2"]),
        Scheme("mxfp8", FORMATS["mxfp8"], FORMATS["mxfp8"], FORMATS["mxfp8"], cached=False),
        Scheme("nvfp4", FORMATS["nvfp4"], replace(FORMATS["nvfp4"], tile=(16, 16)), FORMATS["nvfp4"], False, True),
    )
}
"""``fp8``: DeepSeek-V3's recipe with V3.1's power-of-two scales, the default; ``fp8_v3``: with float32 scales;
``fp8_tensor``: one scale a tensor, gradients in E5M2; ``nvfp4``: 16 x 16 blocks of weights, gradients rounded
stochastically, no Hadamard transform."""


_ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate)(\.|$)")


def is_router(name: str) -> bool:
    """Whether a module of that name chooses among experts, or weighs them."""
    return _ROUTER.search(name) is not None


class Seen:
    """The codes of the tensor that was coded last: query, key and value read the same one, which is coded once.

    It goes by the tensor and its version: what is written past autograd (``x.data``, a shared array) is not seen.
    """

    _last: tuple[weakref.ref[Tensor], tuple[int, bool], Any] | None = None

    def __init__(self, code: Callable[[Tensor], Any]):
        self._code = code

    def __getstate__(self) -> dict[str, Any]:
        return {"_code": self._code}  # a copy sees for itself

    def coded(self, x: Tensor) -> Any:
        """What ``code`` makes of x as rows (N, features)."""
        if x.is_inference():  # which does not tell whether it was written to
            return self._code(x.reshape(-1, x.shape[-1]))
        now = x._version, torch.is_grad_enabled()
        if self._last is None or self._last[0]() is not x or self._last[1] != now:
            self._last = weakref.ref(x, self._forget), now, self._code(x.detach().reshape(-1, x.shape[-1]))
        return self._last[2]

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        if self._last is not None and self._last[0] is gone:
            self._last = None


class LowLinear(nn.Linear):
    """An nn.Linear, of the same parameters, that computes by its ``scheme``."""

    scheme: Scheme
    seen: Seen

    def forward(self, input: Tensor) -> Tensor:
        device = input.device
        # As a plain Linear would, the layer gives what autocast asks for.
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else input.dtype
        product = _OnTensorCores if on_tensor_cores(self.scheme, device) else _Emulated
        x, rows = self.seen.coded(input), input.reshape(-1, input.shape[-1])
        out = product.apply(rows, self.weight, self.bias, x, self.scheme, dtype)
        return out.view(*input.shape[:-1], self.out_features)


def on_tensor_cores(scheme: Scheme, device: torch.device) -> bool:
    """Whether a device's tensor cores compute by ``scheme``, rather than an emulation of them."""
    return kernels is not None and scheme.of_tensor_cores and kernels.runs_on(device) and agree(device)


@cache
def agree(device: torch.device) -> bool:
    """Whether the kernels make there the codes and products that they should: compilers differ."""
    try:
        wrong = _differs(torch.randn(2, 200, 272, generator=torch.Generator().manual_seed(0)).prod(0).to(device))
    except Exception as error:  # no C compiler, too old a Triton: whatever it is, the emulation does the same
        wrong = first_line(error)
    if wrong:
        told = f"Triton does not make fp8 products on {device} ({wrong}); they are emulated, which is slow"
        warnings.warn(f"{told}; try another version of Triton, or train.precision=full", stacklevel=2)
    return not wrong


def _differs(x: Tensor) -> str | None:
    """What the kernels make of x that is not what the formats make of it."""
    for dtype in (torch.float32, torch.bfloat16):
        x = x.to(dtype)
        for pow2, suffix in ((True, "_pow2"), (False, "")):
            along, block = FORMATS[f"fp8_act{suffix}"], encode(x, FORMATS[f"fp8_block{suffix}"])
            rows, columns = encode(x, along), encode(x, _along_rows(along))
            again = encode(decode(rows), _along_rows(along))
            plain, turned = kernels.blocks(x, pow2), kernels.blocks(x, pow2, turned=True)
            for what, made, codes, scale in (
                ("tiles", kernels.tiles(x, pow2)[0], rows.codes, rows.scale),
                ("tiles along columns", kernels.tiles(x, pow2, "of numbers")[1], columns.codes.T, columns.scale.T),
                ("tiles of codes", kernels.tiles(x, pow2, "of codes")[1], again.codes.T, again.scale.T),
                ("blocks", plain, block.codes, block.scale.T),
                ("turned blocks", turned, block.codes.T, block.scale),
            ):
                same = torch.equal(made.codes[: codes.shape[0], : codes.shape[1]], codes)
                if not same or not torch.equal(made.scale[: scale.shape[0], : scale.shape[1]], scale):
                    return f"its {what} are not those of the formats"
            got = kernels.product(kernels.tiles(x, pow2)[0], plain, torch.float32)[: len(x)]
            want = _multiply(decode(rows), decode(block).T, torch.float32)
            if not bool((got - want).norm() < 1e-3 * want.norm()):
                return "its products are not those of the codes"
    return None


@dataclass(frozen=True)
class _Coder:
    """What a LowLinear of ``scheme`` keeps of what it reads."""

    scheme: Scheme

    def __call__(self, rows: Tensor) -> Any:
        if on_tensor_cores(self.scheme, rows.device):
            return kernels.tiles(rows, self.scheme.pow2, "of codes" if torch.is_grad_enabled() else "none")
        return encode(rows, self.scheme.activation)


def compute_by(scheme: Scheme, *layers: nn.Linear) -> None:
    """Make Linears LowLinears, in place."""
    seen = Seen(_Coder(scheme))
    for layer in layers:
        layer.__class__, layer.scheme, layer.seen = LowLinear, scheme, seen  # type: ignore[assignment]


class _Emulated(torch.autograd.Function):
    """x W^T + b, all three products in the scheme's formats."""

    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, weight_OI: Tensor, bias: Tensor | None, x: Coded, scheme: Scheme, dtype: torch.dtype
    ) -> Tensor:
        out = _multiply(decode(x), decode(encode(weight_OI, scheme.weight)).T, dtype)
        ctx.scheme, ctx.dtype, ctx.whole = scheme, x_NI.dtype, x.whole
        ctx.save_for_backward(*((x.codes, _small(x)) if scheme.cached else (x_NI,)), weight_OI)
        return out if bias is None else out + bias.to(out.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        scheme, (g,) = ctx.scheme, grads
        dx = dw = None
        if ctx.needs_input_grad[0]:
            rounded = decode(encode(g, scheme.gradient, _noise(g, scheme)))
            dx = _multiply(rounded, decode(encode(ctx.saved_tensors[-1], scheme.weight)), ctx.dtype)
        if ctx.needs_input_grad[1]:
            rounded = decode(encode(g, _along_rows(scheme.gradient), _noise(g, scheme)))
            x = decode(encode(_activation(ctx), _along_rows(scheme.activation)))
            dw = _multiply(rounded.T, x, torch.float32)
        return dx, dw, g.float().sum(0) if ctx.needs_input_grad[2] else None, None, None, None


class _OnTensorCores(torch.autograd.Function):
    """The same of DeepSeek-V3's schemes, from the same codes, by ``quant/kernels.py``. The activation is kept as it is
    tiled along N."""

    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, weight_OI: Tensor, bias: Tensor | None, x: Any, scheme: Scheme, dtype: torch.dtype
    ) -> Tensor:
        rows, columns = x
        ctx.pow2, ctx.dtype, ctx.rows = scheme.pow2, x_NI.dtype, len(x_NI)
        kept = (columns.codes, columns.scale) if ctx.needs_input_grad[1] else (None, None)
        ctx.save_for_backward(*kept, weight_OI)
        out = kernels.product(rows, kernels.blocks(weight_OI, scheme.pow2), dtype)[: len(x_NI)]
        return out if bias is None else out + bias.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        (g,), (codes, scale, weight_OI) = grads, ctx.saved_tensors
        wants_dx, wants_dw, wants_db = ctx.needs_input_grad[:3]
        rows, columns = kernels.tiles(g, ctx.pow2, "of numbers" if wants_dw else "none")
        dx = dw = None
        if wants_dx:
            weight = kernels.blocks(weight_OI, ctx.pow2, turned=True)
            dx = kernels.product(rows, weight, ctx.dtype)[: ctx.rows]
        if wants_dw:
            dw = kernels.product(columns, kernels.Operand(codes, scale), weight_OI.dtype)
        return dx, dw, g.float().sum(0) if wants_db else None, None, None, None


def _small(x: Coded) -> Tensor:
    """Scales in as few bytes as hold them: exponents where they are powers of two."""
    return torch.frexp(x.scale).exponent.add(126).to(torch.uint8) if x.format.scale.startswith("pow2") else x.scale


def _activation(ctx: Any) -> Tensor:
    """What forward kept of the activation, (N, I)."""
    if not ctx.scheme.cached:
        return ctx.saved_tensors[0]
    codes, scale, _ = ctx.saved_tensors
    if scale.dtype == torch.uint8:
        scale = torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.int() - 127)
    return decode(Coded(codes, scale, ctx.scheme.activation, ctx.whole))


def _multiply(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b summed in float32, whatever autocast says, in the dtype of the layer."""
    with torch.autocast(a.device.type, enabled=False):
        return (a @ b).to(dtype)


def _noise(g: Tensor, scheme: Scheme) -> Tensor | None:
    return torch.rand_like(g, dtype=torch.float32) if scheme.noisy else None


def compute_in(model: nn.Module, precision: str, weights: str) -> None:
    """Make a causal LM train as a schedule says, in place: ``precision``, a row of ``SCHEMES`` or full, and dtype of
    ``weights``."""
    if weights == "bfloat16":
        for p in model.parameters():  # not buffers, of which rotary frequencies need their bits
            p.data = p.data.to(torch.bfloat16)
    if precision != "full":
        swap(model, SCHEMES[precision])


def swap(model: nn.Module, scheme: Scheme) -> list[str]:
    """Make every Linear of a Hugging Face causal LM compute by ``scheme``, in place; names of those that now do.

    Parameters stay the same objects, so an optimizer, a checkpoint and a saved folder know nothing of it. The output
    head and routers stay as they are; embeddings, norms and attention cores are no Linears.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    every = ((name, m) for name, m in model.named_modules() if type(m) is nn.Linear and m is not head)
    swapped = {name: m for name, m in every if not is_router(name)}
    compute_by(scheme, *swapped.values())
    return list(swapped)


@contextmanager
def reading_in_codes(model: nn.Module, codes: dict[str, Coded]) -> Iterator[None]:
    """Within it, Linears stored in fp8 round what they read as engines do: by token, or by its tiles of 128."""
    with ExitStack() as hooks:
        for name, coded in codes.items():
            f = coded.format
            if f.element is E4M3 and f.tile != (1, 32):
                read = replace(f, tile=(1, f.tile[1]), scale="float32")
                hooks.callback(model.get_submodule(name).register_forward_pre_hook(_rounding(read)).remove)
        yield


def _rounding(f: Format) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def rounded(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        return decode(encode(x.flatten(0, -2), f)).view_as(x).to(x.dtype), *args[1:]

    return rounded
