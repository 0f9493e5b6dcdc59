"""Rollouts: what the model that is being trained writes to prompts, judged, in groups of a prompt each.

A round of them serves one step or several. What is drawn for it depends on the seed, the round's number and the weights
at its beginning, so a run that is killed writes the same again; a round is kept on disk all the same, as steps after
its first have other weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pennyweight.atomic import write_whole
from pennyweight.data.pack import Batch, collate, order
from pennyweight.data.render import opening, prompt_ids
from pennyweight.errors import DataError
from pennyweight.model.generate import Generated, generate
from pennyweight.model.loaded import Loaded, text_of
from pennyweight.records import Encoded, Sample, Task, Verdict
from pennyweight.settings import GrpoMethod, OfflineMethod, OnPolicyMethod
from pennyweight.verifiers.reward import rewards

Judge = Callable[[str, Task], Verdict]
AUTHOR = "student"
"""Who wrote a rollout, in the ledger."""

_FOR_THE_EYE = 1_002  # more than a round has groups, so that these are drawn apart from those


@dataclass(frozen=True, slots=True)
class Rollout:
    """One response to one prompt: its tokens with those of the prompt before them, the log-probability of each token of
    its own, whether it was cut off, its verdict and what it earned in all and by part."""

    encoded: Encoded
    logprobs: tuple[float, ...]
    text: str
    cut_off: bool
    verdict: Verdict
    reward: float
    parts: dict[str, float]

    def first(self, tokens: int) -> Rollout:
        """The same with that many tokens of its own."""
        size = len(self.encoded.ids) - len(self.logprobs) + tokens
        e = Encoded(self.encoded.id, self.encoded.ids[:size], self.encoded.mask[:size])
        return replace(self, encoded=e, logprobs=self.logprobs[:tokens])

    def to_json(self) -> dict[str, Any]:
        e = self.encoded
        prompt = len(e.ids) - len(self.logprobs)
        return {
            **{k: getattr(self, k) for k in ("text", "cut_off", "reward", "parts", "logprobs")},
            "id": e.id,
            "ids": e.ids,
            "prompt": prompt,
            "verdict": asdict(self.verdict),
        }

    @staticmethod
    def from_json(row: dict[str, Any]) -> Rollout:
        encoded = encoded_of(row["id"], row["ids"], row["prompt"])
        verdict = Verdict(**row["verdict"])
        return Rollout(
            encoded, tuple(row["logprobs"]), row["text"], row["cut_off"], verdict, row["reward"], row["parts"]
        )


def encoded_of(name: str, ids: Sequence[int], prompt: int) -> Encoded:
    """Tokens of which all but the first ``prompt`` are learnt."""
    return Encoded(name, tuple(ids), tuple(i >= prompt for i in range(len(ids))))


@dataclass(frozen=True)
class Round:
    """Groups of rollouts of which steps are made, and all those that were written for them, a group to each prompt that
    was asked."""

    groups: list[list[Rollout]]
    every: list[list[Rollout]]

    @property
    def asked(self) -> int:
        """Prompts."""
        return len(self.every)

    @property
    def left_out(self) -> int:
        """Groups that were all alike."""
        return sum(alike(g) for g in self.every)

    @property
    def of(self) -> dict[str, Rollout]:
        return {r.encoded.id: r for group in self.groups for r in group}

    def first(self, share: float) -> Round:
        """Of every response its first tokens only, the share rounded up."""
        if share == 1:
            return self
        return replace(self, groups=[[r.first(math.ceil(share * len(r.logprobs))) for r in g] for g in self.groups])

    def part(self, number: int, parts: int) -> Round:
        """The groups of one of ``parts`` steps."""
        return replace(self, groups=self.groups[number::parts])

    def batches(self, micro: int, pad_id: int, cut_off: bool = True) -> list[Batch]:
        """Micro-batches of at most ``micro`` rows, those of like length together; of responses that were ``cut_off``
        only where that is True, or there are no others."""
        every = [r for group in self.groups for r in group]
        kept = [r for r in every if cut_off or not r.cut_off] or every
        rows = sorted((r.encoded for r in kept), key=lambda e: len(e.ids))
        return [collate([[e] for e in rows[a : a + micro]], pad_id) for a in range(0, len(rows), micro)]

    def facts(self) -> dict[str, float]:
        """What a step's rollouts were like, over all that were written for it; ``entropy`` is that of the model's
        distribution, estimated by what it wrote, in nats a token."""
        all_of = [r for group in self.every for r in group]
        share = lambda values: sum(values) / max(1, len(all_of))  # noqa: E731
        tokens = sum(len(r.logprobs) for r in all_of)
        return {
            "reward": share(r.reward for r in all_of),
            **{f"reward_{k}": share(r.parts[k] for r in all_of) for k in (all_of[0].parts if all_of else ())},
            "length": share(len(r.logprobs) for r in all_of),
            "cut_off": share(r.cut_off for r in all_of),
            "repeated": share(repeated(r.encoded.ids[-len(r.logprobs) :]) for r in all_of),
            "all_alike": self.left_out / max(1, self.asked),
            "stuck": sum(alike(g) and not all(r.verdict.correct for r in g) for g in self.every) / max(1, self.asked),
            "entropy": -sum(sum(r.logprobs) for r in all_of) / max(1, tokens),
            "groups": float(self.asked),
            "generated": float(tokens),
        }


@dataclass(frozen=True)
class Roller:
    """Writes rounds.

    Attributes:
        loaded: the model that is being trained, with its tokenizer.
        samples: whose prompts are asked; what is written to one without a task earns nothing.
        groups: of a round.
        judge: response and task -> verdict.
        folder: rounds are kept in its ``rollouts``.
        record: told the samples of a round before anything is learnt from them.
    """

    loaded: Loaded
    samples: list[Sample]
    groups: int
    method: GrpoMethod | OnPolicyMethod | OfflineMethod
    judge: Judge
    seed: int
    context: int
    folder: Path
    record: Callable[[list[Sample]], None]

    @property
    def pad_id(self) -> int:
        return self.loaded.pad_id

    @property
    def updates(self) -> int:
        """Steps that a round serves."""
        return getattr(self.method, "updates", 1)

    def __call__(self, number: int, may_write: bool) -> Round:
        """Round ``number``: as it is kept, or written now.

        Raises:
            DataError: it is not kept, and ``may_write`` is False.
        """
        file = self.folder / "rollouts" / f"round-{number:06d}.jsonl"
        if not file.exists():
            if not may_write:
                raise DataError(
                    f"the rollouts {file} are gone, and the checkpoint that training goes on from was made in the "
                    "middle of them; delete that checkpoint, too, to go on from an earlier one"
                )
            self._keep(file, self._written(number))
        with open(file, encoding="utf-8") as f:
            chosen = json.loads(f.readline())["chosen"]
            every = [[Rollout.from_json(r) for r in json.loads(line)] for line in f]
        return Round([every[i] for i in chosen], every)

    def again(self, samples: list[Sample], number: int) -> list[list[Rollout]]:
        """A group to each of the samples by the weights as they are, for the reader's eye: nothing of it is kept."""
        return replace(self, record=lambda written: None)._answered(number, _FOR_THE_EYE, samples)

    def first(self, count: int) -> list[Sample]:
        """The first samples that are asked."""
        return [self._sample(i) for i in range(min(count, len(self.samples)))]

    def _keep(self, file: Path, written: tuple[list[list[Rollout]], list[int]]) -> None:
        every, chosen = written
        lines = [json.dumps({"chosen": chosen}), *(json.dumps([r.to_json() for r in g]) for g in every)]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, "".join(f"{line}\n" for line in lines))

    def _written(self, number: int) -> tuple[list[list[Rollout]], list[int]]:
        """All groups that were asked for, and which of them are learnt from: those that differ, as far as there are
        enough."""
        most = round(self.groups * getattr(self.method, "dynamic", 1))
        line = [(number * most + i) for i in range(most)]
        every: list[list[Rollout]] = []
        counts = hasattr(self.method, "dynamic")  # only then does a group that is all alike teach nothing
        while line and (missing := self.groups - sum(not (counts and alike(g)) for g in every)) > 0:
            every += self._answered(
                number, len(every), [self._sample(line.pop(0)) for _ in range(min(missing, len(line)))]
            )
        ranked = sorted(range(len(every)), key=lambda i: counts and alike(every[i]))  # in order, those all alike last
        return every, ranked[: self.groups]

    def _sample(self, index: int) -> Sample:
        epoch, place = divmod(index, len(self.samples))
        return self.samples[int(order(len(self.samples), self.seed, epoch)[place])]

    def write(self, prompts: list[list[int]], temperature: float, seed: int) -> list[Generated]:
        """Responses to prompts by the weights as they are."""
        model, training = self.loaded.model, self.loaded.model.training
        made = generate(
            model.eval(),
            prompts,
            max_tokens=self.method.max_tokens,
            temperature=temperature,
            eos_ids=self.loaded.eos_ids,
            pad_id=self.loaded.pad_id,
            seed=seed,
            batch=256,
            context=self.context,
        )
        model.train(training)
        return made

    def _answered(self, number: int, before: int, asked: list[Sample]) -> list[list[Rollout]]:
        """A group to each of the samples; ``before`` groups of the round are there already."""
        m, prompts = self.method, [prompt_ids(s, self.loaded.tokenizer) for s in asked]
        seed = (self.seed * 1_000_003 + number) * 1_003 + before
        made = self.write([p for p in prompts for _ in range(m.group)], 1.0, seed)
        groups, written = [], []
        for i, (sample, ids) in enumerate(zip(asked, prompts, strict=True)):
            name = f"{number}.{before + i}"
            own, begun = made[i * m.group : (i + 1) * m.group], opening(sample.prompt, self.loaded.tokenizer)
            groups.append([self._rollout(sample, ids, begun, g, f"{name}.{n}") for n, g in enumerate(own)])
            written += [sample.answered(r.text, AUTHOR, not r.cut_off) for r in groups[-1]]
        self.record(written)
        return groups

    def _rollout(self, sample: Sample, prompt: list[int], begun: str, g: Generated, name: str) -> Rollout:
        """``begun``: what of the response the prompt has already."""
        m, task = self.method, sample.task
        ids, logprobs = list(g.ids), list(g.logprobs)
        if g.end is not None and g.end_logprob is not None:
            ids, logprobs = [*ids, g.end], [*logprobs, g.end_logprob]
        text = begun + text_of(self.loaded.tokenizer, g.ids)
        verdict = self.judge(text, task) if task else Verdict(False, None, "there is nothing to judge it by")
        asked = "\n".join(t.content for t in sample.prompt)
        parts = rewards(asked, text, len(ids), m.max_tokens, verdict)
        earned = sum(getattr(m.reward, k) * v for k, v in parts.items())
        answer = sample.answered(text, AUTHOR, g.end is not None)
        encoded = encoded_of(f"{answer.id}:{name}", [*prompt, *ids], len(prompt))
        return Rollout(encoded, tuple(logprobs), text, g.end is None, verdict, earned, parts)


def alike(group: Sequence[Rollout]) -> bool:
    """Whether all earned the same, so that nothing can be learnt from the group."""
    return max(r.reward for r in group) - min(r.reward for r in group) < 1e-9


def repeated(ids: Sequence[int], n: int = 4) -> float:
    """Share of runs of ``n`` tokens that were there before in the same text."""
    runs = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
