"""From what a user names to the scans that are meant: files, folders, patterns, lists."""

from __future__ import annotations

import csv
import glob
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from .errors import InputError
from .files import require_file
from .scan_files import ScanPath, SliceFiles, require_scan, together
from .volume.dicom_source import is_slice
from .volume.folder import find_scans

#: Columns of a list that may hold the path.
PATH_COLUMNS = ("path", "volume", "file")
_LISTS = (".csv", ".parquet")
_T = TypeVar("_T", bound=str | SliceFiles)


@dataclass(frozen=True)
class Item:
    """A scan to embed, and how to read it."""

    path: ScanPath
    options: Mapping[str, Any] = field(default_factory=dict)


def find_items(inputs: Iterable[str | ScanPath], split: str | None, options: Mapping[str, Any]) -> list[Item]:
    """Scans in the order in which they are named, as often as they are; paths absolute.

    Args:
        inputs: scans; folders, in CT-RATE's layout or any other; patterns with ``*``; CSV or Parquet files with a
            column ``path``, relative to the list's own folder. DICOM files of one folder are one scan, however they
            are named.
        split: "valid" or "train", where a folder in CT-RATE's layout holds both.
        options: how to read every scan, as in ``Model.preprocess``; on top of what a folder's table of metadata says.

    Raises:
        InputError: nothing there, a list without a column of paths, a folder without scans.
    """
    named: list[tuple[ScanPath, Path | None]] = []
    for given in inputs:
        named += _expand(given, split)
    metadata = {path: table for path, table in named if table is not None}
    found = []
    for path in slices_together(path for path, _ in named):
        own = {"metadata": metadata[path]} if path in metadata else {}
        found.append(Item(path.absolute(), {**own, **options}))
    if not found:
        raise InputError("no scan in what was given")
    return found


def slices_together(paths: Iterable[_T | ScanPath]) -> list[_T | ScanPath]:
    """DICOM files of one folder as one scan, where the first of them stood; everything else as it is.

    A file alone stays what it is: a scan with too few slices, which whoever reads it will say.
    """
    folders: defaultdict[str, list[Path]] = defaultdict(list)
    found: list[_T | ScanPath | list[Path]] = []
    for path in paths:
        if not isinstance(path, Path) or not is_slice(path):
            found.append(path)
            continue
        slices = folders[os.path.realpath(path.parent)]
        if not slices:
            found.append(slices)
        slices.append(path)
    return [together(one) if isinstance(one, list) else one for one in found]


def one_scan(given: Iterable[str | ScanPath]) -> ScanPath:
    """The scan that is meant: a path, DICOM files of one folder, or a pattern that matches such.

    Raises:
        InputError: several scans, or nothing that matches.
    """
    found: list[ScanPath] = []
    for path in given:
        found += _matches(str(path)) if _is_pattern(path) else [path if isinstance(path, SliceFiles) else Path(path)]
    scans = slices_together(found)
    if len(scans) > 1:
        raise InputError(f"{scans[0]}, {scans[1]}{', …' if len(scans) > 2 else ''}: {len(scans)} scans; expected one")
    return scans[0]


def _is_pattern(given: str | ScanPath) -> bool:
    return not isinstance(given, SliceFiles) and glob.has_magic(str(given)) and not os.path.exists(given)  # noqa: PTH110


def _matches(pattern: str) -> list[Path]:
    matches = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 (of any path, absolute ones too)
    if not matches:
        raise InputError(f"{pattern}: no file matches this pattern")
    return list(map(Path, matches))


def require_there(inputs: Iterable[str | ScanPath]) -> None:
    """Raise InputError if something that was named is not there; of patterns ``find_items`` tells."""
    for given in inputs:
        if not _is_pattern(given):
            require_scan(given if isinstance(given, SliceFiles) else Path(given))


def _expand(given: str | ScanPath, split: str | None) -> Iterator[tuple[ScanPath, Path | None]]:
    if isinstance(given, SliceFiles):
        yield given, None
        return
    path = Path(given)
    if path.is_dir():
        yield from find_scans(path, split)
    elif path.suffix.lower() in _LISTS:
        yield from ((entry, None) for entry in _read_list(path))
    elif _is_pattern(given):
        for match in _matches(str(given)):
            yield from _expand(match, split) if match.is_dir() else [(match, None)]
    else:
        # One that is not there is a failed scan of its own, as is one that cannot be read.
        yield path, None


def _read_list(path: Path) -> list[Path]:
    require_file(path, "list of scans")
    if path.suffix.lower() == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            names = pq.read_schema(path).names
            column = _path_column(path, names)
            values = pq.read_table(path, columns=[column]).column(column).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path}: not a Parquet file, or damaged") from error
    else:
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file)
                column = _path_column(path, reader.fieldnames or ())
                values = [row[column] for row in reader]
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path}: not a CSV text file ({error})") from error
    if empty := next((index for index, value in enumerate(values, 1) if not isinstance(value, str) or not value), None):
        raise InputError(f"{path}: row {empty}: no path in column {column}")
    return [path.parent / value for value in values]


def _path_column(path: Path, names: Iterable[str]) -> str:
    names = list(names)
    for column in PATH_COLUMNS:
        if column in names:
            return column
    raise InputError(f"{path}: columns {', '.join(names) or 'none'}; expected one named {', '.join(PATH_COLUMNS)}")
