"""Scans below a folder, and the tables that lie beside them in CT-RATE's layout.

CT-RATE (Hamamci et al., arXiv:2403.17834) keeps volumes in ``…/valid_1/valid_1_a/valid_1_a_1.nii.gz`` and tables keyed
by ``VolumeName`` in other folders, whose names have changed over its releases. So tables are recognised by their
columns, wherever below the folder they lie.
"""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from ..errors import InputError, suggestion
from ..files import require_file
from ..scan_files import visible_files
from .dicom_source import find_dicom, is_dicom_source
from .dicom_split import warn_of_split
from .metadata import as_numbers, table_name
from .prepared import SUFFIX, is_prepared

NAME_COLUMN = "VolumeName"
METADATA_COLUMNS = ("XYSpacing", "ZSpacing", "RescaleSlope", "RescaleIntercept")
#: Endings of volumes, and of tables, in small letters; names may have them in capitals.
_VOLUMES, _TABLES = (".nii.gz", ".nii"), (".csv",)
SCANS = (*_VOLUMES, *(f"{ending}{SUFFIX}" for ending in _VOLUMES))
_SPLITS = ("train", "valid")
_T = TypeVar("_T")


class NoScans(InputError):
    """A folder without any scan."""


def find_scans(folder: Path, split: str | None = None, metadata: Path | None = None
               ) -> list[tuple[Path, Path | None]]:
    """All scans below a folder by name, labelled or not, each with the table of its metadata if there is one.

    Args:
        metadata: a table instead of those below the folder.

    Raises:
        InputError: no such folder, no scans, or a choice left open.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected one with .nii, .nii.gz or DICOM volumes")
    volumes = find_volumes(folder, split)
    tables = choose_tables(metadata, tables_below(folder), METADATA_COLUMNS, "metadata")
    files = dict[str, Path]()
    if metadata is None:
        files = metadata_files(tables)
    else:  # the caller reads all by it; it may be long, and asked of for many folders
        require_one_each(folder, volumes, tables)
    return [(volumes[name], metadata_of(folder, volumes[name], name, files))
            for name in sorted(volumes, key=natural_order)]


def find_volumes(folder: Path, split: str | None) -> dict[str, Path]:
    """Path by the name that tables use, always that of the compressed file; by its place where several have that name.

    Raises:
        InputError: no scans, a choice left open, a file and its copy in another form in one folder, or a table below
            the folder that names what several are called.
    """
    volumes = _nifti(folder)
    volumes |= _dicom(folder, volumes)
    if not volumes:
        raise NoScans(f"{folder}: no .nii, .nii.gz or DICOM volume below it; expected a data set in CT-RATE's "
                         "layout, or any folder of scans")
    volumes = _of_split(folder, volumes, split)
    require_one_each(folder, volumes, (table for table in tables_below(folder) if NAME_COLUMN in table_header(table)))
    return volumes


def _nifti(folder: Path) -> dict[str, Path]:
    """Files, prepared ones too."""
    files = [path for path in visible_files(folder, SCANS) if path.name.removesuffix(SUFFIX).lower().endswith(_VOLUMES)]
    names = Counter(map(_listed_as, files))
    volumes: dict[str, Path] = {}
    for path in files:
        name = _listed_as(path)
        place = name if names[name] == 1 else _place(folder, path)
        if (other := volumes.setdefault(place, path)) != path:
            raise InputError(f"{folder}: {name} is there twice: {other} and {path}; move one away")
    return volumes


def _dicom(folder: Path, files: Mapping[str, Path]) -> dict[str, Path]:
    """Folders of slices and zip files; ``files``: by name, those of other kinds, which come first."""
    found = dict(find_dicom(folder))
    warn_of_split({path: first for path, first in found.items() if path != first})
    names = Counter(map(_listed_as, found))
    taken = set(map(_listed_as, files.values()))
    volumes = {}
    for path in found:
        name = _listed_as(path)
        if names[name] > 1 or name in taken:
            name = f"{path.relative_to(folder)}.nii.gz"
            name = str(path.relative_to(folder)) if name in files else name  # a folder, and what it was converted to
        volumes[name] = path
    return volumes


def _listed_as(path: Path) -> str:
    """The name by which a table would list a scan; for DICOM as if it had been converted."""
    name = path.name.removesuffix(SUFFIX)
    if name.lower().endswith(_VOLUMES):
        return table_name(name)
    return f"{path.stem if path.suffix.lower() == '.zip' else path.name}.nii.gz"


def _place(folder: Path, path: Path) -> str:
    """Where it lies below the folder, under the name by which a table would list it."""
    parent = path.relative_to(folder).parent
    return str(parent / _listed_as(path))


def find_row(rows: Mapping[str, _T], folder: Path, path: Path, name: str) -> _T | None:
    """What tables say of a scan: of its place below the folder, or else of its name; None where they say nothing.

    Args:
        rows: by the names in the tables. name: as ``find_volumes`` has it.
    """
    place = _place(folder, path)
    # A folder of slices beside the file that was made of it is called otherwise, and that place is the file's.
    found = rows.get(place) if name in (place, _listed_as(path)) else None
    return rows.get(name) if found is None else found


def _of_split(folder: Path, volumes: Mapping[str, Path], split: str | None) -> dict[str, Path]:
    """Those whose name, or a folder that tells them apart, begins with the split."""
    splits = sorted(set(map(_split_of, volumes)))
    if split is None:
        if len(splits) > 1 and set(splits) & set(_SPLITS):
            raise InputError(f"{folder}: holds volumes of {', '.join(splits)}; choose with --split")
        return dict(volumes)
    chosen = {name: path for name, path in volumes.items()
              if any(f"{part}_".startswith(f"{split}_") for part in name.split("/"))}
    if not chosen:
        raise InputError(f"{folder}: no volume of split {split!r}{suggestion(split, splits)}; there are "
                         f"{', '.join(splits[:5])}")
    return chosen


def _split_of(name: str) -> str:
    beginnings = [part.split("_")[0] for part in reversed(name.split("/"))]
    return next((part for part in beginnings if part in _SPLITS), beginnings[0])


def require_one_each(folder: Path, volumes: Mapping[str, Path], tables: Iterable[Path]) -> None:
    """Raise InputError if a table names what several volumes are called, so that nobody knows which it means.

    It does not where all of them are listed by their places, of which one may be no more than its name.

    Args:
        volumes: as ``find_volumes`` has them. tables: with a column of names.
    """
    called: defaultdict[str, list[Path]] = defaultdict(list)
    for path in volumes.values():
        called[_listed_as(path)].append(path)
    # A file goes before DICOM, which it was made of.
    files = {name: [path for path in paths if not is_dicom_source(path) or is_prepared(path)] or paths
             for name, paths in called.items() if len(paths) > 1}
    several = {name: paths for name, paths in files.items() if len(paths) > 1}
    listed = {name: table for table, name, _ in table_rows(tables)} if several else {}
    for name, table in listed.items():
        if name in several and not {_place(folder, path) for path in several[name]} <= listed.keys():
            first, second, *_ = several[name]
            raise InputError(f"{folder}: {name} is there twice: {first} and {second}, and {table} names it; move one "
                             "away, or list both by their places below the folder")


def tables_below(folder: Path) -> list[Path]:
    """CSV files, with whatever columns."""
    return visible_files(folder, _TABLES)


def metadata_of(folder: Path, path: Path, name: str, metadata: Mapping[str, Path]) -> Path | None:
    """The table that says how to read a volume; None for one that is prepared or DICOM, of which all is known."""
    return None if is_prepared(path) or is_dicom_source(path) else find_row(metadata, folder, path, name)


def natural_order(name: str) -> tuple[object, ...]:
    """valid_2 before valid_10."""
    return tuple((1, int(part), "") if part.isdecimal() else (0, 0, part)
                 for part in name.removesuffix(".nii.gz").split("_"))


def choose_tables(given: Path | None, found: Iterable[Path], columns: Sequence[str], what: str, required: bool = False
            ) -> list[Path]:
    """The given table, or all found with these columns.

    Raises:
        InputError: columns that are missing, or no table where one is required.
    """
    if given is not None:
        require_file(given, f"CSV of {what}")
        if missing := [name for name in (NAME_COLUMN, *columns) if name not in table_header(given)]:
            raise InputError(f"{given}: no column {missing[0]!r}; expected {NAME_COLUMN}, {', '.join(columns[:3])}"
                             f"{', …' if len(columns) > 3 else ''}")
        return [given]
    chosen = [path for path in found if {NAME_COLUMN, *columns} <= table_header(path)]
    if required and not chosen:
        raise InputError(f"no CSV with {NAME_COLUMN} and {what} in the data set; pass --labels FILE")
    return chosen


def table_header(path: Path) -> set[str]:
    """Columns of a CSV."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return set(next(csv.reader(file), ()))
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise InputError(f"{path}: not a CSV text file ({error}); mend it or move it out of the data set") from error


def table_rows(paths: Iterable[Path]) -> Iterable[tuple[Path, str, dict[str, str]]]:
    """Rows of CSV files: the file, the volume's name as ``table_name`` has it, the row."""
    for path in paths:
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                for row in csv.DictReader(file):
                    yield path, table_name(row[NAME_COLUMN] or ""), row
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path}: not a CSV text file ({error})") from error


def metadata_files(paths: Sequence[Path]) -> dict[str, Path]:
    """The file in which to look a volume up; its values are read when the volume is.

    Raises:
        InputError: files that say different things of a volume.
    """
    found, firsts = dict[str, Path](), dict[str, tuple[Path, dict[str, str]]]()
    for path, name, row in table_rows(paths):
        found[name] = path
        first, other = firsts.setdefault(name, (path, {column: row[column] or "" for column in METADATA_COLUMNS}))
        for column, value in other.items() if first != path else ():
            if (row[column] or "") != value and as_numbers(row[column] or "") != as_numbers(value):
                raise InputError(f"{first} and {path} contradict each other: {name}: {column} is {value!r} and "
                                 f"{row[column] or ''!r}; move one away, or choose one with --metadata where the "
                                 "command takes it")
    return found
