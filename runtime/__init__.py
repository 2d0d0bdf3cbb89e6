"""Run an exported bundle: NIfTI in, embeddings and zero-shot scores out. Never imports torch, onnx or transformers."""

from .errors import BundleError, CheckFailed, DcformerError, DeviceUnavailable, InputError, MissingDependency
from .manifest import Manifest
from .model import Classification, Model, ZeroShot, load

__all__ = [
    "BundleError",
    "CheckFailed",
    "Classification",
    "DcformerError",
    "DeviceUnavailable",
    "InputError",
    "Manifest",
    "MissingDependency",
    "Model",
    "ZeroShot",
    "load",
]
