"""A teacher's targets, labelled once and kept in content-addressed shards.

A shard holds the targets of up to ``shard`` samples, taken in the order of their token hashes, so it depends on the
teacher's weights, the tokens, the settings and the kind of processor, and not on seeds, batches, the order of the data
or how many label. Its file name is ``KEY.SHA.targets``: KEY hashes what it was made from, SHA what is in it. So a
killed pass goes on where it stopped, a damaged shard is found, named and made again, and several processes can label at
once: each takes a shard that nobody holds, and a process that dies lets go of its own. What they hold lies outside the
folder of the shards, which holds nothing else, so that its hash is that of the targets.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from pennyweight.atomic import write_whole
from pennyweight.data.pack import Batch
from pennyweight.loss.signals import Dense, Sparse, Target, TopK, joined
from pennyweight.model.head import Head
from pennyweight.records import Encoded, sha256_json
from pennyweight.teacher.shards import Shard, encode, encode_hidden
from pennyweight.teacher.targets import Keep, Kept, join, restore, threshold_within

LABELLED_AS = "labelling.json"
"""File of a RUN folder: the threshold that was settled on, and what it was found from."""

_RULE = 1  # goes into every KEY: raise it when the same teacher, tokens and settings would give other targets

Label = Callable[[Sequence[Encoded], Keep], list[Kept] | list[Tensor]]
"""(samples, what to keep) -> targets of each sample: ``Kept``, or (P, D) hidden states"""


@dataclass(frozen=True)
class CacheFacts:
    """What a labelled cache holds: loss positions, bytes of its shards, entries kept, shards made and re-made; and of
    several teachers, by name, what each labelled."""

    tokens: int
    bytes: int
    entries: int
    made: int
    damaged: tuple[str, ...]
    members: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / max(1, self.tokens)

    def facts(self, keep: Keep) -> dict[str, Any]:
        """What the ledger and the report keep of it."""
        entries = self.entries / max(1, self.tokens) if keep.kind != "hidden" else None
        facts = {"bytes": self.bytes, "bytes_per_token": self.bytes_per_token, "entries_per_token": entries}
        if self.members:
            return facts | {"members": self.members}
        return facts | _threshold(keep)

    def over(self, budget: float) -> str | None:
        """What to tell of a cache that takes more than ``budget`` bytes a token; None of one that does not."""
        if self.bytes_per_token <= budget:
            return None
        return (
            f"targets take {self.bytes_per_token:.1f} bytes a token, more than targets.budget={budget:g}: samples have "
            "few tokens to learn, or the teacher is diffuse; a higher targets.threshold takes less"
        )


class TargetCache:
    """Targets of samples from the teacher whose weights hash to ``fingerprint``.

    Args:
        folder: where the shards lie, made if it is not there; claims to make one lie in ``.claims`` beside it.
        keep: what is kept of the teacher.
        vocabulary: entries of the teacher's head.
        shard: samples in one shard.
        label: asked only for shards that are missing.
    """

    def __init__(self, folder: Path, fingerprint: str, keep: Keep, vocabulary: int, shard: int, label: Label):
        self.folder, self.fingerprint, self.keep = folder, fingerprint, keep
        self.vocabulary, self.shard, self.label = vocabulary, shard, label
        self.files: dict[str, Path] = {}
        self._place: dict[str, tuple[Shard, int]] = {}

    def fill(
        self, samples: Sequence[Encoded], progress: Callable[[int], None] = lambda n: None, clean: bool = True
    ) -> CacheFacts:
        """Load or make every shard; afterwards ``signal`` answers for these samples.

        ``clean`` removes all else from the folder, such as shards of other settings: for the one process whose folder
        it is, not for those that help it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        unique = {s.token_hash: s for s in samples}
        order = sorted(unique)
        groups = [[unique[h] for h in order[a : a + self.shard]] for a in range(0, len(order), self.shard)]
        found: dict[str, Path] = {}
        damaged: list[str] = []
        made = 0
        self.files = found
        for waits in (False, True):  # first what nobody else is at; then wait for what they have not finished
            for group in groups:
                key = self._key(group)
                if key in found:
                    continue
                path, new = self._shard(key, group, damaged, waits)
                if path is not None:
                    found[key], made = path, made + new
                    progress(len(group))
        if clean:
            self.clean(found.values())
        shards = [Shard(found[self._key(group)]) for group in groups]
        for shard, group in zip(shards, groups, strict=True):
            self._place.update({s.token_hash: (shard, i) for i, s in enumerate(group)})
        size = sum(p.stat().st_size for p in found.values())
        entries = sum(s.layout.entries for s in shards)
        return CacheFacts(sum(s.positions for s in shards), size, entries, made, tuple(damaged))

    def clean(self, shards: Iterable[Path]) -> None:
        """Remove from the folder all but these."""
        for other in set(self.folder.iterdir()) - set(shards):
            other.unlink(missing_ok=True)

    def kept(self, sample: Encoded) -> Kept:
        """The kept entries of one sample of those that ``fill`` was given."""
        shard, place = self._place[sample.token_hash]
        return shard.read(place)

    def signal(self, batch: Batch, device: torch.device, head: Callable[[], Head]) -> Target:
        """The targets of a batch's loss positions, on the device of the loss.

        ``head`` gives the teacher's output head, which makes logits of hidden states.
        """
        if self.keep.kind == "hidden":
            places = [self._place[s.token_hash] for s in batch.placed]
            states = torch.cat([shard.hidden(i) for shard, i in places]).to(device)
            return Dense.live(states, head().logits)
        return self.told(batch.placed, device)

    def told(self, samples: Sequence[Encoded], device: torch.device) -> Sparse | TopK:
        """What was kept at the samples' loss positions, in their order."""
        kept = join([self.kept(s) for s in samples])
        counts, ids, weights, entropy = restore(kept, self.keep.threshold, self.keep.bits)
        if self.keep.kind == "top_k":
            return TopK(ids.view(-1, self.keep.k).to(device), weights.view(-1, self.keep.k).to(device))
        return Sparse.of(counts, ids.to(device), weights.to(device), entropy.to(device))

    @property
    def filled(self) -> bool:
        return bool(self._place)

    def _key(self, group: list[Encoded]) -> str:
        made_from = [_RULE, self.fingerprint, asdict(self.keep), self.vocabulary, [s.token_hash for s in group]]
        return sha256_json(made_from)[:32]

    def _shard(self, key: str, group: list[Encoded], damaged: list[str], waits: bool) -> tuple[Path | None, bool]:
        """The shard of a group and whether it was made now; None where another process is at it and ``waits`` is not
        set."""
        path = self._load(key, group)
        if path is not None:
            return path, False
        with _claim(self.folder.parent / ".claims" / key, waits) as mine:
            if not mine:
                return None, False
            # Only who holds the claim may remove what is damaged: another may have repaired it since it was read.
            path = self._load(key, group, damaged)
            if path is not None:
                return path, False
            for left_by_a_kill in self.folder.glob(f".making-{key}.*"):
                left_by_a_kill.unlink()
            return self._make(key, group), True

    def _load(self, key: str, group: list[Encoded], damaged: list[str] | None = None) -> Path | None:
        """The shard of a group, if there and whole; a damaged one is removed and named in ``damaged``, if given."""
        for path in sorted(self.folder.glob(f"{key}.*.targets")):
            try:
                whole = _digest(path.read_bytes()) == path.name.split(".")[1]
                if whole and Shard(path).sizes() == [len(s.loss_positions) for s in group]:
                    return path
            except (ValueError, OSError):
                pass
            if damaged is not None:
                damaged.append(path.name)
                path.unlink(missing_ok=True)
        return None

    def _make(self, key: str, group: list[Encoded]) -> Path:
        targets = self.label(group, self.keep)
        if self.keep.kind == "hidden":
            content = encode_hidden(cast(list[Tensor], targets))
        else:
            content = encode(cast(list[Kept], targets), self.vocabulary, self.keep)
        path = self.folder / f"{key}.{_digest(content)}.targets"
        write_whole(path, content)
        return path


class AssignedCache:
    """Targets of samples that each have one of several teachers: a cache a teacher, in one folder.

    Args:
        owner: the teacher that a sample has, by name.
        cache_of: that teacher's cache; asked for once, one teacher after the other, so that no two need be in memory.
    """

    def __init__(self, owner: Callable[[Encoded], str], cache_of: Callable[[str], TargetCache]):
        self.owner, self.cache_of = owner, cache_of
        self._caches: dict[str, TargetCache] = {}

    def fill(
        self, samples: Sequence[Encoded], progress: Callable[[int], None] = lambda n: None, clean: bool = True
    ) -> CacheFacts:
        """As ``TargetCache.fill``, teacher by teacher."""
        made: dict[str, CacheFacts] = {}
        for name in sorted({self.owner(s) for s in samples}):
            own = [s for s in samples if self.owner(s) == name]
            self._caches[name] = cache = self.cache_of(name)
            made[name] = cache.fill(own, progress, clean=False)
        if clean:
            cache.clean(path for c in self._caches.values() for path in c.files.values())
        tokens, size, entries, new = (
            sum(getattr(m, what) for m in made.values()) for what in ("tokens", "bytes", "entries", "made")
        )
        members = {
            name: {"tokens": m.tokens, "bytes": m.bytes, **_threshold(self._caches[name].keep)}
            for name, m in made.items()
        }
        return CacheFacts(tokens, size, entries, new, tuple(name for m in made.values() for name in m.damaged), members)

    def signal(self, batch: Batch, device: torch.device, head: Callable[[], Head]) -> Target:
        """As ``TargetCache.signal``: each sample's targets by its own teacher."""
        places: dict[str, list[int]] = {}
        for i, sample in enumerate(batch.placed):
            places.setdefault(self.owner(sample), []).append(i)
        parts = [self._caches[n].told([batch.placed[i] for i in of], device) for n, of in places.items()]
        if len(parts) == 1:
            return parts[0]
        order = [i for of in places.values() for i in of]
        counts = torch.tensor([len(batch.placed[i].loss_positions) for i in order])
        sample = torch.repeat_interleave(torch.tensor(order), counts)
        return joined(parts).take(torch.argsort(sample, stable=True).to(device))

    @property
    def keep(self) -> Keep:
        """What is kept of one of them; thresholds may differ."""
        return next(iter(self._caches.values())).keep

    @property
    def filled(self) -> bool:
        return bool(self._caches)


def _threshold(keep: Keep) -> dict[str, float]:
    return {"threshold": keep.threshold} if keep.kind == "sampled" else {}


def settled_keep(
    file: Path,
    asked: Any,
    keep: Keep,
    samples: Sequence[Encoded],
    vocabulary: int,
    by: dict[str, Any],
    expected: Callable[[list[Encoded], list[float]], list[tuple[float, float]]],
) -> Keep:
    """``keep`` with the threshold that was asked for, or the least above it that keeps to the budget on some samples.

    Kinds without a threshold keep 0, but tell in the same file how they are labelled.

    Args:
        file: where the number is kept once it is found.
        asked: the recipe's targets.
        by: whatever else labels depend on, as JSON.
        expected: some samples, thresholds -> heads and tails a position of each, as ``targets.expected_entries``.
    """
    some = sorted(samples, key=lambda e: e.token_hash)[:16]
    made_from = {**by, "keep": asdict(keep), "from": sha256_json([e.token_hash for e in some])}

    def find() -> float:
        if keep.kind != "sampled":
            return 0.0
        return threshold_within(asked.budget, asked.threshold, vocabulary, lambda tried: expected(some, tried))

    return replace(keep, threshold=settled(file, made_from, find))


def settled(file: Path, made_from: dict[str, object], find: Callable[[], float]) -> float:
    """A number that was found from the data, found once: read again where it was found from the same.

    Args:
        file: where it is kept, with what it was made from.
        made_from: whatever it depends on, as JSON.
    """
    with _claim(file.parent / ".claims" / file.name, waits=True):
        known = read_settled(file)
        if known and known["made_from"] == made_from:
            return known["settled"]
        found = find()
        write_whole(file, json.dumps({"made_from": made_from, "settled": found}, indent=2))
    return found


def read_settled(file: Path) -> dict[str, Any] | None:
    """What ``settled`` kept: ``settled``, a float, and ``made_from``; None where there is nothing, or it is damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(file.read_text())
        return {"settled": float(known["settled"]), "made_from": dict(known["made_from"])}
    return None


@contextmanager
def _claim(path: Path, waits: bool) -> Iterator[bool]:
    """Whether this process may make a shard. The lock goes with its process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(path, "w") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            if not _is_at(f.fileno(), path):
                continue  # whoever held it has removed the file since; another may have made a new one
            try:
                yield True
            finally:
                with suppress(OSError):
                    os.unlink(path)
            return


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError:
        return False


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
