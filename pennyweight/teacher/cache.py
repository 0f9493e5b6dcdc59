"""A teacher that wraps a teacher: its sampled targets, labelled once and kept in content-addressed shards.

A shard holds the targets of up to ``shard`` samples, taken in the order of their token hashes, so it depends on the
teacher's weights, the tokens and the settings, and on nothing else (not on seeds, batches or the order of the data).
Its file name is ``KEY.SHA.safetensors``: KEY hashes what it was made from, SHA what is in it. So a killed pass goes
on where it stopped, and a damaged shard is found, named and made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pennyweight.atomic import write_whole
from pennyweight.data.pack import Batch
from pennyweight.loss.divergence import Sparse
from pennyweight.records import Encoded, sha256_json
from pennyweight.teacher.targets import Kept, join, restore

Label = Callable[[Sequence[Encoded], float, float], list[Kept]]


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
    """Sampled targets of ``samples`` from the teacher whose weights hash to ``fingerprint``.

    Args:
        folder: where the shards lie; made if it is not there.
        label: (samples, threshold, temperature) -> Kept per sample; asked only for shards that are missing.
    """

    def __init__(self, folder: Path, fingerprint: str, threshold: float, temperature: float, shard: int, label: Label):
        self.folder, self.fingerprint = folder, fingerprint
        self.threshold, self.temperature, self.shard, self.label = threshold, temperature, shard, label
        self._kept: dict[str, Kept] = {}

    def fill(self, samples: Sequence[Encoded], progress: Callable[[int], None] = lambda n: None) -> CacheFacts:
        """Load or make every shard; afterwards ``signal`` answers for these samples, and no other shard is left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left_by_a_kill in self.folder.glob(".making-*"):
            left_by_a_kill.unlink()
        unique = {s.token_hash: s for s in samples}
        order = sorted(unique)
        tokens = size = entries = made = 0
        damaged: list[str] = []
        used: set[str] = set()
        for start in range(0, len(order), self.shard):
            hashes = order[start : start + self.shard]
            group = [unique[h] for h in hashes]
            sizes = [len(s.loss_positions) for s in group]
            key = self._key(hashes)
            kept, path = self._load(key, sum(sizes), damaged)
            if kept is None:
                kept = join(self.label(group, self.threshold, self.temperature))
                path, made = self._store(key, kept), made + 1
            used.add(path.name)
            self._kept.update(zip(hashes, kept.split(sizes), strict=True))
            tokens, size, entries = tokens + sum(sizes), size + path.stat().st_size, entries + len(kept.ids)
            progress(len(group))
        for of_other_settings in {p.name for p in self.folder.glob("*.safetensors")} - used:
            (self.folder / of_other_settings).unlink()
        return CacheFacts(tokens, size, entries, made, tuple(damaged))

    def signal(self, batch: Batch, device: torch.device) -> Callable[[int, int], Sparse]:
        """The targets of a batch's loss positions, as the method hands them to the loss."""
        whole = restore(join([self._kept[s.token_hash] for s in batch.placed]), self.threshold)
        ids, weights, entropy = (t.to(device) for t in (whole.ids, whole.weights, whole.entropy))
        return lambda a, b: Sparse(ids[a:b], weights[a:b], entropy[a:b])

    @property
    def filled(self) -> bool:
        return bool(self._kept)

    def _key(self, hashes: list[str]) -> str:
        made_from = [self.fingerprint, "threshold", self.threshold, self.temperature, hashes]
        return sha256_json(made_from)[:32]

    def _load(self, key: str, positions: int, damaged: list[str]) -> tuple[Kept | None, Path]:
        for path in sorted(self.folder.glob(f"{key}.*.safetensors")):
            content = path.read_bytes()
            if _digest(content) == path.name.split(".")[1]:
                kept = _unpack(path)
                if kept is not None and len(kept) == positions:
                    return kept, path
            damaged.append(path.name)
            path.unlink()
        return None, self.folder

    def _store(self, key: str, kept: Kept) -> Path:
        # One metadata entry only: their order in the file is not fixed, and a shard is named by its bytes.
        settings = json.dumps({"pennyweight-targets": 1, "threshold": self.threshold, "temperature": self.temperature})
        content = save(_pack(kept), metadata={"made": settings})
        path = self.folder / f"{key}.{_digest(content)}.safetensors"
        write_whole(path, content)
        return path


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _pack(kept: Kept) -> dict[str, Tensor]:
    """Narrowest integer types that hold the values; counts are at most 1/threshold heads and as many tails."""
    wide = int(kept.ids.max()) > 65535 if len(kept.ids) else False
    count = torch.uint8 if max(int(kept.heads.max()), int(kept.tails.max())) < 256 else torch.int32
    return {
        "heads": kept.heads.to(count),
        "tails": kept.tails.to(count),
        "ids": kept.ids.to(torch.int32 if wide else torch.uint16),
        "head_q": kept.head_q.to(torch.uint16),
        "entropy": kept.entropy,
    }


def _unpack(path: Path) -> Kept | None:
    try:
        with safe_open(path, framework="pt") as f:
            t = {k: f.get_tensor(k) for k in ("heads", "tails", "ids", "head_q", "entropy")}
    except (SafetensorError, OSError):
        return None
    return Kept(t["heads"].int(), t["tails"].int(), t["ids"].int(), t["head_q"].int(), t["entropy"])
