"""A file is the old one or the new one, whole, wherever the writing stops."""

from __future__ import annotations

import pytest

from pennyweight import atomic


def test_text_and_bytes_are_written_and_folders_made(tmp_path):
    atomic.write_whole(tmp_path / "a" / "b.txt", "안녕\n")
    assert (tmp_path / "a" / "b.txt").read_bytes() == "안녕\n".encode()
    atomic.write_whole(tmp_path / "a" / "b.txt", b"\x00\xff")
    assert (tmp_path / "a" / "b.txt").read_bytes() == b"\x00\xff"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.txt"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_what_was_there_stays_when_it_fails_on_the_way(tmp_path, monkeypatch, step):
    file = tmp_path / "f"
    atomic.write_whole(file, "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, step, fail)
    with pytest.raises(OSError, match="No space"):
        atomic.write_whole(file, "new")
    assert file.read_text() == "old"
