"""A bundle's engines, built beside its graphs."""

from __future__ import annotations

import dataclasses
import datetime
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import onnx

from ...runtime.backends.tensorrt import SLOTS
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
    runs_on,
)
from ...runtime.errors import BuildFailed, DcformerWarning, InputError
from ...runtime.files import atomic_folder, sha256_file
from ...runtime.machine import machine
from ...runtime.manifest import MANIFEST_NAME, Graph
from .build import BuildOptions, Built, build_engine, options_as_sides, parser_refusal, require_known
from .fused_layers import fused_layers
from .preflight import Preflight, preflight, require_fitting_batch
from .watch import Phase, Watch


def add_engines(bundle: Bundle, library: Library, precisions: Sequence[str], options: BuildOptions, gpu: Gpu | None,
                display: Stages) -> list[EngineRecord]:
    """Build an engine of each tower in each precision, and replace the bundle by one that has them.

    Nothing is built before all graphs have passed the preflight and the library's parser, and the bundle stays as it is
    if anything fails.

    Args:
        gpu: of this machine; None = there is none, which only tensorrt_rtx can do with.

    Raises:
        InputError: a precision that the bundle does not have, an option that the library does not have, or a tensor
            beyond what TensorRT can hold.
        DeviceUnavailable: a GPU is needed and is not there.
        BuildFailed: the library's own reason; of the parser, those against all graphs.
    """
    require_known(library, options, gpu is not None)
    options = _fitted(bundle, options)
    graphs = [_graph(bundle, role, precision) for precision in precisions for role in tower_roles(bundle)]
    checks = _check(bundle, library, graphs, options, display)
    if gpu is not None and runs_on(_targets(library, options, gpu), gpu):
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
            built = build_engine(library, bundle.path(graph.file), options, Watch(partial(_tell, display, library)))
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


def tower_roles(bundle: Bundle) -> list[str]:
    """Roles of the towers that a bundle has: one engine each in a precision."""
    return [role for role in ("image", "text") if bundle.manifest.graph(role) is not None]


def _graph(bundle: Bundle, role: str, precision: str) -> Graph:
    graph = bundle.manifest.graph(role, precision, GPU_TARGET)
    if graph is None:
        raise InputError(f"{bundle.folder}: no {role} tower in {precision}; `dcformer calibrate {bundle.folder} --data "
                         f"DIR --precision {precision}` adds it")
    return graph


def _check(bundle: Bundle, library: Library, graphs: Sequence[Graph], options: BuildOptions, display: Stages
           ) -> list[Preflight]:
    """What would fail minutes later, of all graphs, in one message. Raises as ``add_engines``."""
    checks, refusals = [], []
    for graph in graphs:
        display.stage(f"checking {graph.file}")
        path = bundle.path(graph.file)
        proto = onnx.load(path, load_external_data=False)
        checks.append(preflight(proto, options_as_sides(options), graph.file))
        refusals.append(parser_refusal(library, path))
    require_fitting_batch(checks)
    if any(refusals):
        raise BuildFailed("; ".join(refusal for refusal in refusals if refusal))
    return checks


def _tell(display: Stages, library: Library, phases: Sequence[Phase]) -> None:
    """Steps of the outermost phase as a bar; of the innermost, where most of the time goes, in words."""
    outer, inner = phases[0], phases[-1]
    part = f": {inner.name}, {inner.done} of {inner.total}" if len(phases) > 1 else ""
    display.steps(f"{library.name}: {outer.name}{part}", outer.done, outer.total)


def _fitted(bundle: Bundle, options: BuildOptions) -> BuildOptions:
    """Texts no longer than the bundle's own limit."""
    text = bundle.manifest.text
    if text is None or options.sequence[2] <= text.max_tokens:
        return options
    smallest, usual, _ = options.sequence
    return dataclasses.replace(options, sequence=(smallest, min(usual, text.max_tokens), text.max_tokens))


def _warn_of_memory(graph: Graph, check: Preflight, options: BuildOptions, gpu: Gpu) -> None:
    if check.activation_bytes + check.weight_bytes > gpu.memory_bytes:
        warnings.warn(f"{graph.file}: {check.activation_bytes / 2**30:.1f} GiB of activations are alive at once at "
                      f"{check.at_node} for a batch of {options.batch[2]} if nothing is fused, and {SLOTS} requests at "
                      f"once, the most that the runtime computes, need {SLOTS} times that; the {gpu.name} has "
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
    targets = _targets(library, options, gpu)
    runs_here = gpu is not None and runs_on(targets, gpu)
    return EngineRecord(
        SCHEMA_VERSION, path.name, sha256_file(path), path.stat().st_size, graph.role, graph.precision, graph.file,
        digests[graph.file], graph.weights, digests[graph.weights] if graph.weights else None, library.name,
        library.version, targets, gpu.name if gpu else None,
        options.version_compatible, (built.profile,), options.flags(), built.tensors, built.layers,
        check.activation_bytes, round(built.seconds, 3),
        datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), machine(),
        fused_layers(library, built.plan, path.name) if runs_here else None)
