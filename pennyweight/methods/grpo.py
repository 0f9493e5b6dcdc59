"""Group relative policy optimisation (Shao et al., arXiv 2402.03300): a response is worth what it earned above its
group's mean, and its tokens are pulled by that.

The options are those that the literature found to matter: advantages in the group's standard deviations or not (not in
Dr. GRPO, arXiv 2503.20783, so that easy and hard prompts weigh alike); each term over its response's length (GRPO),
over all tokens of the step (DAPO, arXiv 2503.14476) or over a constant (Dr. GRPO); more room above than below (DAPO);
the ratio of a whole response (GSPO, arXiv 2507.18071).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pennyweight.data.pack import Batch
from pennyweight.loss.divergence import Divergence
from pennyweight.loss.policy import Policy, advantages
from pennyweight.settings import GrpoMethod


def response_weights(lengths: Sequence[int], over: str, longest: int) -> Tensor:
    """(R,) weight of each token of R responses, so that a sum divided by the number of all tokens is what is asked for.

    Args:
        lengths: tokens of each response.
        over: ``token``: the mean over all tokens; ``response``: the mean over responses of each one's mean;
            ``constant``: the sum over R times ``longest``.
        longest: most tokens that a response may have.
    """
    size = torch.tensor(lengths, dtype=torch.float32)
    if over == "token":
        return torch.ones_like(size)
    tokens, count = float(size.sum()), max(1, len(size))
    return tokens / (count * size) if over == "response" else torch.full_like(size, tokens / (count * longest))


def grpo(batch: Batch, settings: GrpoMethod, signal: Any) -> Batch:
    """Every token of a response pulls by what the response earned above its group's mean.

    Args:
        batch: rollouts of the step, without those that are left out (``cut_off``), which no mean counts; where all of a
            step are, it has them, and they pull nothing.
        signal: the rollouts of the whole step, ``.groups`` and by the ids of their samples ``.of``; where there is a
            KL term, ``.reference(batch)`` gives (N,) log-probabilities under the start.
    """
    s, worth = settings, _worth(signal.groups, settings)
    rollouts = [signal.of[e.id] for e in batch.placed]
    sizes = torch.tensor([len(r.logprobs) for r in rollouts])
    row = torch.repeat_interleave(torch.arange(len(rollouts)), sizes)
    advantage, weight = (torch.tensor([worth[r.encoded.id][i] for r in rollouts])[row] for i in (0, 1))
    old = torch.tensor([p for r in rollouts for p in r.logprobs]) if s.updates > 1 else None
    reference = signal.reference(batch) if s.kl else None
    policy = Policy(advantage, weight, row, old, reference, s.clip_low, s.clip_high, s.kl, s.level)
    return replace(batch.weighted(ce=0.0, kd=0.0, divergence=Divergence(), target=None), policy=policy)


def _worth(groups: Any, s: GrpoMethod) -> dict[str, tuple[float, float]]:
    """Advantage and weight of each response of a step. One that is left out counts in its group and nowhere else: the
    weights are those of a step without it."""
    rollouts = [r for group in groups for r in group]
    earned = torch.tensor([[r.reward for r in group] for group in groups], dtype=torch.float64)
    above = advantages(earned, s.scaled).flatten().tolist()
    kept = [r for r in rollouts if s.cut_off == "learnt" or not r.cut_off]
    weights = response_weights([len(r.logprobs) for r in kept], s.over, s.max_tokens).tolist()
    weight = dict(zip((r.encoded.id for r in kept), weights, strict=True))
    return {r.encoded.id: (a, weight.get(r.encoded.id, 0.0)) for r, a in zip(rollouts, above, strict=True)}


def signals(settings: GrpoMethod) -> frozenset[str]:
    """None: no teacher is asked."""
    return frozenset()
