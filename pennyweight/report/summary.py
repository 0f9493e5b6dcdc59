"""Evaluations of every arm and seed -> the numbers of summary.json: means, intervals, gap recovered, verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pennyweight.evaluate.intervals import difference, over_seeds
from pennyweight.records import METRICS, ROUNDED, Interval, json_safe, sha256_json

Evaluation = Mapping[str, Any]


def combine(evaluations: Mapping[int, Evaluation]) -> dict[str, dict[str, Any]]:
    """Metrics of one arm over its seeds.

    From two seeds on, the t interval over seeds; with one, the sampling interval of that evaluation. Where all
    seeds start from the same weights (a cut student's base arm) there is nothing to vary, and the sampling interval
    of the first stands.
    """
    first = next(iter(evaluations.values()))["metrics"]
    out = {}
    for name, interval in first.items():
        values = [e["metrics"][name]["mean"] for e in evaluations.values()]
        vary = len(set(values)) > 1 and all(math.isfinite(v) for v in values)
        out[name] = over_seeds(values).to_json() if vary else dict(interval)
        low, high = (0.0, 1.0) if METRICS[name].unit == "percent" else (0.0, math.inf)
        row = json_safe(out[name])
        row["low"] = None if row["low"] is None else max(low, row["low"])
        row["high"] = None if row["high"] is None else min(high, row["high"])
        out[name] = row
    return out


def gap_recovered(
    teacher: Evaluation | None, sft: Mapping[int, Evaluation], kd: Mapping[int, Evaluation], arm: str
) -> dict[str, dict[str, Any]]:
    """(kd - sft) / (teacher - sft) for each metric that both arms have, with a verdict.

    It is None where the control is as good as the teacher or better: there is no gap to recover; and where the teacher
    was not measured.

    The verdict goes by the paired difference kd - sft: over seeds its t interval; with one seed whether the two
    sampling intervals are apart. An interval that holds zero is a draw.
    """
    out = {}
    seeds = sorted(set(sft) & set(kd))
    shared = set(sft[seeds[0]]["metrics"]) & set(kd[seeds[0]]["metrics"])
    for name in METRICS:
        if name not in shared:
            continue
        a = [kd[s]["metrics"][name]["mean"] for s in seeds]
        b = [sft[s]["metrics"][name]["mean"] for s in seeds]
        best = _teacher_value(teacher, name)
        gap = best - sum(b) / len(b) if best is not None else 0.0
        # A control as good as the teacher, or better, leaves nothing to recover.
        ahead = gap if METRICS[name].higher_is_better else -gap
        recovered = [(x - y) / gap for x, y in zip(a, b, strict=True)] if ahead > 1e-9 else None
        whole = over_seeds(recovered) if recovered and len(recovered) > 1 else None
        delta = difference(a, b)
        share = {
            "mean": sum(recovered) / len(recovered) if recovered else None,
            "low": whole.low if whole else None,
            "high": whole.high if whole else None,
            "how": (whole.how if whole else delta.how) if recovered else _no_gap(best),
        }
        verdict = _verdict(name, delta, kd[seeds[0]]["metrics"][name], sft[seeds[0]]["metrics"][name], arm)
        out[name] = {**json_safe(share), "difference": json_safe(delta.to_json()), "verdict": verdict}
    return out


def _no_gap(best: float | None) -> str:
    return "the teacher was not measured" if best is None else "the control is as good as the teacher, or better"


def _teacher_value(teacher: Evaluation | None, name: str) -> float | None:
    """The teacher against itself: KL 0, agreement 1; otherwise as measured."""
    if teacher is None:
        return None
    if name in ("kl_to_teacher", "kl_from_teacher"):
        return 0.0
    if name == "agreement":
        return 1.0
    return teacher["metrics"].get(name, {}).get("mean")


def _verdict(name: str, delta: Interval, kd: Mapping[str, Any], sft: Mapping[str, Any], arm: str) -> str:
    if math.isnan(delta.mean):
        return "draw"
    if math.isfinite(delta.low):
        low, high = delta.low, delta.high
    elif kd["low"] > sft["high"] or kd["high"] < sft["low"]:
        low = high = delta.mean
    else:
        return "draw"
    if low <= 0 <= high:
        return "draw"
    better = (low > 0) == METRICS[name].higher_is_better
    return f"{arm} better" if better else "sft better"


def per_seed(evaluations: Mapping[int, Evaluation], names: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """The value of each metric for each seed."""
    return {str(s): json_safe({n: e["metrics"][n]["mean"] for n in names}) for s, e in evaluations.items()}


def summarise(
    *,
    recipe: Mapping[str, Any],
    teacher: Mapping[str, Any],
    start: Mapping[str, Any],
    trained: Mapping[str, Mapping[str, Any]],
    evaluations: Mapping[str, Any],
    copies: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The measured part of summary.json.

    Args:
        teacher, start: facts of the teacher and of the untouched student (name, params, bytes, fingerprint); of several
            teachers also ``members``, their facts by name, and whether they are ``mixed``.
        trained: by arm, the steps and tokens of its training.
        evaluations: ``teacher`` -> evaluation, None of one that cannot be measured; each arm -> seed -> evaluation.
        copies: by name, facts of the low-bit copy and its evaluation; those rounded only, beside one of the same
            format that was taught, are kept apart, under ``rounded``.
    """
    arms = {}
    for arm, by_seed in evaluations.items():
        if arm == "teacher":
            continue
        first = next(iter(by_seed.values()))
        arms[arm] = {
            "params": start["params"],
            "bytes": start["bytes"],
            "seeds": sorted(by_seed),
            **trained.get(arm, {"steps": 0, "tokens": 0}),
            "decode_tokens_per_second": first["decode_tokens_per_second"],
            "metrics": combine(by_seed),
            "per_seed": per_seed(by_seed, list(first["metrics"])),
        }
    method = recipe["method"]["kind"]
    both, measured = method != "sft" and "sft" in evaluations, evaluations["teacher"]
    return {
        "schema": 1,
        "name": recipe["name"],
        "recipe_hash": sha256_json(recipe),
        "seeds": list(recipe["seeds"]),
        "teacher": {
            **{k: teacher[k] for k in ("name", "path", "fingerprint", "licence", "params", "bytes")},
            **{k: teacher[k] for k in ("members", "mixed") if k in teacher},
            "bytes_fp32": 4 * teacher["params"] if teacher["params"] else None,
            "decode_tokens_per_second": measured["decode_tokens_per_second"] if measured else None,
            "metrics": combine({0: measured}) if measured else {},
        },
        "start": {"unsure": start.get("unsure")},
        "arms": arms,
        "gap_recovered": (
            gap_recovered(evaluations["teacher"], evaluations["sft"], evaluations[method], method) if both else {}
        ),
        "quantized": {name: _copy(name, facts) for name, facts in copies.items() if not name.endswith(ROUNDED)},
        "rounded": {name.removesuffix(ROUNDED): _copy(name, copies[name]) for name in copies if name.endswith(ROUNDED)},
    }


def _copy(name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    evaluation = facts["evaluation"]
    return {
        "format": f"{name.removesuffix(ROUNDED)}, compressed-tensors",
        "recovered": facts.get("recovered", 0),
        "path": f"student-{name}",
        "bytes": facts["bytes"],
        "params": facts["params"],
        "decode_tokens_per_second": evaluation["decode_tokens_per_second"],
        "metrics": combine({0: evaluation}),
    }


def shown_samples(evaluations: Mapping[str, Evaluation], count: int) -> list[dict[str, Any]]:
    """The first ``count`` held-out prompts with the greedy output of every model that writes, less those rounded only;
    not picked, so not flattering."""
    evaluations = {name: e for name, e in evaluations.items() if not name.endswith(ROUNDED) and e["outputs"]}
    if not evaluations:
        return []
    asked = [[row["prompt"] for row in e["outputs"][:count]] for e in evaluations.values()]
    alike = max(asked, key=asked.count)  # a teacher of other tokens may have begun from other places of a text
    evaluations = {name: e for (name, e), mine in zip(evaluations.items(), asked, strict=True) if mine == alike}
    first = next(iter(evaluations.values()))["outputs"][:count]
    return [
        {
            "prompt": row["prompt"],
            "gold": row["gold"],
            "outputs": {name: {k: e["outputs"][i][k] for k in ("text", "correct")} for name, e in evaluations.items()},
        }
        for i, row in enumerate(first)
    ]
