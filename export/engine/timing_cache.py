"""What TensorRT measured of its kernels, kept from one build for the next.

Run with a faked library only: TensorRT measures on a GPU, and TensorRT-RTX keeps no timings.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from ...runtime.engine_library import Library
from ...runtime.engines import Gpu
from ...runtime.errors import DcformerError, DcformerWarning, one_line
from ...runtime.files import atomic_file, cache_folder


def timing_cache_file(library: Library, gpu: Gpu | None) -> Path | None:
    """Where the timings of a library version on a GPU are kept; None without a GPU, where nothing is measured."""
    if gpu is None:
        return None
    name = re.sub("[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
    target = f"sm{gpu.compute_capability.replace('.', '')}"
    return cache_folder() / f"{library.name}-{library.version}-{name}-{target}.timings"


def attach_timing_cache(config: Any, file: Path | None) -> Any:
    """Let a build use the stored timings, or start with none where the library refuses them, which warns.

    Returns:
        The cache that the build adds to; None if the library takes not even an empty one.
    """
    if file is not None and file.exists():
        try:
            return _attached(config, file.read_bytes())
        except (OSError, RuntimeError, ValueError) as error:
            warnings.warn(f"{file}: not used ({one_line(str(error))}); kernels are measured anew, and it is made anew",
                          DcformerWarning, stacklevel=2)
    try:
        return _attached(config, b"")
    except (RuntimeError, ValueError):
        return None  # the build measures all the same, and keeps nothing


def store_timing_cache(cache: Any, file: Path) -> None:
    """Keep what was measured; warns if it cannot be written, as the engine is built all the same."""
    try:
        with atomic_file(file) as temporary:
            temporary.write_bytes(bytes(memoryview(cache.serialize())))
    except (OSError, DcformerError) as error:
        warnings.warn(f"{file}: measured kernels are not kept, and the next build measures anew ({error})",
                      DcformerWarning, stacklevel=2)


def _attached(config: Any, stored: bytes) -> Any:
    cache = config.create_timing_cache(stored)
    if cache is None:
        raise ValueError("the library cannot read it")
    # False: no timings of another GPU, which the library would else take.
    if not config.set_timing_cache(cache, False):
        raise ValueError("the library refuses it: of another GPU, or of another release")
    return cache
