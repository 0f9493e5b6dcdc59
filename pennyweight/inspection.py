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
from pennyweight.evaluate.fidelity import Gradient, Stand, compare, drawn, hidden_states, k_for, norm_of, sampled, top_k
from pennyweight.loss.divergence import Divergence
from pennyweight.loss.signals import Dense, Target
from pennyweight.model.head import head_of
from pennyweight.progress import counting, say
from pennyweight.recipe import SampledTargets, TopKTargets
from pennyweight.records import sha256_json
from pennyweight.report.draw import draw
from pennyweight.run_folder import a_run, recipe_of, write_json
from pennyweight.settings import TEXT_ONLY
from pennyweight.teacher.cache import LABELLED_AS, read_settled
from pennyweight.teacher.local import LocalTeacher
from pennyweight.train.loop import batch_loss

_ENTRIES = 1 << 28  # logits looked at in all: 1 GiB of float32
_DRAWS = 4
_TOKENS = 4096  # through a model at once
_LONGEST = 16  # tokens read for each that is learnt, at most


def inspect_targets(folder: str, tokens: int = 4096) -> dict[str, Any]:
    """Bytes a token, mass kept, gradient error, angle and calibration of ways to keep the run's teacher.

    Measured on its first training samples by hash, as the run labels them and at its temperature, against the whole
    teacher's forward KL; for the student before training and, once there is one, after. Writes inspection.json into the
    RUN folder, and draws the report of a finished run again.

    Args:
        tokens: loss positions to measure on; fewer where their logits would take more than 1 GiB.

    Raises:
        RunError: not a RUN folder, it has no training samples or no student yet, or no student differs from its
            teacher.
    """
    root, bench = _bench(folder)
    _check_measurable(root, bench)
    batches = _batches(bench, min(tokens, max(64, _ENTRIES // bench.teacher.vocabulary)))
    # A mixture is mixed at the temperature of the labels, and is then the whole teacher.
    whole, labelled = _logits(bench.labelling if bench.team else bench.local, batches), None
    if bench.labelling is not bench.local and not bench.team:
        labelled = _logits(bench.labelling, batches)
    temperature = getattr(bench.recipe.method, "temperature", 1.0)
    students = _students(bench, root)
    stands = _ways(bench, root, whole if labelled is None else labelled, temperature, batches)
    confidence = torch.softmax(whole / temperature, -1).amax(-1)
    rows: dict[str, list[dict[str, Any]]] = {}
    with counting("inspecting", len(stands) * len(students), "gradients") as c:
        for name, path in students.items():
            gradient = _gradient(bench, path, batches, temperature)
            dense = gradient(Dense.of(whole))
            if norm_of(dense) == 0.0:
                say(f"{name} is its teacher, whose gradient is zero: nothing to measure")
                continue
            rows[name] = []
            for stand, chosen in stands:
                rows[name].append({**compare(stand, dense, gradient, confidence), "chosen": chosen})
                c.advance(1)
    if not rows:
        raise RunError(f"no student of {root} differs from its teacher; there is no gradient to measure")
    entropy = float(torch.special.entr(torch.softmax(whole, -1)).sum(-1).mean())
    found = {"tokens": len(whole), "vocabulary": whole.shape[1], "entropy": entropy, "students": rows}
    found |= {
        "said": _said(*list(rows.items())[-1]),
        "made_from": [sha256_json(bench.recipe.model_dump(mode="json")), bench.teacher.fingerprint],
    }
    write_json(root / "inspection.json", found)
    if (root / "summary.json").exists():
        draw(root)
    return found


def _check_measurable(root: Path, bench: Bench) -> None:
    """Raise RunError where no one teacher in this process has the student's tokens."""
    if bench.apart:
        raise RunError(
            f"the student of {root} has other tokens than its teacher, which cannot be measured token by token; "
            "inspect a run whose student has its teacher's tokenizer"
        )
    if bench.team and not bench.team.mixture:
        raise RunError(
            f"the records of {root} have several teachers, and none stands for all to be measured against; inspect a "
            "run with one teacher, or with a mixture"
        )
    if bench.served:
        raise RunError(
            f"the teacher of {root} is behind a server, which shows too little of it to measure against; inspect a run "
            "whose teacher is a folder"
        )


def help_to_label(folder: str) -> dict[str, Any]:
    """Label what a run has not labelled yet, beside whoever else is at it; facts of its targets.

    Raises:
        RunError: not a RUN folder, it has no training samples yet, its teacher runs live, it is labelled on another
            kind of device, or its settings change meanwhile.
    """
    root, bench = _bench(folder)
    if bench.recipe.targets.kind == "dense" or bench.recipe.method.kind in TEXT_ONLY:
        raise RunError(f"{root} keeps no targets (its teacher runs live, or is not needed); there is nothing to label")
    labelled_as = [read_settled(file) for file in (root / LABELLED_AS, *root.glob(f"*-{LABELLED_AS}"))]
    others = {known["made_from"].get("compute") for known in labelled_as if known} - {bench.compute.name}
    if others:
        raise RunError(
            f"{root} is labelled on {', '.join(map(str, others))} and this process would on {bench.compute.name}, "
            "whose targets differ; help from a machine like the first"
        )
    try:
        return asdict(bench.fill_cache(own=False))
    except FileNotFoundError as e:
        raise RunError(
            f"{e.filename} was removed meanwhile: {root} is run with other settings now; start this command again"
        ) from None


def _bench(folder: str) -> tuple[Path, Bench]:
    root = a_run(folder)
    if not (root / "data" / "train.jsonl").exists():
        raise RunError(f"{root} has no training samples yet; let the run get past its data stage")
    bench = Bench(recipe_of(root), root)
    if not bench.encoded:
        raise RunError(f"{root} has no training samples; run its recipe again")
    return root, bench


def _batches(bench: Bench, tokens: int) -> list[Batch]:
    """The first samples by hash that have so many loss positions together, in batches of a few thousand tokens."""
    batches, group, count, seen = [], [], 0, 0
    for sample in sorted(bench.encoded, key=lambda e: e.token_hash):
        if count >= tokens or seen >= _LONGEST * tokens:
            break
        if group and (len(group) + 1) * max(len(s.ids) for s in (*group, sample)) > _TOKENS:
            batches.append(group)
            group = []
        group.append(sample)
        count += len(sample.loss_positions)
        seen += len(sample.ids)
    return [collate([[s] for s in g], bench.language.pad_id) for g in (*batches, group)]


@torch.no_grad()
def _logits(teacher: LocalTeacher, batches: list[Batch]) -> Tensor:
    """(N, V) at the loss positions of all batches."""
    return torch.cat([teacher.head.logits(teacher.hidden(b)) for b in batches])


def _students(bench: Bench, root: Path) -> dict[str, Path]:
    before = root / "arms" / f"base-{bench.recipe.seeds[0]}"
    known = {"the untouched student": before, "the trained student": root / "student"}
    found = {name: path for name, path in known.items() if (path / "config.json").exists()}
    if not found:
        raise RunError(f"{root} has no student yet; let the run get past its start stage")
    return found


def _gradient(bench: Bench, path: Path, batches: list[Batch], temperature: float) -> Gradient:
    """The gradient of the mean forward KL over the batches with respect to every parameter of a student."""
    model = bench.opened(path).model.eval()  # no dropout, which would differ from one way to the next
    head, spec, total = head_of(model), Divergence(temperature=temperature), sum(b.count for b in batches)

    def gradient(target: Target) -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        a = 0
        for batch in batches:
            index = torch.arange(a, a + batch.count, device=bench.compute.device)
            weighed = batch.weighted(0.0, 1.0, spec, target.take(index))
            (batch_loss(model, head, weighed, bench.compute.measuring).loss / total).backward()
            a += batch.count
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    return gradient


def _ways(
    bench: Bench, root: Path, logits: Tensor, temperature: float, batches: list[Batch]
) -> list[tuple[Stand, bool]]:
    """Ours around the run's threshold, at each of its sizes the others, and hidden states; whether the run keeps it."""
    t, kind = bench.recipe.targets, bench.recipe.targets.kind
    if temperature != 1.0:
        logits = logits / temperature
    factors = (4.0, 2.0, 1.0, 0.5)
    ours = [sampled(logits, min(0.5, _threshold(bench, root) * factor), _DRAWS) for factor in factors]
    ks = {min(k_for(s.bytes_per_token, logits.shape[1]), logits.shape[1]) for s in ours}
    ks |= {t.k} if isinstance(t, TopKTargets) else set()
    ways = [(s, f == 1.0 and kind in ("sampled", "dense")) for s, f in zip(ours, factors, strict=True)]
    for tail in (False, True):
        ways += [(top_k(logits, k, tail), tail and k == getattr(t, "k", None)) for k in sorted(ks)]
    ways += [(drawn(logits, n, _DRAWS), False) for n in (12, 25, 50, 100)]
    states = torch.cat([bench.labelling.hidden(b) for b in batches])
    return [*ways, (hidden_states(states, bench.local.head.logits), kind == "hidden")]


def _threshold(bench: Bench, root: Path) -> float:
    """What the run settled on, or will begin with; of a run that keeps no sample, the default."""
    t = bench.recipe.targets
    if not isinstance(t, SampledTargets):
        return SampledTargets().threshold
    known = read_settled(root / LABELLED_AS)
    return known["settled"] if known and known["made_from"].get("asked") == t.model_dump(mode="json") else t.threshold


def _said(student: str, rows: list[dict[str, Any]]) -> str:
    """What the run keeps (the default sample where it keeps nothing) beside usual top-k of at least as many bytes."""
    mine = next(r for r in rows if r["chosen"])
    others = sorted((r for r in rows if r["way"] == "top-k, rescaled"), key=lambda r: r["bytes_per_token"])
    rival = next((r for r in others if r["bytes_per_token"] >= mine["bytes_per_token"]), others[-1])
    named = {
        "sampled": f"The sample at threshold {mine['setting']:.3g} takes",
        "top-k + tail": f"Top-{mine['setting']:.0f} with the rest as one outcome takes",
        "hidden states": "The last hidden states take",
    }[mine["way"]]
    turns = "turns" if named.endswith("takes") else "turn"
    return (
        f"{named} {mine['bytes_per_token']:.1f} bytes a token and {turns} the gradient of {student} by "
        f"{mine['gradient_angle']:.1f}°; top-{rival['setting']:.0f} rescaled takes "
        f"{rival['bytes_per_token']:.1f} and turns it by {rival['gradient_angle']:.1f}°."
    )
