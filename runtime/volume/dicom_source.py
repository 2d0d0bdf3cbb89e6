"""What would be read as DICOM; found without reading it, and without pydicom."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from ..errors import DcformerWarning

_ZIP = ".zip"
_SLICES = (".dcm", ".ima")
#: Behind a preamble of 128 bytes (DICOM PS3.10, 7.1).
_MAGIC, _PREAMBLE = b"DICM", 128
#: The table of contents of a disc, which is a DICOM file, too (PS3.10, 8.6); slices lie below.
_CONTENTS = "DICOMDIR"
#: Files of other kinds, which need not be opened to know.
_OTHERS = (".nii", ".gz", ".csv", ".json", ".txt", ".png", ".jpg", ".pdf", ".xml", ".html", ".parquet", _ZIP)


def is_dicom_source(path: str | Path) -> bool:
    """Whether a path would be read as DICOM: a folder, a zip, or a slice."""
    # Not Path.is_dir, which raises where a name is too long.
    return Path(path).suffix.lower() == _ZIP or os.path.isdir(path) or is_slice(Path(path))  # noqa: PTH112


def find_dicom(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Below a folder, itself included: a folder that holds DICOM files and the first of them; a zip file and itself."""
    for place, folders, files in os.walk(folder, onerror=_told):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        visible = sorted(name for name in files if not name.startswith("."))
        first = next((path for name in visible if _is_dicom(path := Path(place, name))), None)
        if first is not None:
            yield Path(place), first
        yield from ((Path(place, name), Path(place, name)) for name in visible
                    if name.lower().endswith(_ZIP) and not name.endswith(".prepared.zip"))


def is_contents(path: Path) -> bool:
    """Whether a file is a disc's table of contents, whose name some systems show in small letters."""
    return path.name.upper() == _CONTENTS


def is_slice(path: Path) -> bool:
    """Whether a file is a DICOM file, by its ending or its first bytes; one that is not there, by its ending."""
    return (path.suffix.lower() in _SLICES and not os.path.isdir(path)) or _is_dicom(path)  # noqa: PTH112


def may_be_slice(path: Path) -> bool:
    """Whether a file is a DICOM file, or of no known kind, as damaged slices without an ending are."""
    return is_slice(path) or (path.suffix.lower() not in _OTHERS and os.path.isfile(path))  # noqa: PTH113


def _told(error: OSError) -> None:
    warnings.warn(f"{error.filename}: cannot be searched for scans ({error.strerror})", DcformerWarning, stacklevel=4)


def _is_dicom(path: Path) -> bool:
    if path.suffix.lower() in _OTHERS or is_contents(path) or not os.path.isfile(path):  # noqa: PTH113 (as above)
        return False
    try:
        with path.open("rb") as file:
            file.seek(_PREAMBLE)
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False
