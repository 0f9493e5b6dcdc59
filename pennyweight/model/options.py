"""Training in less memory, or in less time: LoRA, gradient checkpointing and torch.compile."""

from __future__ import annotations

import os
import shutil
import sys
from functools import cache
from typing import Any

import torch
from torch import nn

from pennyweight.errors import RecipeError, first_line
from pennyweight.model.adapters import attach, bases_of
from pennyweight.model.head import check_packing
from pennyweight.model.loaded import blocks_of
from pennyweight.quant.formats import Format
from pennyweight.quant.packing import storable
from pennyweight.settings import Lora, Schedule


def check_options(model: Any, schedule: Schedule) -> None:
    """What ``ready`` would refuse, found out beforehand; ``model`` is left as it is.

    Raises:
        RecipeError, MissingExtra: the model, or this machine, cannot be trained in the way that is asked for.
    """
    if schedule.pack:
        check_packing(model)
    if schedule.lora:
        bases_of(model, _blocks(model, "lora"), schedule.lora, _format_of(schedule.lora))
    if schedule.gradient_checkpointing and not _can_checkpoint(model):
        raise RecipeError(
            f"a {type(model).__name__} has no gradient checkpointing; set train.gradient_checkpointing=false, and a "
            "smaller train.micro_batch for less memory"
        )
    if schedule.compile:
        _blocks(model, "compile")
        _check_compiler(next(model.parameters()).device.type)


def ready(model: Any, schedule: Schedule, seed: int) -> None:
    """What a schedule asks of the model itself, before it is trained: low-rank factors, made by ``seed``; gradient
    checkpointing; torch.compile.

    Raises:
        RecipeError, MissingExtra: it cannot be had.
    """
    check_options(model, schedule)
    if schedule.lora:
        attach(model, blocks_of(model), schedule.lora, seed, _format_of(schedule.lora))
    if schedule.gradient_checkpointing:
        checkpoint_gradients(model)
    if schedule.compile:
        compile_blocks(model)


def checkpoint_gradients(model: Any) -> None:
    """Keep each block's input only; the backward pass computes the block again (Chen et al., arXiv 1604.06174)."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # as transformers now calls it
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    model.plain_attention = True  # what is computed again must be computed as it was


def compile_blocks(model: Any) -> None:
    """torch.compile each block, for any number of rows and tokens, in its place.

    Blocks that are alike, of this model and of the next, share what is compiled: it takes no longer for a deep model.
    What is outside stays as it is, above all the look at positions that tells packed rows from others.
    """
    for block in blocks_of(model)[1]:
        block.compile(dynamic=True)
    model.plain_attention = True  # the compiler chooses


def _blocks(model: Any, option: str) -> tuple[str, nn.Module]:
    try:
        return blocks_of(model)
    except RecipeError:
        raise RecipeError(
            f"the blocks of a {type(model).__name__}, which train.{option} works on, could not be found; leave "
            f"train.{option} out"
        ) from None


def _format_of(lora: Lora) -> Any:
    def of(shape: tuple[int, int]) -> Format | None:
        return storable(lora.base, shape, 32, torch.bfloat16)

    return of


def _can_checkpoint(model: Any) -> bool:
    known = getattr(model, "supports_gradient_checkpointing", False)
    return known and any(hasattr(m, "gradient_checkpointing") for m in model.modules())


@cache
def _check_compiler(device: str) -> None:
    """Raise RecipeError unless torch.compile makes something here that runs; it is tried on a sum."""
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if device == "cpu" and not shutil.which(compiler):  # what an earlier run has compiled would be found again
        raise RecipeError(
            f"train.compile=true needs a C++ compiler, and there is no {compiler} on the path; install one, name "
            "another by the environment variable CXX, or set train.compile=false"
        )
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as e:  # of the compiler, the linker, Triton, headers that are not there
        raise RecipeError(
            f"train.compile=true: torch.compile does not work here ({first_line(e)}); install a compiler and Python's "
            "headers, or set train.compile=false"
        ) from None
