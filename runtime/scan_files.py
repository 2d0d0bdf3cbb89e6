"""A scan on disk, be it one file or a folder of slices: is it there, is it the same, what is in it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from .files import require_file, sha256_file


def path_text(path: Path) -> str:
    """A path as text that any file can hold: names that are not UTF-8 with their bytes escaped."""
    return str(path).encode(errors="backslashreplace").decode()


def require_scan(path: Path) -> None:
    """Raise InputError unless ``path`` is a folder or a readable regular file."""
    if not os.path.isdir(path):  # noqa: PTH112 (Path.is_dir raises where a name is too long)
        require_file(path, "scan")


def file_facts(path: Path) -> tuple[int, int] | None:
    """Size in bytes and time of change in ns, of a folder all and the last of its files'; None without it."""
    try:
        statuses = [file.stat() for file in _files(path)] if os.path.isdir(path) else [path.stat()]  # noqa: PTH112
    except OSError:
        return None
    return sum(status.st_size for status in statuses), max((status.st_mtime_ns for status in statuses), default=0)


def sha256_scan(path: Path) -> str:
    """Hex sha256 of a file, or of the names and contents of a folder's files."""
    if not os.path.isdir(path):  # noqa: PTH112
        return sha256_file(path)
    digest = hashlib.sha256()
    for file in _files(path):
        digest.update(os.fsencode(file.relative_to(path)) + f"\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.is_file())
