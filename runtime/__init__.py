"""Run an exported bundle: NIfTI in, embeddings and zero-shot scores out. Never imports torch, onnx or transformers.

Names are loaded when first used, so that ``dcformer --help`` does not wait for numpy and nibabel.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import (
        BundleError,
        CheckFailed,
        DcformerError,
        DeviceUnavailable,
        InferenceError,
        InputError,
        MissingDependency,
    )
    from .manifest import Manifest
    from .model import Model, load
    from .results import Classification, Prepared, Scores, ZeroShot

__all__ = [
    "BundleError",
    "CheckFailed",
    "Classification",
    "DcformerError",
    "DeviceUnavailable",
    "InferenceError",
    "InputError",
    "Manifest",
    "MissingDependency",
    "Model",
    "Prepared",
    "Scores",
    "ZeroShot",
    "load",
]
# ONNX Runtime's published Linux builds send usage data to Microsoft, and keep an identifier of the machine, unless this
# is set before its import. A hospital's program must not.
os.environ["ORT_DISABLE_TELEMETRY"] = os.environ.get("ORT_DISABLE_TELEMETRY") or "1"
_MODULES = ("errors", "manifest", "results", "model")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in _MODULES:
            loaded = importlib.import_module(f".{module}", __name__)
            if name in vars(loaded):
                return vars(loaded)[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
