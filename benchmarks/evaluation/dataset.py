"""A folder in CT-RATE's layout: which scans it has, what is known of each, and which tables say so.

CT-RATE (Hamamci et al., arXiv:2403.17834) keeps volumes in ``…/valid_1/valid_1_a/valid_1_a_1.nii.gz`` and tables keyed
by ``VolumeName`` in other folders, whose names have changed over its releases. So tables are recognised by their
columns, wherever below the folder they lie.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...runtime.errors import InputError, suggestion
from ...runtime.files import require_file

NAME_COLUMN = "VolumeName"
REPORT_COLUMNS = ("Findings_EN", "Impressions_EN")
METADATA_COLUMNS = ("XYSpacing", "ZSpacing", "RescaleSlope", "RescaleIntercept")
#: What CT-RATE writes into an empty column; the original code drops it.
NOT_GIVEN = "Not given."
_VOLUMES = (".nii.gz", ".nii")


@dataclass(frozen=True)
class Tables:
    """CSV files given by the user instead of those found by their columns; None = find it."""

    labels: Path | None = None
    reports: Path | None = None
    metadata: Path | None = None


@dataclass(frozen=True)
class Case:
    """One scan: labels in the order of the classes, its report (None if there is none or an empty one)."""

    name: str
    path: Path
    labels: tuple[bool, ...]
    report: str | None
    metadata: Path | None


def read_dataset(folder: Path, classes: Sequence[str], tables: Tables, split: str | None = None) -> list[Case]:
    """The labelled scans below ``folder``, by name.

    Args:
        classes: columns of the labels to read.
        split: "valid" or "train": only volumes whose names begin so; needed where the folder holds both.

    Raises:
        InputError: no scans, no labels, a table that is not one or contradicts itself, or a choice left open.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected a data set in CT-RATE's layout")
    volumes = _find_volumes(folder, split)
    found = sorted(folder.rglob("*.csv"))
    labels = _labels(_choose(tables.labels, found, classes, f"labels (columns {classes[0]}, …)", required=True),
                     classes, folder)
    reports = _reports(_choose(tables.reports, found, REPORT_COLUMNS, "reports"))
    metadata = _metadata_files(_choose(tables.metadata, found, METADATA_COLUMNS, "metadata"))
    cases = [Case(name, path, labels[name], reports.get(name), metadata.get(name))
             for name, path in sorted(volumes.items(), key=lambda item: _natural(item[0])) if name in labels]
    if not cases:
        first = next(iter(volumes))
        raise InputError(f"{folder}: none of its {len(volumes)} volumes has a row in the labels (the first is {first})")
    return cases


def has_labels(folder: Path, classes: Sequence[str]) -> bool:
    """Whether a table below the folder has these columns."""
    return any({NAME_COLUMN, *classes} <= _header(path) for path in sorted(folder.rglob("*.csv")))


def find_scans(folder: Path, split: str | None = None) -> list[tuple[Path, Path | None]]:
    """All scans below a folder by name, labelled or not, each with the table of its metadata if there is one.

    Raises:
        InputError: no such folder, no scans, or a choice left open.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected one with .nii or .nii.gz volumes")
    volumes = _find_volumes(folder, split)
    metadata = _metadata_files(_choose(None, sorted(folder.rglob("*.csv")), METADATA_COLUMNS, "metadata"))
    return [(path, metadata.get(name)) for name, path in sorted(volumes.items(), key=lambda item: _natural(item[0]))]


def _find_volumes(folder: Path, split: str | None) -> dict[str, Path]:
    """Path by the name that tables use, which is always that of the compressed file."""
    volumes: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.nii*")):
        if not path.name.endswith(_VOLUMES) or path.name.startswith("."):
            continue
        name = path.name if path.name.endswith(".gz") else path.name + ".gz"
        if name in volumes:
            raise InputError(f"{folder}: {name} is there twice: {volumes[name]} and {path}; move one away")
        volumes[name] = path
    if not volumes:
        raise InputError(f"{folder}: no .nii or .nii.gz volume below it; expected a data set in CT-RATE's layout")
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


def _natural(name: str) -> tuple[object, ...]:
    """valid_2 before valid_10."""
    return tuple((1, int(part), "") if part.isdigit() else (0, 0, part)
                 for part in name.removesuffix(".nii.gz").split("_"))


def _choose(given: Path | None, found: Iterable[Path], columns: Sequence[str], what: str, required: bool = False
            ) -> list[Path]:
    """The given table, or all found with these columns."""
    if given is not None:
        require_file(given, f"CSV of {what}")
        if missing := [name for name in (NAME_COLUMN, *columns) if name not in _header(given)]:
            raise InputError(f"{given}: no column {missing[0]!r}; expected {NAME_COLUMN}, {', '.join(columns[:3])}"
                             f"{', …' if len(columns) > 3 else ''}")
        return [given]
    chosen = [path for path in found if {NAME_COLUMN, *columns} <= _header(path)]
    if required and not chosen:
        raise InputError(f"no CSV with {NAME_COLUMN} and {what} in the data set; pass --labels FILE")
    return chosen


def _header(path: Path) -> set[str]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return set(next(csv.reader(file), ()))
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise InputError(f"{path}: not a CSV text file ({error}); mend it or move it out of the data set") from error


def _rows(paths: Iterable[Path]) -> Iterable[tuple[Path, str, dict[str, str]]]:
    for path in paths:
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                for row in csv.DictReader(file):
                    name = (row[NAME_COLUMN] or "").strip()
                    yield path, name if name.endswith(".gz") else f"{name}.gz", row
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path}: not a CSV text file ({error})") from error


def _labels(paths: Sequence[Path], classes: Sequence[str], folder: Path) -> dict[str, tuple[bool, ...]]:
    labels: dict[str, tuple[bool, ...]] = {}
    values = {"0": False, "1": True, "0.0": False, "1.0": True}
    for path, name, row in _rows(paths):
        for column in classes:
            if (row[column] or "").strip() not in values:
                raise InputError(f"{path}: {name}: {column} is {row[column]!r}; expected 0 or 1")
        row_labels = tuple(values[row[column].strip()] for column in classes)
        if labels.setdefault(name, row_labels) != row_labels:
            raise InputError(f"{folder}: {name} has two different rows of labels in {', '.join(map(str, paths))}; "
                             "choose one file with --labels")
    return labels


def _reports(paths: Sequence[Path]) -> dict[str, str]:
    """Findings and impression as the original joins them: placeholder and blanks dropped."""
    reports: dict[str, str] = {}
    for path, name, row in _rows(paths):
        parts = ((row[column] or "").strip() for column in REPORT_COLUMNS)
        text = " ".join(part for part in parts if part and part != NOT_GIVEN)
        if text and reports.setdefault(name, text) != text:
            raise InputError(f"{path}: {name} has two different reports; choose one file with --reports")
    return reports


def _metadata_files(paths: Sequence[Path]) -> dict[str, Path]:
    """The file in which to look a volume up; its values are read when the volume is."""
    return {name: path for path, name, _ in _rows(paths)}
