"""Several responses to a prompt: asked for, turned down, and of those that are left the ones that differ most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from pennyweight.data.split import normalised
from pennyweight.recipe import Responses
from pennyweight.records import Sample
from pennyweight.verifiers.reward import of_the_script

_RUN = 3  # words of a run that two solutions are compared by


def asked_for(samples: Sequence[Sample], r: Responses) -> list[Sample]:
    """Every prompt as often as it is to be answered; texts, and rows whose own response is taken, once."""
    out: list[Sample] = []
    for s in samples:
        again = bool(s.prompt) and (r.by == "teacher" or (r.by == "auto" and s.response is None))
        out += [s, *(replace(s) for _ in range(r.samples - 1))] if again else [s]
    return out


def selected(samples: Sequence[Sample], r: Responses) -> tuple[list[Sample], dict[str, int]]:
    """The responses that are learnt from, in their order, and how many were turned down for what.

    ``cut_off``: it did not end by itself, where only verified ones are kept; ``language``: too little of it is in the
    prompt's script; ``repeated``: of several, the same response to the prompt is there already, but for case, spacing
    and punctuation; ``beyond``: the prompt has ``r.most`` that differ more.
    """
    told: Counter[str] = Counter()
    by_prompt: dict[tuple[str, str | None], list[Sample]] = {}
    for s in samples:
        if not s.prompt:
            by_prompt[s.id, s.teacher] = [s]
            continue
        alike = by_prompt.setdefault((s.prompt_hash, s.teacher), [])
        why = _why_not(s, alike, r)
        if why:
            told[why] += 1
        else:
            alike.append(s)
    chosen = {id(s) for group in by_prompt.values() for s in _most_different(group, r.most)}
    left = [s for group in by_prompt.values() for s in group]
    told["beyond"] += len(left) - len(chosen)
    return [s for s in samples if id(s) in chosen], {k: n for k, n in sorted(told.items()) if n}


def _why_not(s: Sample, before: list[Sample], r: Responses) -> str | None:
    response = s.response or ""
    if r.keep == "verified" and not s.complete:
        return "cut_off"
    if r.language and of_the_script("\n".join(m.content for m in s.prompt), response) < r.language:
        return "language"
    if (r.samples > 1 or r.most) and any(normalised(response) == normalised(b.response or "") for b in before):
        return "repeated"
    return None


def _most_different(group: list[Sample], most: int | None) -> list[Sample]:
    """Up to ``most``: the first, then always the one whose nearest chosen one is farthest, by the share of runs of
    three words that two have in common (Jaccard)."""
    if most is None or len(group) <= most:
        return group
    runs = [_runs(s.response or "") for s in group]
    chosen = [0]
    nearest = [_alike(runs[0], x) for x in runs]
    while len(chosen) < most:
        best = min((i for i in range(len(group)) if i not in chosen), key=lambda i: nearest[i])
        chosen.append(best)
        nearest = [max(n, _alike(runs[best], x)) for n, x in zip(nearest, runs, strict=True)]
    return [group[i] for i in sorted(chosen)]


def _runs(text: str) -> set[tuple[str, ...]]:
    words = normalised(text).split()
    return {tuple(words[i : i + _RUN]) for i in range(max(1, len(words) - _RUN + 1))}


def _alike(a: set[tuple[str, ...]], b: set[tuple[str, ...]]) -> float:
    return len(a & b) / len(a | b)
