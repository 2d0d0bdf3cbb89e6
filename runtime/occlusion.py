"""Where an encoder looks: how scores change when a block of the volume is hidden.

Zeiler and Fergus, "Visualizing and understanding convolutional networks" (ECCV 2014), section 4.2, in three dimensions:
no gradients, so any back end and precision will do. A block is hidden by giving it the value of air (the lowest
that it can hold). The answer is as coarse as the blocks, and true of the model, not of the patient.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .manifest import Preprocessing, TensorInfo
from .model import Model
from .results import Prepared

#: Probabilities nearer to 0 or 1 are not told apart: their log-odds would be dominated by rounding.
_SMALLEST_PROBABILITY = 1e-6
_FEATURE_MAP = "feature_map"


@dataclass(frozen=True)
class Occlusion:
    """Effects of blocks on scores.

    ``classes``: names. ``scores``: of the whole scan, ``[classes]``. ``effect``: ``[D', H', W', classes]`` float32, the
    log-odds of the whole scan less those with the block hidden: positive where the block speaks for the class; 0 for
    blocks in which there is only air already. ``block_dhw``: voxels of a block. ``cell_dhw``: of a cell of the
    encoder's own output, None where it has no such grid. ``inferences``: how many it took.
    """

    classes: tuple[str, ...]
    scores: NDArray[np.float32]
    effect: NDArray[np.float32]
    block_dhw: tuple[int, int, int]
    cell_dhw: tuple[int, int, int] | None
    inferences: int

    def strongest(self, name: str, count: int = 1) -> list[tuple[tuple[int, int, int], float]]:
        """Blocks (indices along D', H', W') that speak for a class, the strongest first, with their effects."""
        effect = self.effect[..., self.classes.index(name)]
        order = np.argsort(-effect, axis=None, kind="stable")[:count]
        places = (tuple(int(i) for i in np.unravel_index(index, effect.shape)) for index in order)
        return [((d, h, w), float(effect[d, h, w])) for d, h, w in places]


def occlude(model: Model, scan: Prepared, classes: Sequence[str] | None = None, most_blocks: int = 256,
            on_block: Callable[[int, int], None] = lambda done, of: None) -> Occlusion:
    """Hide one block after the other and score again.

    Args:
        scan: as ``Model.prepare`` gives it, on the CPU.
        classes: as in ``Model.zero_shot``; a detector has its own.
        most_blocks: as in ``choose_grid``; each takes an inference.
        on_block: told how many are done, of how many.

    Raises:
        InputError: fewer than eight blocks allowed, or inputs on the GPU.
    """
    spec = model.manifest.preprocessing
    feeds = scan.feeds
    if not all(isinstance(array, np.ndarray) for array in feeds.values()):
        raise InputError("occlusion hides blocks on the CPU; load the model with preprocess='cpu'")
    cell = _cell(model)
    grid = choose_grid(spec.shape_dhw, most_blocks)
    block = tuple(side // parts for side, parts in zip(spec.shape_dhw, grid, strict=True))
    names, whole = _score(model, feeds, classes)
    effect = np.zeros((*grid, len(names)), np.float32)
    air = spec.value_range[0]
    places = [place for place in itertools.product(*map(range, grid))
              if any(np.any(part != air) for part in _parts(feeds, spec, place, block))]
    hidden = {name: array.copy() for name, array in feeds.items()}
    for done, place in enumerate(places):
        on_block(done, len(places))
        for part in _parts(hidden, spec, place, block):
            part[...] = air
        effect[place] = _log_odds(whole) - _log_odds(_score(model, hidden, classes)[1])
        for part, seen in zip(_parts(hidden, spec, place, block), _parts(feeds, spec, place, block), strict=True):
            part[...] = seen
    return Occlusion(names, whole, effect, (block[0], block[1], block[2]), cell, len(places) + 1)


def choose_grid(shape_dhw: tuple[int, int, int], most_blocks: int) -> tuple[int, int, int]:
    """Blocks along D, H and W: the longest side is halved, again and again, while there are not too many.

    Raises:
        InputError: ``most_blocks`` below 8, with which nothing could be told.
    """
    if most_blocks < 8:
        raise InputError(f"blocks: {most_blocks}; expected at least 8")
    grid = [1, 1, 1]
    while math.prod(grid) * 2 <= most_blocks:
        even = [axis for axis in range(3) if shape_dhw[axis] % (2 * grid[axis]) == 0]
        if not even:
            break
        # Of sides of as many voxels D first, along which voxels are thickest.
        grid[max(even, key=lambda axis: (shape_dhw[axis] // grid[axis], -axis))] *= 2
    return grid[0], grid[1], grid[2]


def _parts(feeds: Mapping[str, NDArray[Any]], spec: Preprocessing, place: Sequence[int], block: Sequence[int]
           ) -> list[NDArray[Any]]:
    """Views of what each input holds of a block; lines are kept at every s-th index of an axis."""
    views = []
    for array in feeds.values():
        taken = []
        for index, length, side, kept in zip(place, block, spec.shape_dhw, array.shape[-3:], strict=True):
            stride = side // kept
            taken.append(slice(-(-index * length // stride), -(-(index + 1) * length // stride)))
        views.append(array[..., *taken])
    return views


def _score(model: Model, feeds: dict[str, Any], classes: Sequence[str] | None
           ) -> tuple[tuple[str, ...], NDArray[np.float32]]:
    scan = Prepared("", feeds)
    found = (model.classify(scan) if model.manifest.zero_shot is None else model.zero_shot(scan, classes)).scores
    return tuple(found), np.array(list(found.values()), np.float32)


def _cell(model: Model) -> tuple[int, int, int] | None:
    """Voxels of a cell of the feature map ``[B, C, H', W', D']``."""
    graph = model.manifest.graph("image")
    info: TensorInfo | None = next((one for one in graph.outputs if one.name == _FEATURE_MAP), None) if graph else None
    if info is None or len(info.axes) != 5:
        return None
    height, width, depth = info.axes[-3:]
    if not (isinstance(height, int) and isinstance(width, int) and isinstance(depth, int)) or \
            min(height, width, depth) < 1:
        return None
    cells = [side // parts for side, parts in zip(model.manifest.preprocessing.shape_dhw, (depth, height, width),
                                                  strict=True)]
    return cells[0], cells[1], cells[2]


def _log_odds(probability: NDArray[np.float32]) -> NDArray[np.float64]:
    inside = np.clip(probability.astype(np.float64), _SMALLEST_PROBABILITY, 1 - _SMALLEST_PROBABILITY)
    return np.log(inside / (1 - inside))
