"""Pixels that are no part of what was scanned, such as the corners around a round field of view.

Source: DICOM PS3.3, C.7.5.1.1.2: the padding value is one of the stored values, before slope and intercept, and no
pixel of the scan itself has it. Scanners make it darker than air, or so they mean: read without its sign, or in fewer
bits than it was written in, it is brighter than bone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset

from ..errors import InputError
from .types import LinearMap

#: What is set instead, and what is bright: everything up to pure air is the same to any window of a chest.
AIR_HU, _BRIGHT_HU = -1024.0, -1000.0
#: Some headers name a value that the scan itself has. Then those next to it are there, too, and more of them.
_NEIGHBOURS = 8


@dataclass(frozen=True)
class Padding:
    """Stored values, as pixels are decoded, of pixels that are padding."""

    lowest: int
    highest: int


def read_padding(name: str, header: Dataset) -> Padding | None:
    """What a slice's header says; None where it says nothing.

    Args:
        name: of the file.

    Raises:
        InputError: values that are no numbers.
    """
    value = _stored(name, header, "PixelPaddingValue")
    if value is None:
        return None
    limit = _stored(name, header, "PixelPaddingRangeLimit")
    limit = value if limit is None else limit
    return Padding(min(value, limit), max(value, limit))


def bright_padding(plane: NDArray[Any], padding: Padding, scaling: LinearMap) -> NDArray[np.bool_] | None:
    """Where a slice is padding that would be taken for a part of the patient; None for nowhere.

    Args:
        plane: as stored. scaling: to HU.
    """
    ends = [scaling.slope * value + scaling.intercept for value in (padding.lowest, padding.highest)]
    if min(ends) <= _BRIGHT_HU or plane.dtype.kind == "f":  # the value is an integer, and means those
        return None
    found = (plane >= padding.lowest) & (plane <= padding.highest)
    count = int(np.count_nonzero(found))
    around = int(np.count_nonzero((plane >= padding.lowest - _NEIGHBOURS) & (plane <= padding.highest + _NEIGHBOURS)))
    return found if count > around - count else None


def stored_air(dtype: np.dtype[Any], scaling: LinearMap) -> Any:
    """The stored value nearest to ``AIR_HU``."""
    limits = np.iinfo(dtype)
    return dtype.type(round(min(max((AIR_HU - scaling.intercept) / scaling.slope, limits.min), limits.max)))


def _stored(name: str, header: Dataset, tag: str) -> int | None:
    """As the pixels are decoded: with their sign, and of their bits those that are stored."""
    value = header.get(tag)
    if isinstance(value, bytes):  # of no known sign, without explicit representations
        value = int.from_bytes(value[:2], "little") if value else None
    if value is None or value == "":
        return None
    bits, signed = header.get("BitsStored"), header.get("PixelRepresentation")
    if not isinstance(value, int) or not isinstance(bits, int) or not 1 <= bits <= 32 or signed not in (0, 1):
        raise InputError(f"{name}: {tag} is {value!r}, BitsStored {bits!r}, PixelRepresentation {signed!r}; expected a "
                         "number, 1 to 32, and 0 or 1")
    value &= (1 << bits) - 1
    return value - (1 << bits) if signed and value >> (bits - 1) else value
