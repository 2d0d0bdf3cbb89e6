"""DICOM series whose slices lie in several folders, as archives write them that put so many files into each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from .dicom_source import is_slice

#: More folders than these that name one series are told of without a look at all of their slices.
_MOST_COMPARED = 8


def split_series(first_slices: Mapping[Path, Path]) -> Iterator[list[Path]]:
    """Folders that hold different slices of one series, or lie in each other; copies of a series are none.

    Without pydicom, which is needed to read them, there are none.

    Args:
        first_slices: by folder; one that is damaged takes its folder out, as whoever reads the scan will tell.
    """
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
