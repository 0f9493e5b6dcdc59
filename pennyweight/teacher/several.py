"""More than one teacher: whose a record is, and what the members are together.

Dealt out by content (weighted rendezvous hashing: Thaler and Ravishankar, 1998): each member draws a time from an
exponential distribution whose rate is its share, by the hash of its name and the record; the first to come gets the
record. Its probability is its share; the others, the order and the number of records change nothing; and a member that
joins takes records over, while none moves between the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pennyweight.data.store import read_samples
from pennyweight.errors import DataError, ModelError
from pennyweight.model.loaded import Language
from pennyweight.model.token_bytes import difference
from pennyweight.recipe import FolderTeacher, Recipe, SeveralTeachers
from pennyweight.records import Encoded, Sample, sha256_json, sha256_text


def member_of(key: str, shares: Mapping[str, float]) -> str:
    """The member that gets what is called ``key``; those without a share get nothing."""

    def comes_at(name: str) -> float:
        uniform = (int(sha256_text(f"{name}:{key}")[:13], 16) + 0.5) / 16**13
        return -math.log(uniform) / shares[name]

    return min((name for name, share in shares.items() if share), key=comes_at)


def assigned(samples: Iterable[Sample], teacher: Any) -> list[Sample]:
    """Samples that have no teacher yet with theirs, by the hash of their prompt (or text) and the shares; as they are
    where there is one teacher."""
    if not isinstance(teacher, SeveralTeachers) or not (shares := teacher.shares):
        return list(samples)
    return [s if s.teacher else replace(s, teacher=member_of(s.prompt_hash, shares)) for s in samples]


class ByColumn:
    """Whose a row is, by the value of a column; called with each row and the place it stands at."""

    def __init__(self, teacher: SeveralTeachers):
        self.column, self.default, self.names = teacher.route or "", teacher.default, tuple(teacher.members)
        self.found = False

    def __call__(self, row: Mapping[str, Any], where: str) -> str:
        self.found |= self.column in row
        value = row.get(self.column)
        named = "" if value is None else str(value).strip()
        if named in self.names:
            return named
        if self.default is not None:
            return self.default
        cure = f"write one of {', '.join(self.names)}, or set teacher.default to the member of all other rows"
        if self.column not in row:
            has = ", ".join(map(str, row)) or "none"
            raise DataError(f"{where} has no column {self.column!r} (teacher.route; it has: {has}); {cure}")
        raise DataError(f"{where}: {self.column} is {named[:40]!r}, which is no member of the teacher; {cure}")

    def check(self) -> None:
        """Raise DataError where no row had the column, whose name is then mistyped."""
        if not self.found:
            raise DataError(f"no row has the column {self.column!r}; correct teacher.route to a column of the data")


def seed_of(seed: int, member: str | None) -> int:
    """The seed by which a teacher writes: of several, each has its own, lest they draw alike."""
    return int(sha256_text(f"{seed}:{member}")[:7], 16) if member else seed


def all_of(teacher: Any) -> list[Any]:
    """The settings of each teacher."""
    return list(teacher.members.values()) if isinstance(teacher, SeveralTeachers) else [teacher]


def route_of(teacher: Any) -> ByColumn | None:
    """How a column says whose rows are; None where none does."""
    return ByColumn(teacher) if isinstance(teacher, SeveralTeachers) and teacher.route else None


def one_teacher_each(samples: Sequence[Sample]) -> list[Sample]:
    """The samples, less those that are word for word another teacher's, too: a record is taught by one, the first."""
    first = {s.id: s.teacher for s in reversed(samples)}
    return [s for s in samples if s.teacher == first[s.id]]


def by_teacher(samples: Iterable[Sample]) -> dict[str | None, list[Sample]]:
    """Samples by the member they are for, in the order of the members' first; under None where there is one teacher."""
    groups: dict[str | None, list[Sample]] = {}
    for s in samples:
        groups.setdefault(s.teacher, []).append(s)
    return groups


def folders_of(teacher: SeveralTeachers) -> dict[str, FolderTeacher]:
    """The members in this process."""
    return {name: m for name, m in teacher.members.items() if isinstance(m, FolderTeacher)}


def cut_from(recipe: Recipe) -> str:
    """Of several teachers, the one that a student is cut from: as named, or the first folder; empty of one teacher."""
    folders = folders_of(recipe.teacher) if isinstance(recipe.teacher, SeveralTeachers) else ()
    return getattr(recipe.student, "member", None) or next(iter(folders), "")


def added(usages: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """What several servers counted, in sum."""
    return {what: sum(u[what] for u in usages) for what in usages[0]}


def identities(teacher: Any, identity_of: Callable[[str, bool], str]) -> dict[str, str]:
    """``identity`` of the teachers that are folders, as a stage depends on it; nothing where none is."""
    known = [identity_of(t.path, t.trust_remote_code) for t in all_of(teacher) if isinstance(t, FolderTeacher)]
    return {"identity": ",".join(known)} if known else {}


def named_tokenizer(recipe: Recipe) -> str | None:
    """The folder or hub id of a tokenizer that a student, or a teacher behind a server, is given by name."""
    named = [getattr(x, "tokenizer", None) for x in (recipe.student, *all_of(recipe.teacher))]
    return next((name for name in named if name), None)


def shared_language(
    teacher: SeveralTeachers, language_of: Callable[[str, bool], Language], own: Language | None
) -> Language | None:
    """The one tokenizer and vocabulary of the members that are folders, and the shortest of their contexts; None where
    all are servers, which do not decide it.

    Args:
        language_of: (path, trust_remote_code) -> what a folder's is.
        own: what the student, or a server, is given by name, which must be the same.

    Raises:
        ModelError: tokenizers or vocabularies differ.
    """
    languages = {name: language_of(m.path, m.trust_remote_code) for name, m in folders_of(teacher).items()}
    if not languages:
        return None
    (first, one), *others = languages.items()
    for name, other in others:
        both = f"members {first} and {name} cannot teach one student: "
        if found := difference(one.tokenizer, other.tokenizer):
            raise ModelError(f"{both}the tokenizers differ: {found}; give members of one tokenizer, or a run to each")
        if one.vocabulary != other.vocabulary:
            raise ModelError(
                f"{both}their heads have {one.vocabulary:,} and {other.vocabulary:,} entries; give members of one "
                "vocabulary, or a run to each"
            )
    if own and (found := difference(one.tokenizer, own.tokenizer)):
        raise ModelError(
            f"the student's tokenizer is not its teachers' ({found}); several teachers teach in their own tokens: give "
            "a student with theirs, or take one teacher, whose distribution can be carried over"
        )
    return Language(one.tokenizer, one.vocabulary, min(x.context for x in languages.values()))


def together(teacher: SeveralTeachers, facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Facts of all members as of one teacher, for ledger and report.

    ``fingerprint`` hashes theirs with the rule by which they teach, ``identity`` their licences besides, which their
    texts carry. Sizes are sums, None where a member's is not known.
    """
    rule = {"route": teacher.route, "default": teacher.default, "weights": teacher.weights, "mixture": teacher.mixture}
    identity = {name: [f["identity"], teacher.members[name].licence] for name, f in facts.items()}
    total = lambda key: None if None in (sizes := [f[key] for f in facts.values()]) else sum(sizes)  # noqa: E731
    contexts = [f["context"] for f in facts.values() if f["context"]]
    mixed = teacher.mixture or {}
    listed = [f"{mixed[name]:g} {f['name']}" if mixed else str(f["name"]) for name, f in facts.items()]
    return {
        "name": (" + " if mixed else ", ").join(listed),
        "fingerprint": sha256_json([{name: f["fingerprint"] for name, f in facts.items()}, rule]),
        "identity": sha256_json([identity, rule]),
        "params": total("params"),
        "bytes": total("bytes"),
        "context": min(contexts, default=None),
        "shape": {},
        "mixed": bool(mixed),
        "members": {name: {**f, "licence": teacher.members[name].licence} for name, f in facts.items()},
    }


def who_teaches(
    samples: Sequence[Sample], facts: Mapping[str, Any]
) -> list[tuple[Mapping[str, Any], Sequence[Sample]]]:
    """Facts of each teacher that teaches on some samples, and these: of members their own, of a mixture or of one
    teacher all."""
    members = facts.get("members")
    if not members or facts["mixed"]:
        return [(facts, samples)]
    return [(members[name], group) for name, group in by_teacher(samples).items() if name]


class Team:
    """The teachers of a run that has several: of each a ``bench.Bench``, as if it were the run's only one.

    Args:
        teacher: the recipe's.
        benches: by the members' names.
        data: folder of the run's samples.
    """

    def __init__(self, teacher: SeveralTeachers, benches: Mapping[str, Any], data: Path):
        self.teacher, self.benches, self.mixture, self._data = teacher, benches, teacher.mixture, data

    def of(self, name: str) -> Any:
        """The bench of one; the others are put away, so that one is in memory at a time."""
        self.put_away(name)
        return self.benches[name]

    def put_away(self, but: str = "") -> None:
        """Keep no model in memory, or one teacher's alone."""
        for name, bench in self.benches.items():
            for held in ("teacher", "local", "labelling") if name != but else ():
                bench.__dict__.pop(held, None)

    def facts(self) -> dict[str, Any]:
        """Of all as of one teacher; each is opened for it."""
        return together(self.teacher, {name: self.of(name).answering.facts() for name in self.benches})

    def parts(self, read: Callable[[Any], Any]) -> tuple[dict[str, Any], dict[str, float], dict[str, Any]]:
        """What ``model.mixture.mixed`` makes one of: what ``read`` gives of each bench, the shares, and facts."""
        parts = {name: read(bench) for name, bench in self.benches.items()}
        facts = together(self.teacher, {name: part.facts() for name, part in parts.items()})
        return parts, self.mixture or {}, facts

    def measurable(self, text: str | None) -> bool:
        """Whether all are in this process; and either mixed, or measured on samples of their own, not on a text."""
        return len(folders_of(self.teacher)) == len(self.benches) and bool(self.mixture or not text)

    @cached_property
    def _owners(self) -> dict[str, str | None]:
        files = (self._data / f"{side}.jsonl" for side in ("train", "eval"))
        return {s.id: s.teacher for file in files for s in read_samples(file)}

    def owner(self, sample: Encoded | Sample) -> str:
        """Whose a sample is, or the sample that it is a window of; empty where it is nobody's."""
        return self._owners.get(sample.id.partition(":")[0]) or ""
