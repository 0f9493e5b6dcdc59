"""SHA-256 of files and folders: what artifacts and model weights are recognised by.

A file's hash is the plain SHA-256 of its bytes, as ``sha256sum`` prints it. A folder's hash covers the relative path
and the content of each of its files, in path order; it covers no times, owners or permissions, and no empty folders,
so a copy of a folder has the hash of the original. Everything is read in blocks.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path, PurePosixPath
from typing import Any

from pennyweight.errors import RunError
from pennyweight.records import Artifact

_FOLDER_TAG = b"pennyweight/folder/1\0"


def hash_file(path: Path | str) -> str:
    """Hex SHA-256 of a file's bytes.

    Raises:
        OSError: it is missing, unreadable, or not a regular file (a pipe would never end).
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_of(folder: Path | str) -> list[Path]:
    """Paths of all files below ``folder``, relative to it, hidden ones included, in the byte order of their names.

    Raises:
        OSError: the folder or one below it cannot be listed, or holds a link to another folder, which could lead
            anywhere, itself included.
    """
    folder = Path(folder)
    found: list[Path] = []
    for where, folders, names in os.walk(folder, onerror=_reraise):
        for name in folders:
            if os.path.islink(os.path.join(where, name)):
                raise OSError(errno.EINVAL, "a link to a folder cannot be hashed", os.path.join(where, name))
        found += [Path(where, name).relative_to(folder) for name in names]
    return sorted(found, key=_name)


def hash_folder(path: Path | str) -> str:
    """Hex SHA-256 of a folder: of the relative path and SHA-256 of each of its files, in path order.

    Raises:
        OSError: see ``files_of`` and ``hash_file``.
    """
    whole = hashlib.sha256(_FOLDER_TAG)
    for file in files_of(path):
        whole.update(_name(file) + b"\0" + bytes.fromhex(hash_file(Path(path, file))))
    return whole.hexdigest()


def size_of(path: Path | str) -> int:
    """Bytes in a file, or in all files of a folder.

    Raises:
        OSError: it is missing or cannot be listed.
    """
    if not os.path.isdir(path):
        return os.stat(path).st_size
    return sum(os.stat(Path(path, file)).st_size for file in files_of(path))


def artifact(root: Path | str, path: str, facts: dict[str, Any] | None = None) -> Artifact:
    """The file or folder at ``path`` below ``root`` as an Artifact: SHA-256 of its contents, and bytes in total.

    Args:
        root: the run folder.
        path: relative to it, with forward slashes.
        facts: whatever else is worth noting about it, as JSON values.

    Raises:
        RunError: it is missing or unreadable, or the path is not inside the run folder.
    """
    relative = PurePosixPath(path)
    if relative.is_absolute() or ".." in relative.parts or not relative.parts:
        raise RunError(f"the artifact path {path!r} is not inside the run folder; give a path relative to the run")
    whole = Path(root, relative)
    try:
        digest = hash_folder(whole) if whole.is_dir() else hash_file(whole)
        return Artifact(relative.as_posix(), digest, size_of(whole), facts or {})
    except FileNotFoundError:
        raise RunError(f"the artifact {path} is missing; run the stage that makes it again") from None
    except OSError as e:
        raise RunError(f"cannot hash the artifact {path}: {e.strerror}; make it a readable file or folder") from None


def artifact_problem(root: Path | str, recorded: Artifact) -> str | None:
    """What is wrong with a recorded artifact below ``root``, in one sentence; None when it is as recorded."""
    try:
        found = artifact(root, recorded.path)
    except RunError as e:
        return str(e)
    if found.sha256 == recorded.sha256:
        return None
    return f"the artifact {recorded.path} has changed: {recorded.bytes} bytes were recorded, {found.bytes} are there"


def _name(file: Path) -> bytes:
    return os.fsencode(file.as_posix())


def _reraise(error: OSError) -> None:
    raise error


def content_hash(path: Path | str) -> str | None:
    """Hash of a file's or folder's contents; None where there is none (a hub name, say)."""
    place = Path(path).expanduser()
    if place.is_file():
        return hash_file(place)
    return hash_folder(place) if place.is_dir() else None
