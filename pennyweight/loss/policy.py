"""Policy-gradient terms at tokens that the model wrote itself: PPO's clipped ratio (Schulman et al., arXiv 1707.06347)
as GRPO takes it (Shao et al., arXiv 2402.03300), with room above of its own (clip-higher of DAPO, arXiv 2503.14476), by
token or by sequence (GSPO, arXiv 2507.18071), and the k3 estimate of the KL to a reference.

Each is a function of the log-probability of the token that was written and of nothing else, so its gradient is that of
cross-entropy with a weight of its own: the ``pull``. Head and loss then stay the one pass of ``loss.chunked``; where
the pull depends on what the log-probabilities are now, after a product of the head, without gradient, that tells them.

Letters: N positions that carry loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from pennyweight.loss.divergence import sums_of_rows

_LEAST = 1e-4  # beside the standard deviation of a group's rewards


@dataclass(frozen=True)
class Policy:
    """What the tokens of a batch are worth. Tensors are float32 unless said otherwise.

    Attributes:
        advantage: (N,) of the token, mostly that of its whole response.
        weight: (N,) of the token's term in the sum that is divided by the step's number of tokens.
        old: (N,) log-probability that the token was written with, in nats; None where the model's weights have not
            changed since, so that the ratio is 1.
        reference: (N,) log-probability under the reference model; None without a KL term.
        row: (N,) int64, which response the token belongs to, from 0 and ascending.
        low, high: the ratio counts between 1 - low and 1 + high.
        kl: weight of the KL to the reference.
        level: whose ratio it is: each token's, or the geometric mean of a response's.
    """

    advantage: Tensor
    weight: Tensor
    row: Tensor
    old: Tensor | None = None
    reference: Tensor | None = None
    low: float = 0.2
    high: float = 0.2
    kl: float = 0.0
    level: Literal["token", "sequence"] = "token"

    @property
    def compares(self) -> bool:
        """Whether the terms depend on what the tokens' log-probabilities are now."""
        return self.old is not None or self.reference is not None

    def to(self, device: torch.device) -> Policy:
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True)
class PolicyTerms:
    """``value`` (N,): the weighted terms; ``pull`` (N,): minus their sum's derivative with respect to each token's
    log-probability. ``sums`` over tokens are for the log: ``clipped`` ones, and k3 estimates, in nats, of ``kl_old``,
    KL(what wrote the tokens || the model), and, with a reference, of ``kl_reference``, KL(the model || the reference).
    """

    value: Tensor
    pull: Tensor
    sums: dict[str, float]


def policy_terms(logp: Tensor | None, p: Policy) -> PolicyTerms:
    """The terms at N tokens of log-probability ``logp`` (N,) under the model as it is; None will do where the policy
    ``compares`` it with nothing."""
    gap = torch.zeros_like(p.advantage) if p.old is None or logp is None else logp - p.old
    rows = int(p.row[-1]) + 1 if len(p.row) else 0
    if p.level == "sequence":
        length = torch.bincount(p.row, minlength=rows)
        mean = sums_of_rows(p.row, gap, rows) / length
        ratio = torch.exp(mean)[p.row]
        # Every token of a response moves its ratio by a share, and with it all of the response's terms.
        share = (sums_of_rows(p.row, p.weight * p.advantage, rows) / length)[p.row]
    else:
        ratio, share = torch.exp(gap), p.weight * p.advantage
    bounded = ratio.clamp(1 - p.low, 1 + p.high)
    free = ratio * p.advantage <= bounded * p.advantage
    value = -p.weight * torch.where(free, ratio, bounded) * p.advantage
    pull = torch.where(free, ratio * share, 0.0)
    sums = {"clipped": float((~free).sum()), "kl_old": float(k3(gap)[0].sum())}
    if p.reference is not None and logp is not None:
        value_kl, slope = k3(p.reference - logp)
        sums["kl_reference"] = float(value_kl.sum())
        value = value + p.kl * p.weight * value_kl
        pull = pull - p.kl * p.weight * slope
    return PolicyTerms(value, pull, sums)


def k3(gap: Tensor) -> tuple[Tensor, Tensor]:
    """exp(gap) - gap - 1, never below 0, where ``gap`` is reference minus model in log-probability: its mean over the
    model's own tokens is KL(model || reference) (Schulman, 2020). And its derivative with respect to the model's.

    The tokens are those of the side that is subtracted: of ``kl_old`` that is what wrote them, the other one the model.
    """
    return torch.expm1(gap) - gap, -torch.expm1(gap)


def advantages(rewards: Tensor, scaled: bool = True) -> Tensor:
    """(P, G) rewards of G responses to each of P prompts -> what each earned above its group's mean, in the group's
    standard deviations where ``scaled``."""
    above = rewards - rewards.mean(1, keepdim=True)
    return above / (rewards.std(1, keepdim=True) + _LEAST) if scaled and rewards.shape[1] > 1 else above
