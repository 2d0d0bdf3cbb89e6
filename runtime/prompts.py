"""Zero-shot prompts of a bundle, embedded when it was made."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle
from .errors import BundleError
from .manifest import ZeroShotTask


def stored_prompts(bundle: Bundle, task: ZeroShotTask) -> NDArray[np.float32]:
    """``[classes, prompts, 512]`` from the bundle's file.

    Raises:
        BundleError: not the array that the manifest tells of.
    """
    path = bundle.path(task.prompt_embeddings)
    try:
        stored = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise BundleError(f"{path}: not a usable array ({error}); export the bundle again") from error
    expected = (len(task.classes), task.prompt_count, bundle.manifest.embedding_dim)
    if stored.shape != expected or stored.dtype != np.float32:
        raise BundleError(f"{path}: {stored.dtype} {list(stored.shape)}; expected float32 {list(expected)}")
    return stored
