"""Whose traces a model was tuned on: a small file beside its weights, carried along by whatever is made of it.

Offline on-policy distillation goes by it (Lightning-OPD, arXiv 2604.13010): its rollouts are those of the start, taken
once, so it is sound only where the start was tuned on traces of the teacher that scores them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pennyweight.errors import MethodError, ModelError
from pennyweight.records import Lineage, Taught

TAUGHT_BY = "taught_by.json"
_GIVEN = "given"  # author of a response that came with the data; a teacher of that name cannot be told from it


def read_lineage(folder: Path) -> Lineage:
    """What a model folder says.

    Raises:
        ModelError: it cannot be read.
    """
    file = folder / TAUGHT_BY
    if not file.exists():
        return None
    try:
        return tuple(Taught(**row) for row in json.loads(file.read_text(encoding="utf-8"))["taught_by"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ModelError(
            f"{file} is damaged, so nobody knows whose traces that model was tuned on; copy the model again, or remove "
            "that file"
        ) from None


def lineage_text(lineage: Lineage) -> str | None:
    """What ``read_lineage`` reads; None where there is nothing to say."""
    return None if lineage is None else json.dumps({"taught_by": [asdict(t) for t in lineage]}, indent=2)


def tuned_further(
    before: Lineage, method: Any, teacher: Mapping[str, Any], data: Mapping[str, Any], run: str, served: bool
) -> Lineage:
    """The lineage of a model that was trained by ``method``.

    Fine-tuning adds those who wrote the responses, distillation whose distribution was learnt. Who learns from what it
    wrote itself is tuned on nobody's traces: on-policy methods and reinforcement add none, but for ``given`` samples.
    A response has its author's name, which within a run is one teacher's alone; the fingerprint is then that teacher's.
    What might have come with the data is never taken for a teacher's.

    Args:
        teacher, data: facts of the run's teacher and of its training samples.
    """
    teachers = list((teacher.get("members") or {"": teacher}).values())
    as_one = lambda t: Taught(t["name"], t["fingerprint"], method.kind, run, served)  # noqa: E731
    added: list[Taught] = []
    if method.kind == "kd":
        added = [as_one(t) for t in teachers]
    elif method.kind == "sft" or getattr(method, "given", 0):
        wrote, authors = {t["name"] for t in teachers} - {_GIVEN}, set(data["authors"])
        added = [as_one(t) for t in teachers if t["name"] in wrote & authors]
        if authors - wrote:
            added.append(Taught(data["source"], None, method.kind, run))
    if not added:
        return before
    return (*(before or ()), *(t for t in added if t not in (before or ())))


def check_start(lineage: Lineage, teacher: Mapping[str, Any]) -> str | None:
    """Refuse a start of offline distillation that was tuned on another teacher's traces; and where it is not known that
    it was tuned on this teacher's, a sentence that says so.

    Raises:
        MethodError: with the reason and the cure.
    """
    mine = teacher["fingerprint"]
    for t in lineage or ():
        if t.fingerprint not in (None, mine) and not t.served:
            raise MethodError(
                f"method offline learns from what the start wrote once, which is sound only where the start was tuned "
                f"on traces of the teacher that scores them; this one was tuned ({t.method} of run {t.run}) on "
                f"{t.name} ({t.fingerprint[:12]}), and the teacher is {teacher['name']} ({mine[:12]}): give a start "
                "tuned on this teacher's traces (method.kind=sft with this teacher), or set method.kind=on_policy, "
                "whose teacher is asked as training goes on"
            )
    if lineage and all(t.fingerprint == mine for t in lineage):
        return None
    sure = "offline distillation is sound for a start tuned on its teacher's traces, and "
    cure = "; method.kind=sft with this teacher makes one that is"
    if lineage is None:
        return f"{sure}the start's folder does not say whose it was tuned on{cure}"
    if not lineage:
        return f"{sure}this one has been tuned on nobody's{cure}"
    others = ", ".join(sorted({t.name for t in lineage if t.fingerprint != mine}))
    return f"{sure}nobody knows whether those of {others}, which it was tuned on, are its teacher's{cure}"
