"""Fused experts of a mixture taken apart into Linears, and names as a checkpoint has them.

transformers keeps the experts of a layer in two tensors, (E, 2 I, H) and (E, I, H) turned; checkpoints, and the engines
that read low-bit ones, know three Linears for each expert.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

from pennyweight.errors import ModelError

_GATE_UP, _DOWN = "experts.gate_up_proj", "experts.down_proj"


class Experts(nn.ModuleList):
    """Experts apart, each with three Linears under their names in a checkpoint: gate, up, down.

    Computes what the fused module did: of every token the weighted sum of what its experts give.
    """

    names: tuple[str, str, str]
    act_fn: Any

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for i in top_k_index.unique().tolist():
            token, place = torch.where(top_k_index == i)
            gate, up, down = (self[i].get_submodule(name) for name in self.names)
            x = hidden_states[token]
            x = down(self.act_fn(gate(x)) * up(x)) * top_k_weights[token, place, None]
            out.index_add_(0, token, x.to(out.dtype))
        return out


def take_apart(model: Any) -> bool:
    """Put ``Experts`` in the place of fused ones, in place, without a copy of their weights; whether there are any.

    Raises:
        ModelError: they are of a kind that is not three plain Linears.
    """
    fused = {name: m for name, m in model.named_modules() if _is_fused(m)}
    if not fused:
        return any(isinstance(m, Experts) for m in model.modules())
    names = _names(model)
    for name, m in fused.items():
        plain = getattr(m, "has_gate", True) and getattr(m, "is_concatenated", True)
        special = any(getattr(m, kind, False) for kind in ("is_transposed", "has_bias", "has_post_expert_norm"))
        own_gate = getattr(getattr(type(m), "_apply_gate", None), "__name__", "") != "_default_apply_gate"
        if names is None or not plain or special or own_gate:
            raise ModelError(
                f"the experts of a {type(model).__name__} are not three plain Linears each, which computing or storing "
                "them in few bits needs; use another model, or full precision"
            )
        apart = Experts(_expert(m, i, names) for i in range(m.num_experts))
        apart.names, apart.act_fn = names, m.act_fn
        model.set_submodule(name, apart.train(m.training))
    return True


def in_experts(name: str) -> bool:
    """Whether a Linear of that name is one expert's."""
    return ".experts." in name


def _is_fused(m: nn.Module) -> bool:
    pair = (getattr(m, "gate_up_proj", None), getattr(m, "down_proj", None))
    return all(isinstance(p, nn.Parameter) and p.ndim == 3 for p in pair)


def _expert(m: Any, i: int, names: tuple[str, str, str]) -> nn.ModuleDict:
    weights = (*m.gate_up_proj.detach()[i].chunk(2), m.down_proj.detach()[i])
    made = nn.ModuleDict()
    for name, weight in zip(names, weights, strict=True):
        with torch.device("meta"):
            made[name] = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        made[name].weight = nn.Parameter(weight, requires_grad=m.down_proj.requires_grad)
    return made


def _names(model: Any) -> tuple[str, str, str] | None:
    """What a checkpoint calls gate, up and down; None where it has them in another form."""
    found: dict[str, list[str]] = {}
    for step in get_model_conversion_mapping(model, add_legacy=False):
        if isinstance(step, WeightConverter) and len(step.target_patterns) == 1:
            sources = [re.search(r"experts\.\*\.(\w+)\.weight", s) for s in step.source_patterns]
            for end in (_GATE_UP, _DOWN):
                if step.target_patterns[0].endswith(end) and all(sources):
                    found[end] = [s[1] for s in sources if s]
    if len(found.get(_GATE_UP, ())) != 2 or len(found.get(_DOWN, ())) != 1:
        return None
    gate, up = found[_GATE_UP]
    return gate, up, found[_DOWN][0]


def as_in_a_checkpoint(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model whose experts are apart, under the names that a checkpoint gives them."""
    return revert_weight_conversion(model, tensors)
