"""The checkpoint itself in PyTorch, fp32, to judge beside the bundle made from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ...export.checkpoints import read_checkpoint
from ...export.clip import Detector
from ...runtime.bundle import Bundle
from ...runtime.errors import BundleError, InputError
from ...runtime.scoring import probabilities
from ...runtime.text import Tokenizer
from .run import Outputs


class CheckpointEmbedder:
    """See ``run.Embedder``. Prompts are embedded here too; only the tokenizer and the task's words are the bundle's."""

    def __init__(self, bundle: Bundle, checkpoint: Path, classifier: bool, threads: int) -> None:
        torch.set_num_threads(threads)
        manifest = bundle.manifest
        found = read_checkpoint(checkpoint, manifest.input_size, manifest.reduction)
        if found.sha256 != manifest.source.sha256:
            raise InputError(f"{checkpoint}: not the checkpoint of {bundle.folder}, which was made from "
                             f"{manifest.source}")
        model = found.build()
        self._detector = model if isinstance(model, Detector) else None
        self._clip = model.trained_model if isinstance(model, Detector) else model
        self._classifier = classifier
        if manifest.text is None:
            raise BundleError(f"{bundle.folder}: this bundle has no tokenizer; export it with --tokenizer DIR")
        self._tokenizer = Tokenizer(bundle.path(manifest.text.file), manifest.text)
        if not classifier and manifest.zero_shot is not None:
            task = manifest.zero_shot
            prompts = self.texts([text for name in task.classes for text in task.prompts(name)])
            self._task, self._prompts = task, prompts.reshape(len(task.classes), task.prompt_count, -1)

    def image(self, volume: NDArray[np.float32]) -> Outputs:
        """See Embedder."""
        with torch.inference_mode():
            embedding = self._clip.encode_image(torch.from_numpy(volume[None, None])).embedding
            if self._classifier and self._detector is not None:
                scores = self._detector.class_scores(embedding)[0].numpy()
            else:
                scores = probabilities(self._prompts @ embedding[0].numpy(), self._task)
        return Outputs(embedding[0].numpy(), scores)

    def texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """See Embedder."""
        ids, mask = self._tokenizer.encode(texts)
        with torch.inference_mode():
            return self._clip.encode_text(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
