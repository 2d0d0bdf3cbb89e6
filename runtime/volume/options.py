"""What a caller knows better than the file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError
from .types import Spacing

AS_STORED = "as-stored"
_LARGEST_MM = 1000.0


@dataclass(frozen=True)
class ReadOptions:
    """Overrides for one scan; None leaves a matter to the file.

    ``spacing``: mm along the stored axes, (x, y, z), or (xy, z) as CT-RATE's metadata gives it.
    ``slope``, ``intercept``: HU = slope * value + intercept, on top of the file's own scaling.
    ``orientation``: "as-stored" keeps the stored axes; the manifest's code, like None, reorients by the header.
    ``metadata``: a CSV in CT-RATE's layout; supplies spacing, slope and intercept by file name.
    ``series``: of several DICOM series, the one with this SeriesInstanceUID. ``resample_irregular``: interpolate DICOM
    slices with gaps, uneven distances or a tilted gantry, instead of refusing them.
    """

    spacing: Sequence[float] | None = None
    slope: float | None = None
    intercept: float | None = None
    orientation: str | None = None
    metadata: str | Path | None = None
    series: str | None = None
    resample_irregular: bool | None = None

    def __post_init__(self) -> None:
        if self.spacing is not None:
            require_spacing("spacing", expand_spacing(self.spacing), "give positive millimetres")
        for field in ("slope", "intercept"):
            value = getattr(self, field)
            if value is not None and not (isinstance(value, int | float | np.number) and math.isfinite(value)):
                raise InputError(f"{field}: {value!r}; expected a finite number")
        if self.slope == 0:
            raise InputError("slope: 0 would make every voxel equal; expected the rescale slope, usually 1")


#: Nothing overridden.
AS_IN_FILE = ReadOptions()


def expand_spacing(spacing: Sequence[float]) -> Spacing:
    """(xy, z) or (x, y, z) to (x, y, z)."""
    try:
        if isinstance(spacing, str | bytes):  # a sequence, too: "123" would be 1 x 2 x 3
            raise TypeError
        values = [float(v) for v in spacing]
    except (TypeError, ValueError) as error:
        raise InputError(f"spacing: {spacing!r}; expected numbers, in mm") from error
    if len(values) == 2:
        return values[0], values[0], values[1]
    if len(values) == 3:
        return values[0], values[1], values[2]
    raise InputError(f"spacing: {len(values)} numbers; expected three (x y z) or two (xy z), in mm")


def require_spacing(where: str, spacing: Spacing, remedy: str) -> None:
    """Raise InputError unless all three are positive, and those of a scan."""
    if not all(0 < mm <= _LARGEST_MM for mm in spacing):
        raise InputError(f"{where} is {in_mm(spacing)}; expected positive numbers up to {_LARGEST_MM:g}; {remedy}")


def in_mm(spacing: Sequence[float]) -> str:
    """For messages."""
    return " x ".join(f"{mm:g}" for mm in spacing) + " mm"
