"""Teachers that recipes trained, kept between runs under what they were made from.

``PENNYWEIGHT_CACHE`` names the folder; default: ``~/.cache/pennyweight``.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pennyweight.ledger.hashing import hash_folder


def cache() -> Path:
    """The folder of what is kept between runs."""
    return Path(os.environ.get("PENNYWEIGHT_CACHE") or Path.home() / ".cache" / "pennyweight")


def place_of(key: str) -> Path:
    """Where the teacher made from ``key`` is, or would be kept."""
    return cache() / "teachers" / key


def adopt(kept: Path, to: Path) -> bool:
    """Copy a kept teacher to ``to``; False when there is none, or when it is damaged."""
    try:
        if (kept / "sha256").read_text() != hash_folder(kept / "model"):
            return False
        shutil.rmtree(to, ignore_errors=True)
        making = to.with_name(f".making-{to.name}")
        shutil.rmtree(making, ignore_errors=True)
        shutil.copytree(kept / "model", making)
        os.replace(making, to)
    except OSError:
        return False
    return True


def keep(model: Path, kept: Path) -> None:
    """Keep the teacher folder ``model`` for later runs. A cache that cannot be written is no reason to fail."""
    making = kept.with_name(f".making-{os.getpid()}-{kept.name}")
    try:
        making.mkdir(parents=True)
        shutil.copytree(model, making / "model")
        (making / "sha256").write_text(hash_folder(making / "model"))
        shutil.rmtree(kept, ignore_errors=True)
        os.replace(making, kept)
    except OSError:
        shutil.rmtree(making, ignore_errors=True)
