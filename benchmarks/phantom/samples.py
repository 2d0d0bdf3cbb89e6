"""Phantoms as training reads them: the voxels that the stem of DCFormer looks at, eight bits each, and the findings.

With stride 4 and kernels of length 7 along one axis, the stem's first layer at an output position reads 19 voxels: the
centre and three to either side along each axis. A volume of (128, 256, 256) becomes ``[64, 64, 32, 19]`` bytes, 2.5 MB
instead of 34, in the order in which a matrix product wants them. A sample is one patient several times, with other
findings each time and moved by a few voxels, because painting the anatomy takes longest.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...runtime.files import atomic_file
from ...runtime.manifest import CT_RATE_CLASSES, Preprocessing
from ...runtime.volume import preprocess
from ...runtime.volume.types import Volume
from .dataset import DatasetOptions, leave_interrupts_to_the_parent, make_variants
from .words import Drawn

STRIDE, REACH = 4, 3
#: (axis, offset) of the voxels read, in the order of the last axis; axes are H, W, D. The centre comes once.
TAPS = tuple((axis, offset) for axis in range(3) for offset in range(-REACH, REACH + 1) if axis == 0 or offset != 0)
#: Stored byte = 127 * (value + 1): -1 is 0, the convolution's padding value 0 is 127, 1 is 254; steps of 4.7 HU.
BYTE_SCALE = 127
#: Scans of one patient, and how far they are moved at most (voxels along D, H, W).
VARIANTS, LARGEST_SHIFT_DHW = 5, (4, 6, 6)
#: Side (voxels) of the cells in which places of findings are kept.
PLACE_CELL = 8


@dataclass(frozen=True)
class Sample:
    """One scan: its taps ``[H/4, W/4, D/4, 19]`` uint8, the words for what is in it, by finding, and where that is.

    ``packed_places``: bits of ``[18, H/8, W/8, D/8]``, see ``places``.
    """

    taps: NDArray[np.uint8]
    present: dict[str, Drawn]
    packed_places: NDArray[np.uint8]

    @property
    def places(self) -> NDArray[np.bool_]:
        """Whether each finding touches each cell, ``[18, H/8, W/8, D/8]``; of cardiomegaly nothing is known."""
        shape = (len(CT_RATE_CLASSES), *(side * STRIDE // PLACE_CELL for side in self.taps.shape[:3]))
        return np.unpackbits(self.packed_places, count=int(np.prod(shape))).reshape(shape).astype(bool)


def gather_taps(volume: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The voxels ``[H/4, W/4, D/4, 19]`` that the stem reads of a preprocessed ``[D, H, W]`` volume, as bytes."""
    stored = np.rint((volume.transpose(1, 2, 0) + 1) * BYTE_SCALE).astype(np.uint8)
    padded = np.pad(stored, REACH, constant_values=BYTE_SCALE)
    taps = np.empty((*(side // STRIDE for side in stored.shape), len(TAPS)), np.uint8)
    for index, (axis, offset) in enumerate(TAPS):
        where = []
        for i, side in enumerate(stored.shape):
            first = REACH + (offset if i == axis else 0)
            where.append(slice(first, first + side, STRIDE))
        taps[..., index] = padded[tuple(where)]
    return taps


def gather_places(places: NDArray[np.bool_], spacing_mm: tuple[float, float, float], preprocessing: Preprocessing,
                  starts: tuple[int, int, int], shape: tuple[int, int, int]) -> NDArray[np.bool_]:
    """Which cells a finding touches, in a window of the preprocessed volume.

    Args:
        places: the stored voxels it changed, ``[X, Y, Z]``, ``spacing_mm`` apart.
        starts: first voxel of the window along H, W, D in a volume preprocessed as ``preprocessing`` says.
        shape: of the window, likewise.

    Returns:
        ``[H/8, W/8, D/8]``; a cell's middle is the voxel that stride 8 looks at.
    """
    depth, *plane = preprocessing.shape_dhw
    for axis, (spacing, wanted, side, start, length) in enumerate(zip(
            spacing_mm, preprocessing.spacing_hwd_mm, (*plane, depth), starts, shape, strict=True)):
        count = places.shape[axis]
        resampled = int(count * spacing / wanted)
        # Half-pixel centres, then the crop or padding of the middle, then the window.
        position = (np.arange(count) + 0.5) * resampled / count - 0.5
        position -= max((resampled - side) // 2, 0) - max((side - resampled) // 2, 0) + start
        cell = np.floor((position + PLACE_CELL / 2) / PLACE_CELL).astype(int)
        result = np.zeros((*places.shape[:axis], length // PLACE_CELL, *places.shape[axis + 1 :]), bool)
        for index in range(length // PLACE_CELL):
            within = np.flatnonzero(cell == index)
            if len(within):
                part = places.take(np.arange(within[0], within[-1] + 1), axis)
                result[(slice(None),) * axis + (index,)] = part.any(axis=axis)
        places = result
    return places


def write_samples(
    folder: Path, options: DatasetOptions, preprocessing: Preprocessing, workers: int,
    on_done: Callable[[], None] = lambda: None,
) -> None:
    """Make the patients that ``folder`` does not hold yet; an interrupted call goes on where it stopped.

    Args:
        on_done: called after each patient, made now or found; for progress display.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = []
    for index in range(options.count):
        if _taps_file(folder, index).exists() and _facts_file(folder, index).exists():
            on_done()
        else:
            missing.append(index)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=leave_interrupts_to_the_parent)
    try:
        for future in as_completed([pool.submit(_write_one, folder, options, preprocessing, i) for i in missing]):
            future.result()
            on_done()
    finally:
        pool.shutdown(cancel_futures=True)


def read_samples(folder: Path, count: int) -> list[Sample]:
    """The scans of patients 0 to ``count`` - 1; the taps stay on disk until they are looked at."""
    samples = []
    for index in range(count):
        facts = json.loads(_facts_file(folder, index).read_text(encoding="utf-8"))
        taps = np.load(_taps_file(folder, index), mmap_mode="r", allow_pickle=False)
        places = np.load(_places_file(folder, index), allow_pickle=False)
        for variant, present, bits in zip(taps, facts, places, strict=True):
            samples.append(Sample(variant, {name: Drawn(detail) for name, detail in present.items()}, bits))
    return samples


def _write_one(folder: Path, options: DatasetOptions, preprocessing: Preprocessing, index: int) -> None:
    shape = preprocessing.shape_dhw
    wider = replace(preprocessing, shape_dhw=tuple(side + 2 * shift
                                                   for side, shift in zip(shape, LARGEST_SHIFT_DHW, strict=True)))
    rng = np.random.default_rng([options.seed, index])
    taps, facts, places = [], [], []
    for phantom in itertools.islice(make_variants(options, index, locate=True), VARIANTS):
        volume = Volume(f"phantom {index}", phantom.stored, (), phantom.grid.spacing_mm, preprocessing.orientation)
        starts = tuple(int(rng.integers(0, 2 * shift + 1)) for shift in LARGEST_SHIFT_DHW)
        where = tuple(slice(start, start + side) for start, side in zip(starts, shape, strict=True))
        taps.append(gather_taps(preprocess(volume, wider)[where]))
        facts.append({name: drawn.detail for name, drawn in phantom.present.items()})
        window, start_hwd = (shape[1], shape[2], shape[0]), (starts[1], starts[2], starts[0])
        cells = np.zeros((len(CT_RATE_CLASSES), *(side // PLACE_CELL for side in window)), bool)
        for name, changed in phantom.places.items():
            found = gather_places(changed, phantom.grid.spacing_mm, wider, start_hwd, window)
            cells[CT_RATE_CLASSES.index(name)] = found
        places.append(np.packbits(cells))
    with atomic_file(_taps_file(folder, index)) as path, path.open("wb") as file:
        np.save(file, np.stack(taps))
    with atomic_file(_places_file(folder, index)) as path, path.open("wb") as file:
        np.save(file, np.stack(places))
    with atomic_file(_facts_file(folder, index)) as path:
        path.write_text(json.dumps(facts), encoding="utf-8")


def _taps_file(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.npy"


def _places_file(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}_places.npy"


def _facts_file(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.json"
