"""Build one engine from one ONNX file, on strongly typed networks only: precision is what the file says.

One builder for ``tensorrt`` 10 and 11 and ``tensorrt_rtx``. TensorRT measures kernels on the GPU that it builds on;
TensorRT-RTX builds anywhere, without a GPU too, and finishes on the GPU that runs the engine.

Built here with ``tensorrt_rtx`` 1.7 on a CPU; with ``tensorrt`` not yet run.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx

from ...runtime.engine_library import Library, Log
from ...runtime.engines import EngineTensor, Layer, Shapes
from ...runtime.errors import BuildFailed, DeviceUnavailable, InputError, one_line
from .timing_cache import attach_timing_cache, store_timing_cache
from .watch import Watch, monitor, run_apart

#: Axes whose length a profile gives.
BATCH, SEQUENCE = "batch", "sequence"
HARDWARE = ("none", "ampere-plus", "same-compute-capability")
TILING = ("none", "fast", "moderate", "full")


@dataclass(frozen=True)
class BuildOptions:
    """Builder settings; None leaves the library's default.

    ``batch``, ``sequence``: smallest, usual and largest of a profile. ``workspace_bytes``: scratch memory of one layer.
    ``tf32``: let float32 be computed with 10 bits. ``gpus``: compute capabilities for TensorRT-RTX, such as "8.9";
    empty = portable, Ampere and later. ``hardware``: for TensorRT, GPUs beside the one here. ``timing_cache``: for
    TensorRT, where measured kernels are remembered.
    """

    batch: tuple[int, int, int] = (1, 1, 8)
    sequence: tuple[int, int, int] = (1, 64, 512)
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    auxiliary_streams: int | None = None
    tiling: str | None = None
    tf32: bool = False
    version_compatible: bool = False
    strip_weights: bool = False
    hardware: str = HARDWARE[0]
    gpus: tuple[str, ...] = ()
    timing_cache: Path | None = None

    def flags(self) -> dict[str, Any]:
        """What differs from the defaults, for the record."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)
                if field.name not in ("batch", "sequence", "timing_cache")
                and getattr(self, field.name) != field.default}


@dataclass(frozen=True)
class Built:
    """``plan``: the engine's bytes. ``profile``: shapes by input."""

    plan: bytes
    profile: dict[str, Shapes]
    tensors: tuple[EngineTensor, ...]
    layers: tuple[Layer, ...]
    seconds: float


def build_engine(library: Library, path: Path, options: BuildOptions, watch: Watch | None = None) -> Built:
    """Parse an ONNX file and build.

    Raises:
        BuildFailed: the parser or the builder refused; with nodes and operators, or the library's own words.
        InputError: an option that the library does not have.
        KeyboardInterrupt: after Ctrl-C, once the library has stopped.
    """
    watch = watch or Watch()
    return run_apart(partial(_build, library, path, options, watch), watch)


def parser_refusal(library: Library, path: Path) -> str | None:
    """Why the library's parser refuses an ONNX file, with nodes and operators; None if it takes it.

    Keeps nothing: what was parsed is given back.
    """
    return run_apart(partial(_refusal, library, path), Watch())


def _refusal(library: Library, path: Path) -> str | None:
    log = Log(library)
    builder = library.module.Builder(log.logger)
    return _parse(library.module, builder.create_network(_network_flags(library.module)), log, path)


def _build(library: Library, path: Path, options: BuildOptions, watch: Watch) -> Built:
    trt = library.module
    log = Log(library)
    builder = trt.Builder(log.logger)
    network = builder.create_network(_network_flags(trt))
    if (refusal := _parse(trt, network, log, path)) is not None:
        raise BuildFailed(refusal)
    config = builder.create_builder_config()
    cache = _configure(library, config, options)
    profile, shapes = _profile(builder, network, path, options)
    config.add_optimization_profile(profile)
    tensors, layers = _describe(trt, network), _layers(network)
    progress = monitor(trt, watch)
    config.progress_monitor = progress
    start = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    if watch.stopped:
        raise KeyboardInterrupt
    if plan is None:
        raise BuildFailed(f"{path}: {library.name} {library.version} could not build it: {log.all()}")
    if cache is not None and options.timing_cache is not None:
        store_timing_cache(cache, options.timing_cache)
    return Built(bytes(memoryview(plan)), shapes, tensors, layers, time.perf_counter() - start)


def _network_flags(trt: Any) -> int:
    """Strongly typed, which newer releases always are."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _parse(trt: Any, network: Any, log: Log, path: Path) -> str | None:
    parser = trt.OnnxParser(network, log.logger)
    if parser.parse_from_file(str(path)):
        return None
    alike: dict[tuple[str, str], dict[int, Any]] = {}
    for error in map(parser.get_error, range(parser.num_errors)):
        alike.setdefault((error.node_operator(), error.desc()), {})[error.node()] = error
    told = "; ".join(_told(list(errors.values())) for errors in alike.values()) or log.all()
    return f"{path}: the ONNX parser refuses it: {told}"


def _told(errors: list[Any]) -> str:
    """Of errors that say the same of one operator: the first node, and how many more, which can be hundreds."""
    first = errors[0]
    node = f"node {first.node()} {first.node_name()!r} ({first.node_operator()}): " if first.node_operator() else ""
    return one_line(f"{node}{first.desc()}{f' (and {len(errors) - 1} more nodes)' if len(errors) > 1 else ''}")


def _configure(library: Library, config: Any, options: BuildOptions) -> Any:
    """Set what was asked for; returns the timing cache, if there is one."""
    trt = library.module
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.auxiliary_streams is not None:
        config.max_aux_streams = options.auxiliary_streams
    if options.tiling is not None:
        config.tiling_optimization_level = getattr(trt.TilingOptimizationLevel, options.tiling.upper())
    # TensorRT's default is to compute float32 with 10 bits, which nobody asked for.
    (config.set_flag if options.tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
    for wanted, name in ((options.version_compatible, "VERSION_COMPATIBLE"), (options.strip_weights, "STRIP_PLAN")):
        if wanted:
            config.set_flag(getattr(trt.BuilderFlag, name))
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if library.is_rtx:
        for index, gpu in enumerate(options.gpus):
            config.num_compute_capabilities = len(options.gpus)
            config.set_compute_capability(_capabilities(trt)[gpu], index)
        return None
    level = getattr(trt.HardwareCompatibilityLevel, options.hardware.upper().replace("-", "_"), None)
    if level is None:
        raise InputError(f"--hardware {options.hardware}: {library.name} {library.version} does not have it")
    config.hardware_compatibility_level = level
    return attach_timing_cache(config, options.timing_cache)


def _capabilities(trt: Any) -> dict[str, Any]:
    """By name, such as "8.9"."""
    return {f"{name[2:-1]}.{name[-1]}": value for name, value in trt.ComputeCapability.__members__.items()
            if name.startswith("SM")}


#: Named by TensorRT-RTX, and of no use: why.
_NOT_BUILT = {"7.5": "For Turing its builder has no float32 convolutions and products, and every graph has some; "
                     "tensorrt builds there"}


def require_known(library: Library, options: BuildOptions, has_gpu: bool) -> None:
    """Refuse, before any work, what a library does not have or what needs a GPU.

    Raises:
        InputError: an option of the other library, a GPU that it does not build for, one named twice.
        DeviceUnavailable: no GPU, and one is needed.
    """
    if not library.is_rtx:
        if options.gpus:
            raise InputError("--gpu: tensorrt builds for the GPU that it runs on; use --hardware, or tensorrt_rtx")
        if not has_gpu:
            raise DeviceUnavailable("--engine-library tensorrt: builds on the GPU that the engine is for, and here is "
                                    "none; tensorrt_rtx builds without")
        return
    given = {"--version-compatible": options.version_compatible, "--hardware": options.hardware != HARDWARE[0],
             "--tiling": options.tiling is not None}
    if any(given.values()):
        raise InputError(f"{', '.join(name for name, is_given in given.items() if is_given)}: not for tensorrt_rtx "
                         "engines; --gpu names their GPUs")
    if options.strip_weights and not has_gpu:
        raise DeviceUnavailable("--strip-weights: needs a GPU while the engine is built, and here is none")
    known = [name for name in _capabilities(library.module) if name not in _NOT_BUILT]
    for index, gpu in enumerate(options.gpus):
        if gpu not in known or gpu in options.gpus[:index]:
            raise InputError(f"--gpu {gpu}: tensorrt_rtx builds for {', '.join(known)}, each named once; without --gpu "
                             "portable engines for all from 8.0 on"
                             f"{f'. {_NOT_BUILT[gpu]}' if gpu in _NOT_BUILT else ''}")


def _profile(builder: Any, network: Any, path: Path, options: BuildOptions) -> tuple[Any, dict[str, Shapes]]:
    names = _axis_names(path)
    profile, shapes = builder.create_optimization_profile(), {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        sides: list[tuple[int, int, int]] = []
        for axis, side in enumerate(tuple(tensor.shape)):
            name = names[tensor.name][axis]
            sides.append((side, side, side) if side >= 0 else
                         options.sequence if name == SEQUENCE else options.batch)
        found = Shapes(*(tuple(side[which] for side in sides) for which in range(3)))
        profile.set_shape(tensor.name, found.smallest, found.usual, found.largest)
        shapes[tensor.name] = found
    return profile, shapes


def _axis_names(path: Path) -> dict[str, list[str]]:
    graph = onnx.load(path, load_external_data=False).graph
    return {value.name: [axis.dim_param for axis in value.type.tensor_type.shape.dim] for value in graph.input}


def _describe(trt: Any, network: Any) -> tuple[EngineTensor, ...]:
    sides = ((network.num_inputs, network.get_input, True), (network.num_outputs, network.get_output, False))
    return tuple(EngineTensor(tensor.name, is_input, _dtype(trt, tensor.dtype), tuple(tensor.shape))
                 for count, get, is_input in sides for tensor in map(get, range(count)))


def _dtype(trt: Any, dtype: Any) -> str:
    names = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32",
             "INT8": "int8", "BOOL": "bool"}
    return next(name for kind, name in names.items() if dtype == getattr(trt.DataType, kind))


def _layers(network: Any) -> tuple[Layer, ...]:
    kinds = Counter(network.get_layer(index).type.name.lower() for index in range(network.num_layers))
    return tuple(Layer(kind, count) for kind, count in kinds.most_common())


def options_as_sides(options: BuildOptions) -> Mapping[str, int]:
    """The largest length of each dynamic axis."""
    return {BATCH: options.batch[2], SEQUENCE: options.sequence[2]}
