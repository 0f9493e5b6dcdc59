"""Several models as one whose distribution is the weighted mean of theirs: p = sum of w_m p_m at each position.

Its hidden states are theirs side by side, and its head makes logits of them: the logarithm of that mean. So whatever
reads a model by hidden states and head (labelling, live targets, evaluation) reads a mixture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.model.head import Head, forward_hidden
from pennyweight.model.loaded import Loaded


@dataclass(frozen=True)
class MixedHead(Head):
    """Members' ``heads``, each for its part of the hidden states (``widths``), and the logarithms of their shares.

    ``weight`` is the first head's, whose number of entries all have. Distributions are mixed at ``temperature``: the
    logits divided by it are the logarithm of the mean of members' tempered distributions.
    """

    heads: tuple[Head, ...] = field(kw_only=True)
    widths: tuple[int, ...] = field(kw_only=True)
    log_shares: tuple[float, ...] = field(kw_only=True)
    temperature: float = field(kw_only=True)

    @torch.no_grad()
    def logits(self, hidden_ND: Tensor, out: Tensor | None = None) -> Tensor:
        """(N, sum of D) hidden states -> (N, V) float32 logits, in ``out`` if given; without gradient."""
        mixed: Tensor | None = None
        for head, states, share in zip(self.heads, hidden_ND.split(self.widths, -1), self.log_shares, strict=True):
            log_p = torch.log_softmax(head.logits(states.contiguous()).div_(self.temperature), -1).add_(share)
            # In logarithms, since a product that a float cannot hold is no zero to a divergence.
            mixed = log_p if mixed is None else torch.logaddexp(mixed, log_p, out=mixed)
        assert mixed is not None
        mixed.mul_(self.temperature)
        return mixed if out is None else out.copy_(mixed)


class Mixed(nn.Module):
    """The members' trunks side by side, under one head; a forward pass gives ``last_hidden_state`` (B, T, sum of D)."""

    def __init__(self, models: Sequence[Any], head: MixedHead):
        super().__init__()
        self.models, self.own_head = nn.ModuleList(models), head
        self.config: Any = models[0].config

    def forward(self, input_ids: Tensor, position_ids: Tensor, use_cache: bool = False) -> Any:
        states = [forward_hidden(m, input_ids, position_ids) for m in self.models]
        return SimpleNamespace(last_hidden_state=torch.cat(states, -1))

    def get_decoder(self) -> Any:
        return self

    def get_output_embeddings(self) -> Any:
        first: Any = self.models[0]
        return first.get_output_embeddings()


def mixed(members: Mapping[str, Any], shares: Mapping[str, float], facts: dict[str, Any], temperature: float) -> Any:
    """Teachers of one vocabulary as one.

    Args:
        members: by name, of ``teacher.local.LocalTeacher``, as which the mixture is given back.
        shares: by member, not all 0; scaled to sum to 1.
        facts: of the mixture: ``name``, ``fingerprint``, ``identity``, ``params``, ``bytes``, ``context``.
        temperature: at which distributions are mixed.
    """
    used = {name: m for name, m in members.items() if shares[name]}
    total = sum(shares[name] for name in used)
    heads = tuple(m.head for m in used.values())
    head = MixedHead(
        heads[0].weight,
        heads=heads,
        widths=tuple(h.weight.shape[1] for h in heads),
        log_shares=tuple(math.log(shares[name] / total) for name in used),
        temperature=temperature,
    )
    first, models = next(iter(used.values())), [m.loaded.model for m in used.values()]
    known = {k: facts[k] for k in ("name", "fingerprint", "identity", "params", "bytes", "context")}
    loaded = Loaded(Mixed(models, head).eval(), first.tokenizer, **known, writes=False)
    return replace(first, loaded=loaded, output=None)
