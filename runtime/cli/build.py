"""``dcformer build``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from ..bundle import open_bundle, require_writable_bundle
from ..engine_library import load_library
from ..engines import EngineRecord
from ..errors import InputError
from ..gpu import gpu_or_none
from ..manifest import PRECISIONS
from .options import bundle_argument, json_option, parse_names
from .output import print_json, print_table, progress

_ENGINE_COLUMNS = ("engine", "MB", "memory MB", "runs on", "version", "largest batch", "build s")


@click.command("build")
@bundle_argument
@click.option("--precision", "precisions", default="fp16", show_default=True, metavar="NAME,NAME",
              help="Of the bundle's graphs: fp32, and what `dcformer calibrate` added.")
@click.option("--engine-library", default="auto", show_default=True, metavar="NAME",
              help="tensorrt (builds on the GPU that it is for), tensorrt_rtx (builds anywhere), or auto.")
@click.option("--max-batch", type=click.IntRange(1, 65536), default=8, show_default=True,
              help="Largest batch that the engines take.")
@click.option("--batch", "usual_batch", type=click.IntRange(1, 65536), default=1, show_default=True,
              help="Batch that they are fastest at.")
@click.option("--gpu", "gpus", metavar="CC,CC", help="tensorrt_rtx: only for these compute capabilities, such as 8.9; "
              "default: one portable engine for 8.0 and later.")
@click.option("--hardware", default="none", show_default=True, metavar="LEVEL",
              help="tensorrt: also other GPUs: none, ampere-plus, same-compute-capability.")
@click.option("--version-compatible", is_flag=True, help="tensorrt: engines load in later releases, too.")
@click.option("--workspace-mb", type=click.IntRange(min=1), help="Scratch memory that one layer may use.")
@click.option("--optimization-level", type=click.IntRange(0, 5), help="Effort of the builder; the default is 3.")
@click.option("--aux-streams", type=click.IntRange(0, 64), help="Streams beside the main one.")
@click.option("--tiling", metavar="LEVEL", help="tensorrt: none, fast, moderate or full.")
@click.option("--tf32", is_flag=True, help="Let float32 be computed with 10 bits of mantissa.")
@click.option("--strip-weights", is_flag=True, help="Leave weights out of the engine; needs a GPU.")
@json_option
def command(bundle: Path, precisions: str, engine_library: str, max_batch: int, usual_batch: int, gpus: str | None,
            hardware: str, version_compatible: bool, workspace_mb: int | None, optimization_level: int | None,
            aux_streams: int | None, tiling: str | None, tf32: bool, strip_weights: bool, as_json: bool
            ) -> None:
    """Build TensorRT engines of BUNDLE's towers, into the bundle.

    Precision is what the graphs say: engines are strongly typed. Beside each engine lies a record of what it was built
    from, by and for; the runtime loads no engine that does not fit. Ctrl-C stops a build and leaves the bundle as it
    was.

    "memory MB" is of one request of the largest batch: its activations, if the library fused nothing, and the weights.
    Each further request at the same time needs activations of its own.
    """
    from ...export.engine.add_engines import add_engines, tower_roles
    from ...export.engine.build import HARDWARE, TILING, BuildOptions
    from ...export.engine.timing_cache import timing_cache_file

    names = parse_names("--precision", precisions, PRECISIONS)
    for option, value, known in (("--hardware", hardware, HARDWARE), ("--tiling", tiling, TILING)):
        if value is not None and value not in known:
            raise InputError(f"{option} {value!r}: expected one of {', '.join(known)}")
    if usual_batch > max_batch:
        raise InputError(f"--batch {usual_batch}: more than --max-batch {max_batch}")
    opened = open_bundle(bundle)
    require_writable_bundle(opened)
    library, gpu = load_library(engine_library), gpu_or_none()
    options = BuildOptions(
        batch=(1, usual_batch, max_batch), workspace_bytes=workspace_mb and workspace_mb << 20,
        optimization_level=optimization_level, auxiliary_streams=aux_streams, tiling=tiling, tf32=tf32,
        version_compatible=version_compatible, strip_weights=strip_weights, hardware=hardware,
        gpus=tuple(part.strip() for part in gpus.split(",")) if gpus else (),
        timing_cache=timing_cache_file(library, gpu))
    with progress(len(names) * len(tower_roles(opened))) as display:
        records = add_engines(opened, library, names, options, gpu, display)
    if as_json:
        print_json([dataclasses.asdict(record) for record in records])
        return
    rows = [(record.engine, f"{record.bytes / 1e6:.1f}", f"{_memory_bytes(bundle, record) / 1e6:.1f}",
             ", ".join(record.compute_capability), record.version, next(iter(record.profiles[0].values())).largest[0],
             f"{record.build_seconds:.1f}") for record in records]
    print_table(f"Engines in {bundle}", _ENGINE_COLUMNS, rows)


def _memory_bytes(bundle: Path, record: EngineRecord) -> int:
    """Activations of one request and the weights, which lie in the ONNX file itself where there is no file of them."""
    return record.activation_bytes + (bundle / (record.weights or record.onnx)).stat().st_size
