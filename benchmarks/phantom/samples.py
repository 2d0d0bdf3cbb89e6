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
from ...runtime.manifest import Preprocessing
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
VARIANTS, LARGEST_SHIFT_DHW = 3, (4, 6, 6)


@dataclass(frozen=True)
class Sample:
    """One scan: its taps ``[H/4, W/4, D/4, 19]`` uint8, and the words for what is in it, by finding."""

    taps: NDArray[np.uint8]
    present: dict[str, Drawn]


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
        for variant, present in zip(taps, facts, strict=True):
            samples.append(Sample(variant, {name: Drawn(detail) for name, detail in present.items()}))
    return samples


def _write_one(folder: Path, options: DatasetOptions, preprocessing: Preprocessing, index: int) -> None:
    shape = preprocessing.shape_dhw
    wider = replace(preprocessing, shape_dhw=tuple(side + 2 * shift
                                                   for side, shift in zip(shape, LARGEST_SHIFT_DHW, strict=True)))
    rng = np.random.default_rng([options.seed, index])
    taps, facts = [], []
    for phantom in itertools.islice(make_variants(options, index), VARIANTS):
        volume = Volume(f"phantom {index}", phantom.stored, (), phantom.grid.spacing_mm, preprocessing.orientation)
        starts = (int(rng.integers(0, 2 * shift + 1)) for shift in LARGEST_SHIFT_DHW)
        where = tuple(slice(start, start + side) for start, side in zip(starts, shape, strict=True))
        taps.append(gather_taps(preprocess(volume, wider)[where]))
        facts.append({name: drawn.detail for name, drawn in phantom.present.items()})
    with atomic_file(_taps_file(folder, index)) as path, path.open("wb") as file:
        np.save(file, np.stack(taps))
    with atomic_file(_facts_file(folder, index)) as path:
        path.write_text(json.dumps(facts), encoding="utf-8")


def _taps_file(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.npy"


def _facts_file(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.json"
