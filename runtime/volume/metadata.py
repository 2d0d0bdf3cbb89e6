"""CT-RATE's metadata CSV: spacing, slope and intercept of volumes whose NIfTI headers are blank."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..errors import InputError
from ..files import require_file
from .types import Spacing

_COLUMNS = ("VolumeName", "XYSpacing", "ZSpacing", "RescaleSlope", "RescaleIntercept")


@dataclass(frozen=True)
class VolumeMetadata:
    """One row: spacing in mm along the stored axes, and HU = slope * value + intercept."""

    spacing_xyz_mm: Spacing
    slope: float
    intercept: float


def read_metadata(path: str | Path, volume: Path) -> VolumeMetadata:
    """The row of a volume in a CSV with CT-RATE's columns; ``XYSpacing`` is written ``[x, y]``.

    Args:
        volume: listed by its name, or by the end of its path, of which the longest that is listed counts.

    Raises:
        InputError: no such file, column or volume, or a value that is no usable number.
    """
    path = Path(path)
    require_file(path, "metadata CSV")
    facts = path.stat()
    table = _table(path, facts.st_mtime_ns, facts.st_size)
    volume_name, parts = volume.name, volume.absolute().parts
    ends = (table_name("/".join(parts[-count:])) for count in range(len(parts), 0, -1))
    rows = next((table[end] for end in ends if end in table), ())
    if not rows:
        raise InputError(f"{path}: no row with VolumeName {volume_name!r}")
    if any(row != rows[0] for row in rows):
        raise InputError(f"{path}: {len(rows)} different rows for {volume_name!r}; expected one")
    row = rows[0]
    x, y = _numbers(path, volume_name, row, "XYSpacing", 2)
    (z,) = _numbers(path, volume_name, row, "ZSpacing", 1)
    (slope,) = _numbers(path, volume_name, row, "RescaleSlope", 1)
    (intercept,) = _numbers(path, volume_name, row, "RescaleIntercept", 1)
    if min(x, y, z) <= 0 or slope == 0:
        raise InputError(f"{path}: {volume_name}: spacing {x:g} x {y:g} x {z:g} mm, slope {slope:g}; expected positive "
                         "spacing and a slope other than 0")
    return VolumeMetadata((x, y, z), slope, intercept)


def table_name(name: str) -> str:
    """The name under which tables are searched: CT-RATE lists x.nii.gz, and the file at hand may be x.nii or X.NII.

    Blanks around it, which come with tables that were edited by hand, are no part of it.
    """
    name = name.strip()
    stem = name[: -len(".gz")] if name.lower().endswith(".gz") else name
    return f"{stem[: -len('.nii')]}.nii.gz" if stem.lower().endswith(".nii") else f"{stem}.gz"


@lru_cache(maxsize=4)
def _table(path: Path, changed_ns: int, size: int) -> dict[str, list[dict[str, str]]]:
    """Rows by volume, as ``table_name`` has it. Kept, as one table may be asked about fifty thousand scans."""
    del changed_ns, size  # another table
    found: dict[str, list[dict[str, str]]] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if missing := [name for name in _COLUMNS if name not in (reader.fieldnames or ())]:
                raise InputError(f"{path}: no column {missing[0]}; expected CT-RATE's: {', '.join(_COLUMNS)}")
            for row in reader:
                found.setdefault(table_name(row["VolumeName"] or ""), []).append({name: row[name] for name in _COLUMNS})
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV text file ({error})") from error
    return found


def as_numbers(text: str) -> list[float] | str:
    """What a cell says: ``[0.7, 0.7]`` is two numbers; one that holds none stays text."""
    try:
        return [float(part) for part in re.sub(r"[\[\]()]", "", text).split(",")]
    except ValueError:
        return text.strip()


def _numbers(path: Path, volume_name: str, row: dict[str, str], column: str, count: int) -> list[float]:
    text = row[column] or ""
    values = found if isinstance(found := as_numbers(text), list) else []
    if len(values) != count or not all(math.isfinite(value) for value in values):
        raise InputError(f"{path}: {volume_name}: {column} is {text!r}; expected {count} number{'s' * (count > 1)}")
    return values
