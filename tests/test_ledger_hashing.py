"""Hashes of files and folders: the same for copies, different for every change."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from pathlib import Path

import pytest

from pennyweight.ledger.hashing import artifact, artifact_problem, files_of, hash_file, hash_folder, size_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "folder"
    for name in ("a.safetensors", "b.json", ".hidden", "sub/c.safetensors"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(secrets.token_bytes(50))
    return root


def test_file_hash_is_plain_sha256(tmp_path):
    content = secrets.token_bytes(1_000_003)
    (tmp_path / "f").write_bytes(content)
    assert hash_file(tmp_path / "f") == hashlib.sha256(content).hexdigest()
    assert size_of(tmp_path / "f") == len(content)


def test_a_copy_has_the_same_hash(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    os.utime(tmp_path / "copy" / "b.json", (0, 0))
    assert hash_folder(folder) == hash_folder(tmp_path / "copy")
    assert size_of(folder) == 200
    assert [p.as_posix() for p in files_of(folder)] == [".hidden", "a.safetensors", "b.json", "sub/c.safetensors"]


def test_every_change_changes_the_hash(folder):
    seen = {hash_folder(folder)}

    def changed() -> bool:
        before = len(seen)
        seen.add(hash_folder(folder))
        return len(seen) > before

    (folder / ".hidden").write_bytes(b"x")
    assert changed()
    (folder / "b.json").rename(folder / "d.json")
    assert changed()
    (folder / "sub" / "c.safetensors").rename(folder / "c.safetensors")
    assert changed()
    one, two = (folder / "a.safetensors").read_bytes(), (folder / "c.safetensors").read_bytes()
    (folder / "a.safetensors").write_bytes(two)
    (folder / "c.safetensors").write_bytes(one)
    assert changed()
    (folder / "new").touch()
    assert changed()
    (folder / "new").unlink()
    assert not changed()


def test_what_cannot_be_hashed_raises(folder, tmp_path):
    with pytest.raises(FileNotFoundError):
        hash_folder(tmp_path / "absent")
    with pytest.raises(FileNotFoundError):
        hash_file(tmp_path / "absent")
    with pytest.raises(OSError, match="regular"):
        hash_file(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes and links")
def test_links_and_pipes(folder, tmp_path):
    plain = hash_folder(folder)
    (folder / "b.json").rename(tmp_path / "elsewhere")
    (folder / "b.json").symlink_to(tmp_path / "elsewhere")
    assert hash_folder(folder) == plain  # as model caches keep their files
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    with pytest.raises(OSError, match="link to a folder"):
        hash_folder(folder)
    (folder / "loop").unlink()
    os.mkfifo(folder / "pipe")
    with pytest.raises(OSError, match="regular"):
        hash_folder(folder)


def test_artifact_of_file_and_folder(folder):
    made = artifact(folder.parent, "folder", {"tokens": 3})
    assert (made.path, made.sha256, made.bytes, made.facts) == ("folder", hash_folder(folder), 200, {"tokens": 3})
    assert artifact(folder.parent, "folder/b.json").sha256 == hash_file(folder / "b.json")
    assert artifact_problem(folder.parent, made) is None
    (folder / "b.json").write_text("other")
    assert "155 are there" in str(artifact_problem(folder.parent, made))
