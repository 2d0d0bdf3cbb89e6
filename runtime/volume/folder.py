"""Scans below a folder, and the tables that lie beside them in CT-RATE's layout.

CT-RATE (Hamamci et al., arXiv:2403.17834) keeps volumes in ``…/valid_1/valid_1_a/valid_1_a_1.nii.gz`` and tables keyed
by ``VolumeName`` in other folders, whose names have changed over its releases. So tables are recognised by their
columns, wherever below the folder they lie.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..errors import InputError, suggestion
from ..files import require_file
from .dicom_source import find_dicom, is_dicom_source
from .dicom_split import warn_of_split
from .prepared import SUFFIX, is_prepared

NAME_COLUMN = "VolumeName"
METADATA_COLUMNS = ("XYSpacing", "ZSpacing", "RescaleSlope", "RescaleIntercept")
_VOLUMES = (".nii.gz", ".nii")
SCANS = (*_VOLUMES, *(f"{ending}{SUFFIX}" for ending in _VOLUMES))


class NoScans(InputError):
    """A folder without any scan."""


def find_scans(folder: Path, split: str | None = None) -> list[tuple[Path, Path | None]]:
    """All scans below a folder by name, labelled or not, each with the table of its metadata if there is one.

    Raises:
        InputError: no such folder, no scans, or a choice left open.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected one with .nii, .nii.gz or DICOM volumes")
    volumes = find_volumes(folder, split)
    metadata = metadata_files(choose_tables(None, sorted(folder.rglob("*.csv")), METADATA_COLUMNS, "metadata"))
    return [(volumes[name], metadata_of(volumes[name], name, metadata)) for name in sorted(volumes, key=natural_order)]


def find_volumes(folder: Path, split: str | None) -> dict[str, Path]:
    """Path by the name that tables use, which is always that of the compressed file."""
    volumes: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.nii*")):
        if not path.name.endswith(SCANS) or path.name.startswith("."):
            continue
        name = path.name.removesuffix(SUFFIX)
        name = name if name.endswith(".gz") else f"{name}.gz"
        if name in volumes:
            raise InputError(f"{folder}: {name} is there twice: {volumes[name]} and {path}; move one away")
        volumes[name] = path
    volumes |= _dicom(folder, volumes)
    if not volumes:
        raise NoScans(f"{folder}: no .nii, .nii.gz or DICOM volume below it; expected a data set in CT-RATE's "
                         "layout, or any folder of scans")
    splits = sorted({name.split("_")[0] for name in volumes})
    if split is None:
        if len(splits) > 1 and set(splits) & {"train", "valid"}:
            raise InputError(f"{folder}: holds volumes of {', '.join(splits)}; choose with --split")
        return volumes
    chosen = {name: path for name, path in volumes.items() if name.startswith(f"{split}_")}
    if not chosen:
        raise InputError(f"{folder}: no volume of split {split!r}{suggestion(split, splits)}; there are "
                         f"{', '.join(splits[:5])}")
    return chosen


def _dicom(folder: Path, taken: Mapping[str, Path]) -> dict[str, Path]:
    """Folders of slices and zip files, by the name that a table would use; by their path where that is not unique."""
    found = dict(find_dicom(folder))
    warn_of_split({path: first for path, first in found.items() if path != first})
    names = Counter(path.stem if path.suffix == ".zip" else path.name for path in found)
    volumes = {}
    for path in found:
        name = path.stem if path.suffix == ".zip" else path.name
        if names[name] > 1 or f"{name}.nii.gz" in taken:
            name = str(path.relative_to(folder))
        volumes[f"{name}.nii.gz"] = path
    return volumes


def metadata_of(path: Path, name: str, metadata: Mapping[str, Path]) -> Path | None:
    """The table that says how to read a volume; None for one that is prepared or DICOM, of which all is known."""
    return None if is_prepared(path) or is_dicom_source(path) else metadata.get(name)


def natural_order(name: str) -> tuple[object, ...]:
    """valid_2 before valid_10."""
    return tuple((1, int(part), "") if part.isdigit() else (0, 0, part)
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
    """Rows of CSV files: the file, the volume's name, the row."""
    for path in paths:
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                for row in csv.DictReader(file):
                    name = (row[NAME_COLUMN] or "").strip()
                    yield path, name if name.endswith(".gz") else f"{name}.gz", row
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path}: not a CSV text file ({error})") from error


def metadata_files(paths: Sequence[Path]) -> dict[str, Path]:
    """The file in which to look a volume up; its values are read when the volume is."""
    return {name: path for path, name, _ in table_rows(paths)}
