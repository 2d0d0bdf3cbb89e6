"""Read a CT volume from NIfTI, refusing whatever would have to be guessed."""

from __future__ import annotations

import io
import logging
import math
import threading
import warnings
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
from isal import igzip, igzip_lib  # two to three times as fast as zlib
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from numpy.typing import NDArray

from ..errors import DcformerWarning, InputError
from ..files import require_file
from .dicom_source import is_contents
from .geometry import LPS_AFFINE, Geometry, axis_codes, choose_spacing, describe_contradiction, describe_turn, reorient
from .hounsfield import check_voxels
from .metadata import VolumeMetadata, read_metadata
from .options import AS_IN_FILE, AS_STORED, ReadOptions
from .types import LinearMap, Volume

#: Larger headers are refused before anything is allocated: 2^30 voxels are 1024 slices of 1024 x 1024.
MAX_VOXELS = 1 << 30
#: Bytes tolerated behind the voxels; a longer tail means that the header describes another file.
_LARGEST_TAIL_BYTES = 1 << 20
#: Header and extensions; a larger offset is nonsense, and skipping to it could decompress without end.
_LARGEST_OFFSET_BYTES = 16 << 20
_READ_BYTES = 8 << 20
_SUFFIXES = (".nii", ".nii.gz")
#: What a damaged stream raises; isal's stub declares its exception class as an instance.
_GZIP_ERRORS: tuple[type[Exception], ...] = (EOFError, OSError, zlib.error,
                                             cast("type[Exception]", igzip_lib.IsalError))


_BLANK = "the header is blank: its axes are taken to point to the left, the back and upwards, as CT-RATE's do"
#: What nibabel raises of damaged headers.
_HEADER_ERRORS = (ImageFileError, HeaderDataError, WrapStructError, ValueError, OverflowError)


@dataclass(frozen=True)
class _Header:
    """What the file says of its voxels and of their place."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    scaling: LinearMap
    geometry: Geometry


def read_nifti(path: str | Path, target_orientation: str = "LPS", options: ReadOptions = AS_IN_FILE,
               needs_hounsfield: bool = True, needs_spacing: bool = True) -> Volume:
    """Read a ``.nii`` or ``.nii.gz`` file.

    The voxels stay as stored (integers are not converted); the array is viewed in ``target_orientation``.

    Args:
        needs_hounsfield: false where voxels in other units will do.
        needs_spacing: false where a blank header, which does not tell it, will do.

    Raises:
        InputError: missing, not NIfTI, truncated, not one grey-scale 3-D volume, larger than ``MAX_VOXELS``, spacing
            missing or impossible, voxels that are not finite or cannot be Hounsfield units.
    """
    path = Path(path)
    if options.orientation not in (None, AS_STORED, target_orientation):
        raise InputError(f"orientation: {options.orientation!r}; expected {target_orientation!r} (reorient by the "
                         f"header) or {AS_STORED!r}")
    before = _identity(path)
    header = _read_header(path)
    shape = _check_layout(path, header)
    metadata = read_metadata(options.metadata, path) if options.metadata is not None else None
    spacing = choose_spacing(path, header.geometry, options, metadata, needs_spacing)
    stored = _read_voxels(path, header, shape, before)
    orientation = AS_STORED if options.orientation == AS_STORED else target_orientation
    notes: tuple[str, ...] = ()
    codes = None if header.geometry.is_blank else axis_codes(header.geometry.affine)
    if orientation != AS_STORED:
        affine = LPS_AFFINE if header.geometry.is_blank else header.geometry.affine
        stored, spacing = reorient(path, affine, stored, spacing, target_orientation)
        if header.geometry.is_blank:
            notes = (_BLANK,)
        else:
            found = (describe_turn(path, affine), describe_contradiction(header.geometry))
            notes = tuple(note for note in found if note is not None)
            for note in notes:
                warnings.warn(f"{path}: {note}", DcformerWarning, stacklevel=2)
    volume = Volume(path.name, stored, (header.scaling, _rescale(options, metadata)), spacing, orientation, notes,
                    codes)
    doubt = check_voxels(path, volume, needs_hounsfield,
                         explicit=options.slope is not None and options.intercept is not None)
    return volume if doubt is None else replace(volume, notes=(*notes, doubt))


def _read_header(path: Path) -> _Header:
    require_file(path, "scan")
    if is_contents(path):
        raise InputError(f"{path}: the table of contents of a disc; name the folder of the slices")
    if not path.name.lower().endswith(_SUFFIXES):
        raise InputError(f"{path}: neither NIfTI by its name nor DICOM; expected .nii, .nii.gz, or slices")
    if (path.name[: -len(".gz")] if _is_gzip(path) else path.name)[-len(".nii") :] not in (".nii", ".NII"):
        # nibabel opens the file of that name in small letters instead, which may be another one.
        raise InputError(f"{path}: its ending is in capitals and small letters; rename it to .nii or .nii.gz")
    try:
        with _quiet_nibabel:
            image = nib.load(path)
            if not isinstance(image, nib.Nifti1Image):
                raise InputError(f"{path}: a {type(image).__name__}, not a single-file NIfTI volume")
            with (igzip.IGzipFile(path) if _is_gzip(path) else path.open("rb")) as file:
                raw = type(image.header).from_fileobj(file, check=False)
        proxy: Any = image.dataobj  # nibabel's annotations do not cover its array proxies
        offset, slope, intercept = int(proxy.offset), float(proxy.slope), float(proxy.inter)
    except (*_HEADER_ERRORS, *_GZIP_ERRORS) as error:
        raise InputError(f"{path}: not a NIfTI file, or its header is damaged ({_brief(error)})") from error
    if not 0 <= offset <= _LARGEST_OFFSET_BYTES:
        raise InputError(f"{path}: the header puts the voxels at byte {offset:,}; expected at most "
                         f"{_LARGEST_OFFSET_BYTES:,}")
    if not (math.isfinite(slope) and math.isfinite(intercept)) or slope == 0:
        raise InputError(f"{path}: scl_slope {slope:g} and scl_inter {intercept:g} are not a usable scaling")
    # The header holds float32: 0.7 must be read as the 0.7 that was meant, or int(size * spacing / target) comes out
    # one less than with the same spacing from CT-RATE's CSV.
    x, y, z = (float(str(np.float32(v))) for v in raw["pixdim"][1:4])
    geometry = Geometry(
        affine=np.asarray(image.affine, np.float64),
        other_affine=_unused_qform(image.header),
        pixdim_mm=(x, y, z),
        has_form=int(raw["qform_code"]) != 0 or int(raw["sform_code"]) != 0,
        unit_code=int(raw["xyzt_units"]) & 7,
    )
    return _Header(tuple(int(n) for n in image.shape), np.dtype(image.get_data_dtype()), offset,
                   LinearMap(slope, intercept), geometry)


def _unused_qform(header: nib.Nifti1Header) -> NDArray[np.float64] | None:
    """Where the header has a usable one beside the sform, which goes before it."""
    if int(header["qform_code"]) == 0 or int(header["sform_code"]) == 0:
        return None
    try:
        return np.asarray(header.get_qform(), np.float64)
    except _HEADER_ERRORS:  # what it does not say contradicts nothing
        return None


def _check_layout(path: Path, header: _Header) -> tuple[int, int, int]:
    """The three axes of the one grey-scale volume that the file must hold."""
    shape, dtype = header.shape, header.dtype
    voxels = math.prod(shape)
    if len(shape) < 3:
        raise InputError(f"{path}: {len(shape)}-D of shape {shape}; expected a 3-D volume")
    if any(n > 1 for n in shape[3:]):
        raise InputError(f"{path}: shape {shape} holds {math.prod(shape[3:])} volumes; expected one. Split the file")
    if any(n < 1 for n in shape):
        raise InputError(f"{path}: shape {shape} has an empty axis")
    if voxels > MAX_VOXELS:
        raise InputError(f"{path}: the header claims {voxels:,} voxels {shape}; the limit is {MAX_VOXELS:,}")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        kind = "RGB colour" if dtype.fields else str(dtype)
        raise InputError(f"{path}: voxels are {kind}; expected integers or floats in Hounsfield units")
    return shape[0], shape[1], shape[2]


def _rescale(options: ReadOptions, metadata: VolumeMetadata | None) -> LinearMap:
    """Slope and intercept: the caller's, else the metadata's, else none."""
    slope = options.slope if options.slope is not None else metadata.slope if metadata else 1.0
    intercept = options.intercept if options.intercept is not None else metadata.intercept if metadata else 0.0
    return LinearMap(slope, intercept)


def _read_voxels(path: Path, header: _Header, shape: tuple[int, int, int], before: object) -> NDArray[Any]:
    """The stored voxels ``[x, y, z]``.

    Read, not mapped: all are looked at once anyway, and a mapped file that someone cuts off meanwhile ends the process.
    """
    size = math.prod(shape) * header.dtype.itemsize
    if not _is_gzip(path) and (actual := path.stat().st_size) < header.offset + size:
        _require_unchanged(path, before)
        raise InputError(f"{path}: truncated: {actual:,} bytes, the header needs {header.offset + size:,}")
    buffer = np.empty(size, np.uint8)
    try:
        with (igzip.IGzipFile(path) if _is_gzip(path) else path.open("rb")) as stream:
            stream.read(header.offset)
            filled = _fill(stream, buffer.data)
            # Only reading to the end makes gzip compare its checksum.
            tail = len(stream.read(_LARGEST_TAIL_BYTES + 1)) if filled == size else 0
    except _GZIP_ERRORS as error:
        _require_unchanged(path, before)
        raise InputError(f"{path}: truncated or damaged gzip stream ({_brief(error)}); copy the file again") from error
    _require_unchanged(path, before)
    if filled < size:
        raise InputError(f"{path}: truncated: {filled:,} bytes of voxels, the header needs {size:,}")
    if tail > _LARGEST_TAIL_BYTES:
        raise _too_long(path, shape, size)
    return buffer.view(header.dtype).reshape(shape, order="F")


def _identity(path: Path) -> tuple[int, ...] | None:
    """Another one, another file or content; None where there is none, which reading it will tell."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _require_unchanged(path: Path, before: object) -> None:
    if _identity(path) != before:
        raise InputError(f"{path}: changed while it was read; wait until it is written, then read it again")


def _too_long(path: Path, shape: tuple[int, int, int], size: int) -> InputError:
    return InputError(f"{path}: more than {_LARGEST_TAIL_BYTES:,} bytes follow the {size:,} that shape {shape} needs; "
                      "the header does not describe this file")


class _QuietNibabel(logging.Filter):
    """Silence: nibabel repairs impossible header fields and logs that, where we read them unrepaired and refuse.

    For the threads that are reading here alone; what others have nibabel log is theirs to see.
    """

    def __init__(self) -> None:
        super().__init__()
        self._own = threading.local()
        logging.getLogger("nibabel.global").addFilter(self)

    def __enter__(self) -> None:
        self._own.reads = True

    def __exit__(self, *_: object) -> None:
        self._own.reads = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is logged; asked by the thread that logs it."""
        return not getattr(self._own, "reads", False)


_quiet_nibabel = _QuietNibabel()


def _fill(stream: io.RawIOBase | io.BufferedIOBase, target: memoryview) -> int:
    """Read until ``target`` is full or the stream ends; returns the number of bytes."""
    filled = 0
    while filled < len(target):
        count = stream.readinto(target[filled : filled + _READ_BYTES])
        if not count:
            break
        filled += count
    return filled


def _is_gzip(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:120] if lines else type(error).__name__
