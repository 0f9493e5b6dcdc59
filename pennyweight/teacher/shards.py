"""Shards: the bytes of cached targets, packed to the bit and read through a memory map.

Layout, little-endian (docs/targets.md has it field by field): a 64-byte header; the rank table, the R most frequent
ids of the shard as uint32, most frequent first; an index of S + 1 rows (uint64 byte offset, uint32 first position);
then one stream a sample. Within a stream, sections follow each other, each begun on a new byte:

    head counts   P fields of ``head_bits``
    tail counts   P fields of ``tail_bits``
    classes       E fields of 0, 1 or 2 bits
    ids           E fields: in class c the rank less that class's first, in ``widths[c]`` bits; in the last, the id
    probs         H fields of ``prob_bits``
    entropy       P bytes

Ids that occur often thus take few bits: a tail is drawn in proportion to probability, so its ids repeat as words do.
Counts are stored less the least one, so that a fixed count takes no bits. A hidden-state shard has one section
instead: P rows of D numbers of 16 bits.
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pennyweight.teacher.targets import Keep, Kept, join

MAGIC = b"PWTARGET"
VERSION = 1
_HEADER = struct.Struct("<8sHBBBBBBBB4BxxIIIIHHdd")
_INDEX = np.dtype([("offset", "<u8"), ("position", "<u4")])
_KINDS = {"sampled": 1, "top_k": 2, "hidden": 3}
_DTYPES = {1: np.dtype("<f2"), 2: np.dtype("<u2")}  # float16; bfloat16 as its bits
_PAD = 8  # a field is read as four whole bytes, whose last may lie beyond the end


@dataclass(frozen=True, slots=True)
class Layout:
    """The header: ``kind``; field widths in bits; least counts; widths of the rank classes; sizes; settings."""

    kind: str
    id_bits: int = 0
    prob_bits: int = 0
    head_bits: int = 0
    tail_bits: int = 0
    widths: tuple[int, ...] = ()
    samples: int = 0
    table: int = 0
    columns: int = 0
    entries: int = 0
    dtype: int = 0
    least_heads: int = 0
    least_tails: int = 0
    threshold: float = 0.0
    temperature: float = 1.0

    def to_bytes(self) -> bytes:
        classes = len(self.widths) + 1
        widths = (*self.widths, 0, 0, 0, 0)[:4]
        bits = (self.id_bits, self.prob_bits, self.head_bits, self.tail_bits)
        sizes = (self.samples, self.table, self.columns, self.entries, self.least_heads, self.least_tails)
        kind = _KINDS[self.kind]
        packed = _HEADER.pack(
            MAGIC, VERSION, kind, self.dtype, *bits, classes, 0, *widths, *sizes, self.threshold, self.temperature
        )
        return packed.ljust(64, b"\0")

    @staticmethod
    def from_bytes(raw: bytes) -> Layout:
        """Raises ValueError for bytes that are no shard of this version."""
        if len(raw) < _HEADER.size:
            raise ValueError("not a whole shard")
        magic, version, kind, dtype, ids, probs, heads, tails, classes, _, *rest = _HEADER.unpack(raw[: _HEADER.size])
        if magic != MAGIC or version != VERSION:
            raise ValueError("not a shard of this version")
        widths, (samples, table, columns, entries, least_heads, least_tails, threshold, temperature) = (
            rest[:4],
            rest[4:],
        )
        names = {n: name for name, n in _KINDS.items()}
        if kind not in names:
            raise ValueError("not a shard of this version")
        return Layout(
            names[kind], ids, probs, heads, tails, tuple(widths[: classes - 1]), samples, table, columns, entries,
            dtype, least_heads, least_tails, threshold, temperature,
        )  # fmt: skip

    @property
    def class_bits(self) -> int:
        return (0, 1, 2, 2)[len(self.widths)]


def encode(kept: list[Kept], vocabulary: int, keep: Keep) -> bytes:
    """A shard of the targets of several samples, in their order; the same targets always give the same bytes."""
    whole = join(kept)
    ids, heads, tails = (x.numpy().astype(np.int64) for x in (whole.ids, whole.heads, whole.tails))
    id_bits = max(1, (vocabulary - 1).bit_length())
    table, widths = _ranking(ids, id_bits)
    layout = Layout(
        keep.kind, id_bits, keep.bits, _bits(heads), _bits(tails), widths, len(kept), len(table), entries=len(ids),
        least_heads=_least(heads), least_tails=_least(tails), threshold=keep.threshold, temperature=keep.temperature,
    )  # fmt: skip
    rank = np.full(vocabulary, len(table), dtype=np.int64)
    rank[table] = np.arange(len(table))
    return _assemble(layout, table, [len(k) for k in kept], [_stream(k, layout, rank) for k in kept])


def as_stored(states: Tensor) -> Tensor:
    """Hidden states in the 16 bits they are kept in: float16, or bfloat16 where one is beyond its range."""
    return states.half() if bool((states.abs() <= 65504).all()) else states.bfloat16()


def encode_hidden(states: list[Tensor]) -> bytes:
    """A shard of (P, D) last hidden states of several samples, on the CPU."""
    sizes = [len(s) for s in states]
    whole = as_stored(torch.cat(states))
    raw = [s.contiguous().view(torch.int16).numpy().tobytes() for s in whole.split(sizes)]
    kind = 1 if whole.dtype == torch.float16 else 2
    layout = Layout("hidden", samples=len(states), columns=whole.shape[1], dtype=kind)
    return _assemble(layout, np.zeros(0, np.int64), sizes, raw)


class Shard:
    """An open shard: ``read`` and ``hidden`` give the targets of one sample by its place, from a memory map."""

    def __init__(self, path: Path):
        """Raises ValueError for a file that is no shard of this version."""
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r")
        self.layout = layout = Layout.from_bytes(self._bytes[:64].tobytes())
        at = 64 + 4 * layout.table
        self._table = np.frombuffer(self._bytes[64:at], "<u4").astype(np.int64)
        self._index = np.frombuffer(self._bytes[at : at + _INDEX.itemsize * (layout.samples + 1)], _INDEX)
        if len(self._index) <= layout.samples or int(self._index["offset"][-1]) + _PAD != len(self._bytes):
            raise ValueError("not a whole shard")
        firsts = np.cumsum([0, *(1 << w for w in layout.widths)])
        self._firsts = np.append(np.minimum(firsts[:-1], layout.table), 0)
        self._widths = np.array([*layout.widths, layout.id_bits])

    @property
    def positions(self) -> int:
        return int(self._index["position"][-1])

    def sizes(self) -> list[int]:
        """Positions of each sample."""
        return np.diff(self._index["position"].astype(np.int64)).tolist()

    def read(self, sample: int) -> Kept:
        """The kept entries of one sample."""
        x, buffer = self.layout, self._bytes
        at, count = int(self._index["offset"][sample]), self._count(sample)
        heads = _unpack(buffer, at, count, x.head_bits) + x.least_heads
        at += -(-count * x.head_bits // 8)
        tails = _unpack(buffer, at, count, x.tail_bits) + x.least_tails
        at += -(-count * x.tail_bits // 8)
        total, of_heads = int(heads.sum() + tails.sum()), int(heads.sum())
        classes = _unpack(buffer, at, total, x.class_bits) if x.class_bits else np.zeros(total, np.int64)
        at += -(-total * x.class_bits // 8)
        widths = self._widths[classes]
        ends = widths.cumsum()
        fields = _fields(buffer, 8 * at + ends - widths, widths)
        at += -(-int(ends[-1] if total else 0) // 8)
        ranked = classes < len(x.widths)
        ids = fields
        if x.widths:
            ids = np.where(ranked, self._table[np.where(ranked, fields + self._firsts[classes], 0)], fields)
        probs = _unpack(buffer, at, of_heads, x.prob_bits)
        at += -(-of_heads * x.prob_bits // 8)
        return Kept(
            torch.from_numpy(heads.astype(np.int32)),
            torch.from_numpy(tails.astype(np.int32)),
            torch.from_numpy(ids.astype(np.int32)),
            torch.from_numpy(probs.astype(np.int32)),
            torch.from_numpy(np.array(buffer[at : at + count])),
        )

    def hidden(self, sample: int) -> Tensor:
        """(P, D) last hidden states of one sample, in the 16-bit type they are kept in."""
        at, x = int(self._index["offset"][sample]), self.layout
        raw = np.array(self._bytes[at : at + 2 * x.columns * self._count(sample)])
        states = torch.from_numpy(raw.view(_DTYPES[x.dtype].newbyteorder("=")).reshape(-1, x.columns))
        return states if x.dtype == 1 else states.view(torch.bfloat16)

    def _count(self, sample: int) -> int:
        return int(self._index["position"][sample + 1]) - int(self._index["position"][sample])


def _stream(kept: Kept, x: Layout, rank: np.ndarray) -> bytes:
    """One sample's sections."""
    heads, tails, ids, probs = (t.numpy().astype(np.int64) for t in (kept.heads, kept.tails, kept.ids, kept.probs))
    ranks, bounds = rank[ids], np.minimum(np.cumsum([1 << w for w in x.widths]), x.table)
    classes = np.searchsorted(bounds, ranks, side="right")
    firsts = np.append(np.concatenate([[0], bounds[:-1]]) if x.widths else [], 0).astype(np.int64)
    fields = np.where(classes < len(x.widths), ranks - firsts[classes], ids)
    widths = np.array([*x.widths, x.id_bits])[classes]
    return b"".join(
        [
            _pack(heads - x.least_heads, x.head_bits),
            _pack(tails - x.least_tails, x.tail_bits),
            _pack(classes, x.class_bits),
            _pack(fields, widths),
            _pack(probs, x.prob_bits),
            kept.entropy.numpy().tobytes(),
        ]
    )


def _assemble(layout: Layout, table: np.ndarray, sizes: list[int], streams: list[bytes]) -> bytes:
    index = np.zeros(len(streams) + 1, _INDEX)
    start = 64 + 4 * len(table) + index.nbytes
    index["offset"] = start + np.cumsum([0, *map(len, streams)])
    index["position"] = np.cumsum([0, *sizes])
    return b"".join([layout.to_bytes(), table.astype("<u4").tobytes(), index.tobytes(), *streams, bytes(_PAD)])


def _ranking(ids: np.ndarray, id_bits: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """The rank table and the class widths that make this shard smallest: none, one or three classes before the rest."""
    values, counts = np.unique(ids, return_counts=True)
    order = np.lexsort((values, -counts))
    values, below = values[order], np.concatenate([[0], np.cumsum(counts[order])])
    total, best = int(below[-1]), (int(below[-1]) * id_bits, (), 0)
    for classes, choice in ((1, 1), (2, 3)):
        for widths in itertools.combinations(range(min(id_bits, 16)), choice):
            ends = np.minimum(np.cumsum([0, *(1 << w for w in widths)]), len(values))
            inside = below[ends[1:]] - below[ends[:-1]]
            bits = int((inside * widths).sum()) + (total - int(below[ends[-1]])) * id_bits
            bits += total * classes + int(ends[-1]) * 32
            best = min(best, (bits, widths, int(ends[-1])))
    return values[: best[2]], best[1]


def _least(counts: np.ndarray) -> int:
    return min(65535, int(counts.min())) if len(counts) else 0


def _bits(counts: np.ndarray) -> int:
    return int(counts.max() - _least(counts)).bit_length() if len(counts) else 0


def _pack(values: np.ndarray, widths: np.ndarray | int) -> bytes:
    """Fields one after the other, least significant bit first."""
    widths = np.broadcast_to(np.asarray(widths, np.int64), values.shape)
    ends = widths.cumsum()
    bits = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    for j in range(int(widths.max()) if len(widths) else 0):
        has = widths > j
        bits[(ends - widths)[has] + j] = (values[has] >> j) & 1
    return np.packbits(bits, bitorder="little").tobytes()


def _unpack(buffer: np.ndarray, at: int, count: int, width: int) -> np.ndarray:
    """``count`` fields of one width from byte ``at`` on."""
    if width == 0:
        return np.zeros(count, np.int64)
    if width == 8:
        return buffer[at : at + count].astype(np.int64)
    return _fields(buffer, 8 * at + width * np.arange(count), np.int64(width))


def _fields(buffer: np.ndarray, first_bit: np.ndarray, widths: np.ndarray | np.int64) -> np.ndarray:
    """Fields of up to 25 bits at given bit offsets."""
    byte = first_bit >> 3
    if not len(byte):
        return np.zeros(0, np.int64)
    base = int(byte[0])
    near = np.asarray(buffer[base : int(byte[-1]) + 4]).astype(np.uint32)
    byte = byte - base
    window = (
        near[byte] | near[byte + 1] << np.uint32(8) | near[byte + 2] << np.uint32(16) | near[byte + 3] << np.uint32(24)
    )
    return (window.astype(np.int64) >> (first_bit & 7)) & ((np.int64(1) << widths) - 1)
