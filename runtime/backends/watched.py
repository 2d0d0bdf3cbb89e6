"""A graph whose weights are mapped into memory from a file that others can write to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from ..bundle import HeldFile
from .base import Backend


class WatchedBackend:
    """Gives no results of weights that were overwritten meanwhile, as by ``cp`` onto a bundle in use. See ``Backend``.

    A bundle that is replaced as a whole, as every command of this project does, leaves loaded graphs what they are.
    """

    def __init__(self, backend: Backend, weights: HeldFile) -> None:
        self._backend, self._weights = backend, weights

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        """Compute the named outputs.

        Raises:
            BundleError: the weights are no longer those that were checked.
            InferenceError: as the back end itself.
        """
        self._weights.require_unchanged()
        found = self._backend.run(feeds, outputs)
        self._weights.require_unchanged()
        return found

    def describe(self) -> str:
        """As of ``Backend``."""
        return self._backend.describe()
