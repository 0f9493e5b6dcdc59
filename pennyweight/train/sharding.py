"""A model cut over the processes that train it: each holds its part of every weight, gradient and moment.

PyTorch's FSDP2 (``fully_shard``) gathers the weights of a block where its forward and backward pass need them, and
adds up gradients by parts. It does so around a module's ``forward``, which this toolkit never calls: head and loss go
in one pass. So the loss of a micro-batch is made the forward of a module that holds the model. FSDP2 is imported when
it is needed: one process in need of none starts half a second sooner.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.errors import ModelError, RecipeError
from pennyweight.model.loaded import blocks_of
from pennyweight.train.group import Group

Loss = Callable[[nn.Module, Any, bool], Any]
"""(model, batch, whether to measure) -> a dataclass whose ``loss`` carries the gradient"""


class _Pass(nn.Module):
    """A micro-batch's loss as the forward of a module, so that it is known when weights are needed."""

    def __init__(self, model: nn.Module, loss: Loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any, measured: bool) -> tuple[Tensor, Any]:
        totals = self.loss(self.model, batch, measured)
        return totals.loss, totals  # a tensor of its own: the backward pass is noticed by what happens to it


def cut_over(model: nn.Module, loss: Loss, group: Group) -> tuple[nn.Module, Callable[[Any, bool], Any]]:
    """The model to train, and the loss of (batch, whether to measure).

    For one process that is ``model`` itself. For several it is a twin whose parameters are cut over the group, along
    their first dimension; ``model`` keeps none, and gets them back by ``gather``. Every process must take the loss and
    its gradient equally often.

    Raises:
        ModelError: a parameter is a single number, which cannot be cut.
    """
    if group.size == 1:
        return model, partial(loss, model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    tensors = (*model.parameters(), *model.buffers())
    twin = copy.deepcopy(model, {id(t): t for t in tensors})  # of the modules only
    for whole, copied in zip(model.modules(), twin.modules(), strict=True):
        if whole._compiled_call_impl is not None:  # which is not copied
            copied.compile(dynamic=True)
    step = _Pass(twin, loss)
    mesh = init_device_mesh(next(twin.parameters()).device.type, (group.size,))
    parts: list[nn.Module] = []
    with suppress(RecipeError):  # no list of blocks: all is gathered at once
        parts.extend(blocks_of(twin)[1])
    for part in (*parts, step):
        try:
            fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
        except ValueError as e:
            raise ModelError(f"this model cannot be cut over processes ({e}); train it in one process") from None
    for part in step.modules():
        if isinstance(part, FSDPModule):
            _add_up(part)
    for _, module, name, parameter in _places(model):
        module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)

    def loss_of(batch: Any, measured: bool) -> Any:
        value, totals = step(batch, measured)
        return replace(totals, loss=value)

    return twin, loss_of


def _add_up(part: Any) -> None:
    """Gradients are summed over processes, not averaged: the loop divides once, by the positions of the whole step."""
    part.set_gradient_divide_factor(1.0)
    part.set_force_sum_reduction_for_comms(True)  # gloo has no other
    if hasattr(part, "set_reduce_scatter_unused_params"):  # an expert that only one process has tokens for
        part.set_reduce_scatter_unused_params(True)


def _places(model: nn.Module) -> list[tuple[str, nn.Module, str, nn.Parameter]]:
    """(name, module, name in it, parameter) of every place where a parameter is; tied ones have several."""
    return [
        (f"{path}.{name}" if path else name, module, name, parameter)
        for path, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]


@torch.no_grad()
def gather(trained: nn.Module, model: nn.Module, group: Group) -> None:
    """Put the weights that were trained in parts back into ``model``, whole, on the CPU of the first process.

    One tensor at a time: no GPU ever holds more than that beside its part.
    """
    if group.size == 1:
        return
    homes = {name: (module, key) for name, module, key, _ in _places(model)}
    whole: dict[int, nn.Parameter] = {}
    for name, _, _, parameter in _places(trained):
        if id(parameter) not in whole:
            full = _whole(parameter)
            whole[id(parameter)] = nn.Parameter(full.cpu() if group.first else full.to("meta"), parameter.requires_grad)
        module, key = homes[name]
        module._parameters[key] = whole[id(parameter)]


@torch.no_grad()
def clip(model: nn.Module, largest: float) -> float:
    """Scale gradients down to a norm of ``largest`` over all parameters and processes; the norm before."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = _whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return float(norm)


def _whole(t: Tensor) -> Tensor:
    """A tensor that is cut over processes, put together in each of them."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t  # type: ignore[attr-defined]
