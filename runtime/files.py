"""File helpers: hashing, and writing so that a reader sees the old file, the new file, or none."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import InputError

_CHUNK_BYTES = 1 << 20


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def require_file(path: Path, what: str) -> None:
    """Raise InputError unless ``path`` is a readable regular file."""
    if not path.exists():
        raise InputError(f"{path}: no such {what}")
    if not path.is_file():
        raise InputError(f"{path}: expected a {what}, found a {'folder' if path.is_dir() else 'special file'}")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path}: no permission to read this {what}")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it takes the final name only if the block succeeds.

    Raises:
        InputError: the folder does not exist or cannot be written.
    """
    if path.is_dir():
        raise InputError(f"{path}: expected a file name, found a folder")
    temporary = _temporary_folder(path)
    try:
        yield temporary / path.name
        (temporary / path.name).replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def atomic_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; it takes the final name only if the block succeeds.

    Raises:
        InputError: ``path`` exists and ``overwrite`` is false, or its parent cannot be written.
    """
    if path.exists() and not overwrite:
        raise InputError(f"{path}: exists already; choose another name or pass --force to replace it")
    temporary = _temporary_folder(path)
    try:
        content = temporary / "new"
        content.mkdir()
        yield content
        if path.exists():
            path.replace(temporary / "old")
        content.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary_folder(path: Path) -> Path:
    """A private folder on the same file system as ``path``, so that renaming out of it is atomic."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise InputError(f"{path}: cannot write here ({error.strerror}); choose another --out") from error
