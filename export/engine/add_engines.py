"""A bundle's engines, built beside its graphs."""

from __future__ import annotations

import dataclasses
import datetime
import warnings
from collections.abc import Sequence
from pathlib import Path

import onnx

from ...runtime.bundle import ENGINE_SUFFIX, Bundle, copy_files, record_file, require_unchanged, write_manifest
from ...runtime.cli.output import Stages
from ...runtime.engine_library import Library
from ...runtime.engines import (
    GPU_TARGET,
    PORTABLE,
    SCHEMA_VERSION,
    EngineRecord,
    Gpu,
    engine_records,
)
from ...runtime.errors import DcformerWarning, InputError
from ...runtime.files import atomic_folder, sha256_file
from ...runtime.machine import machine
from ...runtime.manifest import MANIFEST_NAME, Graph
from .build import BuildOptions, Built, Watch, build_engine, options_as_sides, require_known
from .preflight import Preflight, preflight, require_fitting_batch


def add_engines(bundle: Bundle, library: Library, precisions: Sequence[str], options: BuildOptions, gpu: Gpu | None,
                display: Stages) -> list[EngineRecord]:
    """Build an engine of each tower in each precision, and replace the bundle by one that has them.

    Nothing is built before all graphs have passed the preflight; the bundle stays as it is if anything fails.

    Args:
        gpu: of this machine; None = there is none, which only tensorrt_rtx can do with.

    Raises:
        InputError: a precision that the bundle does not have, an option that the library does not have, or a tensor
            beyond what TensorRT can hold.
        DeviceUnavailable: a GPU is needed and is not there.
        BuildFailed: the library's own reason.
    """
    require_known(library, options, gpu is not None)
    options = _fitted(bundle, options)
    graphs = [_graph(bundle, role, precision) for precision in precisions for role in _roles(bundle)]
    checks = []
    for graph in graphs:
        display.stage(f"checking {graph.file}")
        proto = onnx.load(bundle.path(graph.file), load_external_data=False)
        checks.append(preflight(proto, options_as_sides(options), graph.file))
    require_fitting_batch(checks)
    for graph, check in zip(graphs, checks, strict=True):
        _warn_of_memory(graph, check, options, gpu)
    made = [(graph, _file_name(graph, library, options, gpu)) for graph in graphs]
    names = {name for _, name in made}
    replaced = {file for record in engine_records(bundle) if record.engine in names for file in record.files}
    records = []
    with atomic_folder(bundle.folder, MANIFEST_NAME) as folder:
        files = copy_files(bundle, folder, replaced)
        for (graph, name), check in zip(made, checks, strict=True):
            display.stage(f"building {name}")
            watch = Watch(lambda phase, name=name: display.stage(f"building {name}: {phase}"))
            built = build_engine(library, bundle.path(graph.file), options, watch)
            (folder / name).write_bytes(built.plan)
            record = _record(bundle, graph, folder / name, library, options, gpu, built, check)
            (folder / record.files[1]).write_text(record.to_json(), encoding="utf-8")
            files += record.files
            records.append(record)
            display.advance()
        described = tuple(record_file(folder, name) for name in files)
        write_manifest(folder, dataclasses.replace(bundle.manifest, files=described))
        require_unchanged(bundle)
    return records


def _roles(bundle: Bundle) -> list[str]:
    return [role for role in ("image", "text") if bundle.manifest.graph(role) is not None]


def _graph(bundle: Bundle, role: str, precision: str) -> Graph:
    graph = bundle.manifest.graph(role, precision, GPU_TARGET)
    if graph is None:
        raise InputError(f"{bundle.folder}: no {role} tower in {precision}; `dcformer calibrate {bundle.folder} --data "
                         f"DIR --precision {precision}` adds it")
    return graph


def _fitted(bundle: Bundle, options: BuildOptions) -> BuildOptions:
    """Texts no longer than the bundle's own limit."""
    text = bundle.manifest.text
    if text is None or options.sequence[2] <= text.max_tokens:
        return options
    smallest, usual, _ = options.sequence
    return dataclasses.replace(options, sequence=(smallest, min(usual, text.max_tokens), text.max_tokens))


def _warn_of_memory(graph: Graph, check: Preflight, options: BuildOptions, gpu: Gpu | None) -> None:
    if gpu is not None and check.activation_bytes + check.weight_bytes > gpu.memory_bytes:
        warnings.warn(f"{graph.file}: {check.activation_bytes / 2**30:.1f} GiB of activations are alive at once at "
                      f"{check.at_node} for a batch of {options.batch[2]} if nothing is fused; the {gpu.name} has "
                      f"{gpu.memory_bytes / 2**30:.1f} GiB; pass a smaller --max-batch if the build fails",
                      DcformerWarning, stacklevel=3)


def _targets(library: Library, options: BuildOptions, gpu: Gpu | None) -> tuple[str, ...]:
    """Compute capabilities that an engine will run on."""
    if library.is_rtx:
        return options.gpus or (PORTABLE,)
    if options.hardware == "ampere-plus":
        return (PORTABLE,)
    assert gpu is not None  # require_known has seen to it
    return (gpu.compute_capability,)


def _file_name(graph: Graph, library: Library, options: BuildOptions, gpu: Gpu | None) -> str:
    targets = _targets(library, options, gpu)
    where = "portable" if targets == (PORTABLE,) else "sm" + "-".join(target.replace(".", "") for target in targets)
    return f"{graph.role}.{graph.precision}.{library.name}.{where}{ENGINE_SUFFIX}"


def _record(bundle: Bundle, graph: Graph, path: Path, library: Library, options: BuildOptions, gpu: Gpu | None,
            built: Built, check: Preflight) -> EngineRecord:
    digests = {entry.path: entry.sha256 for entry in bundle.manifest.files}
    return EngineRecord(
        SCHEMA_VERSION, path.name, sha256_file(path), path.stat().st_size, graph.role, graph.precision, graph.file,
        digests[graph.file], graph.weights, digests[graph.weights] if graph.weights else None, library.name,
        library.version, _targets(library, options, gpu), gpu.name if gpu else None,
        options.version_compatible, (built.profile,), options.flags(), built.tensors, built.layers,
        check.activation_bytes, round(built.seconds, 3),
        datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), machine())
