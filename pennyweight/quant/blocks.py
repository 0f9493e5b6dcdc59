"""What goes into the blocks of a decoder, so that they can be worked on one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn


def inputs_of(
    trunk: nn.Module, blocks: nn.ModuleList, batches: Iterable[dict[str, Any]]
) -> tuple[list[Tensor], list[list[dict[str, Any]]]]:
    """What comes into the first block for each batch, and, for each block, what else it is given.

    ``trunk`` is the model without its head: the logits of a batch would be the most that is there.
    """
    inputs: list[Tensor] = []
    others: list[list[dict[str, Any]]] = [[] for _ in blocks]
    with ExitStack() as hooks:
        for i, block in enumerate(blocks):

            def note(module: nn.Module, args: tuple, kwargs: dict[str, Any], i: int = i) -> None:
                if i == 0:
                    inputs.append(args[0] if args else kwargs["hidden_states"])
                others[i].append({k: v for k, v in kwargs.items() if k != "hidden_states"})

            hooks.callback(block.register_forward_pre_hook(note, with_kwargs=True).remove)
        for batch in batches:
            trunk(**batch, use_cache=False)
    return inputs, others


def adding_to(hessian: Tensor) -> Callable[[nn.Module, tuple], None]:
    """A forward pre-hook that adds x^T x of what comes in, (N, I), to an (I, I) matrix."""

    def add(module: nn.Module, args: tuple) -> None:
        x = args[0].flatten(0, -2).float()
        hessian.addmm_(x.T, x)

    return add


def first_of(out: Any) -> Tensor:
    """The hidden states of what a block gives."""
    return out[0] if isinstance(out, tuple) else out
