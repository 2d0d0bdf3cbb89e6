"""``--backend auto``: the best back end that works here, and why."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator

from ..bundle import Bundle
from ..engines import LIBRARIES
from ..errors import DcformerError, DeviceUnavailable
from ..gpu import current_gpu
from ..manifest import Manifest
from . import open_tower
from .base import CPU_BACKENDS, Backend, Options
from .onnxruntime import import_onnxruntime
from .tensorrt import TensorRtBackend


def choose_backend(bundle: Bundle, options: Options) -> tuple[Options, str, Backend | None]:
    """Options with a back end in the place of "auto", what was found, and on a GPU the image tower, which was tried.

    In this order: an engine for this GPU that computes, by TensorRT before TensorRT-RTX; ONNX Runtime on the GPU, where
    it starts; on the CPU, for fp32 the faster of the two back ends where the export has measured both, for bf16 and
    int8 OpenVINO; ONNX Runtime. ONNX Runtime's TensorRT providers, which first build for minutes, are left for asking.

    Raises:
        DeviceUnavailable: device "cuda", and nothing that works there.
    """
    reasons = []
    for found, why, tried in _candidates(bundle, options):
        reasons.append(why)
        if found is not None and options.preprocess == "gpu" and found.preprocess != "gpu":
            reasons.append(f"{found.backend} preprocesses on the CPU alone, and the GPU was asked for")
        elif found is not None:
            return found, "; ".join(reasons), tried
    raise DeviceUnavailable(f"backend auto on device {options.device}: {'; '.join(reasons)}")


def _candidates(bundle: Bundle, options: Options) -> Iterator[tuple[Options | None, str, Backend | None]]:
    try:
        gpu = current_gpu()
    except DcformerError as error:
        yield None, f"no GPU: {error}", None
    else:
        for library in LIBRARIES:
            chosen = dataclasses.replace(options, backend=library, device="cuda")
            try:
                engine = TensorRtBackend(bundle, "image", chosen)
                engine.try_out()
            except DcformerError as error:
                yield None, f"{library}: {error}", None
                continue
            yield chosen, f"{library}, as {engine.record.engine} of the bundle runs on this {gpu.name}", engine
        chosen = dataclasses.replace(options, backend="onnxruntime", device="cuda", preprocess="cpu")
        graph = bundle.manifest.graph("image", chosen.graph_precision, chosen.target)
        if "CUDAExecutionProvider" not in import_onnxruntime().get_available_providers():
            yield None, "this onnxruntime has no CUDA", None
        elif graph is not None:
            try:
                opened = open_tower(bundle, graph, chosen)
            except DcformerError as error:
                yield None, f"onnxruntime: {error}", None
            else:
                yield chosen, f"onnxruntime on this {gpu.name}", opened
    if options.device == "cuda":
        return
    yield from ((found, why, None) for found, why in _on_the_cpu(bundle, options))


def _on_the_cpu(bundle: Bundle, options: Options) -> Iterator[tuple[Options | None, str]]:
    onnxruntime, openvino = (dataclasses.replace(options, backend=name, device="cpu", preprocess="cpu")
                             for name in CPU_BACKENDS)
    measured = _measured_ms(bundle.manifest)
    if importlib.util.find_spec("openvino") is None:
        yield None, "openvino is not installed"
    elif options.precision == "bf16":
        yield openvino, "openvino, which computes fp32 graphs in bfloat16"
    elif options.precision == "int8":
        yield openvino, "openvino, whose INT8 convolutions are faster than fp32"
    elif options.precision == "fp32" and len(measured) == len(CPU_BACKENDS):
        best = min(CPU_BACKENDS, key=lambda name: measured[name])
        told = ", ".join(f"{name} {measured[name]:.0f} ms" for name in CPU_BACKENDS)
        yield dataclasses.replace(onnxruntime, backend=best), f"{best}, by what the export measured ({told})"
    yield onnxruntime, "onnxruntime on the CPU"


def _measured_ms(manifest: Manifest) -> dict[str, float]:
    """The image tower's latency by back end, as the last measured rewrite left it."""
    return {rewrite.target: min(rewrite.measured.before_ms, rewrite.measured.after_ms)
            for rewrite in manifest.rewrites if rewrite.measured is not None and rewrite.target in CPU_BACKENDS}
