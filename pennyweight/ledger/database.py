"""The ledger's SQLite file: its tables as numbered migrations, how it is opened, and what its errors mean.

Two tables share one counter, ``seq``: ``entries`` (few, a JSON body each) and ``records`` (one narrow row for every
training record). Triggers refuse changes by anyone who is not trying hard; against those who are, there is the hash
chain. The views are for people with ``sqlite3``; nothing in Pennyweight depends on them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from pennyweight.errors import LedgerError

APPLICATION_ID = 0x50574C31
"""In the header of the SQLite file (the letters PWL1), so that another program's database is never taken for ours."""

_BUSY_SECONDS = 30.0


class Migration(NamedTuple):
    """One step from an older schema to the next. A published one is never edited; a change is a new number."""

    number: int
    name: str
    statements: tuple[str, ...]


_CHAIN = Migration(
    1,
    "the chain",
    (
        f"PRAGMA application_id = {APPLICATION_ID}",
        """CREATE TABLE entries (
            seq INTEGER PRIMARY KEY,
            kind TEXT NOT NULL,
            body TEXT NOT NULL,
            time TEXT NOT NULL,
            prev_hash BLOB NOT NULL CHECK (length(prev_hash) = 32),
            hash BLOB NOT NULL CHECK (length(hash) = 32)
        )""",
        """CREATE TABLE records (
            seq INTEGER PRIMARY KEY,
            sample BLOB NOT NULL CHECK (length(sample) = 32),
            prompt BLOB NOT NULL CHECK (length(prompt) = 32),
            response BLOB NOT NULL CHECK (length(response) = 32),
            split TEXT NOT NULL CHECK (split IN ('train', 'eval', 'teacher-train')),
            origin INTEGER NOT NULL REFERENCES entries (seq),
            time TEXT NOT NULL,
            prev_hash BLOB NOT NULL CHECK (length(prev_hash) = 32),
            hash BLOB NOT NULL CHECK (length(hash) = 32)
        )""",
        "CREATE INDEX records_by_sample ON records (sample)",
        """CREATE INDEX finished_stages ON entries (json_extract(body, '$.name'), seq)
            WHERE kind = 'stage' AND json_extract(body, '$.status') = 'finished'""",
    ),
)


def _append_only(table: str) -> tuple[str, ...]:
    refuse = "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
    # INSERT OR REPLACE deletes without firing a delete trigger, hence the third one.
    return (
        f"CREATE TRIGGER {table}_no_update BEFORE UPDATE ON {table} {refuse}",
        f"CREATE TRIGGER {table}_no_delete BEFORE DELETE ON {table} {refuse}",
        f"""CREATE TRIGGER {table}_in_order BEFORE INSERT ON {table}
            WHEN NEW.seq IS NOT 1 + max(coalesce((SELECT max(seq) FROM entries), 0),
                                        coalesce((SELECT max(seq) FROM records), 0)) {refuse}""",
    )


_TRIGGERS = Migration(2, "append-only", _append_only("entries") + _append_only("records"))

_VIEWS = Migration(
    3,
    "views for people",
    (
        """CREATE VIEW runs AS
            SELECT seq, time, json_extract(body, '$.recipe.name') AS name, json_extract(body, '$.version') AS version,
                   json_extract(body, '$.recipe') AS recipe, lower(hex(hash)) AS hash
            FROM entries WHERE kind = 'run'""",
        """CREATE VIEW stages AS
            SELECT seq, time, json_extract(body, '$.name') AS name, json_extract(body, '$.key') AS key,
                   json_extract(body, '$.status') AS status, json_extract(body, '$.seconds') AS seconds,
                   json_extract(body, '$.tokens') AS tokens,
                   json_extract(body, '$.peak_memory_bytes') AS peak_memory_bytes,
                   json_array_length(body, '$.artifacts') AS artifacts, lower(hex(hash)) AS hash
            FROM entries WHERE kind = 'stage'""",
        """CREATE VIEW artifacts AS
            SELECT e.seq, e.time, json_extract(e.body, '$.name') AS stage, json_extract(a.value, '$.path') AS path,
                   json_extract(a.value, '$.sha256') AS sha256, json_extract(a.value, '$.bytes') AS bytes,
                   json_extract(a.value, '$.facts') AS facts
            FROM entries AS e, json_each(e.body, '$.artifacts') AS a
            WHERE e.kind = 'stage' AND json_extract(e.body, '$.status') = 'finished'
            UNION ALL
            SELECT seq, time, NULL, json_extract(body, '$.path'), json_extract(body, '$.sha256'),
                   json_extract(body, '$.bytes'), json_extract(body, '$.facts')
            FROM entries WHERE kind = 'artifact'""",
        """CREATE VIEW training_records AS
            SELECT r.seq, lower(hex(r.sample)) AS id, lower(hex(r.prompt)) AS prompt_hash,
                   lower(hex(r.response)) AS response_hash, r.split, json_extract(o.body, '$.source') AS source,
                   json_extract(o.body, '$.licence') AS licence, json_extract(o.body, '$.author') AS author,
                   json_extract(o.body, '$.teacher') AS teacher,
                   json_extract(o.body, '$.teacher_fingerprint') AS teacher_fingerprint, r.time,
                   lower(hex(r.hash)) AS hash
            FROM records AS r LEFT JOIN entries AS o ON o.seq = r.origin""",
    ),
)

MIGRATIONS: tuple[Migration, ...] = (_CHAIN, _TRIGGERS, _VIEWS)


def applied(db: sqlite3.Connection) -> set[int]:
    """Numbers of the migrations that this file already has; empty for a new file."""
    if not db.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'migrations'").fetchone():
        return set()
    return {number for (number,) in db.execute("SELECT number FROM migrations")}


def migrate(db: sqlite3.Connection, migrations: Sequence[Migration] = MIGRATIONS) -> list[int]:
    """Bring the file to the newest schema, in one transaction; returns the numbers applied now.

    ``db`` is in autocommit mode (``isolation_level=None``). A file that is up to date is only read.

    Raises:
        LedgerError: the file has a migration that this version does not know.
        sqlite3.Error: a statement failed; nothing was applied.
    """
    newest = max(m.number for m in migrations)
    foreign = applied(db) - {m.number for m in migrations}
    if foreign:
        raise LedgerError(
            f"the ledger has schema {max(foreign)}, newer than the {newest} known here; upgrade pennyweight"
        )
    if {m.number for m in migrations} <= applied(db):
        return []
    db.execute("BEGIN IMMEDIATE")
    try:
        # Read again: another process may have migrated while this one waited for the lock.
        pending = [m for m in sorted(migrations) if m.number not in applied(db)]
        db.execute("CREATE TABLE IF NOT EXISTS migrations (number INTEGER PRIMARY KEY, name TEXT, time TEXT)")
        for migration in pending:
            for statement in migration.statements:
                db.execute(statement)
            now = datetime.now(UTC).isoformat(timespec="seconds")
            db.execute("INSERT INTO migrations VALUES (?, ?, ?)", (migration.number, migration.name, now))
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    return [m.number for m in pending]


def connect(path: Path, create: bool) -> sqlite3.Connection:
    """The ledger file, open in autocommit mode and with its schema brought up to date; see ``Ledger.open``."""
    with clearly(path):
        mode = "rwc" if create else "rw"
        db = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=_BUSY_SECONDS, isolation_level=None
        )
        try:
            # Text that is not UTF-8 was put there by somebody else; it must be seen and named, not raise.
            db.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
            db.execute("PRAGMA synchronous = FULL")
            _refuse_foreign(db, path, create)
            migrate(db)
        except BaseException:
            db.close()
            raise
    return db


@contextmanager
def clearly(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into one sentence each."""
    try:
        yield
    except sqlite3.ProgrammingError:  # a mistake in this program, such as using a closed ledger
        raise
    except UnicodeDecodeError:  # SQLite quotes a damaged name in its message
        raise LedgerError(f"the ledger {path} is damaged: names in it are not text; restore it from a copy") from None
    except sqlite3.Error as e:
        code = getattr(e, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            cure = "another process kept it locked; wait for that one to end and try again"
        elif code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
            cure = "check that its folder exists and can be written, and that the disk has room"
        else:
            cure = "it is damaged or not a ledger; restore it from a copy"
        raise LedgerError(f"cannot use the ledger {path}: {e}; {cure}") from None


def _refuse_foreign(db: sqlite3.Connection, path: Path, create: bool) -> None:
    """Refuse a file that is neither a ledger nor, when one may be created, empty."""
    db.execute("BEGIN")  # both questions about the same moment: another process may be creating it
    mark = db.execute("PRAGMA application_id").fetchone()[0]
    empty = not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    db.execute("ROLLBACK")
    if mark != APPLICATION_ID and not (create and empty and mark == 0):
        raise LedgerError(f"{path} is not a Pennyweight ledger; give the path of a run's ledger")
