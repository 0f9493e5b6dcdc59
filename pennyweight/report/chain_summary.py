"""The folder of a chain -> what its stages made, side by side: its summary.json and report.html."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from pennyweight.atomic import write_whole
from pennyweight.ledger.store import Ledger
from pennyweight.records import CHAIN, sha256_json
from pennyweight.report.chain_page import render_chain
from pennyweight.report.language import in_language
from pennyweight.report.view import view
from pennyweight.version import __version__

MEASURED = ("accuracy", "pass_at_k", "accuracy_harder", "pass_at_k_harder", "bits_per_byte")
"""What stages are compared by; distances to a teacher are to another one in each."""

Read = Callable[[Path], dict[str, Any]]


_BEGUN = "begun.json"  # in a stage's folder: hashes of what it began from, by reference


def is_chain(root: Path) -> bool:
    """Whether ``root`` is the folder of a chain of runs."""
    return (root / CHAIN).is_file()


def stages_of(root: Path, read: Read) -> list[str]:
    """Names of a chain's stages, in their order, of those whose run has begun."""
    return [stage for stage in read(root / CHAIN)["stages"] if (root / stage / "recipe.json").exists()]


def made_by(root: Path, needs: Mapping[str, str]) -> dict[str, str]:
    """What references (each with its stage) stand for now: hashes of the artifacts that they are, or are part of.

    They are those in the ledgers, so that nothing large has to be read.
    """
    out = {}
    for reference, stage in needs.items():
        path = PurePosixPath(reference.removeprefix(f"@{stage}/"))
        if not (root / stage / "ledger.sqlite").exists():
            continue
        with Ledger.open(root / stage / "ledger.sqlite", create=False) as ledger:
            whole = [a.sha256 for a in ledger.artifacts() if path.is_relative_to(a.path)]
        out |= {reference: whole[0]} if whole else {}
    return out


def note_begun(root: Path, stage: str, begun: Mapping[str, str]) -> None:
    """Keep what a stage that has been run began from, so that it is seen when that is no more."""
    write_whole(root / stage / _BEGUN, json.dumps(begun, indent=2))


def write_chain(root: Path, read: Read, lang: str = "en") -> dict[str, Any]:
    """Write summary.json and report.html of a chain from what its stages are now; that summary."""
    summary = summarise_chain(root, read)
    write_whole(root / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False))
    write_whole(root / "report.html", in_language(lang).page(render_chain(summary)))
    return summary


def summarise_chain(root: Path, read: Read) -> dict[str, Any]:
    """What the stages of a chain have made so far.

    Args:
        read: file -> the JSON object in it, or an error that says that it is damaged.
    """
    chain = read(root / CHAIN)
    stages = {name: _stage(root, name, known["needs"], read) for name, known in chain["stages"].items()}
    done = [s for s in stages.values() if s["state"] == "finished"]
    return {
        "schema": 1,
        "name": chain["name"],
        "chain": list(stages),
        "version": __version__,
        "stages": stages,
        "bill": {**_bill([s["bill"] for s in done]), "budget": chain.get("budget")},
        "seconds": round(sum(s["seconds"] for s in done), 3),
        **{k: sum(s[k] or 0 for s in done) for k in ("tokens_trained", "tokens_generated")},
        **{k: _largest(s[k] for s in done) for k in ("peak_memory_bytes", "peak_device_memory_bytes")},
    }


def _stage(root: Path, name: str, known: Mapping[str, str], read: Read) -> dict[str, Any]:
    """One stage; what is not finished has a ``state`` alone, and no numbers."""
    folder, needs = root / name, list(known)
    if not (folder / "recipe.json").exists():
        return {"state": "not run", "needs": needs}
    recipe, file = read(folder / "recipe.json"), folder / "summary.json"
    made = read(file) if file.exists() else {}
    if made.get("recipe_hash") != sha256_json(recipe):  # of settings that it has no more
        return {"state": "unfinished", "needs": needs}
    seen, work = view(made), made["stages"]
    student = seen.student.facts if seen.student else {}
    begun = read(folder / _BEGUN) if (folder / _BEGUN).exists() else {}
    now = made_by(root, known)
    base = seen.find("base")
    measured, before = (
        {m: of["metrics"][m] for m in MEASURED if m in of.get("metrics", {})}
        for of in (student, base.facts if base else {})
    )
    return {
        "state": "finished",
        "needs": needs,
        "outdated": [r for r in needs if r in begun and begun[r] != now.get(r)],
        "method": seen.method,
        "params": student.get("params"),
        "bytes": student.get("bytes"),
        "seeds": made["seeds"],
        "metrics": measured,
        "before": before,
        "measured_on": _problems(folder, f"{seen.method}-{made['seeds'][0]}", read),
        "seconds": round(sum(s["seconds"] for s in work.values()), 3),
        "bill": _of_run(made),
        "tokens_trained": sum(s["tokens"] for stage, s in work.items() if _trains(stage)),
        "tokens_generated": _generated(folder / "metrics.jsonl", made["arms"]),
        **{k: _largest(s[k] for s in work.values()) for k in ("peak_memory_bytes", "peak_device_memory_bytes")},
        "finished": made["finished"],
        "recipe_hash": made["recipe_hash"],
        "ledger": made["ledger"]["head"],
        "report": f"{name}/report.html",
    }


def _of_run(made: Mapping[str, Any]) -> dict[str, Any]:
    """What a run came to, all its tries together, and what it was foretold to; of folders older than the bill their
    stages' seconds alone."""
    known = made.get("bill") or {}
    spent = known.get("spent") or {}
    seconds = known.get("whole") or sum(s["seconds"] for s in made["stages"].values())
    return {"seconds": seconds, "kwh": spent.get("kwh"), "usd": spent.get("usd"), "foretold": known.get("foretold")}


def _bill(bills: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Bills of several runs as one; None for what is not known of all of them."""
    out: dict[str, Any] = {}
    for name in ("seconds", "kwh", "usd"):
        each = [b[name] for b in bills]
        out[name] = None if None in each or not each else round(sum(each), 9)
    foretold: dict[str, dict[str, float]] = {}
    for name in ("hours", "kwh", "money"):
        ends = [e for b in bills if (e := (b["foretold"] or {}).get(name))]
        if ends and len(ends) == len(bills):
            foretold[name] = {end: sum(e[end] for e in ends) for end in ("low", "middle", "high")}
    return {**out, "foretold": foretold or None}


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
