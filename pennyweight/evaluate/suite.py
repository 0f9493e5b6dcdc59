"""What is measured of one model: pass@1 and pass@k on problems, bits per byte and calibration on held-out tokens,
agreement with its teacher, and for a low-bit copy with its full-precision parent."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pennyweight.evaluate.agreement import Scored, as_scorer, score
from pennyweight.evaluate.held_out import HeldOut
from pennyweight.evaluate.intervals import wilson
from pennyweight.model.device import Compute
from pennyweight.model.generate import Generated, generate
from pennyweight.model.loaded import Loaded
from pennyweight.records import Interval, Task, Verdict

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
    loaded: Loaded,
    held_out: HeldOut,
    judge: Judge,
    sampling: Sampling,
    compute: Compute,
    teacher: Loaded | None = None,
    parent: Loaded | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> Examined:
    """Measure one model. ``teacher`` adds agreement with it, ``parent`` agreement with that."""
    found = Examined()
    if held_out.encoded:
        scored = _scored(loaded, held_out, compute, teacher, progress)
        found.tokens += int(scored.tokens.sum())
        found.metrics |= _token_metrics(scored, teacher is not None, sampling.seed)
    if held_out.encoded and parent is not None:
        beside = _scored(loaded, held_out, compute, parent, progress)
        found.metrics["kl_parent"] = beside.per_token("kl_to", sampling.seed)
        found.metrics["agreement_parent"] = beside.per_token("same", sampling.seed)
    if held_out.problems:
        _solve(found, loaded, held_out, judge, sampling, progress)
    elif held_out.openings:
        _write_on(found, loaded, held_out.openings, sampling)
    return found


def _scored(
    loaded: Loaded, held_out: HeldOut, compute: Compute, reference: Loaded | None, progress: Callable[[int], None]
) -> Scored:
    other = as_scorer(reference, compute) if reference else None
    model = as_scorer(loaded, compute)
    return score(held_out.encoded, held_out.bytes, model, other, loaded.pad_id, progress=progress)


def _token_metrics(scored: Scored, with_teacher: bool, seed: int) -> dict[str, Interval]:
    out = {"bits_per_byte": scored.bits_per_byte(seed), "ece": scored.ece(seed)}
    if with_teacher:
        out["kl_to_teacher"] = scored.per_token("kl_to", seed)
        out["kl_from_teacher"] = scored.per_token("kl_from", seed)
        out["agreement"] = scored.per_token("same", seed)
    return out


def _solve(
    found: Examined,
    loaded: Loaded,
    held_out: HeldOut,
    judge: Judge,
    sampling: Sampling,
    progress: Callable[[int], None],
) -> None:
    """Greedy answers for pass@1, sampled ones for pass@k."""
    began = time.monotonic()
    greedy = _answers(loaded, held_out.prompts, sampling, 0.0, sampling.seed)
    seconds = time.monotonic() - began
    written = sum(len(g.ids) for g in greedy)
    found.decode_tokens_per_second = round(written / max(seconds, 1e-9), 1)
    found.tokens += written
    progress(len(greedy))
    verdicts = []
    for sample, answer in zip(held_out.problems, greedy, strict=True):
        text = loaded.tokenizer.decode(list(answer.ids), skip_special_tokens=True)
        assert sample.task is not None
        verdicts.append(judge(text, sample.task))
        prompt = "\n".join(m.content for m in sample.prompt)
        found.outputs.append(
            {"prompt": prompt, "gold": sample.task.answer, "text": text, "correct": verdicts[-1].correct}
        )
    found.metrics["accuracy"] = wilson(sum(v.correct for v in verdicts), len(verdicts))
    if not sampling.samples:
        return
    right = [0] * len(held_out.problems)
    for k in range(sampling.samples):
        sampled = _answers(loaded, held_out.prompts, sampling, sampling.temperature, sampling.seed + 1 + k)
        found.tokens += sum(len(g.ids) for g in sampled)
        progress(len(sampled))
        for i, (sample, answer) in enumerate(zip(held_out.problems, sampled, strict=True)):
            assert sample.task is not None
            right[i] += judge(loaded.tokenizer.decode(list(answer.ids), skip_special_tokens=True), sample.task).correct
    solved = wilson(sum(c > 0 for c in right), len(right))  # k is the number of samples: any right one is a pass
    found.metrics["pass_at_k"] = replace(solved, how=f"k={sampling.samples}, {solved.how}")


def _write_on(found: Examined, loaded: Loaded, openings: list[tuple[list[int], str]], sampling: Sampling) -> None:
    """Greedy continuations, for the reader's eye: nothing judges them."""
    began = time.monotonic()
    begun = [ids for ids, _ in openings]
    written = _answers(loaded, begun, replace(sampling, max_tokens=min(64, sampling.max_tokens)), 0.0, sampling.seed)
    found.decode_tokens_per_second = round(sum(len(g.ids) for g in written) / max(time.monotonic() - began, 1e-9), 1)
    for (_, prompt), answer in zip(openings, written, strict=True):
        text = loaded.tokenizer.decode(list(answer.ids), skip_special_tokens=True)
        found.outputs.append({"prompt": prompt, "gold": None, "text": text, "correct": None})


def _answers(
    loaded: Loaded, prompts: Sequence[list[int]], sampling: Sampling, temperature: float, seed: int
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
    )
