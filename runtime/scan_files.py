"""A scan on disk, be it one file, a folder of slices or a list of them: is it there, is it the same, what is in it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import require_file, sha256_file

#: Endings of scans that are whole in themselves.
_WHOLE = (".nii", ".gz", ".zip")
#: Backslashes before a byte that is escaped, or before what looks like one that was.
_BEFORE_ESCAPE = re.compile("\\\\+(?=ud[89a-f][0-9a-f]{2}|[\ud800-\udfff])")


@dataclass(frozen=True)
class SliceFiles:
    """DICOM files that were named one by one and are one scan together, in any order.

    Raises:
        InputError: none, or one that is a scan of its own.
    """

    files: tuple[Path, ...]

    def __post_init__(self) -> None:
        folders = {folder: os.path.realpath(folder) for folder in {file.parent for file in self.files}}
        unique = {(folders[file.parent], file.name): file for file in sorted(self.files, reverse=True)}
        object.__setattr__(self, "files", tuple(sorted(unique.values())))  # one file may be named in two ways
        if not self.files:
            raise InputError("scan: an empty list of files; expected the slices of a DICOM series")
        for file in self.files:
            if file.suffix.lower() in _WHOLE or os.path.isdir(file):  # noqa: PTH112
                raise InputError(f"{file}: a scan of its own in a list of files, which are the slices of one DICOM "
                                 "series; name scans one by one")

    def __str__(self) -> str:
        """With a digest of all names, so that no other list is called the same."""
        names = "\0".join(map(str, self.files)).encode(errors="surrogateescape")
        others = f"{len(self.files) - 1} other file{'s' * (len(self.files) != 2)}"
        return f"{self.files[0]} and {others} ({hashlib.sha256(names).hexdigest()[:12]})"

    @property
    def folder(self) -> Path:
        """The nearest that all files lie in."""
        return Path(os.path.commonpath([file.absolute().parent for file in self.files]))

    @property
    def name(self) -> str:
        """Of that folder."""
        return self.folder.name

    def absolute(self) -> SliceFiles:
        """The same files, by absolute paths."""
        return SliceFiles(tuple(file.absolute() for file in self.files))


#: A file, a folder of slices, or slices.
ScanPath = Path | SliceFiles


def as_scan(scan: str | Path | SliceFiles | Sequence[str | Path]) -> ScanPath:
    """What a caller names one scan by: a path, or the paths of its slices. Raises ``InputError`` as ``SliceFiles``."""
    if isinstance(scan, SliceFiles):
        return scan
    if isinstance(scan, str | Path):
        return named(scan)
    if not isinstance(scan, Sequence) or not all(isinstance(file, str | Path) for file in scan):
        raise InputError(f"scan: {type(scan).__name__}; expected a path, a list of DICOM files, or a preprocessed "
                         "array")
    return together(map(named, scan))


def named(path: str | Path) -> Path:
    """The path. Raises ``InputError`` for an empty name, which would be the current folder."""
    if not str(path).strip():
        raise InputError("SCAN: an empty name (a variable that is not set?); expected a file or a folder")
    return Path(path)


def together(files: Iterable[Path]) -> ScanPath:
    """Files as one scan. Raises ``InputError`` as ``SliceFiles``."""
    scan = SliceFiles(tuple(files))
    first, *others = scan.files
    return scan if others else first


def path_text(path: ScanPath) -> str:
    """A path as text that any file can hold: names that are not UTF-8 with their bytes escaped, each in its own way.

    Only backslashes that could be taken for those of an escape are doubled, so that ordinary names stay what they are.
    """
    return _BEFORE_ESCAPE.sub(r"\g<0>\g<0>", str(path)).encode(errors="backslashreplace").decode()


def require_scan(path: ScanPath) -> None:
    """Raise InputError unless ``path`` is a folder or a readable regular file, or a list of these."""
    if isinstance(path, SliceFiles):
        for file in path.files:
            require_file(file, "scan")
    elif not os.path.isdir(path):  # noqa: PTH112 (Path.is_dir raises where a name is too long)
        require_file(path, "scan")


def file_facts(path: ScanPath) -> tuple[int, int] | None:
    """What changes when a scan does: size in bytes and time of change in ns; None if a file is not there.

    Of several files the sum of their sizes, and a number that stands for all names, sizes and times: the last time
    alone would not tell of one that was replaced by an older one.
    """
    try:
        found = [(file.name, file.stat()) for file in _files(path)]
    except OSError:
        return None
    if isinstance(path, Path) and not os.path.isdir(path):  # noqa: PTH112
        (_, status), = found
        return status.st_size, status.st_mtime_ns
    told = b"".join(os.fsencode(name) + f"\0{status.st_size} {status.st_mtime_ns}\n".encode() for name, status in found)
    number = int.from_bytes(hashlib.sha256(told).digest()[:8]) >> 1  # a store's column holds 63 bits of it
    return sum(status.st_size for _, status in found), number


def visible_files(folder: Path, endings: tuple[str, ...] = ("",)) -> list[Path]:
    """What lies below a folder, but for hidden files and hidden folders, where programs keep what is not finished.

    Args:
        endings: of the names, in small letters; names may have them in capitals.
    """
    found: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in names
                  if not name.startswith(".") and name.lower().endswith(endings)]
    return sorted(found)


def table_of(options: Mapping[str, Any]) -> str | None:
    """The table of metadata by which a scan is read, with its size and time of change; None if there is none.

    Args:
        options: as in ``Model.preprocess``.
    """
    if (table := options.get("metadata")) is None:
        return None
    return " ".join(map(str, (path_text(Path(table)), *(file_facts(Path(table)) or ()))))


def sha256_scan(path: ScanPath) -> str:
    """Hex sha256 of a file, or of the names and contents of a folder's files or of those in a list."""
    if isinstance(path, Path) and not os.path.isdir(path):  # noqa: PTH112
        return sha256_file(path)
    folder = path.folder if isinstance(path, SliceFiles) else path
    digest = hashlib.sha256()
    for file in _files(path):
        name = file.absolute().relative_to(folder.absolute())
        digest.update(os.fsencode(name) + f"\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def _files(path: ScanPath) -> Iterator[Path]:
    if isinstance(path, SliceFiles):
        return iter(path.files)
    if not os.path.isdir(path):  # noqa: PTH112
        return iter((path,))
    return (file for file in sorted(path.rglob("*")) if file.is_file())
