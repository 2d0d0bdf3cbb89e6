"""What one training step reads: options, token ids, and batches of samples with reports written for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import BertWordPieceTokenizer
from torch import Tensor

from ...runtime.manifest import CT_RATE_CLASSES
from .captions import report_text
from .reports import write_report
from .samples import BYTE_SCALE, PLACE_CELL, STRIDE, TAPS, Sample

MAX_TOKENS = 384


@dataclass(frozen=True)
class TrainOptions:
    """What fixes a training; ``patients`` are painted five times each with other findings."""

    patients: int
    steps: int
    batch_size: int
    seed: int
    learning_rate: float
    prevalence: float
    monitored_patients: int = 40
    warm_up: float = 0.05
    open_stem_after: float = 0.975
    focus_after: float = 0.58
    quantize_after: float = 0.6
    codebook_batches: int = 64
    tuning_steps: int = 600
    tuning_batch_size: int = 128


@dataclass(frozen=True)
class Batch:
    """Taps ``[B, …, 19]`` uint8, places ``[B, 18, …]`` and labels ``[B, 18]`` float, ids and mask ``[B, L]`` int64."""

    taps: Tensor
    places: Tensor
    labels: Tensor
    ids: Tensor
    mask: Tensor


class Texts:
    """Token ids of reports and prompts."""

    def __init__(self, vocabulary: Path) -> None:
        self._tokenizer = BertWordPieceTokenizer.from_file(str(vocabulary), lowercase=True)
        self._tokenizer.enable_padding()
        self._tokenizer.enable_truncation(MAX_TOKENS)
        self.size = self._tokenizer.get_vocab_size()

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask ``[n, L]`` int64."""
        rows = self._tokenizer.encode_batch(list(texts))
        return torch.tensor([row.ids for row in rows]), torch.tensor([row.attention_mask for row in rows])


#: How far training moves a scan at most, in cells of the places (8 voxels), along H, W and D.
FARTHEST_HWD = (2, 2, 1)
_CELL = PLACE_CELL // STRIDE


def moved(sample: Sample, by: Sequence[int] | NDArray[np.integer]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Taps and places of a scan moved by some cells along H, W and D; what comes in at the border is air."""
    taps, places = sample.taps, sample.places
    if not any(by):
        return taps, places
    new_taps, new_places = np.zeros_like(taps), np.zeros_like(places)
    source = [slice(max(-n, 0), min(side, side - n)) for n, side in zip(by, places.shape[1:], strict=True)]
    target = [slice(max(n, 0), min(side, side + n)) for n, side in zip(by, places.shape[1:], strict=True)]
    new_places[:, *target] = places[:, *source]
    new_taps[*map(_fine, target)] = taps[*map(_fine, source)]
    # Taps before the first voxel are the convolution's padding, wherever the scan lies; elsewhere they are air.
    for index, (axis, offset) in enumerate(TAPS):
        if offset < 0:
            first = [slice(None)] * 3
            if by[axis] > 0:
                first[axis] = slice(by[axis] * _CELL, by[axis] * _CELL + 1)
                new_taps[*first, index] = 0
            first[axis] = slice(0, 1)
            new_taps[*first, index] = BYTE_SCALE
    return new_taps, new_places


def _fine(cells: slice) -> slice:
    return slice(cells.start * _CELL, cells.stop * _CELL)


class Batches:
    """Batches by step number: every epoch in another order, every scan moved, every report written anew."""

    def __init__(self, samples: Sequence[Sample], texts: Texts, options: TrainOptions) -> None:
        self.samples, self._texts, self._options = samples, texts, options

    def __call__(self, step: int) -> Batch:
        """The batch of one step; a function of the seed and the step alone."""
        size = self._options.batch_size
        per_epoch = len(self.samples) // size
        epoch, position = divmod(step, per_epoch)
        order = np.random.default_rng([self._options.seed, 1, epoch]).permutation(len(self.samples))
        rng = np.random.default_rng([self._options.seed, 2, step])
        return self.collate([self.samples[i] for i in order[position * size : (position + 1) * size]], rng, True)

    def collate(self, samples: Sequence[Sample], rng: np.random.Generator, moves: bool = False) -> Batch:
        """Some samples as a batch; ``moves``: at random, each by some cells."""
        reach = np.array(FARTHEST_HWD) * moves
        taps, places = zip(*(moved(sample, rng.integers(-reach, reach + 1)) for sample in samples), strict=True)
        return Batch(torch.from_numpy(np.stack(taps)), torch.from_numpy(np.stack(places).astype(np.float32)),
                     *self._labels_and_reports(samples, rng))

    def texts(self, indices: NDArray[np.integer], rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Labels, token ids and mask of reports on some samples by number."""
        return self._labels_and_reports([self.samples[i] for i in indices], rng)

    def _labels_and_reports(self, samples: Sequence[Sample], rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        labels = np.array([[name in sample.present for name in CT_RATE_CLASSES] for sample in samples], np.float32)
        ids, mask = self._texts.encode([report_text(write_report(sample.present, rng)) for sample in samples])
        return torch.from_numpy(labels), ids, mask

    def stream(self, first: int, last: int) -> Iterator[tuple[int, Batch]]:
        """Steps and their batches; the next one is read while this one is used."""
        with ThreadPoolExecutor(1) as reader:
            following = reader.submit(self, first)
            for step in range(first, last):
                batch = following.result()
                if step + 1 < last:
                    following = reader.submit(self, step + 1)
                yield step, batch
