"""The original way: PyTorch eager, fp32, the same architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...runtime.bundle import open_bundle
from ...runtime.errors import DeviceUnavailable
from ...runtime.manifest import Manifest
from ...runtime.scan_files import ScanPath
from ...runtime.scoring import probabilities
from . import Job

KIND = "pytorch"


def build_clip(manifest: Manifest, checkpoint: Path | None) -> tuple[Any, str]:
    """A bundle's model in PyTorch, on the CPU, and what its weights are: the checkpoint's, or random ones."""
    from ...export.checkpoints import read_checkpoint
    from ...export.clip import Detector
    from ...export.random_weights import random_checkpoint

    if checkpoint is not None:
        model = read_checkpoint(checkpoint, manifest.input_size, manifest.reduction).build()
        weights = "the checkpoint's weights"
    else:
        seed = manifest.source.random_seed
        model = random_checkpoint(manifest.encoder, seed or 0, manifest.input_size, manifest.reduction).build()
        weights = "random weights" if seed is None else f"random weights, seed {seed}"
    return model.trained_model if isinstance(model, Detector) else model, weights


class _Eager:
    def __init__(self, job: Job) -> None:
        import torch

        torch.set_num_threads(job.threads)
        self._torch, self._device = torch, job.device
        if job.device == "cuda" and not torch.cuda.is_available():
            raise DeviceUnavailable(f"PyTorch {torch.__version__} has no CUDA here")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        manifest = open_bundle(job.bundle, verify=False).manifest
        clip, weights = build_clip(manifest, Path(job.checkpoint) if job.checkpoint else None)
        self._clip = clip.to(job.device)
        self._manifest = manifest
        self._prompts = None if manifest.zero_shot is None else np.load(
            Path(job.bundle) / manifest.zero_shot.prompt_embeddings, allow_pickle=False)
        self._description = f"PyTorch {torch.__version__} eager, {job.device}, {job.threads} threads, {weights}"

    def run(self, volume: NDArray[np.float32]) -> NDArray[np.float32]:
        with self._torch.inference_mode():
            tensor = self._torch.from_numpy(volume[:, None]).to(self._device)
            return self._clip.encode_image(tensor).embedding.cpu().numpy()

    def run_scan(self, scan: ScanPath) -> NDArray[np.float32]:
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
