"""Looking into a run's targets: what they cost and how well they stand in for the whole teacher; and help to label."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pennyweight.bench import Bench
from pennyweight.data.pack import Batch, collate
from pennyweight.errors import RunError
from pennyweight.evaluate.fidelity import Gradient, Stand, compare, dense_of, drawn, k_for, sampled, top_k
from pennyweight.loss.divergence import Divergence
from pennyweight.loss.signals import Target
from pennyweight.model.head import head_of
from pennyweight.progress import counting
from pennyweight.recipe import SampledTargets
from pennyweight.records import Encoded
from pennyweight.report.draw import draw
from pennyweight.run_folder import a_run, recipe_of, write_json
from pennyweight.train.loop import batch_loss

_ENTRIES = 1 << 28  # logits looked at in all: 1 GiB of float32
_DRAWS = 4


def inspect_targets(folder: str, tokens: int = 4096) -> dict[str, Any]:
    """Bytes a token, mass kept, gradient error, angle and calibration of ways to keep the run's teacher.

    Measured on its first training samples by hash, for the student before training and, once there is one, after.
    Writes inspection.json into the RUN folder, and draws the report of a finished run again.

    Raises:
        RunError: not a RUN folder, or it has no training samples yet.
    """
    root, bench = _bench(folder)
    samples = _some(bench.encoded, min(tokens, max(64, _ENTRIES // bench.teacher.vocabulary)))
    batch = collate([[s] for s in samples], bench.teacher.pad_id)
    with torch.no_grad():
        logits = bench.answering.head.logits(bench.answering.hidden(batch))
    students = _students(bench, root)
    stands = _ways(logits, _threshold(bench))
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in students}
    with counting("inspecting", len(stands) * len(students), "gradients") as c:
        for name, path in students.items():
            gradient = _gradient(bench, path, batch)
            whole, confidence = dense_of(logits)
            dense = gradient(whole)
            for stand, chosen in stands:
                rows[name].append({**compare(stand, dense, gradient, confidence), "chosen": chosen})
                c.advance(1)
    log_p = torch.log_softmax(logits, -1)
    entropy = float(-(log_p.exp() * log_p).nansum(-1).mean())
    found = {"tokens": len(logits), "vocabulary": logits.shape[1], "entropy": entropy, "students": rows}
    found["said"] = _said(*list(rows.items())[-1])
    write_json(root / "inspection.json", found)
    if (root / "summary.json").exists():
        draw(root)
    return found


def help_to_label(folder: str) -> dict[str, Any]:
    """Label what a run has not labelled yet, beside whoever else is at it; facts of its targets.

    Raises:
        RunError: not a RUN folder, it has no training samples yet, or its teacher runs live.
    """
    root, bench = _bench(folder)
    if bench.recipe.targets.kind == "dense" or bench.recipe.method.kind == "sft":
        raise RunError(f"{root} keeps no targets (its teacher runs live, or is not needed); there is nothing to label")
    return asdict(bench.fill_cache())


def _bench(folder: str) -> tuple[Path, Bench]:
    root = a_run(folder)
    if not (root / "data" / "train.jsonl").exists():
        raise RunError(f"{root} has no training samples yet; let the run get past its data stage")
    bench = Bench(recipe_of(root), root)
    if not bench.encoded:
        raise RunError(f"{root} has no training samples; run its recipe again")
    return root, bench


def _some(encoded: list[Encoded], tokens: int) -> list[Encoded]:
    """The first samples by hash that have so many loss positions together."""
    out, count = [], 0
    for sample in sorted(encoded, key=lambda e: e.token_hash):
        if count >= tokens:
            break
        out.append(sample)
        count += len(sample.loss_positions)
    return out


def _threshold(bench: Bench) -> float:
    if isinstance(bench.recipe.targets, SampledTargets) and bench.recipe.method.kind != "sft":
        return bench.cache.keep.threshold
    return SampledTargets().threshold


def _students(bench: Bench, root: Path) -> dict[str, Path]:
    before = root / "arms" / f"base-{bench.recipe.seeds[0]}"
    known = {"the untouched student": before, "the trained student": root / "student"}
    found = {name: path for name, path in known.items() if (path / "config.json").exists()}
    if not found:
        raise RunError(f"{root} has no student yet; let the run get past its start stage")
    return found


def _gradient(bench: Bench, path: Path, batch: Batch) -> Gradient:
    """The gradient of the mean forward KL over the batch with respect to every parameter of a student."""
    model = bench.opened(path).model.eval()  # no dropout, which would differ from one way to the next
    head = head_of(model)

    def gradient(target: Target) -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        weighed = batch.weighted(0.0, 1.0, Divergence(), target)
        (batch_loss(model, head, weighed, bench.measuring).loss / batch.count).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    return gradient


def _ways(logits: Tensor, threshold: float) -> list[tuple[Stand, bool]]:
    """Ours around the run's threshold, and at each of its sizes the others; whether it is what the run keeps."""
    factors = (4.0, 2.0, 1.0, 0.5)
    ours = [sampled(logits, min(0.5, threshold * factor), _DRAWS) for factor in factors]
    ks = sorted({min(k_for(s.bytes_per_token, logits.shape[1]), logits.shape[1]) for s in ours})
    others = [top_k(logits, k, tail) for tail in (False, True) for k in ks]
    others += [drawn(logits, n, _DRAWS) for n in (12, 25, 50, 100)]
    return [(s, f == 1.0) for s, f in zip(ours, factors, strict=True)] + [(s, False) for s in others]


def _said(student: str, rows: list[dict[str, Any]]) -> str:
    """What the run keeps beside usual top-k of at least as many bytes, in a sentence."""
    mine = next(r for r in rows if r["chosen"])
    others = sorted((r for r in rows if r["way"] == "top-k, rescaled"), key=lambda r: r["bytes_per_token"])
    rival = next((r for r in others if r["bytes_per_token"] >= mine["bytes_per_token"]), others[-1])
    return (
        f"The sample at threshold {mine['setting']:.3g} takes {mine['bytes_per_token']:.1f} bytes a token and turns "
        f"the gradient of {student} by {mine['gradient_angle']:.1f}°; top-{rival['setting']:.0f} rescaled takes "
        f"{rival['bytes_per_token']:.1f} and turns it by {rival['gradient_angle']:.1f}°."
    )
