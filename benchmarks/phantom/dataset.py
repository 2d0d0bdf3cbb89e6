"""A folder of phantoms in CT-RATE's layout: volumes, metadata, reports and labels."""

from __future__ import annotations

import csv
import gzip
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from ...runtime.errors import InputError, suggestion
from ...runtime.files import atomic_folder
from ...runtime.manifest import CT_RATE_CLASSES
from .acquisition import Protocol, acquire
from .anatomy import Patient, build_scene
from .canvas import Grid
from .findings import PAINTERS, enlarge_heart
from .reports import Report, write_report
from .words import Drawn

#: The fastest.
_GZIP_LEVEL = 1


@dataclass(frozen=True)
class Split:
    """Names of a split as CT-RATE's files spell them."""

    prefix: str
    metadata: str
    reports: str
    labels: str


SPLITS = {"train": Split("train", "train_metadata.csv", "train_reports.csv", "train_labels.csv"),
          "valid": Split("valid", "validation_metadata.csv", "validation_reports.csv", "valid_labels.csv")}
PREVALENCE = 0.22
#: By how much a finding must change a voxel to be there.
VISIBLE_HU = 30.0
#: One in so many patients has no finding at all.
NORMAL_SHARE = 0.1


@dataclass(frozen=True)
class DatasetOptions:
    """What to make.

    ``findings``: None draws each of the 18 independently; a list gives every volume exactly these.
    ``voxel_mm``: typical in-plane spacing; a chest of 2 mm voxels has about 3 million.
    ``prevalence``: chance of each finding, in those that are not normal.
    """

    count: int
    seed: int
    split: str = "valid"
    voxel_mm: float = 2.0
    findings: Sequence[str] | None = None
    prevalence: float = PREVALENCE

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"--n {self.count}: expected at least 1")
        if self.split not in SPLITS:
            raise InputError(f"--split {self.split!r}: expected one of {', '.join(SPLITS)}")
        if not 0.5 <= self.voxel_mm <= 6:
            raise InputError(f"--voxel-mm {self.voxel_mm:g}: expected 0.5 to 6")
        if not 0 <= self.prevalence <= 1:
            raise InputError(f"--prevalence {self.prevalence:g}: expected 0 to 1")
        for name in self.findings or ():
            if name not in PAINTERS:
                raise InputError(f"finding {name!r}: unknown{suggestion(name, PAINTERS)}; the names are "
                                 f"{', '.join(CT_RATE_CLASSES)}")


@dataclass(frozen=True)
class Phantom:
    """One scan: stored values [X, Y, Z] int16 in HU, axes to the left, back and head; what is in it and its report.

    ``places``: where each finding changed the picture, [X, Y, Z] bool, if that was asked for. Cardiomegaly has none:
    the heart is part of the anatomy.
    """

    stored: NDArray[np.int16]
    grid: Grid
    present: dict[str, Drawn]
    report: Report
    places: dict[str, NDArray[np.bool_]] = field(default_factory=dict)


def draw_findings(rng: np.random.Generator, prevalence: float = PREVALENCE) -> set[str]:
    """Findings at random: each with its chance, or none at all."""
    if rng.random() < NORMAL_SHARE:
        return set()
    return {name for name in CT_RATE_CLASSES if rng.random() < prevalence}


def make_phantom(options: DatasetOptions, index: int) -> Phantom:
    """The phantom number ``index``: a function of the seed, the split and the options, not of the others."""
    return next(make_variants(options, index))


def make_variants(options: DatasetOptions, index: int, locate: bool = False) -> Iterator[Phantom]:
    """The phantom number ``index``, then without end the same patient in the same scanner with other findings.

    Only cardiomegaly stays as it is: the heart is part of the anatomy, and painting that takes longest.
    """
    split = list(SPLITS).index(options.split)
    rng = np.random.default_rng(np.random.SeedSequence([options.seed, split, index]))
    chosen = set(options.findings) if options.findings is not None else draw_findings(rng, options.prevalence)
    patient = Patient.draw(rng)
    large_heart = "Cardiomegaly" in chosen
    if large_heart:
        patient = enlarge_heart(patient, rng)
    protocol = Protocol.draw(patient, rng, options.voxel_mm)
    anatomy = build_scene(patient, protocol.grid, rng)
    while True:
        scene = anatomy.copy()
        present, places = {}, {}
        for name in CT_RATE_CLASSES:
            if name in chosen:
                before = scene.canvas.hu.copy() if locate else None
                present[name] = PAINTERS[name](scene, rng)
                if before is not None and name != "Cardiomegaly":
                    places[name] = np.abs(scene.canvas.hu - before) > VISIBLE_HU
        report = write_report(present, rng)
        yield Phantom(acquire(scene, protocol, rng), protocol.grid, present, report, places)
        if options.findings is None:
            chosen = draw_findings(rng, options.prevalence) - {"Cardiomegaly"}
            chosen |= {"Cardiomegaly"} if large_heart else set()


def write_nifti(phantom: Phantom, path: Path) -> None:
    """Write the scan with its geometry: the stored axes grow to the left, the back and the head (LPS)."""
    sx, sy, sz = phantom.grid.spacing_mm
    affine = np.diag([-sx, -sy, sz, 1.0])
    for axis, sign in enumerate((-1, -1, 1)):
        half = (phantom.grid.shape[axis] - 1) / 2 * phantom.grid.spacing_mm[axis]
        affine[axis, 3] = sign * (phantom.grid.centre_mm[axis] - half)
    image = nib.Nifti1Image(phantom.stored, affine)
    image.header.set_xyzt_units("mm")
    # In one piece: nibabel leaves a gzip stream half open where the disk is full, which Python 3.13 complains of.
    content = image.to_bytes()
    path.write_bytes(gzip.compress(content, _GZIP_LEVEL, mtime=0) if path.suffix == ".gz" else content)


def volume_name(split: str, index: int) -> str:
    """CT-RATE's naming: patient, scan, reconstruction."""
    return f"{SPLITS[split].prefix}_{index + 1}_a_1.nii.gz"


@dataclass(frozen=True)
class _Row:
    """What the tables say of one volume."""

    index: int
    name: str
    spacing_mm: tuple[float, float, float]
    slices: int
    present: tuple[str, ...]
    report: Report


def _make_one(options: DatasetOptions, index: int, volumes: Path) -> _Row:
    phantom = make_phantom(options, index)
    name = volume_name(options.split, index)
    patient = f"{SPLITS[options.split].prefix}_{index + 1}"
    folder = volumes / patient / f"{patient}_a"
    folder.mkdir(parents=True)
    write_nifti(phantom, folder / name)
    return _Row(index, name, phantom.grid.spacing_mm, phantom.grid.shape[2], tuple(phantom.present), phantom.report)


def write_dataset(
    out: Path, options: DatasetOptions, workers: int, overwrite: bool = False,
    on_done: Callable[[], None] = lambda: None,
) -> None:
    """Write ``out``; it gets its name when the last volume is there.

    Args:
        workers: processes; the result does not depend on their number.
        on_done: called after each volume; for progress display.

    Raises:
        InputError: ``out`` exists and ``overwrite`` is false, or cannot be written.
    """
    split = SPLITS[options.split]
    with atomic_folder(out, split.labels if overwrite else None) as folder:
        volumes = folder / "data_volumes" / "dataset" / split.prefix
        volumes.mkdir(parents=True)
        rows: list[_Row] = []
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=leave_interrupts_to_the_parent)
        try:
            for future in as_completed([pool.submit(_make_one, options, i, volumes) for i in range(options.count)]):
                rows.append(future.result())
                on_done()
        finally:
            pool.shutdown(cancel_futures=True)
        rows.sort(key=lambda row: row.index)
        for name in ("metadata", "radiology_text_reports"):
            (folder / name).mkdir()
        _write_csv(folder / "metadata" / split.metadata,
                   ("VolumeName", "Manufacturer", "NumberofSlices", "RescaleSlope", "RescaleIntercept", "XYSpacing",
                    "ZSpacing"),
                   ((r.name, "phantom", r.slices, 1, 0, f"[{r.spacing_mm[0]:.6f}, {r.spacing_mm[1]:.6f}]",
                     f"{r.spacing_mm[2]:.6f}") for r in rows))
        _write_csv(folder / "radiology_text_reports" / split.reports, ("VolumeName", "Findings_EN", "Impressions_EN"),
                   ((r.name, r.report.findings, r.report.impression) for r in rows))
        _write_csv(folder / split.labels, ("VolumeName", *CT_RATE_CLASSES),
                   ((r.name, *(int(name in r.present) for name in CT_RATE_CLASSES)) for r in rows))


def leave_interrupts_to_the_parent() -> None:
    """Ctrl-C reaches every process; a worker would only print a traceback of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
