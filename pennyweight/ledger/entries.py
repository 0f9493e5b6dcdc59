"""What an entry of the ledger must hold, by kind, and how it becomes the text that is hashed."""

from __future__ import annotations

from typing import Any

from pennyweight.errors import LedgerError
from pennyweight.records import Artifact, Sample, canonical_json

KINDS: dict[str, tuple[str, ...]] = {
    "run": ("recipe", "version"),
    "environment": (),
    "origin": ("source", "licence", "author", "teacher", "teacher_fingerprint"),
    "stage": ("name", "key", "status"),
    "artifact": ("path", "sha256", "bytes"),
    "forecast": ("stage", "step", "seconds"),
}
"""Kinds of entry, and what the body of each must hold. A finished stage may also hold ``seconds``, ``tokens``,
``peak_memory_bytes`` and ``artifacts`` (a list of ``Artifact.to_json()``)."""

SPLITS = ("train", "eval", "teacher-train")


def entry_body(kind: str, body: dict[str, Any]) -> str:
    """The canonical JSON of an entry's body, checked against ``KINDS``."""
    if kind not in KINDS:
        raise LedgerError(f"unknown kind of ledger entry {kind!r}; use one of {', '.join(KINDS)}")
    missing = [key for key in KINDS[kind] if key not in body]
    if missing:
        raise LedgerError(f"a ledger entry of kind {kind} lacks {', '.join(missing)}; add it to the body")
    if kind == "stage" and body["status"] not in ("started", "finished"):
        raise LedgerError(f"a stage cannot have the status {body['status']!r}; use started or finished")
    if kind == "stage" and not isinstance(body["name"], str):
        raise LedgerError(f"a stage cannot have the name {body['name']!r}; use text")
    try:
        for listed in [body] if kind == "artifact" else body.get("artifacts", []) if kind == "stage" else []:
            Artifact(**listed)
        # A lone surrogate (a file name that is not UTF-8) becomes the JSON escape that stands for it.
        return canonical_json(body).encode("utf-8", "backslashreplace").decode()
    except (TypeError, ValueError) as e:
        raise LedgerError(f"a ledger entry of kind {kind} cannot be written as JSON: {e}; correct that value") from None


def origin_body(sample: Sample, teacher: str | None, teacher_fingerprint: str | None) -> str:
    """The body of the origin entry that a sample's record points to: who wrote it, and which teacher teaches on it."""
    body = {
        "source": sample.source,
        "licence": sample.licence,
        "author": sample.author,
        "teacher": teacher,
        "teacher_fingerprint": teacher_fingerprint,
    }
    return entry_body("origin", body)
