"""The environment entry: complete, JSON, harmless to publish, and never a reason to stop."""

from __future__ import annotations

import getpass
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from pennyweight.ledger import environment as module
from pennyweight.ledger.environment import PACKAGES, environment
from pennyweight.records import canonical_json

ROOT = Path(module.__file__).resolve().parents[2]


def test_says_what_it_knows():
    found = environment("NVIDIA H200", 4)
    assert found["device"] == "NVIDIA H200" and found["threads"] == 4
    assert found["python"].endswith(platform.python_version())
    assert found["cores"] == os.cpu_count()
    assert set(found["packages"]) == set(PACKAGES)
    assert found["packages"]["pydantic"] == metadata.version("pydantic")
    assert json.loads(canonical_json(found)) == found


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_commit_and_dirt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment()["git"] == {"commit": None, "dirty": None}

    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *who, *words], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    Path("file").write_text("one")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    assert environment()["git"] == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    Path("untracked").touch()
    assert environment()["git"]["dirty"] is False
    Path("file").write_text("two")
    assert environment()["git"]["dirty"] is True


def test_never_raises(monkeypatch):
    def broken(*_args, **_kwargs):
        raise RuntimeError("broken machine")

    for owner, name in (
        (subprocess, "run"),
        (os, "cpu_count"),
        (metadata, "version"),
        (platform, "release"),
        (platform, "processor"),
        (Path, "read_text"),
    ):
        monkeypatch.setattr(owner, name, broken)
    found = environment()
    assert found["git"] == {"commit": None, "dirty": None}
    assert found["cores"] is None and found["platform"] is None and found["cpu"] is None
    assert set(found["packages"].values()) == {None}


def test_names_nobody(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "box-of-alice")
    monkeypatch.setattr(platform, "node", lambda: "box-of-alice")
    monkeypatch.setattr(getpass, "getuser", lambda: "alice")
    monkeypatch.setenv("USER", "alice")
    text = canonical_json(environment())
    assert "alice" not in text
    for place in (str(ROOT), str(Path.home()), sys.prefix):
        assert len(place) < 3 or place not in text


def test_imports_no_torch():
    code = "import sys, pennyweight.ledger.environment, pennyweight.ledger.store; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
