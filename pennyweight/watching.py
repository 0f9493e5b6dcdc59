"""What is looked at while a method learns from rollouts: each round, held-out problems now and then, and the responses
to a few prompts at the beginning and at the end, for the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pennyweight.atomic import write_whole
from pennyweight.data.render import prompt_ids
from pennyweight.evaluate.intervals import wilson
from pennyweight.model.loaded import text_of
from pennyweight.records import Sample
from pennyweight.settings import RolloutTripwires
from pennyweight.train.rollout import Judge, Roller
from pennyweight.train.rollout_watch import RolloutWatch
from pennyweight.train.tripwire import Watch

_PROMPTS, _RESPONSES = 3, 2  # that the report shows, and of each prompt
_LONGEST = 4000  # characters of a response that are kept for it


@dataclass
class Lookout(Watch):
    """Over the rounds of one arm.

    Attributes:
        watch: the tripwires.
        roller: writes the arm's rounds.
        problems: held-out samples with a task.
        every: rounds between held-out checks; 0: there are none.
        judge: the trusted one, by each task's own verifier.
        write: takes a line of the journal.
        root, name: ``rollouts/NAME.jsonl`` in the folder ``root`` is where the report finds responses.
    """

    watch: RolloutWatch
    roller: Roller
    problems: list[Sample]
    every: int
    judge: Judge
    write: Callable[[dict[str, Any]], None]
    root: Path
    name: str
    early: list[dict[str, Any]] = field(default_factory=list)
    step: int = 0
    passed: int | None = None

    @property
    def armed(self) -> bool:  # type: ignore[override]
        return self.watch.armed

    @property
    def tripped(self) -> tuple[str, str] | None:  # type: ignore[override]
        return self.watch.tripped

    def state(self) -> dict[str, Any]:
        return {**self.watch.state(), "early": self.early, "step": self.step}

    def restore(self, state: Mapping[str, Any]) -> None:
        known = dict(state)
        self.early, self.step = known.pop("early", []), known.pop("step", 0)
        self.watch.restore(known)

    def look(self, line: dict[str, Any]) -> None:
        """One round: a line of what it was like, with the step that it was written for."""
        self.write({"stage": "rollout", **line})
        self.step = line["step"]
        number = (self.step - 1) // self.roller.updates
        if number == 0:
            self.early = self._responses("early", number)
        self.watch.see(line)
        if self.every and self.problems and number % self.every == 0:
            self._check()
        if self.tripped:
            self.shown()

    def _check(self) -> None:
        """Most likely answers to the held-out problems, by the weights before this step."""
        roller, tokenizer = self.roller, self.roller.loaded.tokenizer
        made = roller.write([prompt_ids(s, tokenizer) for s in self.problems], 0.0, roller.seed)
        texts = [text_of(tokenizer, g.ids) for g in made]
        right = [self._right(text, s) for text, s in zip(texts, self.problems, strict=True)]
        found = wilson(sum(right), len(right))
        bounds = {"held_out_low": round(found.low, 6), "held_out_high": round(found.high, 6)}
        counts = {"held_out_accuracy": round(found.mean, 6), **bounds, "held_out_problems": len(right)}
        self.write({"stage": "held_out", "step": self.step, **counts})
        self.watch.compare(right)
        if not self.armed:
            self.passed = self.step - 1

    def _right(self, text: str, sample: Sample) -> bool:
        assert sample.task is not None
        return self.judge(text, sample.task).correct

    def shown(self) -> list[str]:
        """Write what the report shows, the late responses by the weights as they are now; the file."""
        number = 1 + (self.step - 1) // self.roller.updates
        rows = [*self.early, *self._responses("late", number)]
        path = f"rollouts/{self.name}.jsonl"
        (self.root / "rollouts").mkdir(exist_ok=True)
        write_whole(self.root / path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
        return [path]

    def _responses(self, when: str, number: int) -> list[dict[str, Any]]:
        """Responses to the prompts of the first round; ``number`` decides what is drawn."""
        asked, rows = self.roller.first(_PROMPTS), []
        for sample, group in zip(asked, self.roller.again(asked, number), strict=True):
            prompt = "\n".join(m.content for m in sample.prompt)
            answers = [
                {
                    "text": r.text[:_LONGEST],
                    "reward": round(r.reward, 6),
                    "correct": self._right(r.text, sample) if sample.task else None,
                    "cut_off": r.cut_off,
                }
                for r in group[:_RESPONSES]
            ]
            gold = sample.task.answer if sample.task else None
            rows.append({"when": when, "step": self.step, "prompt": prompt, "gold": gold, "responses": answers})
        return rows


def lookout(
    roller: Roller,
    limits: RolloutTripwires,
    rounds: int,
    held_out: list[Sample],
    judge: Judge,
    write: Callable[[dict[str, Any]], None],
    root: Path,
    name: str,
) -> Lookout:
    """Who looks at the rounds of an arm.

    Args:
        rounds: of the whole arm.
        held_out: samples, of which those that have a task and leave room for a response are asked, up to a limit.
        judge, write, root, name: see ``Lookout``.
    """
    reward, beside = getattr(roller.method, "reward", None), getattr(roller.method, "rewarded", None)
    room = lambda s: len(prompt_ids(s, roller.loaded.tokenizer)) < roller.context  # noqa: E731
    problems = [s for s in held_out if s.task and s.prompt and room(s)][: limits.held_out_problems]
    every = max(1, rounds // 10) if limits.held_out_every is None else limits.held_out_every
    of_reward = reward.most if reward else 0.0, bool(reward and reward.accuracy)
    watch = RolloutWatch(limits, *of_reward, pulls=beside != 0, taught=beside is not None)
    return Lookout(watch, roller, problems, every, judge, write, root, name)
