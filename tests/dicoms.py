"""CT series as DICOM files, for tests."""

import itertools
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

INTERCEPT = -1024
_SERIES = itertools.count()


def write_series(
    folder: Path, hounsfield: np.ndarray, spacing: Sequence[float] = (0.9, 0.8, 1.7), *, prefix: str = "",
    positions: Sequence[float] | None = None, maps: Callable[[int], tuple[float, float]] = lambda _: (1, INTERCEPT),
    lean: float = 0.0, change: Callable[[int, Dataset], None] = lambda index, dataset: None, uid: str | None = None,
) -> str:
    """Write ``hounsfield`` [x, y, z] int16, its axes to the left, the back and upwards; returns the series' UID.

    Args:
        positions: of the slices in mm; default: evenly. lean: mm that each slice lies further to the back.
        maps: slope and intercept by slice. change: edits a slice before it is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    unique = itertools.count(next(_SERIES) * 10_000)

    def new_uid() -> str:
        return generate_uid(entropy_srcs=[str(next(unique))])  # another each time, and the same in the next process

    uid, study, frame = uid or new_uid(), new_uid(), new_uid()
    count = hounsfield.shape[2]
    positions = [-400 + spacing[2] * k for k in range(count)] if positions is None else positions
    names = np.random.default_rng(0).permutation(count)  # no order in the names
    for k in range(count):
        slope, intercept = maps(k)
        stored = np.rint((hounsfield[:, :, k].T - intercept) / slope).astype(np.uint16)
        dataset: Any = Dataset()
        dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, new_uid()
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = study, uid, frame
        dataset.PatientName, dataset.PatientID, dataset.Modality = "Doe^Jane", "12345", "CT"
        dataset.ImageType, dataset.InstanceNumber = ["ORIGINAL", "PRIMARY", "AXIAL"], k + 1
        dataset.Rows, dataset.Columns = stored.shape
        dataset.PixelSpacing = [f"{spacing[1]:g}", f"{spacing[0]:g}"]
        dataset.SliceThickness = f"{spacing[2]:g}"
        dataset.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
        dataset.ImagePositionPatient = ["-30", f"{-20 + lean * k:.6g}", f"{positions[k]:.6g}"]
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
        dataset.RescaleSlope, dataset.RescaleIntercept = f"{slope:g}", f"{intercept:g}"
        dataset.PixelData = stored.tobytes()
        change(k, dataset)
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.file_meta = meta
        pydicom.dcmwrite(folder / f"{prefix}{names[k]:04d}", dataset, enforce_file_format=True)
    return uid


def zip_folder(folder: Path, path: Path) -> Path:
    """All files of a folder, in a folder of the archive."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, Path("series") / file.relative_to(folder))
    return path


def transcode(folder: Path, syntax: str) -> None:
    """Compress every file, with GDCM; ``syntax``: name of one of its transfer syntaxes."""
    import gdcm

    for path in sorted(folder.iterdir()):
        reader = gdcm.ImageReader()
        reader.SetFileName(str(path))
        assert reader.Read()
        change = gdcm.ImageChangeTransferSyntax()
        change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer = gdcm.ImageWriter()
        writer.SetFileName(str(path))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
