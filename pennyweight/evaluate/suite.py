"""What is measured of one model: pass@1 and pass@k on problems, bits per byte and calibration on held-out tokens,
agreement with its teacher, and for a low-bit copy with its full-precision parent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from pennyweight.evaluate.agreement import Routed, Scored, as_scorer, score
from pennyweight.evaluate.held_out import HeldOut
from pennyweight.evaluate.intervals import wilson
from pennyweight.meter.peak import give_back
from pennyweight.model.device import Compute
from pennyweight.model.generate import Generated, generate
from pennyweight.model.loaded import Loaded, text_of
from pennyweight.records import Encoded, Interval, Sample, Task, Verdict

Judge = Callable[[str, Task], Verdict]


@dataclass
class Examined:
    """Metrics with sampling intervals, outputs on problems, generated tokens a second, and tokens worked through."""

    metrics: dict[str, Interval] = field(default_factory=dict)
    outputs: list[dict[str, Any]] = field(default_factory=list)
    decode_tokens_per_second: float | None = None
    tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "metrics": {k: v.to_json() for k, v in self.metrics.items()},
            "outputs": self.outputs,
            "decode_tokens_per_second": self.decode_tokens_per_second,
        }


@dataclass(frozen=True)
class Sampling:
    """How answers to problems are generated; ``samples`` 0 leaves pass@k out."""

    max_tokens: int
    samples: int
    temperature: float
    seed: int


def examine(
    loaded: Loaded | Routed,
    held_out: HeldOut,
    judge: Judge,
    sampling: Sampling,
    compute: Compute,
    teacher: Loaded | Routed | None = None,
    parent: Loaded | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> Examined:
    """Measure one model, or several as one that answers each sample by the one it has. ``teacher`` adds agreement with
    it, ``parent`` agreement with that."""
    found = Examined()
    if held_out.encoded:
        scored = _scored(loaded, held_out, compute, teacher, progress)
        found.tokens += int(scored.tokens.sum())
        found.metrics |= _token_metrics(scored, teacher is not None, sampling.seed)
    if held_out.encoded and parent is not None:
        beside = _scored(loaded, held_out, compute, parent, progress)
        found.metrics["kl_parent"] = beside.per_token("kl_to", sampling.seed)
        found.metrics["agreement_parent"] = beside.per_token("same", sampling.seed)
    if isinstance(loaded, Loaded) and not loaded.writes:
        return found
    if held_out.problems or held_out.harder or held_out.openings:
        give_back()  # main memory that scoring is done with would count towards the peak of writing
    if held_out.problems:
        asked = list(zip(held_out.problems, held_out.prompts, strict=True))
        found.outputs = _solve(found, "", loaded, asked, judge, sampling, progress)
    if held_out.harder:
        _solve(found, "_harder", loaded, held_out.harder, judge, sampling, progress)
    if held_out.openings and not held_out.problems:
        _write_on(found, loaded, held_out, sampling, progress)
    return found


def _scored(
    loaded: Loaded | Routed,
    held_out: HeldOut,
    compute: Compute,
    reference: Loaded | Routed | None,
    progress: Callable[[int], None],
) -> Scored:
    parts = []
    for model, other, places in _sides(loaded, reference, held_out.encoded):
        samples, sizes = [held_out.encoded[i] for i in places], [held_out.bytes[i] for i in places]
        sides = as_scorer(model, compute), as_scorer(other, compute) if other else None
        parts.append((places, score(samples, sizes, *sides, model.pad_id, progress=progress)))
    return Scored.of(parts)


def _sides(
    loaded: Loaded | Routed, reference: Loaded | Routed | None, samples: Sequence[Encoded]
) -> Iterator[tuple[Loaded, Loaded | None, list[int]]]:
    """A model, what it is measured against, and the places of the samples that this is for."""
    if isinstance(loaded, Routed):
        assert reference is None
        yield from ((model, None, places) for model, places in loaded.parts(samples))
    elif isinstance(reference, Routed):
        yield from ((loaded, other, places) for other, places in reference.parts(samples))
    else:
        yield loaded, reference, list(range(len(samples)))


def _token_metrics(scored: Scored, with_teacher: bool, seed: int) -> dict[str, Interval]:
    out = {"bits_per_byte": scored.bits_per_byte(seed), "ece": scored.ece(seed)}
    if with_teacher:
        out["kl_to_teacher"] = scored.per_token("kl_to", seed)
        out["kl_from_teacher"] = scored.per_token("kl_from", seed)
        out["agreement"] = scored.per_token("same", seed)
    return out


def _solve(
    found: Examined,
    which: str,
    loaded: Loaded | Routed,
    asked: Sequence[tuple[Sample, list[int]]],
    judge: Judge,
    sampling: Sampling,
    progress: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Greedy answers for pass@1, which are returned, and sampled ones for pass@k; ``which`` ends the metrics' names."""
    began, problems = time.monotonic(), [s for s, _ in asked]
    ask = partial(_asked, loaded, problems, [ids for _, ids in asked], sampling, progress=progress)
    greedy = ask(0.0, sampling.seed)
    found.tokens += _timed(found, loaded, greedy, began)
    outputs: list[dict[str, Any]] = []
    for sample, answer in zip(problems, greedy, strict=True):
        assert sample.task is not None
        text, prompt = text_of(loaded.tokenizer, answer.ids), "\n".join(m.content for m in sample.prompt)
        correct = judge(text, sample.task).correct
        outputs.append({"prompt": prompt, "gold": sample.task.answer, "text": text, "correct": correct})
    found.metrics[f"accuracy{which}"] = wilson(sum(o["correct"] for o in outputs), len(outputs))
    if not sampling.samples:
        return outputs
    right = [0] * len(problems)
    for k in range(sampling.samples):
        sampled = ask(sampling.temperature, sampling.seed + 1 + k)
        found.tokens += sum(len(g.ids) for g in sampled)
        for i, (sample, answer) in enumerate(zip(problems, sampled, strict=True)):
            assert sample.task is not None
            right[i] += judge(text_of(loaded.tokenizer, answer.ids), sample.task).correct
    solved = wilson(sum(c > 0 for c in right), len(right))  # k is the number of samples: any right one is a pass
    found.metrics[f"pass_at_k{which}"] = replace(solved, how=f"k={sampling.samples}, {solved.how}")
    return outputs


def _write_on(
    found: Examined, loaded: Loaded | Routed, held_out: HeldOut, sampling: Sampling, progress: Callable[[int], None]
) -> None:
    """Greedy continuations, for the reader's eye: nothing judges them, and no progress counts them."""
    asks = lambda n: progress(0)  # noqa: E731
    began, begun = time.monotonic(), [ids for ids, _ in held_out.openings]
    short = replace(sampling, max_tokens=min(64, sampling.max_tokens))
    written = _asked(loaded, held_out.encoded[: len(begun)], begun, short, 0.0, sampling.seed, asks)
    _timed(found, loaded, written, began)
    for (_, prompt), answer in zip(held_out.openings, written, strict=True):
        text = text_of(loaded.tokenizer, answer.ids)
        found.outputs.append({"prompt": prompt, "gold": None, "text": text, "correct": None})


def _timed(found: Examined, loaded: Loaded | Routed, written: Sequence[Generated], began: float) -> int:
    """How many tokens were written; their number a second is noted where one model that was open wrote them."""
    tokens = sum(len(g.ids) for g in written)
    if isinstance(loaded, Loaded):
        found.decode_tokens_per_second = round(tokens / max(time.monotonic() - began, 1e-9), 1)
    return tokens


def _asked(
    loaded: Loaded | Routed,
    whose: Sequence[Encoded | Sample],
    prompts: Sequence[list[int]],
    sampling: Sampling,
    temperature: float,
    seed: int,
    progress: Callable[[int], None],
) -> list[Generated]:
    """Answers to prompts, each of a sample in ``whose``."""
    if isinstance(loaded, Loaded):
        return _answers(loaded, prompts, sampling, temperature, seed, progress)
    out: dict[int, Generated] = {}
    for model, places in loaded.parts(whose):
        mine = [prompts[i] for i in places]
        out |= zip(places, _answers(model, mine, sampling, temperature, seed, progress), strict=True)
    return [out[i] for i in range(len(prompts))]


def _answers(
    loaded: Loaded,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    temperature: float,
    seed: int,
    progress: Callable[[int], None],
) -> list[Generated]:
    return generate(
        loaded.model,
        list(prompts),
        max_tokens=sampling.max_tokens,
        temperature=temperature,
        eos_ids=loaded.eos_ids,
        pad_id=loaded.pad_id,
        seed=seed,
        batch=256,
        context=loaded.context,
        progress=progress,
    )
