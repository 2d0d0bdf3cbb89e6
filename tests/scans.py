"""NIfTI files for tests, written with nibabel or byte by byte where nibabel would refuse."""

from pathlib import Path

import nibabel as nib
import numpy as np

SPACING = (0.9, 0.8, 1.7)
#: Voxel axes to RAS+ mm: x to the left, y to the back, z up, i.e. "LPS", with the spacing above and an offset.
LPS_AFFINE = np.array([[-0.9, 0, 0, 30], [0, -0.8, 0, 20], [0, 0, 1.7, -400], [0, 0, 0, 1]])


def write(path: Path, array: np.ndarray, affine: np.ndarray = LPS_AFFINE, **header: object) -> Path:
    """Write an array; ``header`` sets raw header fields after nibabel filled them in."""
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    if header:
        edit_header(path, **header)
    return path


def edit_header(path: Path, **fields: object) -> None:
    """Change raw header fields of an uncompressed file in place, without nibabel's checks."""
    content = bytearray(path.read_bytes())
    header = nib.Nifti1Header(bytes(content[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    content[:348] = header.binaryblock
    path.write_bytes(content)
