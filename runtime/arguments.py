"""What callers of the model pass, and what graphs give back: usable, or refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends.borrow import borrow
from .errors import InferenceError, InputError
from .manifest import Preprocessing
from .results import Prepared
from .scan_files import as_scan

#: What results call a scan that came as an array.
ARRAY = "array"


def require_preprocessed(volumes: NDArray[Any], spec: Preprocessing) -> None:
    """Raise InputError unless these are preprocessed volumes ``[B, D, H, W]``."""
    if volumes.ndim != 4 or volumes.shape[1:] != spec.shape_dhw:
        sides = ", ".join(map(str, spec.shape_dhw))
        raise InputError(f"volumes: shape {list(volumes.shape)}; expected [batch, {sides}] (D, H, W), preprocessed")
    if volumes.dtype.kind != "f" or not volumes.size:
        raise InputError(f"volumes: {volumes.size} values of {volumes.dtype}; expected float32")
    low, high = float(volumes.min()), float(volumes.max())  # NaN anywhere makes both NaN
    if not np.isfinite([low, high]).all():
        raise InputError("volumes: NaN or infinite values; expected a finite preprocessed volume")
    lowest, highest = spec.value_range
    if low < lowest - 1e-4 or high > highest + 1e-4:
        raise InputError(f"volumes: values from {low:g} to {high:g}; expected a preprocessed volume in [{lowest:g}, "
                         f"{highest:g}]. Pass a file, or use preprocess()")


def require_tokens(ids: NDArray[np.integer], mask: NDArray[np.integer]
                   ) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Both as arrays. Raises InputError unless they are token ids and their attention mask, ``[n, length]``."""
    ids, mask = np.asarray(ids), np.asarray(mask)
    if ids.ndim != 2 or ids.shape != mask.shape or not ids.size:
        raise InputError(f"token ids {list(ids.shape)} and mask {list(mask.shape)}: expected two equal [n, length]")
    if ids.dtype.kind not in "iu" or mask.dtype.kind not in "iub" or ids.min() < 0:
        raise InputError(f"token ids are {ids.dtype} from {ids.min()}, mask {mask.dtype}; expected integers from 0")
    if mask.min() < 0 or mask.max() > 1:
        raise InputError(f"attention mask holds {mask.min()} to {mask.max()}; expected 1 for tokens, 0 for padding")
    return ids, mask


def class_names(classes: Sequence[str]) -> tuple[str, ...]:
    """The names. Raises InputError unless they are texts, at least one, and each only once."""
    names = tuple(classes) if isinstance(classes, Iterable) else ()
    if isinstance(classes, str) or not all(isinstance(name, str) and name.strip() for name in names):
        raise InputError(f"classes: {classes!r}; expected a list of names")
    if not names or len(set(names)) != len(names):
        raise InputError("classes: expected at least one name, each only once")
    return tuple(str(name) for name in names)


def require_finite(where: str, names: Sequence[str], arrays: Sequence[NDArray[Any]]) -> None:
    """Raise InferenceError if an output is not finite: nothing that is made of it would mean anything."""
    for name, array in zip(names, arrays, strict=True):
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InferenceError(f"{where}: {name} is not finite; in fp16 values beyond 65504 overflow (use another "
                                 "--precision), in fp32 the weights are damaged (export the bundle again)")


def scan_name(scan: Any) -> str:
    """What results call a scan: its path or paths, or "array"."""
    if isinstance(scan, Prepared):
        return scan.volume
    return ARRAY if isinstance(scan, np.ndarray) or borrow(scan) is not None else str(as_scan(scan))
