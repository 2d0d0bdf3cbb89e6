"""``--backend auto``: the best back end that works here, and why."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator

from ..bundle import Bundle
from ..engine_library import load_library
from ..engines import LIBRARIES, find_engine, require_fitting
from ..errors import DcformerError, InputError
from ..gpu import current_gpu
from ..manifest import Manifest
from .base import CPU_BACKENDS, Options
from .onnxruntime import import_onnxruntime


def choose_backend(bundle: Bundle, options: Options) -> tuple[Options, str]:
    """Options with a back end in the place of "auto", and what was found.

    In this order: an engine for this GPU, by TensorRT before TensorRT-RTX; ONNX Runtime on the GPU; on the CPU, for
    fp32 the faster of the two back ends where the export has measured both, for bf16 and int8 OpenVINO; ONNX Runtime.

    Raises:
        InputError: device "cuda", and no engine that works here.
    """
    reasons = []
    for found, why in _candidates(bundle, options):
        reasons.append(why)
        if found is not None:
            return found, "; ".join(reasons)
    raise InputError(f"backend auto on device cuda: {'; '.join(reasons)}")


def _candidates(bundle: Bundle, options: Options) -> Iterator[tuple[Options | None, str]]:
    try:
        gpu = current_gpu()
    except DcformerError as error:
        yield None, f"no GPU: {error}"
    else:
        for library in LIBRARIES:
            try:
                record = find_engine(bundle, "image", options.precision, library, gpu)
                require_fitting(bundle, record, load_library(library).version, gpu)
            except DcformerError as error:
                yield None, f"{library}: {error}"
                continue
            yield (dataclasses.replace(options, backend=library, device="cuda"),
                   f"{library}, as the bundle holds {record.engine} for this {gpu.name}")
        if "CUDAExecutionProvider" in import_onnxruntime().get_available_providers():
            yield dataclasses.replace(options, backend="onnxruntime", device="cuda"), f"onnxruntime on this {gpu.name}"
        yield None, "this onnxruntime has no CUDA"
    if options.device == "cuda":
        return
    yield from _on_the_cpu(bundle, options)


def _on_the_cpu(bundle: Bundle, options: Options) -> Iterator[tuple[Options | None, str]]:
    onnxruntime, openvino = (dataclasses.replace(options, backend=name, device="cpu") for name in CPU_BACKENDS)
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
