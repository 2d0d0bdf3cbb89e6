"""The original way: PyTorch eager, fp32, the same architecture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...runtime.bundle import open_bundle
from ...runtime.scoring import probabilities
from . import Job

KIND = "pytorch"


class _Eager:
    def __init__(self, job: Job) -> None:
        import torch

        from ...export.checkpoints import read_checkpoint
        from ...export.clip import Detector
        from ...export.random_weights import random_checkpoint

        torch.set_num_threads(job.threads)
        self._torch = torch
        manifest = open_bundle(job.bundle, verify=False).manifest
        if job.checkpoint is not None:
            model = read_checkpoint(Path(job.checkpoint), manifest.input_size, manifest.reduction).build()
            weights = "the checkpoint's weights"
        elif (seed := manifest.source.random_seed) is not None:
            model = random_checkpoint(manifest.encoder, seed, manifest.input_size, manifest.reduction).build()
            weights = f"random weights, seed {seed}"
        else:
            model = random_checkpoint(manifest.encoder, 0, manifest.input_size, manifest.reduction).build()
            weights = "random weights"
        self._clip = model.trained_model if isinstance(model, Detector) else model
        self._manifest = manifest
        self._prompts = None if manifest.zero_shot is None else np.load(
            Path(job.bundle) / manifest.zero_shot.prompt_embeddings, allow_pickle=False)
        self._description = f"PyTorch {torch.__version__} eager, {job.threads} threads, {weights}"

    def run(self, volume: NDArray[np.float32]) -> NDArray[np.float32]:
        with self._torch.inference_mode():
            return self._clip.encode_image(self._torch.from_numpy(volume[:, None])).embedding.numpy()

    def run_scan(self, scan: str) -> NDArray[np.float32]:
        from ..original import load_volume

        assert self._prompts is not None
        assert self._manifest.zero_shot is not None
        embedding = self.run(load_volume(scan, self._manifest.preprocessing)[None])
        cosine = np.einsum("nd,cpd->ncp", embedding, self._prompts)
        return probabilities(cosine, self._manifest.zero_shot)

    def describe(self) -> str:
        return self._description


def open_contender(job: Job) -> _Eager:
    """Build the model from the checkpoint, or with random weights: the time does not depend on their values."""
    return _Eager(job)
