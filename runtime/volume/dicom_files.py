"""The files of a DICOM source: a folder's, those in a zip, or those of a list."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, one_line
from ..scan_files import ScanPath, SliceFiles, visible_files

#: A zip that unpacks to more is refused, as is one that grows by more than pixels can.
_LARGEST_ZIP_BYTES, _LARGEST_RATIO = 8 << 30, 200


@dataclass(frozen=True)
class SourceFile:
    """A file of a source: its name for messages, and how to open it."""

    name: str
    open: Callable[[], Any]


def source_files(path: ScanPath) -> Iterator[SourceFile]:
    """All files of a list; else of a source but hidden ones; a zip is read in memory, nothing is unpacked to disk."""
    if isinstance(path, SliceFiles):
        yield from (SourceFile(str(file), lambda file=file: file.open("rb")) for file in path.files)
        return
    if path.is_dir():
        yield from (SourceFile(str(file), lambda file=file: file.open("rb"))
                    for file in visible_files(path) if file.is_file())
        return
    if path.suffix.lower() != ".zip":
        yield SourceFile(str(path), lambda: path.open("rb"))
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if not info.is_dir()]
    except (OSError, zipfile.BadZipFile, RuntimeError, ValueError) as error:
        raise InputError(f"{path}: not a zip file, or damaged ({one_line(str(error))})") from error
    if astray := next((info.filename for info in members if _leads_out(info.filename)), None):
        raise InputError(f"{path}: refused: its file {astray!r} would lie outside of the folder that it is unpacked to")
    size = sum(info.file_size for info in members)
    if size > _LARGEST_ZIP_BYTES or size > max(1, path.stat().st_size) * _LARGEST_RATIO:
        raise InputError(f"{path}: unpacks to {size:,} bytes; refused")
    for info in sorted(members, key=lambda info: info.filename):
        if not any(part.startswith((".", "__MACOSX")) for part in Path(info.filename).parts):
            yield SourceFile(f"{path}/{info.filename}", lambda info=info: io.BytesIO(_member(path, info)))


def _leads_out(name: str) -> bool:
    """Absolute, with a drive, or upwards; by the rules of any system."""
    plain = name.replace("\\", "/")
    return plain.startswith("/") or re.match("[A-Za-z]:", plain) is not None or ".." in plain.split("/")


def _member(path: Path, info: zipfile.ZipInfo) -> bytes:
    with zipfile.ZipFile(path) as archive, archive.open(info) as member:
        return member.read(info.file_size)
