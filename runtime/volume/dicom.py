"""Read a CT series from DICOM files: a folder, a zip of one, or a list. Needs pydicom (``pip install '.[dicom]'``).

Which series, in which order, with which distances: whatever would have to be guessed is refused, with the file and its
position. What can be mended by resampling is, if ``resample_irregular`` says so, and noted in the volume.

Source: DICOM PS3.3, C.7.6.2 (image plane), C.7.6.3 (pixels), C.8.2.1 (CT image).
"""

from __future__ import annotations

import lzma
import struct
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.pixels.utils import pixel_array

from ..errors import DcformerWarning, InputError, one_line
from ..scan_files import ScanPath, SliceFiles, as_scan, file_facts, require_scan
from .dicom_files import SourceFile, source_files
from .dicom_geometry import Placed, arrange
from .dicom_padding import AIR_HU, bright_padding, read_padding, stored_air
from .geometry import axis_codes, describe_turn, reorient
from .hounsfield import check_voxels
from .nifti import MAX_VOXELS
from .options import AS_STORED, ReadOptions, expand_spacing
from .types import LinearMap, Volume

_CT_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
_DICOMDIR = "1.2.840.10008.1.3.10"
#: Endings of slices; a file with another one may be anything.
_DICOM_SUFFIXES = ("", ".dcm", ".ima")
_ENHANCED_CT_STORAGE = "1.2.840.10008.5.1.4.1.1.2.1"
_TAGS = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "PatientID", "Modality", "ImageType", "Rows",
         "Columns", "PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient", "RescaleSlope",
         "RescaleIntercept", "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames",
         "FrameOfReferenceUID", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue",
         "PixelPaddingRangeLimit")
#: Fewer slices are a localizer or a fragment, not a scan of a chest.
_FEWEST_SLICES = 8
#: What damaged files make pydicom raise.
_DAMAGE = (BytesLengthException, InvalidDicomError, AttributeError, KeyError, ValueError, TypeError, IndexError,
           NotImplementedError, RuntimeError, OSError, EOFError, struct.error, zipfile.BadZipFile, zlib.error,
           lzma.LZMAError)
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class _Header:
    """What is needed of a file before its pixels."""

    file: SourceFile
    dataset: pydicom.Dataset

    def value(self, tag: str) -> Any:
        return self.dataset.get(tag)

    def text(self, tag: str) -> str:
        return str(self.value(tag) or "")


def identify(file: Path) -> tuple[str, str] | None:
    """UIDs of series and instance, empty where there is none; None if the file cannot be read."""
    try:
        header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=["SOPInstanceUID", "SeriesInstanceUID"])
        return str(header.get("SeriesInstanceUID") or ""), str(header.get("SOPInstanceUID") or "")
    except (*_DAMAGE, MemoryError):
        return None


def read_dicom(source: str | ScanPath, target_orientation: str, options: ReadOptions, needs_hounsfield: bool = True
               ) -> Volume:
    """Read the one axial CT series of a source, or the one that ``options.series`` names.

    Returns:
        As ``read_nifti``: voxels as stored where all slices have one slope and intercept, else HU in float32.

    Raises:
        InputError: no CT, several, slices that do not make a regular volume, or a damaged file.
    """
    path = as_scan(source)
    if options.orientation not in (None, AS_STORED, target_orientation):
        raise InputError(f"orientation: {options.orientation!r}; expected {target_orientation!r} or {AS_STORED!r}")
    if options.metadata is not None:
        raise InputError(f"{path}: DICOM says itself how it was taken; drop --metadata")
    before = file_facts(path)
    headers = _choose_series(path, _read_headers(path), options.series)
    rows, columns, spacing_yx = _common_plane(path, headers)
    if len(headers) * rows * columns > MAX_VOXELS:
        raise InputError(f"{path}: {len(headers)} slices of {columns} x {rows}; the limit is {MAX_VOXELS:,} voxels")
    placed = [Placed(header.file.name, _numbers(header, "ImageOrientationPatient", 6),
                     _numbers(header, "ImagePositionPatient", 3))
              for header in headers]
    grid = arrange(path, placed, spacing_yx, bool(options.resample_irregular))
    ordered = [headers[index] for index in grid.order]
    voxels, scaling, padding_note = _read_pixels(ordered, rows, columns)
    if grid.resample is not None:
        voxels, scaling = grid.resample(scaling.slope * voxels.astype(np.float32) + scaling.intercept), LinearMap()
    stored = voxels.transpose(2, 1, 0)  # [k, row, column] to [x, y, z]
    spacing = (spacing_yx[1], spacing_yx[0], grid.spacing_mm)
    if options.spacing is not None:
        spacing = expand_spacing(options.spacing)
    orientation = AS_STORED if options.orientation == AS_STORED else target_orientation
    affine = _LPS_TO_RAS @ grid.affine
    turn_note = None
    if orientation != AS_STORED:
        stored, spacing = reorient(path, affine, stored, spacing, target_orientation)
        turn_note = describe_turn(path, affine)
    own = LinearMap(1.0 if options.slope is None else options.slope,
                    0.0 if options.intercept is None else options.intercept)
    if file_facts(path) != before:
        raise InputError(f"{path}: changed while it was read; wait until it is written, then read it again")
    notes = (*grid.notes, *(note for note in (padding_note, turn_note) if note is not None))
    for note in notes:
        warnings.warn(f"{path}: {note}", DcformerWarning, stacklevel=3)
    volume = Volume(path.name, stored, (scaling, own), spacing, orientation, notes, axis_codes(affine))
    doubt = check_voxels(path, volume, needs_hounsfield, options.slope is not None and options.intercept is not None)
    return volume if doubt is None else replace(volume, notes=(*notes, doubt))


# ------------------------------------------------------------------ headers


def _read_headers(path: ScanPath) -> list[_Header]:
    """Of all DICOM images; other files, such as DICOMDIR or pictures, are passed over.

    Raises:
        InputError: no image, a damaged one, or a file that is none though it is named like those that are.
    """
    require_scan(path)
    found, none, others = list[_Header](), list[str](), 0
    for file in source_files(path):
        try:
            with file.open() as stream:
                dataset = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=list(_TAGS))
            list(dataset)  # values are decoded when they are asked for, and are now
        except InvalidDicomError as error:
            if isinstance(path, SliceFiles):
                raise InputError(f"{file.name}: no DICOM file, or damaged; expected slices only in a list") from error
            none.append(file.name)
            continue
        except (*_DAMAGE, MemoryError) as error:  # a length in it that is beyond all memory
            raise InputError(f"{file.name}: damaged DICOM file ({_brief(error)})") from error
        if "SOPClassUID" not in dataset and dataset.file_meta.get("MediaStorageSOPClassUID") != _DICOMDIR:
            raise InputError(f"{file.name}: its header is cut off; copy the file again")
        if "SeriesInstanceUID" in dataset and "Rows" in dataset:
            found.append(_Header(file, dataset))
        else:
            others += 1
    endings = {*_DICOM_SUFFIXES, *(_ending(header.file.name) for header in found)}
    if (name := next((name for name in none if _ending(name) in endings), None)) is not None:
        raise InputError(f"{name}: no DICOM file, though its name says nothing else: damaged, or to be moved away")
    if not found:
        raise InputError(f"{path}: no DICOM image in it ({others + len(none)} other files); expected the slices of a "
                         "CT series")
    return found


def _ending(name: str) -> str:
    """What a name says of the kind of its file: nothing where it ends in a number, as UIDs do, and IM.0001."""
    suffix = Path(name).suffix.lower()
    return "" if suffix[1:].isdecimal() else suffix


# ------------------------------------------------------------------ series


def _choose_series(path: ScanPath, headers: Sequence[_Header], wanted: str | None) -> list[_Header]:
    series: defaultdict[str, list[_Header]] = defaultdict(list)
    for header in headers:
        series[header.text("SeriesInstanceUID")].append(header)
    if wanted is not None:
        if wanted not in series:
            raise InputError(f"{path}: no series {wanted}; there are {_listed(series)}")
        if (problem := _problem(series[wanted])) is not None:
            raise InputError(f"{path}: series {wanted}: {problem}")
        return series[wanted]
    problems = {uid: _problem(group) for uid, group in series.items()}
    usable = [uid for uid, problem in problems.items() if problem is None]
    if not usable:
        told = "; ".join(f"{uid}: {problem}" for uid, problem in problems.items())
        raise InputError(f"{path}: no CT scan in it: {told}")
    if len(usable) > 1:
        raise InputError(f"{path}: {len(usable)} CT series; choose one with --series UID: "
                         f"{_listed({uid: series[uid] for uid in usable})}")
    return series[usable[0]]


def _problem(group: Sequence[_Header]) -> str | None:
    """Why a series is no axial CT; None if it is one."""
    first = group[0]
    count = first.value("NumberOfFrames") or 1
    if first.text("SOPClassUID") == _ENHANCED_CT_STORAGE or not isinstance(count, int) or count != 1:
        return "a multi-frame image; convert it to one file per slice"
    for header in group:
        if header.text("Modality") != "CT" or header.text("SOPClassUID") not in ("", _CT_STORAGE):
            return f"images of modality {header.text('Modality') or 'unknown'} among {len(group)}, not CT"
    if len({header.text("PatientID") for header in group}) > 1:
        return "images of several patients under one UID"
    frames = {uid: header.file.name for header in group if (uid := header.text("FrameOfReferenceUID"))}
    if 1 < len(frames) < len(group):  # one for each slice is the work of an anonymiser, and says nothing
        return (f"positions in {len(frames)} frames of reference, which cannot be compared ("
                f"{' and '.join(list(frames.values())[:2])}); move the slices of the others away")
    if any("LOCALIZER" in map(str.upper, map(str, header.value("ImageType") or ())) for header in group):
        return f"{len(group)} images with a localizer among them ({_localizer(group)})"
    if len(group) < _FEWEST_SLICES:
        return f"only {len(group)} slices"
    return None


def _localizer(group: Sequence[_Header]) -> str:
    return next(header.file.name for header in group
                if "LOCALIZER" in map(str.upper, map(str, header.value("ImageType") or ())))


def _listed(series: dict[str, list[_Header]]) -> str:
    """UIDs with what tells them apart; descriptions are free text that may name the patient, and are left out."""
    return ", ".join(f"{uid} ({len(group)} {group[0].text('Modality')} images)" for uid, group in series.items())


def _common_plane(path: ScanPath, headers: Sequence[_Header]) -> tuple[int, int, tuple[float, float]]:
    """Rows, columns and their distances in mm, which all slices must share."""
    shapes = [(_count(header, "Rows"), _count(header, "Columns"), _numbers(header, "PixelSpacing", 2))
              for header in headers]
    usual, _ = Counter(shapes).most_common(1)[0]
    for header, own in zip(headers, shapes, strict=True):
        if own != usual:
            raise InputError(f"{header.file.name}: a slice of {own[1]} x {own[0]} pixels of {own[2]} mm, the others "
                             f"are {usual[1]} x {usual[0]} of {usual[2]}; it belongs to another scan")
        if header.value("SamplesPerPixel") not in (None, 1) or \
                not header.text("PhotometricInterpretation").startswith("MONOCHROME"):
            raise InputError(f"{header.file.name}: {header.text('PhotometricInterpretation')} pixels; expected grey")
        bits, highest = header.value("BitsStored"), header.value("HighBit")
        if isinstance(bits, int) and isinstance(highest, int) and highest != bits - 1:
            raise InputError(f"{header.file.name}: HighBit is {highest}, BitsStored {bits}; expected {bits - 1}, as "
                             "the lowest bits are read. Convert the series")
    if min(usual[2]) <= 0:
        raise InputError(f"{path}: pixel spacing {usual[2]}; expected positive millimetres")
    return usual[0], usual[1], (usual[2][0], usual[2][1])


# ------------------------------------------------------------------ pixels


def _read_pixels(headers: Sequence[_Header], rows: int, columns: int) -> tuple[NDArray[Any], LinearMap, str | None]:
    """``[k, row, column]``: as stored, with the map to HU that all share; else HU, where slices have their own.

    Returns:
        Voxels, map, and a note on padding that was set to air.
    """
    for tag in ("RescaleSlope", "RescaleIntercept"):
        without = [header.file.name for header in headers if header.value(tag) in (None, "")]
        if 0 < len(without) < len(headers):
            raise InputError(f"{without[0]}: no {tag}, which {len(headers) - len(without)} other slices have; it "
                             "belongs to another scan, or is damaged")
    maps = [LinearMap(_number(header, "RescaleSlope", 1.0), _number(header, "RescaleIntercept", 0.0))
            for header in headers]
    shared = len(set(maps)) == 1
    found: NDArray[Any] | None = None
    padded = 0
    for index, (header, scaling) in enumerate(zip(headers, maps, strict=True)):
        plane = _read_plane(header, rows, columns)
        padding = read_padding(header.file.name, header.dataset)
        if padding is not None and (there := bright_padding(plane, padding, scaling)) is not None:
            plane = np.where(there, stored_air(plane.dtype, scaling), plane)
            padded += int(np.count_nonzero(there))
        if not shared:
            plane = np.float32(scaling.slope) * plane.astype(np.float32) + np.float32(scaling.intercept)
        if found is None:
            found = np.empty((len(headers), rows, columns), plane.dtype)
        elif plane.dtype != found.dtype:
            raise InputError(f"{header.file.name}: pixels of {plane.dtype}, those before are {found.dtype}")
        found[index] = plane
    assert found is not None
    note = f"padding that was brighter than air was set to {AIR_HU:g} HU: {padded / found.size:.1%} of the voxels"
    return found, maps[0] if shared else LinearMap(), note if padded else None


def _read_plane(header: _Header, rows: int, columns: int) -> NDArray[Any]:
    """``[row, column]`` as stored."""
    try:
        with header.file.open() as stream:
            plane = pixel_array(stream)
    except (*_DAMAGE, MemoryError) as error:
        raise InputError(f"{header.file.name}: its pixels cannot be read ({_brief(error)})") from error
    if plane.shape != (rows, columns):
        raise InputError(f"{header.file.name}: {plane.shape} pixels, its header says {(rows, columns)}")
    return plane


def _count(header: _Header, tag: str) -> int:
    value = header.value(tag)
    if not isinstance(value, int) or value < 1:
        raise InputError(f"{header.file.name}: {tag} is {value!r}; expected a number from 1")
    return value


def _number(header: _Header, tag: str, default: float) -> float:
    value = header.value(tag)
    if value in (None, ""):
        return default
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{header.file.name}: {tag} is {value!r}; expected a number") from error
    if not np.isfinite(number) or (tag == "RescaleSlope" and number == 0):
        raise InputError(f"{header.file.name}: {tag} is {number:g}; expected a usable number")
    return number


def _numbers(header: _Header, tag: str, count: int) -> tuple[float, ...]:
    try:
        values = tuple(float(value) for value in header.value(tag) or ())
    except (TypeError, ValueError) as error:
        raise InputError(f"{header.file.name}: {tag} is {header.value(tag)!r}; expected {count} numbers") from error
    if len(values) != count or not np.isfinite(values).all():
        raise InputError(f"{header.file.name}: {tag} has {len(values)} values; expected {count} numbers")
    return values


def _brief(error: Exception) -> str:
    return one_line(str(error))[:160] or type(error).__name__
