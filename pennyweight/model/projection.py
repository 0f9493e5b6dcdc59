"""A linear map from a student's hidden width to its teacher's, trained with the student and dropped from what is saved.

FitNets (Romero et al., arXiv 1412.6550) match hidden layers of unlike widths through such a map.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_NAME = "hidden_projection"


def attach(model: nn.Module, width: int, teacher_width: int, seed: int) -> None:
    """Give ``model`` a map from ``width`` to ``teacher_width``, orthogonal at first; none where they are the same."""
    if width == teacher_width:
        return
    start = torch.empty(teacher_width, width)
    nn.init.orthogonal_(start, generator=torch.Generator().manual_seed(seed))
    layer = nn.Linear(width, teacher_width, bias=False)
    layer.weight.data.copy_(start)
    model.add_module(_NAME, layer)


def projected(model: nn.Module, hidden_ND: Tensor) -> Tensor:
    """Hidden states in the teacher's width: through the map if ``model`` has one, else as they are; float32."""
    layer: Any = model._modules.get(_NAME)
    return hidden_ND.float() if layer is None else layer(hidden_ND.float())


def detach(model: nn.Module) -> None:
    """Take the map off again, before ``model`` is saved."""
    model._modules.pop(_NAME, None)
