"""Files that are either the old one or the new one, whole, whenever the process or the machine stops."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write ``content`` (text as UTF-8) beside ``path``, bring it to the disk, and move it in; folders are made."""
    making = path.with_name(f".making-{path.name}")
    making.parent.mkdir(parents=True, exist_ok=True)
    with open(making, "wb") as f:
        f.write(content.encode("utf-8") if isinstance(content, str) else content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(making, path)
