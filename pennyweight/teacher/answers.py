"""Prompts -> the teacher's responses, in parts on disk so that a killed pass goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from pennyweight.atomic import write_whole
from pennyweight.records import Prompt, Sample, Teacher, Verdict, sha256_json

_PART = 512  # prompts a part; also the unit of the random seed, so the text does not depend on where a pass stopped


def write_answers(
    samples: Sequence[Sample],
    prompt: Callable[[Sample], Prompt],
    teacher: Teacher,
    folder: Path,
    seed: int,
    progress: Callable[[int], None] = lambda n: None,
) -> list[Sample]:
    """Every sample with a response by ``teacher``, in order. ``folder`` holds the finished parts meanwhile; a teacher
    that keeps its answers itself is asked for all at once, so that none has to wait for the slowest of a part."""
    folder.mkdir(parents=True, exist_ok=True)
    out: list[Sample] = []
    size = max(1, len(samples)) if teacher.keeps else _PART
    for number, start in enumerate(range(0, len(samples), size)):
        group = samples[start : start + size]
        path = folder / f"{number:06d}.{sha256_json([s.prompt_hash for s in group])[:16]}.json"
        if path.exists():
            pairs = json.loads(path.read_text(encoding="utf-8"))
            progress(len(group))
        else:
            pairs = teacher.write([prompt(s) for s in group], seed * 1_000_003 + number, progress)
            write_whole(path, json.dumps(pairs, ensure_ascii=False))
        out += [s.answered(text, teacher.name, ended) for s, (text, ended) in zip(group, pairs, strict=True)]
    return out


def keep(samples: Sequence[Sample], judge: Callable[[Sample], Verdict | None] | None) -> tuple[list[Sample], int]:
    """Samples whose response is not empty and, with a judge, is not judged wrong; and how many were turned down."""
    kept = []
    for sample in samples:
        verdict = judge(sample) if judge else None
        if (sample.response or "").strip() and (verdict is None or verdict.correct):
            kept.append(sample)
    return kept, len(samples) - len(kept)
