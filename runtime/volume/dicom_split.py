"""DICOM series whose slices lie in several folders, as archives write them that put so many files into each."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from .dicom_source import is_slice


def split_series(folders: Iterable[Path]) -> Iterator[tuple[Path, Path]]:
    """Pairs of folders that hold different slices of one series; copies of a series are no such pair.

    A folder counts by the series of its first slice. Without pydicom, which is needed to read them, there are none.
    """
    try:
        import pydicom

        from .dicom import DAMAGE
    except ImportError:
        return

    def uids(file: Path) -> tuple[str, str] | None:
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True,
                                     specific_tags=["SOPInstanceUID", "SeriesInstanceUID"])
            return str(header.get("SeriesInstanceUID") or ""), str(header.get("SOPInstanceUID") or "")
        except DAMAGE:  # whoever reads the scan will tell
            return None

    series: defaultdict[str, list[Path]] = defaultdict(list)
    for folder in folders:
        first = next(_slices(folder), None)
        if first is not None and (found := uids(first)) is not None and found[0]:
            series[found[0]].append(folder)
    for places in series.values():
        if len(places) < 2:
            continue
        instances = {place: {uids(file) for file in _slices(place)} for place in places}
        yield from (pair for pair in itertools.combinations(places, 2)
                    if not instances[pair[0]] & instances[pair[1]])


def _slices(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.iterdir()) if not file.name.startswith(".") and is_slice(file))
