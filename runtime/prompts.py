"""Zero-shot prompts of a bundle, embedded when it was made."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle
from .errors import BundleError
from .forks import ForkableLock
from .manifest import ZeroShotTask

#: Lists of other classes than the bundle's whose embeddings are kept.
_MOST_KEPT = 64


class Prompts:
    """Embeddings of prompts: the bundle's own as they were stored, others once they were computed."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._own: NDArray[np.float32] | None = None
        self._known: dict[tuple[str, ...], NDArray[np.float32]] = {}
        self._lock = ForkableLock()

    def embeddings(self, task: ZeroShotTask, classes: tuple[str, ...],
                   embed: Callable[[list[str]], NDArray[np.float32]]) -> NDArray[np.float32]:
        """``[classes, prompts, 512]``, positive first.

        Args:
            embed: texts into ``[n, 512]``.
        """
        if classes == task.classes:
            if self._own is None:
                self._own = stored_prompts(self._bundle, task)
            return self._own
        found = self._known.get(classes)
        if found is None:
            texts = [text for name in classes for text in task.prompts(name)]
            found = embed(texts).reshape(len(classes), task.prompt_count, -1)
            with self._lock:
                while len(self._known) >= _MOST_KEPT:
                    self._known.pop(next(iter(self._known)))  # the oldest
                self._known[classes] = found
        return found


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
