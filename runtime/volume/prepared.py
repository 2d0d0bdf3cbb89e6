"""Scans whose preprocessing is done: what an image tower reads, in one compressed file.

A file is a zipped Zarr group (``zarr`` opens it, too) with one array for each input of the image tower, in 16 bits, and
attributes that say where it comes from and what it was prepared for; for another preprocessing it is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import struct
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..files import HAS_LOCKS, atomic_file, lock_file, require_file
from ..manifest import Preprocessing, TensorInfo

#: Behind the name of the scan: ``scan.nii.gz.prepared.zip``.
SUFFIX = ".prepared.zip"
FORMAT = "dcformer-deploy prepared scan 1"
Values = Literal["int16", "float16"]
#: Steps of int16 between the smallest and the largest value of a preprocessed volume.
_STEPS = 2 * 32767
#: Attributes and the archive's own tables.
_LARGEST_OVERHEAD = 1 << 20
#: What is written; anything else might run code, or unpack without end.
_CODECS = ["BytesCodec", "BloscCodec"]
_DTYPES: dict[str, type[np.generic]] = {"int16": np.int16, "float16": np.float16}
#: A Blosc chunk begins with 16 bytes; the fourth to seventh are its unpacked size.
_BLOSC_HEADER = struct.Struct("<4xI8x")
_CHUNKS = 4
#: The temporary folder of ``atomic_file``, with the beginning of the file's name.
_TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.tmp")


@dataclass(frozen=True)
class Origin:
    """Where a prepared scan comes from: the file as it was read, and how it was read."""

    path: str
    bytes: int
    changed_ns: int
    sha256: str
    options: dict[str, Any]


@dataclass(frozen=True)
class PreparedScan:
    """``feeds``: by input, ``[1, 1, D, H, W]`` or lines of it, in the input's dtype. The others as in ``Prepared``."""

    feeds: dict[str, NDArray[np.floating]]
    shape_hwd: tuple[int, ...] | None
    spacing_hwd_mm: tuple[float, ...] | None
    orientation: str | None
    hounsfield: str | None
    notes: str | None


def is_prepared(path: str | Path) -> bool:
    """By the file's name."""
    return str(path).endswith(SUFFIX)


def write_prepared(path: Path, scan: PreparedScan, spec: Preprocessing, origin: Origin, values: Values) -> None:
    """Write a scan, whole or not at all.

    Args:
        values: "int16" is within 1.6e-5 of values in [-1, 1], "float16" within 2.5e-4 and a third smaller.
    """
    import zarr
    from zarr.codecs import BloscCodec
    from zarr.storage import MemoryStore

    arrays = {name: _to_16_bits(array, spec, values) for name, array in scan.feeds.items()}
    about = {"format": FORMAT, **_purpose(spec, {name: array.shape for name, array in arrays.items()}),
             "values": values, "origin": dataclasses.asdict(origin), "sha256": _digest(arrays),
             "scan": {field.name: getattr(scan, field.name) for field in dataclasses.fields(scan)
                      if field.name != "feeds"}}
    codec = BloscCodec(cname="zstd", clevel=1, shuffle="shuffle")
    # Not into a ZipStore: where the disk is full, what Zarr still has to write opens the file again, after its end.
    content: dict[str, Any] = {}
    group = zarr.create_group(MemoryStore(content), attributes=about)
    for name, array in arrays.items():
        chunk = (1, 1, -(-array.shape[2] // _CHUNKS), *array.shape[3:])
        group.create_array(name, data=array, chunks=chunk, compressors=codec)
    with written_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, value in sorted(content.items()):
            archive.writestr(zipfile.ZipInfo(name), value.to_bytes())  # of no date: the same scan, the same file


@contextlib.contextmanager
def written_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name once it is whole and on disk, as ``atomic_file``; ``remove_leftovers`` spares it."""
    with contextlib.ExitStack() as until_it_is_named, atomic_file(path) as temporary, temporary.open("wb") as file:
        with contextlib.suppress(OSError):  # file systems without locks: nobody removes anything there, either
            lock_file(until_it_is_named.enter_context(temporary.open("r+b")).fileno())
        yield file
        file.flush()
        os.fsync(file.fileno())


def remove_leftovers(paths: Iterable[Path]) -> None:
    """Remove what programs left that were killed while they wrote these files; not what another one is writing now."""
    names: defaultdict[Path, list[str]] = defaultdict(list)
    for path in paths:
        names[path.parent].append(path.name)
    for folder, own in names.items():
        for leftover in folder.glob(".*.tmp"):
            named = _TEMPORARY.fullmatch(leftover.name)
            if named and any(name.startswith(named[1]) for name in own) and _is_abandoned(leftover):
                shutil.rmtree(leftover, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    """Whether nobody holds a file in it; a folder without any is one that was just made, or about to be removed."""
    try:
        files = list(folder.iterdir())
        for file in files:
            with file.open("r+b") as opened:
                lock_file(opened.fileno())
    except OSError:  # locked, gone meanwhile, or on a file system where nobody can tell
        return False
    return bool(files) and HAS_LOCKS


def read_origin(path: Path) -> tuple[Origin, Values]:
    """Where a prepared scan comes from. Raises ``InputError`` like ``read_prepared``."""
    about = _open(path, {})[0]
    try:
        return Origin(**about["origin"]), about["values"]
    except (KeyError, TypeError) as error:
        raise _damaged(path, error) from error


def read_prepared(path: Path, inputs: Sequence[TensorInfo], spec: Preprocessing) -> PreparedScan:
    """What an image tower reads of a prepared scan.

    Raises:
        InputError: no such file, damaged, or prepared for another preprocessing or image tower.
    """
    shapes = {info.name: (1, *map(int, info.axes[1:])) for info in inputs}
    about, arrays = _open(path, shapes, _purpose(spec, shapes))
    if about.get("sha256") != _digest(arrays):
        raise InputError(f"{path}: its values are not those that were written; damaged, prepare it again")
    dtypes = {info.name: info.dtype for info in inputs}
    try:
        if any(array.dtype != _DTYPES[about["values"]] for array in arrays.values()):
            raise InputError(f"{path}: its values are not {about['values']}, as it says; damaged, prepare it again")
        feeds = {name: _from_16_bits(array, spec, about["values"]).astype(dtypes[name], copy=False)
                 for name, array in arrays.items()}
        return PreparedScan(feeds, *(_tuple(about["scan"][field.name]) for field in dataclasses.fields(PreparedScan)
                                     if field.name != "feeds"))
    except (KeyError, TypeError) as error:
        raise _damaged(path, error) from error


def as_volume(feeds: Mapping[str, NDArray[np.floating]], spec: Preprocessing) -> NDArray[np.float32]:
    """A preprocessed volume ``[D, H, W]`` that gives these feeds, zero where no input looks."""
    if "volume" in feeds:
        return np.ascontiguousarray(feeds["volume"][0, 0], np.float32)
    volume = np.zeros(spec.shape_dhw, np.float32)
    for array in feeds.values():
        taken = tuple(slice(None, None, side // kept) for side, kept in zip(volume.shape, array.shape[2:], strict=True))
        volume[taken] = array[0, 0]
    return volume


def _purpose(spec: Preprocessing, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What must be the same for a prepared scan to be used, as JSON has it."""
    return json.loads(json.dumps({"preprocessing": dataclasses.asdict(spec),
                                  "inputs": {name: shapes[name] for name in sorted(shapes)}}))


def _open(path: Path, shapes: Mapping[str, tuple[int, ...]], purpose: Mapping[str, Any] | None = None
          ) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Attributes, and the arrays of these shapes; nothing is unpacked that is larger than they are."""
    import zarr
    from zarr.errors import BaseZarrError
    from zarr.storage import ZipStore

    require_file(path, "prepared scan")
    try:
        _require_small(path, shapes)
        with ZipStore(path, mode="r") as store:
            group = zarr.open_group(store, mode="r", zarr_format=3)
            about = dict(group.attrs)
            if about.get("format") != FORMAT:
                raise InputError(f"{path}: not a prepared scan of this version; `dcformer prepare` makes one")
            for name, wanted in (purpose or {}).items():
                if about.get(name) != wanted:
                    raise InputError(f"{path}: prepared for {_difference(about.get(name), wanted)}; prepare it again, "
                                     "for this bundle")
            return about, {name: _array(group[name], shape) for name, shape in shapes.items()}
    except InputError:
        raise
    except (OSError, zipfile.BadZipFile, zlib.error, BaseZarrError, KeyError, ValueError, TypeError, AttributeError,
            RuntimeError, NotImplementedError, ArithmeticError, struct.error) as error:
        raise _damaged(path, error) from error


def _require_small(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Neither the archive nor the chunks in it may unpack to more than was written."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        unpacked = sum(info.file_size for info in entries)
        if unpacked > path.stat().st_size + _LARGEST_OVERHEAD:
            raise InputError(f"{path}: unpacks to {unpacked} bytes; not a prepared scan")
        chunks = 0
        for info in entries if shapes else ():
            if "/c/" in info.filename:
                with archive.open(info) as file:
                    chunks += _BLOSC_HEADER.unpack(file.read(_BLOSC_HEADER.size))[0]
    # The last chunk of an array may be filled up.
    if chunks > 2 * _CHUNKS * sum(2 * math.prod(shape) for shape in shapes.values()):
        raise InputError(f"{path}: its chunks unpack to {chunks} bytes; not a prepared scan")


def _array(array: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    chunks = getattr(array, "chunks", None)
    if chunks is None or array.shape != shape or any(c > s for c, s in zip(chunks, shape, strict=True)) \
            or array.dtype not in _DTYPES.values():
        raise ValueError(f"an array of another shape than {list(shape)}")
    if [type(codec).__name__ for codec in array.metadata.codecs] != _CODECS:
        raise ValueError("an array in another encoding")
    return np.asarray(array[...])


def _difference(there: Any, wanted: Any) -> str:
    if isinstance(there, dict) and isinstance(wanted, dict):
        for name in wanted:
            if there.get(name) != wanted[name]:
                return f"{name} {there.get(name)!r}, the bundle has {wanted[name]!r}"
        return f"inputs {', '.join(sorted(there))}, the bundle has {', '.join(sorted(wanted))}"
    return "another bundle"


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: damaged, or no prepared scan ({type(error).__name__}: {error}); prepare it again")


def _to_16_bits(array: NDArray[np.floating], spec: Preprocessing, values: Values) -> NDArray[Any]:
    if values == "float16":
        return np.ascontiguousarray(array, np.float16)
    low, high = spec.value_range
    return (np.rint((array.astype(np.float32) - low) * np.float32(_STEPS / (high - low))) - _STEPS // 2
            ).astype(np.int16)


def _from_16_bits(array: NDArray[Any], spec: Preprocessing, values: Values) -> NDArray[np.floating]:
    if values == "float16":
        return array
    low, high = spec.value_range
    found = array.astype(np.float32)
    found += _STEPS // 2
    found *= np.float32((high - low) / _STEPS)
    found += low
    return np.clip(found, low, high, out=found)


def _digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
