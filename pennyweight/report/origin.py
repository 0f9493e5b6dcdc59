"""The last parts of the report: what the run was made from, what the teacher handed over, and how to check it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pennyweight.report.charts import Line, tradeoff
from pennyweight.report.markup import Html, element, facts, figure, join, section
from pennyweight.report.view import View
from pennyweight.report.wording import count, finite, number, parameters, plural, size

_NAMES = {"cpu": "CPU", "memory": "Main memory", "git dirty": "Uncommitted changes"}


def data(view: View) -> Html | None:
    """Source, licence, counts, split, overlap and authors of the data, and whose teacher it was."""
    d: Mapping[str, Any] = view.summary.get("data") or {}
    teacher: Mapping[str, Any] = view.teacher.facts if view.teacher else {}
    if not d and not teacher:
        return None
    authors: Mapping[str, Any] = d.get("authors") or {}
    total = sum(finite(n) or 0 for n in authors.values())
    written = (
        [f"{name}: {count(n)} ({100 * (finite(n) or 0) / total:.0f} %)" for name, n in authors.items()] if total else []
    )
    return section(
        "data",
        "What was it made from?",
        facts(
            [
                ("Data", d.get("source")),
                ("Licence of the data", d.get("licence")),
                ("To train on", _amount(d.get("train"), d.get("train_tokens"))),
                ("Held out to measure on", _amount(d.get("evaluation"), d.get("eval_tokens"))),
                ("Held-out share", _share(d.get("evaluation"), d.get("train"))),
                ("Overlap of the two", _overlap(d.get("overlap") or {})),
                ("Duplicates removed", count(d["duplicates"]) if "duplicates" in d else None),
                ("Responses rejected", count(d["rejected"]) if "rejected" in d else None),
                ("Responses written by", ", ".join(written).replace("given:", "the data itself:")),
                ("Start", (view.summary.get("start") or {}).get("unsure")),
                ("Teacher", teacher.get("name")),
                *_members(teacher.get("members") or {}, view.summary),
                ("Licence of the teacher", teacher.get("licence") if not teacher.get("members") else None),
                ("Teacher’s parameters", parameters(teacher["params"]) if teacher.get("params") else None),
                (
                    "Teacher’s fingerprint",
                    element("code", teacher["fingerprint"]) if teacher.get("fingerprint") else None,
                ),
            ]
        ),
    )


def _members(members: Mapping[str, Any], summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of several teachers, each: what it is, and how many records it wrote, teaches and labelled."""
    d, labelled = summary.get("data") or {}, (summary.get("targets") or {}).get("members") or {}
    rows = []
    for name, m in members.items():
        wrote, teaches = (d.get("authors") or {}).get(m.get("name"), 0), (d.get("teachers") or {}).get(name, 0)
        said = [str(m.get("name")), f"licence {m.get('licence')}", f"wrote {plural(wrote, 'record')}"]
        said += [f"teaches {plural(teaches, 'record')}"] if not summary["teacher"].get("mixed") else []
        said += [f"labelled {plural(labelled[name]['tokens'], 'token')}"] if name in labelled else []
        rows.append((f"Teacher {name}", ", ".join(said)))
    return rows


def _amount(samples: Any, tokens: Any) -> str | None:
    if samples is None:
        return None
    return plural(samples, "sample") + (f", {plural(tokens, 'token')}" if tokens is not None else "")


def _share(held_out: Any, train: Any) -> str | None:
    a, b = finite(held_out), finite(train)
    return f"{100 * a / (a + b):.1f} %, chosen by the hash of each prompt" if a and b is not None else None


def _overlap(found: Mapping[str, Any]) -> str | None:
    """How many held-out samples are also among those trained on, whole or by shared 13-grams."""
    if not found:
        return None
    of = f" of {count(found['eval'])}" if "eval" in found else ""
    parts = [
        f"{count(found[key])}{of} held-out samples {words}"
        for key, words in (("normalised", "are also trained on"), ("ngram", "share a 13-gram with training"))
        if key in found
    ]
    return "; ".join(parts)


_ACROSS = (
    "the student’s tokens are not its teacher’s, whose distribution is carried over to them; so nothing here compares "
    "the two token by token"
)


def targets(view: View) -> Html | None:
    """What was kept of the teacher's distribution."""
    t: Mapping[str, Any] = view.summary.get("targets") or {}
    if not t.get("kind"):
        return None
    kind = {
        "text": "texts alone, and nothing of its distribution",
        "sampled": "an unbiased sample of the teacher’s distribution at each token, written once and kept on disk",
        "dense": "the teacher’s whole distribution at each token, computed beside the student and not kept",
        "top_k": "the most probable tokens, and all others together as one outcome, written once and kept on disk",
        "hidden": "the teacher’s last hidden states, from which its head makes the whole distribution again",
    }.get(t["kind"], str(t["kind"]))
    return section(
        "targets",
        "What did the teacher hand over?",
        facts(
            [
                ("Targets", f"{t['kind']}: {kind}" if kind != t["kind"] else kind),
                ("Tokenizers", _ACROSS if t.get("across") else None),
                (
                    "Tokens labelled",
                    count(t["tokens"]) if t.get("tokens") is not None and t["kind"] != "text" else None,
                ),
                ("Kept on disk", size(t["bytes"]) if t.get("bytes") else None),
                ("Bytes per token", number(t["bytes_per_token"]) if t.get("bytes_per_token") else None),
                ("Entries per token", number(t["entries_per_token"]) if t.get("entries_per_token") else None),
                ("Threshold", number(t["threshold"]) if t.get("threshold") else None),
            ]
        ),
        _inspection(view.summary.get("inspection") or {}),
    )


def _inspection(found: Mapping[str, Any]) -> Html | None:
    """Gradient error against bytes a token, for each way of keeping a teacher, as ``targets inspect`` measured it."""
    if not found.get("students"):
        return None
    name, rows = list(found["students"].items())[-1]  # the nearer to its teacher, the more an error weighs
    ways: dict[str, list[tuple[float, float]]] = {}
    for r in rows:
        if r["way"] == "hidden states" and not r["chosen"]:
            continue  # so large and so exact that the others would be drawn into a corner
        ways.setdefault(r["way"], []).append((r["bytes_per_token"], r["gradient_error"]))
    roles = dict(zip(ways, ("student", "control", "base", "teacher", "int8"), strict=False))
    lines = [Line(roles[way], way, sorted(points)) for way, points in ways.items()]
    return figure(
        found["said"],
        tradeoff("tradeoff", lines, "bytes per token", "error of the batch gradient", found["said"]),
        f"Relative error of the gradient of {name} against the whole teacher’s, on {count(found['tokens'])} training "
        "tokens; both axes are logarithmic, and lower left is better.",
    )


def provenance(view: View) -> Html:
    """Ledger, recipe and environment: what somebody needs to check or repeat the run."""
    s = view.summary
    ledger: Mapping[str, Any] = s.get("ledger") or {}
    environment: Mapping[str, Any] = s.get("environment") or {}
    packages: Mapping[str, Any] = environment.get("packages") or {}
    plain = list(_flat({k: v for k, v in environment.items() if k != "packages"}))
    return section(
        "provenance",
        "How can it be checked?",
        element(
            "p",
            "Each step of the run is an entry of a ledger in which every entry seals the one before; ",
            element("code", "pennyweight ledger verify RUN"),
            " derives all its hashes again.",
        ),
        facts(
            [
                (
                    "Ledger",
                    f"{plural(ledger['entries'], 'entry', 'entries')}, {plural(ledger.get('records'), 'record')}"
                    if "entries" in ledger
                    else None,
                ),
                ("Head of the ledger", element("code", ledger["head"]) if ledger.get("head") else None),
                ("Hash of the recipe", element("code", s["recipe_hash"]) if s.get("recipe_hash") else None),
                ("Pennyweight", s.get("version")),
                ("Seeds", ", ".join(str(x) for x in s.get("seeds") or [])),
                ("Finished", s.get("finished")),
                *plain,
                (
                    "Packages",
                    join([", ".join(f"{name} {v}" for name, v in packages.items() if v)]) if packages else None,
                ),
            ]
        ),
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested dict as pairs of a readable name and a value; what is not known is left out."""
    out: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix} {key}".strip().replace("_", " ")
        if isinstance(value, Mapping):
            out += _flat(value, name)
        elif isinstance(value, bool):
            out.append((name, "yes" if value else "no"))
        elif value is not None:
            amount = isinstance(value, int | float)
            text = (
                size(value) if amount and "memory" in name else count(value) if isinstance(value, int) else str(value)
            )
            out.append((name, text))
    return [(_NAMES.get(name, name[0].upper() + name[1:]), text) for name, text in out]
