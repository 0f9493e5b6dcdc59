"""The ledger: what it writes, what it refuses, and that no change to it goes unseen."""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pennyweight.errors import LedgerError, RunError
from pennyweight.ledger import store
from pennyweight.ledger.chain import CONTENT, link
from pennyweight.ledger.database import MIGRATIONS, Migration, applied, connect, migrate
from pennyweight.ledger.hashing import artifact
from pennyweight.ledger.store import Ledger
from pennyweight.records import Message, Sample

ROOT = Path(store.__file__).resolve().parents[2]


def samples(count: int, source: str = "corpus", author: str = "given") -> list[Sample]:
    """Fresh samples; no two calls share one."""
    return [
        Sample((Message("user", secrets.token_hex(8)),), secrets.token_hex(8), source, "CC0-1.0", author)
        for _ in range(count)
    ]


def stage(name: str, key: str = "k", status: str = "finished", artifacts: tuple = ()) -> dict:
    return {
        "name": name,
        "key": key,
        "status": status,
        "seconds": 1.5,
        "tokens": 10,
        "peak_memory_bytes": 4096,
        "artifacts": [a.to_json() for a in artifacts],
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A closed ledger of 5 entries and 8 records, interleaved: 13 rows."""
    file = tmp_path / "ledger.sqlite"
    with Ledger.open(file) as ledger:
        ledger.append("run", {"recipe": {"name": "demo"}, "version": "0.1.0"})
        ledger.add_records(samples(4), "train", None)
        ledger.append("stage", stage("data"))
        ledger.add_records(samples(4, author="teacher"), "eval", "f" * 64)
        ledger.append("stage", stage("train"))
    return file


def raw(path: Path) -> sqlite3.Connection:
    """As a tamperer opens it: no triggers, no views, no constraints in the way."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA synchronous = OFF")
    for kind, name in db.execute("SELECT type, name FROM sqlite_master WHERE type IN ('trigger', 'view')").fetchall():
        db.execute(f"DROP {kind} {name}")
    db.execute("DROP INDEX finished_stages")
    db.execute("PRAGMA ignore_check_constraints = ON")
    return db


def verified(path: Path, **how) -> store.Verification:
    with Ledger.open(path, create=False) as ledger:
        return ledger.verify(**how)


def everything(path: Path) -> list[list]:
    with sqlite3.connect(path) as db:
        return [db.execute(f"SELECT * FROM {table} ORDER BY seq").fetchall() for table in CONTENT]


def table_of(path: Path) -> dict[int, str]:
    with sqlite3.connect(path) as db:
        return {seq: t for t in CONTENT for (seq,) in db.execute(f"SELECT seq FROM {t}")}


def test_one_chain_over_both_tables(path):
    found = verified(path)
    assert (found.ok, found.checked_entries, found.checked_records, found.problem) == (True, 5, 8, None)
    assert sorted(table_of(path)) == list(range(1, 14))
    with Ledger.open(path) as ledger:
        seq, digest = ledger.head
        assert seq == 13 and len(bytes.fromhex(digest)) == 32
        assert ledger.counts() == {"entries": 5, "records": 8, "train": 4, "eval": 4, "teacher-train": 0}


def test_empty_ledger_verifies(tmp_path):
    with Ledger.open(tmp_path / "l") as ledger:
        assert ledger.head == (0, "0" * 64)
        assert ledger.verify(expected_head=ledger.head).ok


def test_closed_ledger_is_one_file(path, tmp_path):
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    shutil.copy(path, tmp_path / "copy")
    assert verified(tmp_path / "copy").ok


# Tampering


@pytest.mark.parametrize("table", list(CONTENT))
def test_every_edit_of_every_column_is_found(path, tmp_path, table):
    rng = random.Random(secrets.randbits(32))
    tables = table_of(path)
    for seq in [s for s, t in tables.items() if t == table]:
        for column in (*CONTENT[table], "prev_hash", "hash"):
            forged = tmp_path / "forged"
            shutil.copy(path, forged)
            db = raw(forged)
            old = db.execute(f"SELECT {column} FROM {table} WHERE seq = ?", (seq,)).fetchone()[0]
            if isinstance(old, bytes):
                at = rng.randrange(32)
                new = old[:at] + bytes([old[at] ^ (1 << rng.randrange(8))]) + old[at + 1 :]
            else:
                new = old + rng.randrange(1000, 2000) if isinstance(old, int) else old + rng.choice(" x0")
            db.execute(f"UPDATE {table} SET {column} = ? WHERE seq = ?", (new, seq))
            db.close()
            found = verified(forged)
            assert not found.ok and found.first_bad_seq == seq, (column, found)
            assert column in str(found.problem) or (column == "seq" and "missing" in str(found.problem))
            assert found.checked_entries + found.checked_records == seq - 1


@pytest.mark.parametrize(
    ("table", "change"),
    [
        ("entries", "body = CAST(x'ff' AS TEXT)"),
        ("entries", "body = CAST(body AS BLOB)"),
        ("entries", "body = '{'"),
        ("records", "sample = lower(hex(sample))"),
        ("records", "prev_hash = lower(hex(prev_hash))"),
        ("records", "hash = ''"),
    ],
)
def test_values_of_another_type_are_found(path, table, change):
    seq = max(s for s, t in table_of(path).items() if t == table)
    db = raw(path)
    db.execute(f"UPDATE {table} SET {change} WHERE seq = ?", (seq,))
    db.close()
    found = verified(path)
    assert found.first_bad_seq == seq and f"{table} row {seq}" in str(found.problem)


def test_deleted_row_is_found(path, tmp_path):
    for seq, table in table_of(path).items():
        if seq < 13:
            forged = tmp_path / "forged"
            shutil.copy(path, forged)
            db = raw(forged)
            db.execute(f"DELETE FROM {table} WHERE seq = ?", (seq,))
            db.close()
            found = verified(forged)
            assert found.first_bad_seq == seq and f"row {seq} is missing" in str(found.problem)


def test_swapped_rows_are_found(path):
    records = [s for s, t in table_of(path).items() if t == "records"]
    one, two = sorted(random.Random(secrets.randbits(32)).sample(records, 2))
    db = raw(path)
    for old, new in ((one, -1), (two, one), (-1, two)):
        db.execute("UPDATE records SET seq = ? WHERE seq = ?", (new, old))
    db.close()
    assert verified(path).first_bad_seq == one


def forge(db: sqlite3.Connection, table: str, seq: int, prev_hash: bytes, **changed) -> bytes:
    """Insert a row with a hash that fits it, made from an existing row of the table; returns that hash."""
    columns = list(CONTENT[table])
    row = db.execute(f"SELECT {', '.join(columns)} FROM {table} ORDER BY seq LIMIT 1").fetchone()
    values = {**dict(zip(columns, row, strict=True)), **changed, "seq": seq}
    digest = link(table, list(values.values()), prev_hash)
    marks = ", ".join("?" * (len(values) + 2))
    names = ", ".join((*values, "prev_hash", "hash"))
    db.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", (*values.values(), prev_hash, digest))
    return digest


def test_forged_row_is_found_wherever_it_is_put(path, tmp_path):
    for what in ("taken number", "behind a gap", "wrong link"):
        forged = tmp_path / "forged"
        shutil.copy(path, forged)
        db = raw(forged)
        head = db.execute("SELECT hash FROM entries WHERE seq = 13").fetchone()[0]
        if what == "taken number":  # row 2 is an entry; a record takes the same number
            forge(db, "records", 2, db.execute("SELECT hash FROM entries WHERE seq = 1").fetchone()[0])
            expected = 2
        elif what == "behind a gap":
            forge(db, "entries", 15, head)
            expected = 14
        else:
            forge(db, "entries", 14, secrets.token_bytes(32))
            expected = 14
        db.close()
        found = verified(forged)
        assert found.first_bad_seq == expected, (what, found)
        assert (what == "taken number") == ("records row 2 was inserted" in str(found.problem))


def test_row_replaced_with_a_fitting_hash_is_named(path):
    db = raw(path)
    before, old = db.execute("SELECT prev_hash, hash FROM entries WHERE seq = 2").fetchone()
    db.execute("DELETE FROM entries WHERE seq = 2")
    assert forge(db, "entries", 2, before) != old
    db.close()
    found = verified(path)
    assert found.first_bad_seq == 2 and "entries row 2 was replaced" in str(found.problem)


def test_record_without_a_true_origin_is_found(path):
    db = raw(path)
    forge(db, "records", 14, db.execute("SELECT hash FROM entries WHERE seq = 13").fetchone()[0], origin=1)
    db.close()
    found = verified(path)
    assert found.first_bad_seq == 14 and "origin" in str(found.problem)


def test_cut_and_rewritten_tail_need_the_expected_head(path):
    with Ledger.open(path) as ledger:
        head = ledger.head
        ledger.append("stage", stage("later"))
    assert verified(path, expected_head=head).ok
    db = raw(path)
    db.execute("DELETE FROM entries WHERE seq > 12")
    assert verified(path).ok
    found = verified(path, expected_head=head)
    assert found.first_bad_seq == 13 and "cut off" in str(found.problem)
    forge(db, "entries", 13, db.execute("SELECT hash FROM records WHERE seq = 12").fetchone()[0])
    db.close()
    assert verified(path).ok
    found = verified(path, expected_head=head)
    assert found.first_bad_seq == 13 and "replaced" in str(found.problem)


def test_triggers_refuse_changes(path):
    db = sqlite3.connect(path, isolation_level=None)
    for table in CONTENT:
        for change in (
            f"UPDATE {table} SET time = 'x'",
            f"DELETE FROM {table}",
            f"INSERT OR REPLACE INTO {table} SELECT * FROM {table} LIMIT 1",
        ):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                db.execute(change)
    db.close()
    assert verified(path).ok


# Records


def test_records_are_idempotent_and_origins_shared(tmp_path):
    given, written = samples(5), samples(3, author="tiny-teacher")
    with Ledger.open(tmp_path / "l") as ledger:
        assert ledger.add_records(iter(given + written + given[:2]), "train", "ab" * 32) == 8
        head = ledger.head
        assert ledger.add_records(given + written, "train", "ab" * 32) == 0
        assert ledger.head == head
        assert ledger.counts()["entries"] == 2
        assert ledger.add_records(given, "eval", "ab" * 32) == 5  # another split: the same origin
        assert ledger.counts()["entries"] == 2
        assert ledger.add_records(written, "train", "cd" * 32) == 3  # another teacher
        assert ledger.verify().ok
    with sqlite3.connect(tmp_path / "l") as db:
        rows = db.execute(
            "SELECT id, author, licence, source, teacher_fingerprint FROM training_records WHERE split = 'train'"
        ).fetchall()
    assert {r for r in rows if r[1] == "given"} == {(s.id, "given", "CC0-1.0", "corpus", "ab" * 32) for s in given}
    assert {r[4] for r in rows if r[1] == "tiny-teacher"} == {"ab" * 32, "cd" * 32}


def test_failing_samples_leave_nothing(tmp_path):
    def stream():
        yield from samples(3)
        raise RuntimeError("the teacher died")

    with Ledger.open(tmp_path / "l") as ledger:
        with pytest.raises(RuntimeError):
            ledger.add_records(stream(), "train", None)
        with pytest.raises(LedgerError, match="split"):
            ledger.add_records(samples(1), "test", None)
        assert ledger.head[0] == 0


def test_a_ledger_of_forty_thousand_records_stays_small(tmp_path):
    with Ledger.open(tmp_path / "l") as ledger:
        assert ledger.add_records(samples(40_000), "train", None) == 40_000
    assert (tmp_path / "l").stat().st_size < 20_000_000


def test_admit_knows_training_records_only(tmp_path):
    train, pretrain, held_out = samples(3), samples(2), samples(2)
    with Ledger.open(tmp_path / "l") as ledger:
        ledger.add_records(train, "train", None)
        ledger.add_records(held_out, "eval", None)
        ledger.admit([])
        ledger.admit(s.id for s in train)
        ledger.add_records(pretrain, "teacher-train", None)
        ledger.admit([s.id for s in train + pretrain])
        for bad in (held_out[0].id, secrets.token_hex(32), "not a hash", ""):
            with pytest.raises(LedgerError, match=f"sample {bad} is not"):
                ledger.admit([train[0].id, bad, held_out[1].id])
        with Ledger.open(tmp_path / "l") as other:
            other.add_records(held_out, "train", None)
        ledger.admit(s.id for s in held_out)


# Entries


def test_stage_finished_is_the_last_one_and_indexed(path):
    with Ledger.open(path) as ledger:
        assert ledger.stage_finished("teacher") is None
        ledger.append("stage", stage("train", key="second"))
        ledger.append("stage", stage("train", key="third", status="started"))
        assert ledger.stage_finished("train") == stage("train", key="second")
        told: list[str] = []
        ledger._db.set_trace_callback(told.append)
        ledger.stage_finished("train")
        plan = ledger._db.execute(f"EXPLAIN QUERY PLAN {told[0]}").fetchall()
    assert any("finished_stages" in str(step) for step in plan)


@pytest.mark.parametrize(
    ("kind", "body", "said"),
    [
        ("note", {}, "unknown kind"),
        ("run", {"version": "1"}, "recipe"),
        ("stage", {**stage("x"), "status": "skipped"}, "skipped"),
        ("stage", {**stage("x"), "name": 3}, "name"),
        ("stage", {**stage("x"), "artifacts": [{"path": "x"}]}, "sha256"),
        ("environment", {"loss": float("nan")}, "JSON"),
        ("environment", {"path": Path("x")}, "JSON"),
    ],
)
def test_bodies_that_cannot_be_kept_are_refused(tmp_path, kind, body, said):
    with Ledger.open(tmp_path / "l") as ledger:
        with pytest.raises(LedgerError, match=said):
            ledger.append(kind, body)
        assert ledger.head[0] == 0


def test_any_text_survives(tmp_path):
    odd = "\udcff é \x00 \u2028 \U0001f600 '; DROP TABLE entries; --"
    with Ledger.open(tmp_path / "l") as ledger:
        ledger.append("stage", stage("s", key=odd))
        ledger.add_records(samples(1, source=odd), "train", None)
        assert ledger.verify().ok
        finished = ledger.stage_finished("s")
        assert finished is not None and finished["key"] == odd


def test_views_can_be_read_by_people(path, tmp_path):
    (tmp_path / "w").write_bytes(b"x" * 7)
    with Ledger.open(path) as ledger:
        ledger.append("stage", stage("export", artifacts=(artifact(tmp_path, "w", {"a": 1}),)))
        ledger.append("artifact", artifact(tmp_path, "w").to_json())
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT name, version FROM runs").fetchall() == [("demo", "0.1.0")]
        assert db.execute(
            "SELECT name, status, seconds, tokens, peak_memory_bytes, artifacts FROM stages"
        ).fetchall() == [
            ("data", "finished", 1.5, 10, 4096, 0),
            ("train", "finished", 1.5, 10, 4096, 0),
            ("export", "finished", 1.5, 10, 4096, 1),
        ]
        assert db.execute("SELECT stage, path, bytes FROM artifacts").fetchall() == [("export", "w", 7), (None, "w", 7)]


# Artifacts


def test_artifact_changes_are_named(path, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(secrets.token_bytes(1000))
    (tmp_path / "log").write_text("old")
    with Ledger.open(path) as ledger:
        ledger.append("stage", stage("train", artifacts=(artifact(tmp_path, "log"),)))
        (tmp_path / "log").write_text("new")
        made = (artifact(tmp_path, "model"), artifact(tmp_path, "log"))
        seq = ledger.append("stage", stage("train", artifacts=made))
        ledger.append("stage", stage("export", status="started"))
        assert ledger.artifacts() == list(made)
        assert len(ledger.artifacts(latest=False)) == 3
    found = verified(path, root=tmp_path)
    assert found.ok and found.checked_artifacts == 2
    (tmp_path / "model" / "weights").write_bytes(secrets.token_bytes(1000))
    found = verified(path, root=tmp_path)
    assert (found.ok, found.first_bad_seq) == (False, seq) and "model has changed" in str(found.problem)
    shutil.rmtree(tmp_path / "model")
    assert "model is missing" in str(verified(path, root=tmp_path).problem)


def test_of_two_stages_that_write_one_path_the_later_counts(path, tmp_path):
    with Ledger.open(path) as ledger:
        for name in ("first", "second"):
            (tmp_path / "shared").write_text(name)
            ledger.append("stage", stage(name, artifacts=(artifact(tmp_path, "shared"),)))
        assert ledger.verify(tmp_path).checked_artifacts == 1


@pytest.mark.parametrize("bad", ["/etc/hostname", "../x", "a/../../x", "", "absent"])
def test_artifact_paths_stay_inside_the_run(tmp_path, bad):
    with pytest.raises(RunError):
        artifact(tmp_path, bad)


# Files that are not what they should be


def test_files_that_are_no_ledger_are_refused(path, tmp_path):
    noise, other, empty = tmp_path / "noise", tmp_path / "other", tmp_path / "empty"
    noise.write_bytes(secrets.token_bytes(5000))
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE entries (a)")
    empty.touch()
    for file in (noise, other):
        before = file.read_bytes()
        with pytest.raises(LedgerError, match="not a"):
            Ledger.open(file)
        assert file.read_bytes() == before
    for file in (empty, tmp_path / "absent", tmp_path):
        with pytest.raises(LedgerError, match="ledger"):
            Ledger.open(file, create=False)
    with pytest.raises(LedgerError, match="folder exists"):
        Ledger.open(tmp_path / "no" / "folder")
    with Ledger.open(empty) as ledger:
        assert ledger.verify().ok


def test_damaged_pages_never_pass(tmp_path):
    file = tmp_path / "l"
    with Ledger.open(file) as ledger:
        ledger.add_records(samples(300), "train", None)
    whole, written = file.read_bytes(), everything(file)
    rng = random.Random(secrets.randbits(32))
    noticed = 0
    for _ in range(12):
        at = rng.randrange(4096, len(whole) - 512)
        file.write_bytes(whole[:at] + rng.randbytes(512) + whole[at + 512 :])
        try:
            with Ledger.open(file, create=False) as ledger:
                found = ledger.verify()
            # A hit on the free space of a page changes nothing.
            assert not found.ok or everything(file) == written
            noticed += not found.ok
        except LedgerError:
            noticed += 1
    assert noticed


def test_missing_table_is_a_sentence(path):
    db = raw(path)
    db.execute("DROP TABLE records")
    db.close()
    with pytest.raises(LedgerError, match="records"):
        verified(path)


# Migrations


def test_older_schema_is_brought_up_to_date(tmp_path):
    file = tmp_path / "l"
    db = sqlite3.connect(file, isolation_level=None)
    assert migrate(db, MIGRATIONS[:1]) == [1]
    forge_first = link("entries", (1, "run", "{}", "t"), bytes(32))
    db.execute("INSERT INTO entries VALUES (1, 'run', '{}', 't', ?, ?)", (bytes(32), forge_first))
    db.close()
    with Ledger.open(file) as ledger:
        assert applied(ledger._db) == {1, 2, 3}
        assert ledger.verify().checked_entries == 1
        ledger.append("stage", stage("x"))
        assert ledger.verify().ok


def test_migrations_go_in_order_once_and_wholly(path):
    extra = Migration(4, "extra", ("CREATE TABLE a (x)", "INSERT INTO a VALUES (1)"))
    after = Migration(5, "after", ("INSERT INTO a VALUES (2)",))
    broken = Migration(6, "broken", ("CREATE TABLE b (x)", "INSERT INTO nowhere VALUES (1)"))
    db = connect(path, create=False)
    with pytest.raises(sqlite3.OperationalError):
        migrate(db, (*MIGRATIONS, broken))
    assert not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'b'").fetchone()
    assert applied(db) == {1, 2, 3}
    assert migrate(db, (after, *MIGRATIONS, extra)) == [4, 5]
    assert migrate(db, (*MIGRATIONS, extra, after)) == []
    assert db.execute("SELECT x FROM a").fetchall() == [(1,), (2,)]
    db.close()
    with pytest.raises(LedgerError, match="upgrade"):
        Ledger.open(path)


# More than one process


WRITER = """
import secrets, sys
from pennyweight.ledger.store import Ledger
from pennyweight.records import Sample
with Ledger.open(sys.argv[1]) as ledger:
    for i in range(int(sys.argv[2])):
        ledger.append("stage", {"name": "s", "key": str(i), "status": "finished"})
        ledger.add_records([Sample((), secrets.token_hex(8), "src") for _ in range(20)], "train", None)
        print(ledger.head[0], flush=True)
"""


def writer(path: Path, rounds: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(rounds)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_killed_writer_leaves_a_ledger_that_verifies(tmp_path):
    rng = random.Random(secrets.randbits(32))
    file = tmp_path / "l"
    for attempt in range(5):
        process = writer(file, 1_000_000)
        assert process.stdout is not None
        reported = int(process.stdout.readline()) if attempt else 0  # the first may die while the file is made
        time.sleep(rng.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        said = process.communicate()[0].split("\n")
        reported = max([reported, *(int(line) for line in said[:-1])])
        with Ledger.open(file) as ledger:
            found = ledger.verify()
            assert found.ok, found
            assert ledger.head[0] >= reported
            ledger.append("stage", stage("after"))
            assert ledger.verify().ok


def test_the_lock_is_held_while_the_head_is_read(path, monkeypatch):
    rival = sqlite3.connect(path, timeout=0, isolation_level=None)

    def link_while_a_rival_tries(*content):
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            rival.execute("BEGIN IMMEDIATE")
        return link(*content)

    monkeypatch.setattr(store, "link", link_while_a_rival_tries)
    with Ledger.open(path) as ledger:
        ledger.append("stage", stage("x"))
        assert ledger.add_records(samples(2, source="another"), "train", None) == 2
        assert ledger.verify().ok
    rival.close()


def test_two_writers_do_not_fork_the_chain(tmp_path):
    rounds = 15
    writers = [writer(tmp_path / "l", rounds) for _ in range(2)]
    assert [w.communicate()[0].count("\n") for w in writers] == [rounds] * 2
    assert [w.returncode for w in writers] == [0, 0]
    with Ledger.open(tmp_path / "l") as ledger:
        assert ledger.verify().ok
        counts = ledger.counts()
    assert counts["records"] == 2 * rounds * 20
    assert counts["entries"] == 2 * rounds + 1  # and the one origin they share
