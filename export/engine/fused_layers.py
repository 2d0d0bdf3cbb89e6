"""Layers of a built engine, after the library fused them.

Run with a faked inspector only: an engine is deserialized on a GPU, and this has not run on one yet.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from functools import partial
from typing import Any

from ...runtime.engine_library import Library, Log
from ...runtime.engines import Layer
from ...runtime.errors import DcformerWarning, one_line
from .watch import Watch, run_apart

#: Kind of a layer that the inspector tells the name of, and no more.
UNKNOWN = "unknown"


def fused_layers(library: Library, plan: bytes, engine: str) -> tuple[Layer, ...] | None:
    """Count an engine's layers by the library's own names of their kinds, most common first.

    Needs the GPU that the engine is for.

    Args:
        engine: its file, for the warning.

    Returns:
        None, with a warning, if the library does not tell: no reason to throw away an engine that was built.
    """
    try:
        layers = json.loads(run_apart(partial(_information, library, plan), Watch()))["Layers"]
        kinds = Counter(str(layer.get("LayerType", UNKNOWN)) if isinstance(layer, dict) else UNKNOWN
                        for layer in layers)
        if set(kinds) <= {UNKNOWN}:
            raise ValueError("the inspector tells names only" if kinds else "the inspector tells of none")
    except (RuntimeError, TypeError, ValueError, KeyError, MemoryError) as error:
        warnings.warn(f"{engine}: its record will not say which layers it has after fusion ({one_line(str(error))})",
                      DcformerWarning, stacklevel=2)
        return None
    return tuple(Layer(kind, count) for kind, count in kinds.most_common())


def _information(library: Library, plan: bytes) -> str:
    trt: Any = library.module
    log = Log(library)
    runtime = trt.Runtime(log.logger)
    # A version-compatible engine carries code of NVIDIA's to run it; this one was built here a moment ago.
    runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise RuntimeError(log.last())
    return engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
