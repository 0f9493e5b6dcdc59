"""The nouns of a plan of a recipe: passes over tokens, and stages that make them. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pennyweight.plan.shapes import Shapes

Ends = tuple[float, float, float]
"""Low, middle, high"""


@dataclass(frozen=True, slots=True)
class Pass:
    """Work of one kind: ``train``, ``forward`` or ``write``, ``steps`` times on ``rows`` rows.

    ``length`` is that of a mean row, of ``write`` that of the prompt, which gets ``new`` tokens; ``learnt`` the share
    of tokens with logits, ``rank`` and ``recompute`` as
    ``flops.Training`` has them; ``padded`` how many times the tokens are computed; ``who`` is at work.
    ``precision`` is that of Linears' products, empty where ``compute.dtype`` says it; ``micro`` the rows of a forward
    pass, 0 for all at once; ``distilled``: it learns a teacher's distribution. ``apart``: several devices each take
    steps of their own, and do not share the rows of one.
    """

    kind: str
    shapes: Shapes
    steps: Ends
    rows: float
    length: Ends
    new: Ends = (0.0, 0.0, 0.0)
    learnt: float = 1.0
    rank: int = 0
    recompute: bool = False
    padded: float = 1.0
    who: str = "student"
    precision: str = ""
    micro: int = 0
    distilled: bool = False
    apart: bool = False

    def turns(self, devices: int = 1) -> float:
        """Forward passes of a step, one after another, for each of so many devices."""
        if self.apart:
            return 1 / devices
        return max(1, math.ceil(self.rows / devices / self.micro)) if self.micro else 1

    @property
    def experts(self) -> bool:
        """Whether a mixture is at work."""
        return any(b.experts for b in self.shapes.blocks)

    def tokens(self, end: int) -> float:
        """Read and written."""
        return self.steps[end] * self.rows * (self.length[end] + self.new[end])


@dataclass(frozen=True, slots=True)
class Work:
    """A stage: what it does, in words, and its passes. ``bytes``: that it leaves on disk. ``opens``: times
    that a model is opened or saved, or that long for what else there is. ``sent``, ``got``: tokens of
    prompts and responses, where a server writes. ``prepared``: rows that are drawn or read, and tokens of each
    (of a trained teacher's problems as many of the data's as take as long);
    ``tasks``: kinds of problems that are drawn, each by a process."""

    stage: str
    does: str
    passes: tuple[Pass, ...] = ()
    bytes: Ends = (0.0, 0.0, 0.0)
    sent: Ends = (0.0, 0.0, 0.0)
    got: Ends = (0.0, 0.0, 0.0)
    opens: float = 1.0
    prepared: tuple[float, float] = (0.0, 0.0)
    tasks: int = 0

    @property
    def shared(self) -> bool:
        """Whether several processes train it together, each with its part; else one does all of it."""
        return self.does in ("trains by sft", "trains by kd")


@dataclass(frozen=True, slots=True)
class Subjects:
    """``teacher`` is None behind a server; of several teachers it is the largest. ``notes``: what was assumed."""

    teacher: Shapes | None
    student: Shapes
    notes: tuple[str, ...] = ()

    def made_in(self, folder: str) -> dict[str, Shapes]:
        """The models of a run's folder, by path."""
        out = {f"{folder}/student": self.student}
        return out | ({f"{folder}/teacher": self.teacher} if self.teacher else {})
