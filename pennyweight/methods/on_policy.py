"""On-policy distillation: the student writes, and at its own tokens it matches the teacher (Agarwal et al., arXiv
2306.13649; Qwen3, arXiv 2505.09388; Lu, Thinking Machines, 2025).

``whole``: a divergence to the teacher's whole distribution, by default reverse KL, which the student can lower only by
leaving what the teacher would not write. ``token``: of that KL the one sample that the student drew, as the advantage
of a policy gradient; it needs of the teacher no more than the log-probability of the token that was written. Rewards
of a verifier may join either. Offline, the same is done with rollouts that the start wrote and targets kept of the
teacher, both made once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from pennyweight.data.pack import Batch
from pennyweight.loss.divergence import Divergence
from pennyweight.loss.policy import Policy, advantages
from pennyweight.settings import OfflineMethod, OnPolicyMethod


def on_policy(batch: Batch, settings: OnPolicyMethod, signal: Any) -> Batch:
    """Every token that the student wrote is pulled to the teacher.

    Args:
        signal: the rollouts of the step, as for ``grpo``; ``.teacher(batch)`` gives the teacher at the loss positions,
            ``.told(batch)`` (N,) log-probabilities of their labels under it. A batch of the data's own samples, which
            nobody here wrote, is matched whole and has no policy.
    """
    s = settings
    spec = Divergence(s.divergence, s.beta, s.temperature, s.alpha)
    if s.signal == "whole":
        made = batch.weighted(ce=0.0, kd=1.0, divergence=spec, target=signal.teacher(batch))
    else:
        made = batch.weighted(ce=0.0, kd=0.0, divergence=spec, target=None)
    if (s.signal == "whole" and not s.rewarded) or not any(e.id in signal.of for e in batch.placed):
        return made
    rollouts, worth = [signal.of[e.id] for e in batch.placed], _worth(signal.groups, s)
    row = torch.repeat_interleave(torch.arange(len(rollouts)), torch.tensor([len(r.logprobs) for r in rollouts]))
    advantage = torch.tensor([worth[r.encoded.id] for r in rollouts])[row]
    wrote = torch.tensor([p for r in rollouts for p in r.logprobs])
    if s.signal == "token":
        advantage = advantage + signal.told(batch).cpu() - wrote
    policy = Policy(
        advantage, torch.ones_like(advantage), row, wrote if s.updates > 1 else None, None, s.clip_low, s.clip_high
    )
    return replace(made, policy=policy)


def _worth(groups: Any, s: OnPolicyMethod) -> dict[str, float]:
    """What each response adds for what a verifier says of it."""
    if not s.rewarded:
        return {r.encoded.id: 0.0 for group in groups for r in group}
    earned = torch.tensor([[r.reward for r in group] for group in groups], dtype=torch.float64)
    above = (s.rewarded * advantages(earned)).flatten().tolist()
    return dict(zip((r.encoded.id for group in groups for r in group), above, strict=True))


def offline(batch: Batch, settings: OfflineMethod, signal: Any) -> Batch:
    """``signal(batch)`` gives the teacher at the loss positions of rollouts, as for distillation on given texts."""
    spec = Divergence(settings.divergence, settings.beta, settings.temperature, settings.alpha)
    return batch.weighted(ce=0.0, kd=1.0, divergence=spec, target=signal(batch))


def signals(settings: OnPolicyMethod) -> frozenset[str]:
    """None that is kept: the teacher is asked as training goes on."""
    return frozenset()
