"""DICOM series whose slices lie in several folders, as archives write them that put so many files into each."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ..errors import DcformerWarning
from ..scan_files import ScanPath, SliceFiles
from .dicom_source import find_dicom, is_slice

#: More folders than these that name one series are told of without a look at all of their slices.
_MOST_COMPARED = 8


def warn_of_split(first_slices: Mapping[Path, Path], owners: Mapping[Path, object] | None = None) -> None:
    """Warn of folders that hold different slices of one series, or lie in each other; not of copies of a series.

    Without pydicom, which is needed to read them, there are none.

    Args:
        first_slices: by folder; one that is damaged takes its folder out, as whoever reads the scan will tell.
        owners: by folder, what it was found by; nothing is said again where it is the same for all that hold a series.
    """
    for parts in _split_series(first_slices):
        if owners is None or len({owners[part] for part in parts}) > 1:
            warnings.warn(f"{len(parts)} folders hold slices of one series, {parts[0]} and {parts[1]} among them: each "
                          "is taken for a scan of its own, which is a part of what was scanned; put them into one "
                          "folder, under different names", DcformerWarning, stacklevel=4)


def warn_of_parts(found_by: Mapping[ScanPath, object]) -> None:
    """As ``warn_of_split``, of scans that were named apart.

    Args:
        found_by: for each scan what it was found by; those of one folder have been told of when it was searched.
    """
    if len(set(found_by.values())) < 2:
        return
    firsts, owners = dict[Path, Path](), dict[Path, object]()
    for scan, owner in found_by.items():
        if isinstance(scan, SliceFiles):
            folder, first = scan.folder, scan.files[0]
        elif os.path.isdir(scan):  # noqa: PTH112 (Path.is_dir raises where a name is too long)
            folder, first = next(find_dicom(scan), (scan, None))
        else:
            continue
        if first is not None:
            firsts[folder], owners[folder] = first, owner
    warn_of_split(firsts, owners)


def _split_series(first_slices: Mapping[Path, Path]) -> Iterator[list[Path]]:
    if len(first_slices) < 2:
        return
    try:
        from .dicom import identify
    except ImportError:
        return
    series: defaultdict[str, dict[str, Path]] = defaultdict(dict)
    for folder, file in first_slices.items():
        uid, instance = identify(file) or ("", "")
        if uid:
            # Copies begin with the same slice; those without a name for it are never taken for copies.
            series[uid].setdefault(instance or str(file), folder)
    for uid, places in series.items():
        folders = list(places.values())
        if len(folders) <= _MOST_COMPARED and len(folders) > 1:
            folders = list(_without_copies(uid, folders))
        if len(folders) > 1:
            yield folders


def _without_copies(uid: str, folders: Iterable[Path]) -> Iterator[Path]:
    from .dicom import identify

    known: dict[Path, set[str]] = {}
    for folder in folders:
        own = {found[1] for file in sorted(folder.rglob("*")) if is_slice(file)
               and (found := identify(file)) is not None and found[0] == uid} - {""}
        nested = any(folder.is_relative_to(other) or other.is_relative_to(folder) for other in known)
        if nested or not own or not any(own <= others or others <= own for others in known.values()):
            yield folder
        known[folder] = own
