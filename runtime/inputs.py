"""From what a user names to the scans that are meant: files, folders, patterns, lists."""

from __future__ import annotations

import csv
import glob
import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from .errors import DcformerWarning, InputError
from .files import require_file
from .scan_files import ScanPath, SliceFiles, as_scan, named, require_scan, together
from .volume.dicom_source import is_contents, is_slice, may_be_slice
from .volume.dicom_split import warn_of_parts
from .volume.folder import NoScans, find_scans

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
            column of ``PATH_COLUMNS``, relative to the list's own folder. DICOM files of one folder are one scan,
            however they are named.
        split: "valid" or "train", where a folder in CT-RATE's layout holds both.
        options: how to read every scan, as in ``Model.preprocess``; on top of what a folder's table of metadata says.

    Raises:
        InputError: nothing there, a list without a column of paths, a folder without scans, a split without a folder.
    """
    inputs = list(inputs)
    require_folder(inputs, split)
    table = options.get("metadata")
    found_scans = [scan for given in inputs for scan in _expand(given, split, Path(table) if table else None)]
    # A scan may be named in several ways, and its folder, which knows of the table, by one of them.
    metadata = {_place(scan.path): scan.metadata for scan in found_scans if scan.metadata is not None}
    paths = slices_together(scan.path for scan in found_scans)
    searched = {scan.path: scan.folder for scan in found_scans}
    warn_of_parts({path: searched.get(path) or path for path in paths})
    found = []
    for path in paths:
        own = {"metadata": metadata[place]} if metadata and (place := _place(path)) in metadata else {}
        found.append(Item(path.absolute(), {**own, **options}))
    if not found:
        raise InputError("no scan in what was given")
    return found


def _place(path: ScanPath) -> ScanPath:
    """The same for all names of a file but links to it."""
    return path if isinstance(path, SliceFiles) else Path(os.path.realpath(path.parent), path.name)


def slices_together(paths: Iterable[_T | ScanPath]) -> list[_T | ScanPath]:
    """DICOM files of one folder as one scan, where the first of them stood; everything else as it is.

    Files of no known kind that are named beside them belong to it, as they may be damaged slices, which whoever reads
    the scan will say. A file alone stays what it is: a scan with too few slices.
    """
    given, folders = list(paths), list[str | None]()
    files: defaultdict[str, list[Path]] = defaultdict(list)
    of_slices: set[str] = set()
    for path in given:
        folder = None
        if isinstance(path, Path) and may_be_slice(path):
            folder = os.path.realpath(path.parent)
            files[folder].append(path)
            if is_slice(path):
                of_slices.add(folder)
        folders.append(folder)
    found: list[_T | ScanPath] = []
    for path, folder in zip(given, folders, strict=True):
        if folder is None or folder not in of_slices:
            found.append(path)
        elif slices := files.pop(folder, None):
            found.append(together(slices))
    return found


def named_scans(given: Iterable[str | ScanPath]) -> list[ScanPath]:
    """The scans that are meant: paths, DICOM files of one folder together, what patterns match.

    Raises:
        InputError: an empty name, a pattern that matches nothing.
    """
    found: list[ScanPath] = []
    for path in given:
        found += _matches(str(path)) if _is_pattern(path) else [as_scan(path)]
    scans = slices_together(found)
    warn_of_parts({path: path for path in scans})
    return scans


def one_scan(given: Iterable[str | ScanPath]) -> ScanPath:
    """The scan that is meant, as in ``named_scans``.

    Raises:
        InputError: several scans, or none.
    """
    scans = named_scans(given)
    if len(scans) > 1:
        raise InputError(f"{scans[0]}, {scans[1]}{', …' if len(scans) > 2 else ''}: {len(scans)} scans; expected one")
    return scans[0]


def _is_pattern(given: str | ScanPath) -> bool:
    return not isinstance(given, SliceFiles) and glob.has_magic(str(given)) and not os.path.exists(given)  # noqa: PTH110


def is_file(given: str | ScanPath) -> bool:
    """Whether a file was named, or slices."""
    return isinstance(given, SliceFiles) or os.path.isfile(named(given))  # noqa: PTH113 (as above)


def require_folder(inputs: Iterable[str | ScanPath], split: str | None) -> None:
    """Raise InputError for a split where all that was named are files, of which it leaves out none."""
    if split is not None and all(map(is_file, inputs)):
        raise InputError("--split: chooses among the scans of a folder, and no folder was named; drop it")


def _matches(pattern: str) -> list[Path]:
    found = map(Path, sorted(glob.glob(pattern, recursive=True)))  # noqa: PTH207 (of any path, absolute ones too)
    matches = [path for path in found if not is_contents(path)]
    if not matches:
        raise InputError(f"{pattern}: no file matches this pattern")
    return matches


def require_there(inputs: Iterable[str | ScanPath]) -> None:
    """Raise InputError if something that was named is not there; of patterns ``find_items`` tells."""
    for given in inputs:
        if not _is_pattern(given):
            require_scan(as_scan(given))


@dataclass(frozen=True)
class _Found:
    path: ScanPath
    metadata: Path | None = None
    #: That was searched.
    folder: Path | None = None


def _expand(given: str | ScanPath, split: str | None, metadata: Path | None) -> Iterator[_Found]:
    """``metadata``: a table that the caller gave, so that those of folders are not asked."""
    if isinstance(given, SliceFiles):
        yield _Found(given)
        return
    path = named(given)
    if path.is_dir():
        yield from (_Found(scan, table, path) for scan, table in find_scans(path, split, metadata))
    elif path.suffix.lower() in _LISTS:
        yield from map(_Found, _read_list(path))
    elif _is_pattern(given):
        for match in _matches(str(given)):
            try:
                yield from _expand(match, split, metadata) if match.is_dir() else [_Found(match)]
            except NoScans as error:
                warnings.warn(f"passed over: {error}", DcformerWarning, stacklevel=2)
    else:
        # One that is not there is a failed scan of its own, as is one that cannot be read.
        yield _Found(path)


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
