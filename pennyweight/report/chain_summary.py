"""The folder of a chain -> what its stages made, side by side: its summary.json and report.html."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pennyweight.atomic import write_whole
from pennyweight.records import CHAIN, sha256_json
from pennyweight.report.chain_page import render_chain
from pennyweight.report.view import view
from pennyweight.version import __version__

MEASURED = ("accuracy", "pass_at_k", "bits_per_byte")
"""What stages are compared by; distances to a teacher are to another one in each."""

Read = Callable[[Path], dict[str, Any]]


def is_chain(root: Path) -> bool:
    """Whether ``root`` is the folder of a chain of runs."""
    return (root / CHAIN).is_file()


def stages_of(root: Path, read: Read) -> list[str]:
    """Names of a chain's stages, in their order, of those whose run has begun."""
    return [stage for stage in read(root / CHAIN)["stages"] if (root / stage / "recipe.json").exists()]


def write_chain(root: Path, read: Read) -> dict[str, Any]:
    """Write summary.json and report.html of a chain from what its stages are now; that summary."""
    summary = summarise_chain(root, read)
    write_whole(root / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False))
    write_whole(root / "report.html", render_chain(summary))
    return summary


def summarise_chain(root: Path, read: Read) -> dict[str, Any]:
    """What the stages of a chain have made so far.

    Args:
        read: file -> the JSON object in it, or an error that says that it is damaged.
    """
    chain = read(root / CHAIN)
    stages = {name: _stage(root / name, name, known, read) for name, known in chain["stages"].items()}
    done = [s for s in stages.values() if s["state"] == "finished"]
    return {
        "schema": 1,
        "name": chain["name"],
        "chain": list(stages),
        "version": __version__,
        "stages": stages,
        "seconds": round(sum(s["seconds"] for s in done), 3),
        **{k: sum(s[k] or 0 for s in done) for k in ("tokens_trained", "tokens_generated")},
        **{k: _largest(s[k] for s in done) for k in ("peak_memory_bytes", "peak_device_memory_bytes")},
    }


def _stage(folder: Path, name: str, known: Mapping[str, Any], read: Read) -> dict[str, Any]:
    """One stage; what is not finished has a ``state`` alone, and no numbers."""
    needs = list(known["needs"])
    if not (folder / "recipe.json").exists():
        return {"state": "not run", "needs": needs}
    recipe, file = read(folder / "recipe.json"), folder / "summary.json"
    made = read(file) if file.exists() else {}
    if made.get("recipe_hash") != sha256_json(recipe):  # of settings that it has no more
        return {"state": "unfinished", "needs": needs}
    seen, work = view(made), made["stages"]
    student = seen.student.facts if seen.student else {}
    measured = {m: student["metrics"][m] for m in MEASURED if m in student.get("metrics", {})}
    return {
        "state": "finished",
        "needs": needs,
        "method": seen.method,
        "params": student.get("params"),
        "bytes": student.get("bytes"),
        "seeds": made["seeds"],
        "metrics": measured,
        "measured_on": _problems(folder, f"{seen.method}-{made['seeds'][0]}", read),
        "seconds": round(sum(s["seconds"] for s in work.values()), 3),
        "tokens_trained": sum(s["tokens"] for stage, s in work.items() if _trains(stage)),
        "tokens_generated": _generated(folder / "metrics.jsonl", made["arms"]),
        **{k: _largest(s[k] for s in work.values()) for k in ("peak_memory_bytes", "peak_device_memory_bytes")},
        "finished": made["finished"],
        "recipe_hash": made["recipe_hash"],
        "ledger": made["ledger"]["head"],
        "report": f"{name}/report.html",
    }


def _trains(stage: str) -> bool:
    """Whether the tokens of a run's stage are tokens trained on: of its own teacher, an arm or a low-bit copy."""
    return stage not in ("data", "targets", "student") and not stage.startswith(("start-", "evaluate-"))


def _generated(metrics: Path, arms: Mapping[str, Any]) -> int | None:
    """Tokens that the students wrote to learn from, by the lines of their rollouts; None where there are none."""
    tokens = []
    for text in metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else ():
        line = json.loads(text) if text.strip() else {}
        if line.get("stage") == "rollout" and line["seed"] in arms.get(line["arm"], {}).get("seeds", []):
            tokens.append(int(line.get("generated", 0)))
    return sum(tokens) if tokens else None


def _problems(folder: Path, model: str, read: Read) -> dict[str, Any] | None:
    """How many problems a model was asked, and their hash, by which stages are seen to have been asked the same."""
    file = folder / "evaluation" / f"{model}.json"
    rows = read(file).get("outputs", []) if file.exists() else []
    asked = [[row["prompt"], row["gold"]] for row in rows if row["gold"] is not None]
    return {"problems": len(asked), "sha256": sha256_json(asked)} if asked else None


def _largest(values: Any) -> int | None:
    return max((v for v in values if v is not None), default=None)
