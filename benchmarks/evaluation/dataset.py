"""A data set in CT-RATE's layout: which scans it has, what is known of each, and which tables say so."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...runtime.errors import DcformerWarning, InputError
from ...runtime.volume.folder import (
    METADATA_COLUMNS,
    NAME_COLUMN,
    choose_tables,
    find_row,
    find_volumes,
    metadata_files,
    metadata_of,
    natural_order,
    require_one_each,
    table_header,
    table_rows,
    tables_below,
)

REPORT_COLUMNS = ("Findings_EN", "Impressions_EN")
#: What CT-RATE writes into an empty column; the original code drops it.
NOT_GIVEN = "Not given."


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
    """The labelled scans below ``folder``, by name; warns of others, which are left out.

    Args:
        classes: columns of the labels to read.
        split: "valid" or "train": only volumes whose names begin so; needed where the folder holds both.

    Raises:
        InputError: no scans, no labels, a table that is not one or contradicts itself, or a choice left open.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected a data set in CT-RATE's layout")
    volumes = find_volumes(folder, split)
    found = tables_below(folder)
    chosen = {
        "labels": choose_tables(tables.labels, found, classes, f"labels (columns {classes[0]}, …)", required=True),
        "reports": choose_tables(tables.reports, found, REPORT_COLUMNS, "reports"),
        "metadata": choose_tables(tables.metadata, found, METADATA_COLUMNS, "metadata")}
    require_one_each(folder, volumes, (table for given in chosen.values() for table in given))
    labels = _labels(chosen["labels"], classes, folder)
    reports, metadata = _reports(chosen["reports"]), metadata_files(chosen["metadata"])
    names = sorted(volumes, key=natural_order)
    own = {name: find_row(labels, folder, volumes[name], name) for name in names}
    unlabelled = [name for name in names if own[name] is None]
    if len(unlabelled) == len(names):
        raise InputError(f"{folder}: none of its {len(names)} volumes has a row in the labels (the first is "
                         f"{names[0]})")
    if unlabelled:
        warnings.warn(f"{folder}: {len(unlabelled)} of its {len(names)} volumes left out, as they have no row in the "
                      f"labels; the first is {unlabelled[0]}", DcformerWarning, stacklevel=2)
    return [Case(name, volumes[name], row, find_row(reports, folder, volumes[name], name),
                 metadata_of(folder, volumes[name], name, metadata))
            for name, row in own.items() if row is not None]


def has_labels(folder: Path, classes: Sequence[str]) -> bool:
    """Whether a table below the folder has these columns."""
    return any({NAME_COLUMN, *classes} <= table_header(path) for path in tables_below(folder))


def _labels(paths: Sequence[Path], classes: Sequence[str], folder: Path) -> dict[str, tuple[bool, ...]]:
    labels: dict[str, tuple[bool, ...]] = {}
    values = {"0": False, "1": True, "0.0": False, "1.0": True}
    for path, name, row in table_rows(paths):
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
    for path, name, row in table_rows(paths):
        parts = ((row[column] or "").strip() for column in REPORT_COLUMNS)
        text = " ".join(part for part in parts if part and part != NOT_GIVEN)
        if text and reports.setdefault(name, text) != text:
            raise InputError(f"{path}: {name} has two different reports; choose one file with --reports")
    return reports
