"""Training in less memory, or in less time: LoRA, gradient checkpointing and torch.compile."""

from __future__ import annotations

import shutil
from typing import Any

import torch

from pennyweight.errors import RecipeError
from pennyweight.model.adapters import attach
from pennyweight.model.head import trunk_of
from pennyweight.model.loaded import blocks_of
from pennyweight.quant.packing import storable
from pennyweight.settings import Schedule


def ready(model: Any, schedule: Schedule, seed: int) -> None:
    """What a schedule asks of the model itself, before it is trained: low-rank factors, made by ``seed``; gradient
    checkpointing; torch.compile.

    Raises:
        RecipeError, MissingExtra: it cannot be had.
    """
    lora = schedule.lora
    if lora:
        format_of = lambda shape: storable(lora.base, shape, 32, torch.bfloat16)  # noqa: E731
        attach(model, blocks_of(model), lora, seed, format_of)
    if schedule.gradient_checkpointing:
        checkpoint_gradients(model)
    if schedule.compile:
        compile_trunk(model)


def checkpoint_gradients(model: Any) -> None:
    """Keep each block's input only; the backward pass computes the block again (Chen et al., arXiv 1604.06174).

    Raises:
        RecipeError: the architecture does not offer it.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise RecipeError(
            f"a {type(model).__name__} has no gradient checkpointing; set train.gradient_checkpointing=false, and a "
            "smaller train.micro_batch for less memory"
        )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.computes_again = True


def compile_trunk(model: Any) -> None:
    """torch.compile the model without its head, for any number of rows and tokens, in its place.

    Raises:
        RecipeError: there is no compiler for what it makes.
    """
    device = next(model.parameters()).device.type
    if device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise RecipeError(
            "train.compile=true needs a C++ compiler (g++ or clang++), and there is none on the path; install one, or "
            "set train.compile=false"
        )
    trunk_of(model).compile(dynamic=True)
