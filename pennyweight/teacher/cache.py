"""A teacher's targets, labelled once and kept in content-addressed shards.

A shard holds the targets of up to ``shard`` samples, taken in the order of their token hashes, so it depends on the
teacher's weights, the tokens and the settings, and on nothing else (not on seeds, batches, the order of the data or how
many label). Its file name is ``KEY.SHA.targets``: KEY hashes what it was made from, SHA what is in it. So a killed
pass goes on where it stopped, a damaged shard is found, named and made again, and several processes can label at once:
each takes a shard that nobody holds, and a process that dies lets go of its own.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from pennyweight.atomic import write_whole
from pennyweight.data.pack import Batch
from pennyweight.loss.signals import Dense, Sparse, Target, TopK
from pennyweight.model.head import Head
from pennyweight.records import Encoded, sha256_json
from pennyweight.teacher.shards import Shard, encode, encode_hidden
from pennyweight.teacher.targets import Keep, Kept, join, restore

Label = Callable[[Sequence[Encoded], Keep], list[Kept] | list[Tensor]]
"""(samples, what to keep) -> targets of each sample: ``Kept``, or (P, D) hidden states"""


@dataclass(frozen=True)
class CacheFacts:
    """What a labelled cache holds: loss positions, bytes of its shards, entries kept, shards made and re-made."""

    tokens: int
    bytes: int
    entries: int
    made: int
    damaged: tuple[str, ...]

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / max(1, self.tokens)


class TargetCache:
    """Targets of samples from the teacher whose weights hash to ``fingerprint``.

    Args:
        folder: where the shards lie; made if it is not there.
        keep: what is kept of the teacher.
        vocabulary: entries of the teacher's head.
        shard: samples in one shard.
        label: asked only for shards that are missing.
    """

    def __init__(self, folder: Path, fingerprint: str, keep: Keep, vocabulary: int, shard: int, label: Label):
        self.folder, self.fingerprint, self.keep = folder, fingerprint, keep
        self.vocabulary, self.shard, self.label = vocabulary, shard, label
        self._place: dict[str, tuple[Shard, int]] = {}

    def fill(self, samples: Sequence[Encoded], progress: Callable[[int], None] = lambda n: None) -> CacheFacts:
        """Load or make every shard; afterwards ``signal`` answers for these samples, and no other shard is left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        unique = {s.token_hash: s for s in samples}
        order = sorted(unique)
        groups = [[unique[h] for h in order[a : a + self.shard]] for a in range(0, len(order), self.shard)]
        found: dict[str, Path] = {}
        damaged: list[str] = []
        made = 0
        for waits in (False, True):  # first what nobody else is at; then wait for what they have not finished
            for group in groups:
                key = self._key(group)
                if key in found:
                    continue
                path, new = self._shard(key, group, damaged, waits)
                if path is not None:
                    found[key], made = path, made + new
                    progress(len(group))
        used = {p.name for p in found.values()}
        others = {p.name for p in self.folder.glob("*.targets")} - used
        for of_other_settings in (*others, *(p.name for p in self.folder.glob(".claim-*"))):
            (self.folder / of_other_settings).unlink(missing_ok=True)
        shards = [Shard(found[self._key(group)]) for group in groups]
        for shard, group in zip(shards, groups, strict=True):
            self._place.update({s.token_hash: (shard, i) for i, s in enumerate(group)})
        size = sum(p.stat().st_size for p in found.values())
        entries = sum(s.layout.entries for s in shards)
        return CacheFacts(sum(s.positions for s in shards), size, entries, made, tuple(damaged))

    def kept(self, sample: Encoded) -> Kept:
        """The kept entries of one sample of those that ``fill`` was given."""
        shard, place = self._place[sample.token_hash]
        return shard.read(place)

    def signal(self, batch: Batch, device: torch.device, head: Callable[[], Head]) -> Target:
        """The targets of a batch's loss positions, on the device of the loss.

        ``head`` gives the teacher's output head, which makes logits of hidden states.
        """
        places = [self._place[s.token_hash] for s in batch.placed]
        if self.keep.kind == "hidden":
            states = torch.cat([shard.hidden(i) for shard, i in places]).to(device)
            return Dense.live(states, head().logits)
        counts, ids, weights, entropy = restore(
            join([shard.read(i) for shard, i in places]), self.keep.threshold, self.keep.bits
        )
        if self.keep.kind == "top_k":
            return TopK(ids.view(-1, self.keep.k).to(device), weights.view(-1, self.keep.k).to(device))
        return Sparse.of(counts, ids.to(device), weights.to(device), entropy.to(device))

    @property
    def filled(self) -> bool:
        return bool(self._place)

    def _key(self, group: list[Encoded]) -> str:
        made_from = [self.fingerprint, asdict(self.keep), self.vocabulary, [s.token_hash for s in group]]
        return sha256_json(made_from)[:32]

    def _shard(self, key: str, group: list[Encoded], damaged: list[str], waits: bool) -> tuple[Path | None, bool]:
        """The shard of a group and whether it was made now; None where another process is at it and ``waits`` is not
        set."""
        path = self._load(key, group)
        if path is not None:
            return path, False
        with _claim(self.folder / f".claim-{key}", waits) as mine:
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


def settled_threshold(folder: Path, made_from: list[object], find: Callable[[], float]) -> float:
    """A threshold that was found from the data, found once: read again where it was found from the same.

    Args:
        made_from: whatever it depends on, as JSON.
    """
    file, key = folder / "threshold.json", sha256_json(made_from)
    folder.mkdir(parents=True, exist_ok=True)
    with _claim(folder / ".claim-threshold", waits=True):
        with suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(file.read_text())
            if known["made_from"] == key:
                return float(known["threshold"])
        threshold = find()
        write_whole(file, json.dumps({"made_from": key, "threshold": threshold}))
    return threshold


@contextmanager
def _claim(path: Path, waits: bool) -> Iterator[bool]:
    """Whether this process may make a shard. The lock goes with its process, however that ends."""
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
