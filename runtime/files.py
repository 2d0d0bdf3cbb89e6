"""File helpers: hashing, and writing so that a reader sees the old content or the new, never a mixture."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from .errors import DcformerError, DcformerWarning, DiskFull, InputError

_CHUNK_BYTES = 1 << 20
#: Characters of a name in that of its temporary folder, which must not be longer than names may be.
_LONGEST_PREFIX = 40
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: What file systems without locks say.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
#: Whether the system can lock files for a program. Windows has none that others may read meanwhile.
HAS_LOCKS = importlib.util.find_spec("fcntl") is not None


def cache_folder() -> Path:
    """Where this program keeps what it may forget; XDG_CACHE_HOME moves it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dcformer-deploy"


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def is_full(error: Exception) -> bool:
    """Whether the system had no more room for a file."""
    return isinstance(error, DiskFull) or (isinstance(error, OSError) and error.errno in _FULL)


def writing_error(path: Path, error: OSError, then: str = "") -> DcformerError:
    """What to raise instead of the system's own error; ``then``: what to do once the cause is gone."""
    reason = error.strerror or str(error)
    if is_full(error):
        return DiskFull(f"{path}: cannot be written ({reason}); free some space{then}, or choose another place")
    return InputError(f"{path}: cannot write here ({reason}); choose another place, or make it writable{then}")


def open_locked(path: Path, refusal: str, flags: int = 0) -> int:
    """Open a file, made if need be, for this program alone: until it is closed, or the program ends in whatever way.

    Args:
        refusal: what to say where another program has it.
        flags: of ``os.open``, more than for reading and writing.

    Raises:
        InputError: another program has it.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o644)
    try:
        lock_file(file)
    except BlockingIOError as error:
        os.close(file)
        raise InputError(refusal) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(file)
            raise
        warnings.warn(f"{path}: its file system has no locks ({error.strerror}); see that no other program uses it",
                      DcformerWarning, stacklevel=3)
    return file


def lock_file(file: int) -> None:
    """Hold an open file for this program, until it is closed; without effect where the system has no such locks.

    Raises:
        BlockingIOError: another program holds it.
        OSError: the file system has no locks.
    """
    if HAS_LOCKS:
        locks = importlib.import_module("fcntl")  # by name, as Windows has it not
        locks.flock(file, locks.LOCK_EX | locks.LOCK_NB)


def require_file(path: Path, what: str) -> None:
    """Raise InputError unless ``path`` is a readable regular file; ``what`` it should be goes into the message."""
    try:
        path.stat()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such {what}") from error
    except (OSError, ValueError) as error:  # too long a name, a folder that may not be entered, a null character
        raise InputError(f"{path}: cannot be read as a {what} ({getattr(error, 'strerror', None) or error})") from error
    if not path.is_file():
        raise InputError(f"{path}: expected a {what}, found a {'folder' if path.is_dir() else 'special file'}")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path}: no permission to read this {what}")


def require_writable_file(path: Path) -> None:
    """Raise InputError unless ``atomic_file`` could write there; to be called before long work."""
    if path.is_dir():
        raise InputError(f"{path}: expected a file name, found a folder")
    with _temporary_folder(path):
        pass


def require_writable_folder(path: Path) -> None:
    """Raise InputError unless a folder could be made there, or there is one whose files could be replaced."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: expected a folder name, found a file")
    with _temporary_folder(path):
        pass


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path on the same disk; it takes the final name only if the block succeeds.

    Raises:
        InputError: ``path`` is a folder, or its parent cannot be written.
        DiskFull: no space left.
    """
    if path.is_dir():
        raise InputError(f"{path}: expected a file name, found a folder")
    with _temporary_folder(path) as temporary:
        yield temporary / path.name
        (temporary / path.name).replace(path)


@contextlib.contextmanager
def atomic_folder(path: Path, replace_if_it_holds: str | None = None) -> Iterator[Path]:
    """Yield a temporary folder on the same disk; it takes the final name only if the block succeeds.

    Args:
        replace_if_it_holds: an existing folder is replaced only if a file of this name shows that it is of the same
            kind; None replaces nothing. If the exchange fails half-way, the old folder gets its name back.

    Raises:
        InputError: ``path`` exists and may not be replaced, or its parent cannot be written.
    """
    require_replaceable(path, replace_if_it_holds)
    with _temporary_folder(path) as temporary:
        content, old = temporary / "new", temporary / "old"
        content.mkdir()
        yield content
        require_replaceable(path, replace_if_it_holds)  # someone may have made it meanwhile
        if path.exists():
            path.replace(old)
        try:
            content.replace(path)
        except BaseException:
            if old.exists():
                old.replace(path)
            raise


def require_replaceable(path: Path, replace_if_it_holds: str | None) -> None:
    """Raise InputError if ``path`` exists, unless it is a folder that holds the named file."""
    if not (path.exists() or path.is_symlink()):
        return
    if replace_if_it_holds is None:
        raise InputError(f"{path}: exists already; choose another name or pass --force to replace it")
    if path.is_symlink() or not (path / replace_if_it_holds).is_file():
        raise InputError(f"{path}: exists and is not what this would replace (no {replace_if_it_holds} in it); choose "
                         "another name")


@contextlib.contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """A private folder beside ``path``, on the same file system, so that renaming out of it is atomic.

    Parents of ``path`` are made; those still empty at the end, because the block failed, are removed again.
    """
    missing = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name[:_LONGEST_PREFIX]}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise writing_error(path, error) from error
    try:
        yield temporary
    except OSError as error:
        if is_full(error):
            raise writing_error(path, error) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in missing:
            with contextlib.suppress(OSError):  # not empty: the block succeeded, or someone else uses it
                parent.rmdir()
