"""Cases of scans: NIfTI headers and bodies, gzip streams, DICOM sets, zips, tables of metadata."""

from __future__ import annotations

import gzip
import os
import shutil
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import nibabel as nib
import numpy as np
import pydicom

from .judge import Case
from .mutate import INTERESTING, INTERESTING_FLOATS, mutate_bytes, text
from .seeds import Seeds

_HEADER_BYTES = 352
_HEADER_FIELDS = tuple(nib.nifti1.header_dtype.names or ())
#: Those that decide what is read.
_LIKELY_FIELDS = (
    "dim",
    "datatype",
    "bitpix",
    "pixdim",
    "vox_offset",
    "scl_slope",
    "scl_inter",
    "qform_code",
    "sform_code",
    "quatern_b",
    "quatern_c",
    "quatern_d",
    "srow_x",
    "srow_y",
    "srow_z",
    "xyzt_units",
    "sizeof_hdr",
    "magic",
)
_TAGS = (
    "Rows",
    "Columns",
    "PixelSpacing",
    "SliceThickness",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "RescaleSlope",
    "RescaleIntercept",
    "Modality",
    "ImageType",
    "SeriesInstanceUID",
    "SOPClassUID",
    "PatientID",
    "NumberOfFrames",
    "PixelData",
    "InstanceNumber",
)


def _score(seeds: Seeds, random: Random, scan: str, more: Sequence[str] = (), files: Sequence[str] = ()) -> Case:
    """One of the commands that take a scan, by its name or by those of its files."""
    words = list(files) or [scan]
    if random.random() < 0.1:
        words = ["report", str(seeds.bundle), *words, "--out", "r.html", "--blocks", "8", "--json", *more]
        return Case(words, outputs=("r.html",))
    if random.random() < 0.7:
        return Case(["zeroshot", str(seeds.bundle), *words, "--json", *more])
    return Case(["embed", str(seeds.bundle), *words, "--out", "e.npz", *more], outputs=("e.npz",))


def header(random: Random, seeds: Seeds, folder: Path) -> Case:
    """NIfTI headers: fields with other numbers, bytes of the header, extensions."""
    content = bytearray(seeds.nifti.read_bytes())
    fields = np.frombuffer(bytes(content[:348]), nib.nifti1.header_dtype).copy()
    for _ in range(random.choice((1, 1, 2, 4))):
        name = random.choice(_LIKELY_FIELDS if random.random() < 0.8 else _HEADER_FIELDS)
        field = fields[name].reshape(-1)
        if field.dtype.kind == "S":
            fields[name] = random.randbytes(4)
            continue
        values = INTERESTING_FLOATS if field.dtype.kind == "f" else INTERESTING
        with np.errstate(all="ignore"):
            field[random.randrange(field.size)] = np.array(random.choice(values)).astype(field.dtype)
        fields[name] = field.reshape(fields[name].shape)
    content[:348] = fields.tobytes()
    if random.random() < 0.2:
        content[:] = mutate_bytes(random, bytes(content), 0, _HEADER_BYTES)
    name = random.choice(("s.nii", "s.nii", "s.nii.gz", "s.NII"))
    data = gzip.compress(content, mtime=0) if name.endswith(".gz") else bytes(content)
    (folder / name).write_bytes(data)
    more = random.choice(
        ([], [], ["--spacing", "1", "1", "2"], ["--orientation", "as-stored"], ["--slope", "1", "--intercept", "0"])
    )
    return _score(seeds, random, name, more)


def body(random: Random, seeds: Seeds, folder: Path) -> Case:
    """NIfTI voxels: other types and shapes, not finite, cut off, too many."""
    image: Any = nib.load(seeds.nifti)
    voxels = np.asanyarray(image.dataobj)
    kind = random.choice(("i2", "u2", "i4", "u1", "f4", "f8", "i8", "u8", "i1", "c8", "bytes"))
    if kind == "bytes":
        data = mutate_bytes(random, seeds.nifti.read_bytes(), _HEADER_BYTES)
        (folder / "s.nii").write_bytes(data)
        return _score(seeds, random, "s.nii")
    with np.errstate(all="ignore"):
        changed = voxels.astype(kind)
        for _ in range(random.choice((0, 1, 5))):
            value = random.choice((*INTERESTING_FLOATS, *INTERESTING))
            place = tuple(slice(a := random.randrange(n), random.randrange(a, n + 1)) for n in voxels.shape)
            changed[place] = np.array(value).astype(kind)
    shape = random.choice(
        (voxels.shape, voxels.shape, (*voxels.shape, 1), (1, *voxels.shape), voxels.shape[::-1], (-1, 1, 1))
    )
    out = (
        nib.Nifti1Image(changed.reshape(shape), image.affine, dtype=changed.dtype)
        if kind not in ("i8", "u8")
        else nib.Nifti1Image(changed.reshape(shape), image.affine, dtype=kind)
    )
    nib.save(out, folder / "s.nii")
    if random.random() < 0.3:
        os.truncate(folder / "s.nii", random.randrange((folder / "s.nii").stat().st_size))
    elif random.random() < 0.2:
        os.truncate(folder / "s.nii", random.choice((1 << 20, 1 << 24, 1 << 34)))
    return _score(seeds, random, "s.nii")


def gz(random: Random, seeds: Seeds, folder: Path) -> Case:
    """Gzip streams: damaged, cut off, several members, tails, bombs, another format under the name."""
    good = seeds.nifti.read_bytes()
    packed = gzip.compress(good, random.randrange(10), mtime=0)
    kind = random.randrange(8)
    if kind <= 3:
        data = mutate_bytes(random, packed, random.choice((0, 0, 10)), None)
    elif kind == 4:
        cut = random.randrange(len(good))
        data = (
            gzip.compress(good[:cut], mtime=0)
            + gzip.compress(good[cut:], mtime=0)
            + random.choice((b"", b"\0" * 700, b"x"))
        )
    elif kind == 5:  # a member of zeros behind the voxels, or a header that claims many
        zeros = gzip.compress(bytes(1 << 20), mtime=0)
        claim = bytearray(good)
        claim[40:56] = struct.pack("<8h", 3, *(random.choice((20, 600, 32767)) for _ in range(3)), 1, 1, 1, 1)
        data = gzip.compress(bytes(random.choice((good, claim))), mtime=0) + zeros * random.choice((1, 3, 200))
    elif kind == 6:
        data = random.choice(
            (
                good,
                b"",
                b"\x1f\x8b",
                b"PK\x03\x04" + packed,
                gzip.compress(packed, mtime=0),
                b"\x1f\x8b\x08" + bytes(50),
            )
        )
    else:
        data = packed[: random.randrange(len(packed))]
    (folder / "s.nii.gz").write_bytes(data)
    return _score(seeds, random, "s.nii.gz")


def dicom(random: Random, seeds: Seeds, folder: Path) -> Case:
    """DICOM folders and lists: tags with other values, damaged, missing, doubled, foreign files, links in circles."""
    place = Path(shutil.copytree(seeds.dicom, folder / "d"))
    files = sorted(place.iterdir())
    chosen = random.sample(files, random.choice((1, 1, 2, len(files))))
    kind = random.randrange(6)
    if kind <= 1:
        name, junk = random.choice(_TAGS), _tag_value(random)
        for file in chosen:
            _set_tag(file, name, junk)
    elif kind <= 3:
        for file in chosen:
            file.write_bytes(mutate_bytes(random, file.read_bytes(), random.choice((0, 128, 132))))
    elif kind == 4:
        for file in chosen[: random.choice((1, 3))]:
            file.unlink()
        if random.random() < 0.5:
            shutil.copy(
                next(f for f in files if f.exists()), place / random.choice(("again", "again.dcm", "é\n.dcm"))
            )
    else:
        other = place / random.choice(("readme.txt", "DICOMDIR", "x.dcm", "deep/er/x", ".hidden"))
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_bytes(random.choice((b"", b"hello", bytes(200), files[0].read_bytes()[:300])))
        (place / "loop").symlink_to(random.choice((".", "..", "loop", "/dev/zero", "nowhere")))
    named = [f"d/{file.name}" for file in (files if random.random() < 0.5 else sorted(place.iterdir()))]
    return _score(
        seeds,
        random,
        "d",
        random.choice(([], [], ["--resample-irregular"], ["--series", text(random)[:60]])),
        named if random.random() < 0.3 else (),
    )


def _tag_value(random: Random) -> Any:
    return random.choice(
        (
            None,
            "",
            "0",
            "-1",
            "nan",
            "inf",
            "1e400",
            "x",
            "1\\2",
            "1\\2\\3",
            "0\\0\\0\\0\\0\\0",
            "1\\0\\0\\0\\1\\0",
            "99999999",
            0,
            1,
            65535,
            8,
            32,
            b"",
            b"\0" * 7,
            b"\xff" * 5000,
            "a" * 3000,
            "1\\1\\1\\1\\1\\1",
            "MONOCHROME1",
            "LOCALIZER",
            "é漢",
        )
    )


def _set_tag(file: Path, name: str, value: Any) -> None:
    dataset: Any = pydicom.dcmread(file)
    try:
        setattr(dataset, name, value)
        dataset.save_as(file)
    except Exception:
        # pydicom itself refuses to write some: put the bytes of the value over those of the tag's name instead.
        file.write_bytes(file.read_bytes().replace(str(value).encode()[:2] or b"CT", b"??", 3))


def zips(random: Random, seeds: Seeds, folder: Path) -> Case:
    """Zips of DICOM slices: damaged, names that lead elsewhere, bombs, encryption flags, doubled names."""
    path = folder / "d.zip"
    files = sorted(seeds.dicom.iterdir())
    kind = random.randrange(5)
    with zipfile.ZipFile(
        path, "w", random.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2))
    ) as archive:
        for file in files:
            prefix = random.choice(("", "../", "/", "..\\", "C:/", "a/../../", "/dev/")) if kind == 0 else "s/"
            archive.write(file, prefix + file.name)
        if kind == 1:
            for _ in range(random.choice((1, 30))):
                archive.writestr(f"s/{random.randrange(10**9)}.dcm", bytes(random.choice((10, 1 << 20, 1 << 24))))
        elif kind == 2:
            import warnings

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                archive.write(files[0], "s/" + files[1].name)
    data = path.read_bytes()
    if kind == 3:
        data = mutate_bytes(random, data)
    elif kind == 4:  # the directory at the end, where names, sizes and flags are
        data = mutate_bytes(random, data, data.rfind(b"PK\x01\x02") - 60 * len(files))
    path.write_bytes(data)
    return _score(seeds, random, "d.zip")


def tables(random: Random, seeds: Seeds, folder: Path) -> Case:
    """Tables of metadata and lists of scans."""
    shutil.copy(seeds.nifti, folder / "scan.nii")
    good = 'VolumeName,XYSpacing,ZSpacing,RescaleSlope,RescaleIntercept\nscan.nii,"[0.8, 0.8]",1.5,1,0\n'
    listed = "path\nscan.nii\n"
    source = random.choice((good, listed))
    data = mutate_bytes(random, source.encode())
    if random.random() < 0.3:
        cells = source.replace("\n", ",\n").split(",")
        cells[random.randrange(len(cells))] = random.choice(
            (text(random)[:200], "nan", "-1", "1e999", '"', "[0.8]", "[[1]]", "None")
        )
        data = ",".join(cells).encode("utf-8", "surrogatepass")
    (folder / "t.csv").write_bytes(data)
    if source is good:
        return _score(seeds, random, "scan.nii", ["--metadata", "t.csv"])
    return Case(["embed", str(seeds.bundle), "t.csv", "--out", "e.npz"], outputs=("e.npz",))
