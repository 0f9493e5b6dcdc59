"""The ledger: an append-only, hash-chained SQLite file of a run's stages, artifacts and training records.

Every write is one transaction, with SQLite's rollback journal and full synchronisation: a process killed at any moment
leaves a file that opens, verifies and holds all that was reported written. The previous hash is read inside a
``BEGIN IMMEDIATE`` transaction, so writers that share a file queue and cannot fork the chain. Rows and their hashes are
defined in ``chain``, tables in ``database``, what an entry holds in ``entries``.
"""

from __future__ import annotations

import heapq
import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from pennyweight.errors import LedgerError
from pennyweight.ledger.chain import CONTENT, GENESIS, Row, link, walk
from pennyweight.ledger.database import clearly, connect
from pennyweight.ledger.entries import SPLITS, entry_body, origin_body
from pennyweight.ledger.hashing import artifact_problem
from pennyweight.records import Artifact, Sample

_INSERT = {table: f"({', '.join(c)}, prev_hash, hash)" for table, c in CONTENT.items()}


@dataclass(frozen=True, slots=True)
class Verification:
    """What ``Ledger.verify`` found. ``problem`` is one sentence about the first thing wrong, None when all is well.

    ``first_bad_seq`` is the row that it is about: the bad row, or the entry that recorded a bad artifact.
    The counts are of what was found good.
    """

    ok: bool
    checked_entries: int
    checked_records: int
    checked_artifacts: int
    problem: str | None = None
    first_bad_seq: int | None = None


class Ledger:
    """An open ledger file; made by ``Ledger.open``, and a context manager that closes it."""

    def __init__(self, path: Path, db: sqlite3.Connection):
        self.path = path
        self._db = db
        self._admitted: set[str] = set()
        self._admitted_up_to = 0

    @classmethod
    def open(cls, path: Path | str, *, create: bool = True) -> Ledger:
        """Open the ledger at ``path``, bringing an older schema up to date.

        Args:
            path: the SQLite file.
            create: make it when there is none.

        Raises:
            LedgerError: there is none and ``create`` is False, or the file is not a ledger, is damaged, was written
                by a newer version, or cannot be opened.
        """
        path = Path(path)
        if not create and not path.is_file():
            raise LedgerError(f"there is no ledger at {path}; give the path of a run that has one")
        return cls(path, connect(path, create))

    def close(self) -> None:
        """Close the file; the ledger cannot be used afterwards."""
        self._db.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def head(self) -> tuple[int, str]:
        """``seq`` and hex hash of the last row; (0, 64 zeros) for an empty ledger."""
        with clearly(self.path):
            seq, digest = self._head()
        return seq, digest.hex()

    def append(self, kind: str, body: dict[str, Any]) -> int:
        """Write one entry; returns its ``seq``.

        Args:
            kind: a row of ``entries.KINDS``.
            body: JSON values, with at least the keys that ``KINDS`` asks for.

        Raises:
            LedgerError: the kind is unknown, the body lacks a key or is not JSON, or the file cannot be written.
        """
        text = entry_body(kind, body)
        with self._writing():
            return self._append("entries", [(kind, text, _now())])

    def add_records(
        self, samples: Iterable[Sample], split: str, teacher_fingerprint: str | None, teacher: str | None = None
    ) -> int:
        """Record samples as used in ``split``, in one transaction; returns how many were new.

        A sample that is already recorded for the same split and origin is not recorded again. The origin is the
        sample's source, licence and author, with the name and the weights hash of the teacher that teaches on it.

        Raises:
            LedgerError: the split is unknown, or the file cannot be written.
        """
        if split not in SPLITS:
            raise LedgerError(f"unknown split {split!r}; use one of {', '.join(SPLITS)}")
        # Drawn before the lock is taken: samples may come from a teacher that is still writing them.
        drawn = [
            (
                origin_body(s, teacher, teacher_fingerprint),
                *(bytes.fromhex(h) for h in (s.id, s.prompt_hash, s.response_hash)),
            )
            for s in samples
        ]
        with self._writing():
            now = _now()
            origins = {text: self._origin_seq(text, now) for text in dict.fromkeys(row[0] for row in drawn)}
            rows: dict[tuple[bytes, int], tuple[Any, ...]] = {}
            for text, sample, prompt, response in drawn:
                seq = origins[text]
                if (sample, seq) not in rows and not self._is_recorded(sample, split, seq):
                    rows[sample, seq] = (sample, prompt, response, split, seq, now)
            self._append("records", rows.values())
        return len(rows)

    def admit(self, ids: Iterable[str]) -> None:
        """Let through sample ids that are recorded as training records (train or teacher-train).

        Known ids are kept in memory; the file is asked only about ids that are not among them.

        Raises:
            LedgerError: names the first id that is not recorded, or is recorded for evaluation only.
        """
        unknown = [i for i in ids if i not in self._admitted]
        if not unknown:
            return
        self._load_admitted()
        for sample_id in unknown:
            if sample_id not in self._admitted:
                raise LedgerError(
                    f"sample {sample_id} is not in the ledger {self.path} as a training record, so it cannot be "
                    "trained on; record it as train before training starts"
                )

    def stage_finished(self, name: str) -> dict[str, Any] | None:
        """Body of the last finished entry of the stage ``name``, or None if it never finished."""
        with clearly(self.path):
            row = self._db.execute(
                "SELECT seq, body FROM entries WHERE kind = 'stage' AND json_extract(body, '$.status') = 'finished' "
                "AND json_extract(body, '$.name') = ? ORDER BY seq DESC LIMIT 1",
                (name,),
            ).fetchone()
        if row is None:
            return None
        with self._reading(row[0]):
            return json.loads(row[1])

    def told(self, kind: str) -> list[dict[str, Any]]:
        """Bodies of all entries of a kind, in order."""
        with clearly(self.path):
            rows = self._db.execute("SELECT body FROM entries WHERE kind = ? ORDER BY seq", (kind,)).fetchall()
        return [json.loads(body) for (body,) in rows]

    def finished_stages(self) -> list[str]:
        """Names of the stages that have finished, in the order of their first finish."""
        with clearly(self.path):
            rows = self._db.execute(
                "SELECT json_extract(body, '$.name') FROM entries WHERE kind = 'stage' "
                "AND json_extract(body, '$.status') = 'finished' ORDER BY seq"
            ).fetchall()
        return list(dict.fromkeys(name for (name,) in rows))

    def artifacts(self, latest: bool = True) -> list[Artifact]:
        """Recorded artifacts in the order written.

        Args:
            latest: only those of the last finish of each stage, and of each path only the last; False: all ever.
        """
        return [artifact for _, artifact in self._recorded_artifacts(latest)]

    def counts(self) -> dict[str, int]:
        """Rows: ``entries``, ``records``, and the records of each split by its name."""
        with clearly(self.path):
            entries = self._db.execute("SELECT count(*) FROM entries").fetchone()[0]
            splits = dict(self._db.execute("SELECT split, count(*) FROM records GROUP BY split"))
        return {"entries": entries, "records": sum(splits.values()), **{s: splits.get(s, 0) for s in SPLITS}}

    def verify(self, root: Path | str | None = None, expected_head: tuple[int, str] | None = None) -> Verification:
        """Re-derive every hash in order; triggers and views are not relied on.

        Finds rows that were edited, deleted, inserted or moved, and names the first one. A chain rewritten from some
        row to its end, or cut at its end, is consistent in itself: only ``expected_head`` shows that.

        Args:
            root: the run folder; when given, the latest artifacts below it are hashed again.
            expected_head: ``head`` as it was noted elsewhere. Rows appended since then are fine.

        Raises:
            LedgerError: the file is damaged as an SQLite database, or its tables are not a ledger's.
        """
        with clearly(self.path):
            self._db.execute("BEGIN")
            try:
                checked, bad = self._check_rows(expected_head)
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
        artifacts = 0
        if bad is None and root is not None:
            for seq, artifact in self._recorded_artifacts(latest=True):
                problem = artifact_problem(Path(root), artifact)
                if problem:
                    bad = (seq, f"{problem} (recorded by entries row {seq})")
                    break
                artifacts += 1
        seq, problem = bad or (None, None)
        return Verification(bad is None, checked["entries"], checked["records"], artifacts, problem, seq)

    def _check_rows(self, expected_head: tuple[int, str] | None) -> tuple[dict[str, int], tuple[int, str] | None]:
        """Good rows by table, and the first bad row with what is wrong."""
        checked, fault = walk(heapq.merge(*(self._rows(table) for table in CONTENT), key=lambda row: row.seq))
        if fault is not None:
            return checked, (fault.seq, fault.what)
        stray = self._db.execute(
            "SELECT seq, origin FROM records WHERE origin NOT IN (SELECT seq FROM entries WHERE kind = 'origin') "
            "OR origin >= seq ORDER BY seq LIMIT 1"
        ).fetchone()
        if stray is not None:
            return checked, (stray[0], f"records row {stray[0]}: row {stray[1]} is not an origin that came before it")
        sound = self._db.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if sound != "ok":
            raise LedgerError(f"{self.path} is damaged: {' '.join(sound.split())}; restore it from a copy")
        return checked, self._head_problem(*expected_head) if expected_head is not None else None

    def _head_problem(self, seq: int, digest: str) -> tuple[int, str] | None:
        last, _ = self._head()
        if last < seq:
            return last + 1, f"rows were cut off: the ledger ends at row {last}, but row {seq} was its head"
        found = [row.hash.hex() for table in CONTENT for row in self._rows(table, seq)]
        if seq and found != [digest]:
            return seq, f"rows were replaced: row {seq} does not have the hash that the head had"
        return None

    def _rows(self, table: str, only: int | None = None) -> Iterator[Row]:
        columns = ", ".join((*CONTENT[table], "prev_hash", "hash"))
        where = "" if only is None else f"WHERE seq = {int(only)}"
        for *values, prev_hash, digest in self._db.execute(f"SELECT {columns} FROM {table} {where} ORDER BY seq"):
            if not isinstance(values[0], int):
                raise LedgerError(f"{self.path}: the table {table} is not a ledger's; restore the file from a copy")
            yield Row(table, tuple(values), prev_hash, digest)

    def _head(self) -> tuple[int, bytes]:
        last = "SELECT seq, hash FROM {0} WHERE seq = (SELECT max(seq) FROM {0})"
        both = " UNION ALL ".join(last.format(table) for table in CONTENT)
        return self._db.execute(f"{both} ORDER BY seq DESC LIMIT 1").fetchone() or (0, GENESIS)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction that holds the write lock from its start."""
        with clearly(self.path):
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _append(self, table: str, contents: Iterable[tuple[Any, ...]]) -> int:
        """Chain rows (their content without ``seq``) to the head; returns the last ``seq``. Inside ``_writing``."""
        seq, prev_hash = self._head()
        rows = []
        for content in contents:
            seq += 1
            digest = link(table, (seq, *content), prev_hash)
            rows.append((seq, *content, prev_hash, digest))
            prev_hash = digest
        marks = ", ".join("?" * (len(CONTENT[table]) + 2))
        self._db.executemany(f"INSERT INTO {table} {_INSERT[table]} VALUES ({marks})", rows)
        return seq

    def _origin_seq(self, text: str, now: str) -> int:
        row = self._db.execute("SELECT seq FROM entries WHERE kind = 'origin' AND body = ?", (text,)).fetchone()
        return row[0] if row else self._append("entries", [("origin", text, now)])

    def _is_recorded(self, sample: bytes, split: str, origin: int) -> bool:
        known = "SELECT 1 FROM records WHERE sample = ? AND split = ? AND origin = ?"
        return self._db.execute(known, (sample, split, origin)).fetchone() is not None

    def _load_admitted(self) -> None:
        """Add the training records written since the last time, by whichever process."""
        with clearly(self.path):
            rows = self._db.execute(
                "SELECT seq, sample FROM records WHERE seq > ? AND split IN ('train', 'teacher-train') ORDER BY seq",
                (self._admitted_up_to,),
            )
            for seq, sample in rows:
                self._admitted.add(sample.hex())
                self._admitted_up_to = seq

    def _recorded_artifacts(self, latest: bool) -> list[tuple[int, Artifact]]:
        with clearly(self.path):
            rows = self._db.execute(
                "SELECT seq, kind, body FROM entries WHERE kind IN ('stage', 'artifact') ORDER BY seq"
            ).fetchall()
        made: dict[Any, list[tuple[int, Artifact]]] = {}
        for seq, kind, text in rows:
            with self._reading(seq):
                body = json.loads(text)
                if kind == "artifact" or body["status"] == "finished":
                    listed = [body] if kind == "artifact" else body.get("artifacts", [])
                    maker = (kind, body["path"] if kind == "artifact" else body["name"]) if latest else seq
                    made[maker] = [(seq, Artifact(**a)) for a in listed]
        found = sorted((pair for pairs in made.values() for pair in pairs), key=lambda pair: pair[0])
        # Two stages may write one path, and only the later content can still be there.
        return sorted({a.path: (seq, a) for seq, a in found}.values(), key=lambda pair: pair[0]) if latest else found

    @contextmanager
    def _reading(self, seq: int) -> Iterator[None]:
        """A body that was written by ``append`` can always be read, so one that cannot was edited."""
        try:
            yield
        except (ValueError, TypeError, KeyError, AttributeError):
            raise LedgerError(f"{self.path}: entries row {seq} was edited and cannot be read; verify it") from None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
