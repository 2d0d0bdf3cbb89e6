"""The original way: PyTorch eager, fp32, the same architecture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...runtime.bundle import open_bundle
from . import Job

NAME = "pytorch"


class _Eager:
    def __init__(self, job: Job) -> None:
        import torch

        from ...export.checkpoints import read_checkpoint
        from ...export.clip import Clip, ClipSpec, Detector, TextSpec
        from ...export.registry import get_encoder

        torch.set_num_threads(job.threads)
        self._torch = torch
        manifest = open_bundle(job.bundle, verify=False).manifest
        if job.checkpoint is not None:
            model = read_checkpoint(Path(job.checkpoint), manifest.input_size, manifest.reduction).build()
            self._clip = model.trained_model if isinstance(model, Detector) else model
            weights = "the checkpoint's weights"
        else:
            torch.manual_seed(0)
            smallest_text = TextSpec(8, 64, 1, 64, 8, 2)  # never run here
            codes = 8192
            self._clip = Clip(ClipSpec(get_encoder(manifest.encoder), manifest.reduction, manifest.input_size, codes,
                                       smallest_text)).eval()
            weights = "random weights"
        self._description = f"PyTorch {torch.__version__} eager, {job.threads} threads, {weights}"

    def run(self, volume: NDArray[np.float32]) -> NDArray[np.float32]:
        with self._torch.inference_mode():
            return self._clip.encode_image(self._torch.from_numpy(volume[:, None])).embedding.numpy()

    def describe(self) -> str:
        return self._description


def open_contender(job: Job) -> _Eager:
    """Build the model from the checkpoint, or with random weights: the time does not depend on their values."""
    return _Eager(job)
