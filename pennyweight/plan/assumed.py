"""A config.json of an architecture that is not known: counted as the known one whose settings it has, and said so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pennyweight.errors import ModelError
from pennyweight.plan.architectures import FAMILIES, read_shapes, shapes_of
from pennyweight.plan.shapes import Shapes

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def read_or_assume(path: str) -> tuple[Shapes, str | None]:
    """The shapes of the model whose config.json, or whose folder, ``path`` is; and what was assumed, if anything.

    Raises:
        ModelError: config.json cannot be read, or has not the settings of any architecture that is known.
    """
    try:
        return read_shapes(path), None
    except ModelError as e:
        found = _other(path)
        if found is None:
            raise
        kind, config = found
        like = _nearest(config)
        if like is None:
            raise
        try:
            shapes = shapes_of({**config, "model_type": like, "architectures": []}, path)
        except ModelError:
            raise e from None
    return shapes, (
        f"architecture {kind} is not known: counted as {like} with the sizes of its config.json, which leaves out "
        "whatever else it has (vision, state-space layers, shared or windowed layers of its own)"
    )


def _other(path: str) -> tuple[str, Mapping[str, Any]] | None:
    """Name and settings of a language model that is of no known family; its text part, where it has several."""
    file = Path(path).expanduser()
    file = file / "config.json" if file.is_dir() else file
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        return None
    text = config.get("text_config")
    if config["model_type"] in FAMILIES:
        return None
    return config["model_type"], text if isinstance(text, dict) else config


def _nearest(config: Mapping[str, Any]) -> str | None:
    """The family whose settings these are."""
    if config.get("model_type") in FAMILIES:
        return str(config["model_type"])
    if "kv_lora_rank" in config:
        return "deepseek_v3"
    if any(config.get(name) for name in _EXPERTS):
        return "qwen3_moe" if "moe_intermediate_size" in config else "mixtral"
    if "n_embd" in config:
        return "gpt2"
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    return "llama" if all(name in config for name in sizes) else None
