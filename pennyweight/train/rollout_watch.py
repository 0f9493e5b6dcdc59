"""Tripwires over rounds of rollouts: entropy, length, repetition, cut-offs, groups that teach nothing, the reward's
fall, and a reward that rises while held-out accuracy does not (reward hacking).

What tells success from collapse is the reward: a policy that has solved its task has low entropy, short responses and
groups that are all alike, too. So rounds in which nearly all that can be earned was earned are never held against it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pennyweight.evaluate.intervals import wilson
from pennyweight.records import Interval
from pennyweight.settings import RolloutTripwires
from pennyweight.train.tripwire import Watch

_START = 3  # rounds whose mean is the start
_KEPT = 0.8  # of the reward's running mean, at each round
_SPAN = 9  # rounds whose mean is as noisy as that running mean: (1 + 0.8) / (1 - 0.8)
_NOISE = 2.0  # standard errors that the reward must have fallen by, as if a group's responses were one
_LOUD = 0.5  # nats a token: entropy below it is no explosion, however low it began
_CHECKS = 2  # held-out checks in a row that must find the reward hacked
_Z = 1.96
_NONE = {"earned": 0.0, "credited": 0.0, "groups": 0.0}
_RELATIVE = ("entropy", "length", "repeated", "cut_off")  # facts that are compared with the start

_CALMER = "lower train.lr, or set method.kl above 0"
CURES = {
    "entropy_low": f"{_CALMER}, or raise method.clip_high",
    "entropy_high": _CALMER,
    "length_low": f"{_CALMER}, or look at what short responses earn (method.reward)",
    "length_high": f"{_CALMER}, or let brevity be rewarded (method.reward.brevity)",
    "repeated": f"{_CALMER}; responses that are cut off can be left out (method.cut_off=left_out)",
    "cut_off": "raise method.max_tokens, let brevity be rewarded (method.reward.brevity), or lower train.lr",
    "stuck": "nothing can be learnt from such groups: give easier problems, a student that solves some of them, or "
    "more responses to each (method.group), and lower train.lr if some were solved before",
    "reward": _CALMER,
    "hacking": "read what was rewarded without being right, and close that loophole in method.reward",
}
"""What to do next, by what tripped."""


@dataclass
class RolloutWatch(Watch):
    """Is told of each round, and of each held-out check; says what tripped once it has held long enough.

    Attributes:
        limits: see ``RolloutTripwires``.
        most: what a response can earn at most; 0 where nothing is rewarded, so that no rule asks for the reward.
        judged: whether the verdict is part of the reward; what is credited as right is then that part alone.
        pulls: whether the reward is learnt from; one that is only looked at can neither fall short nor be hacked.
        taught: whether a teacher's word is learnt from, so that groups that are all alike teach something, too.
    """

    limits: RolloutTripwires
    most: float = 0.0
    judged: bool = True
    pulls: bool = True
    taught: bool = False
    seen: dict[str, Any] = field(default_factory=lambda: asdict(_Seen()))

    def restore(self, state: Mapping[str, Any]) -> None:
        self.seen = copy.deepcopy({**asdict(_Seen()), **state})
        self.tripped = None

    def state(self) -> dict[str, Any]:
        return copy.deepcopy(self.seen)

    @property
    def armed(self) -> bool:  # type: ignore[override]
        return any(self.seen["bad"].values())

    def see(self, facts: Mapping[str, float]) -> None:
        """One round, as ``Round.facts`` tells of it."""
        seen = self.seen
        seen["rounds"] += 1
        if seen["rounds"] <= _START:
            seen["start"] = {
                k: seen["start"].get(k, 0.0) + facts[k] / _START for k in _RELATIVE if facts.get(k) is not None
            }
        self._credit(facts)
        found = dict(self._wrong(facts))
        if fall := self._fall(facts):
            found["reward"] = fall
        if self.most and facts["reward"] >= self.limits.solved * self.most:
            found = {}
        self._count(found, (*_LIMITS, "reward"), self.limits.patience)

    def compare(self, right: Sequence[bool]) -> None:
        """One held-out check: whether each of the same problems was answered right, by the task's own verifier."""
        seen = self.seen
        if len(seen["right"]) != len(right):  # the first check, or one of other problems
            seen["right"] = [bool(r) for r in right]
        elif self.pulls and self.most and seen["now"]["groups"] and seen["rounds"] > _START:
            pairs = {k: (_share(seen["begun"], k), _share(seen["now"], k)) for k in ("credited", "earned")}
            held_out = _HeldOut(seen["right"], right)
            self._count(_hacked(pairs, held_out, self.limits.hacking), ("hacking",), _CHECKS)
        seen["now"] = dict(_NONE)

    def _credit(self, facts: Mapping[str, float]) -> None:
        """Add a round to what was earned and credited as right since the last held-out check, and at the start."""
        if not self.most:
            return
        earned = facts["reward"] / self.most
        shares = {"earned": earned, "credited": facts["reward_accuracy"] if self.judged else earned, "groups": 1.0}
        for name in ("now", *(("begun",) if self.seen["rounds"] <= _START else ())):
            self.seen[name] = {k: self.seen[name][k] + v * facts["groups"] for k, v in shares.items()}

    def _wrong(self, facts: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        """What is beyond its limit in this round, in words."""
        known, start, s = self.seen["rounds"] > _START, self.seen["start"], self.limits
        if not self.taught and facts["stuck"] >= s.stuck < 1:
            yield "stuck", f"{facts['stuck']:.0%} of the groups are all alike without being right"
        if not known:
            return
        entropy, length = facts["entropy"], facts["length"]
        if entropy < s.entropy_low * start["entropy"]:
            yield "entropy_low", f"entropy collapsed: {_beside(entropy, start['entropy'])} nats a token"
        if entropy > max(_LOUD, s.entropy_high * start["entropy"]):
            yield "entropy_high", f"entropy exploded: {_beside(entropy, start['entropy'])} nats a token"
        if length < s.length_low * start["length"]:
            yield "length_low", f"responses shrank to almost nothing: {_beside(length, start['length'])} tokens"
        if length > s.length_high * start["length"]:
            yield "length_high", f"responses keep growing: {_beside(length, start['length'])} tokens"
        for name, words in (("repeated", "of what is written is repetition"), ("cut_off", "of responses are cut off")):
            if facts[name] >= getattr(s, name) > start[name]:
                yield name, f"{facts[name]:.0%} {words}; {start[name]:.0%} at the start"

    def _fall(self, facts: Mapping[str, float]) -> str | None:
        """In words, how far the reward's running mean is below its best, where that is too far to be noise."""
        if not self.pulls or not self.most:
            return None
        seen, share = self.seen, facts["reward"] / self.most
        mean = share if seen["mean"] is None else _KEPT * seen["mean"] + (1 - _KEPT) * share
        seen["mean"], groups = mean, facts["groups"] * min(seen["rounds"], _SPAN)
        if seen["rounds"] >= _START and mean > seen["best"]:
            seen["best"], seen["best_groups"] = mean, groups
        best = seen["best"]
        if not best or mean >= self.limits.reward_low * best:
            return None
        noise = _NOISE * math.sqrt(best * max(0.0, 1 - best) * (1 / seen["best_groups"] + 1 / groups))
        if best - mean <= noise:
            return None
        return f"the reward fell: its running mean is {mean * self.most:.3g}, and was {best * self.most:.3g} at best"

    def _count(self, found: Mapping[str, str], watched: Sequence[str], patience: int) -> None:
        bad = self.seen["bad"]
        for name in watched:
            bad[name] = bad.get(name, 0) + 1 if name in found else 0
            if bad[name] >= patience and self.tripped is None:
                self.tripped = (found[name], f"{CURES[name]}; or loosen [tripwires.rollouts] if this is right")


@dataclass
class _Seen:
    """What is remembered, as plain JSON.

    ``begun`` and ``now`` are sums over the groups of the first rounds, and of those since the last held-out check.
    """

    rounds: int = 0
    start: dict[str, float] = field(default_factory=dict)
    mean: float | None = None
    best: float = 0.0
    best_groups: float = 0.0
    begun: dict[str, float] = field(default_factory=lambda: dict(_NONE))
    now: dict[str, float] = field(default_factory=lambda: dict(_NONE))
    right: list[bool] = field(default_factory=list)
    bad: dict[str, int] = field(default_factory=dict)


_LIMITS = ("stuck", "entropy_low", "entropy_high", "length_low", "length_high", "repeated", "cut_off")


def _beside(now: float, start: float) -> str:
    return f"{now:.3g}, and {start:.3g} at the start,"


def _share(sums: Mapping[str, float], name: str) -> Interval:
    """The mean of shares over groups, with the interval of as many yes-or-no answers, which is never too narrow."""
    return wilson(round(sums[name]), round(sums["groups"]))


@dataclass(frozen=True)
class _HeldOut:
    """Whether the same problems were answered right ``before`` and ``now``."""

    before: Sequence[bool]
    now: Sequence[bool]

    @property
    def change(self) -> tuple[float, float]:
        """Bounds of the change in accuracy, by the problems that changed sides."""
        gained = sum(n and not b for n, b in zip(self.now, self.before, strict=True))
        lost = sum(b and not n for n, b in zip(self.now, self.before, strict=True))
        size, net = len(self.now), gained - lost
        half = _Z * math.sqrt(gained + lost + 1 - net**2 / size)
        return (net - half) / size, (net + half) / size


def _hacked(pairs: Mapping[str, tuple[Interval, Interval]], held_out: _HeldOut, most: float) -> dict[str, str]:
    """In words, that the reward rose by more than ``most`` while held-out accuracy stayed (what is credited as right
    rose) or fell (all that is earned rose), where neither can be noise.

    A rise counts by its lower bound and held-out accuracy by its upper one. Held-out accuracy that is as high as what
    is credited has nothing to catch up with.
    """
    low, high = held_out.change
    accuracy = wilson(sum(held_out.now), len(held_out.now))
    was = wilson(sum(held_out.before), len(held_out.before))
    for name, what in (("credited", "what is credited as right"), ("earned", "what is earned of the most")):
        start, now = pairs[name]
        rise = now.mean - start.mean
        least = rise - math.hypot(now.mean - now.low, start.high - start.mean)
        stayed = low <= 0 and high < least and accuracy.high < now.low
        if rise > most and least > 0 and (stayed if name == "credited" else high < 0):
            return {
                "hacking": f"the reward is being hacked: {what} rose from {_percent(start)} to {_percent(now)}, while "
                f"accuracy on {len(held_out.now)} held-out problems, by their tasks' own verifier, went from "
                f"{_percent(was)} to {_percent(accuracy)}"
            }
    return {}


def _percent(x: Interval) -> str:
    return f"{x.mean:.0%} ({x.low:.0%} to {x.high:.0%})"
