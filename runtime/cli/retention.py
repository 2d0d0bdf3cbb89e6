"""``dcformer retention``."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from pathlib import Path

import click

from ..backends import Options
from ..backends.base import CPU_BACKENDS, MOST_THREADS
from ..backends.openvino import NO_BFLOAT16, has_bfloat16
from ..bundle import open_bundle
from ..engines import GPU_TARGET
from ..errors import DcformerWarning, DeviceUnavailable, InputError, one_line
from ..files import require_writable_folder
from ..manifest import PRECISIONS, Manifest
from ..model import Model
from .options import bundle_argument, json_option, parse_names
from .output import announce, print_json, print_table, progress


@click.command("retention")
@bundle_argument
@click.option("--data", required=True, type=click.Path(path_type=Path), metavar="DIR",
              help="Folder of scans; with labels in CT-RATE's layout, AUROC is compared, too.")
@click.option("--split", metavar="NAME", help="'valid' or 'train', where the folder holds both.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N scans.")
@click.option("--precision", "precisions", metavar="NAME,NAME",
              help="What to compare with fp32; default: what the bundle has. 'bf16': openvino computing in bfloat16.")
@click.option("--backend", type=click.Choice(CPU_BACKENDS), default=CPU_BACKENDS[0], show_default=True,
              help="Inference library, for fp32 and all others.")
@click.option("--emulate", is_flag=True,
              help="Compare the graphs for GPUs, run here with every FP16 or BF16 value rounded as on a GPU.")
@click.option("--threads", type=click.IntRange(1, MOST_THREADS), help="CPU threads; by default every usable core.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR",
              help="Write the report there as Markdown and JSON, and a plot.")
@click.option("--state", type=click.Path(path_type=Path), metavar="FILE",
              help="Where finished scans are kept until the end; default: in the user's cache folder.")
@click.option("--fresh", is_flag=True, help="Do not go on with an interrupted comparison.")
@json_option
def command(bundle: Path, data: Path, split: str | None, limit: int | None, precisions: str | None, backend: str,
            emulate: bool, threads: int | None, out: Path | None, state: Path | None, fresh: bool, as_json: bool
            ) -> int:
    """Compare BUNDLE's lower precisions with its own fp32: embeddings, codes, scores, AUROC, noise by layer.

    An interrupted comparison goes on where it stopped. Scans that cannot be read are listed, and make the exit code 2.
    ONNX Runtime's CPU computes FP16 graphs in float32; what they keep on a GPU is shown by --emulate.
    """
    from ...benchmarks.evaluation.state import library_of, open_state, state_path
    from ...calibration.emulate import emulated_bundle
    from ...calibration.report import COLUMNS, cells, title, write_report
    from ...calibration.retention import REFERENCE, compare, graph_noise
    from ...calibration.scans import choose_scans

    if emulate and backend != CPU_BACKENDS[0]:
        raise InputError(f"--emulate: runs in {CPU_BACKENDS[0]}; drop --backend {backend}")
    opened = open_bundle(bundle)
    names = _names(bundle, opened.manifest, precisions, GPU_TARGET if emulate else backend)
    digest = opened.manifest.digest
    if out is not None:
        require_writable_folder(out)
    with contextlib.ExitStack() as stack:
        if emulate:
            opened = emulated_bundle(opened, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dcformer-"))))
        models = {name: Model(opened, Options(threads=threads, backend=backend, precision=name))
                  for name in (REFERENCE, *names)}
        announce(models[REFERENCE])
        scans = choose_scans(data, opened.manifest, split, limit)
        thread_count = Options(threads=threads).thread_count
        identity = {"command": "retention", "bundle": digest, "dataset": str(data.resolve()),
                    "backend": library_of(models[REFERENCE].describe()), "emulate": emulate}
        display = stack.enter_context(progress(len(scans)))
        kept = stack.enter_context(open_state(state or state_path(identity), identity, fresh))
        about = {"bundle": f"{bundle} (graphs for GPUs, emulated)" if emulate else str(bundle), "dataset": str(data)}
        found = compare(models, scans, kept, display,
                        lambda name, some: graph_noise(opened, name, some, thread_count), about)
    paths = write_report(found, out) if out is not None else []
    for text in found.failed:
        click.echo(f"error: {one_line(text)}", err=True)
    if as_json:
        print_json(found.to_dict())
    else:
        print_table(title(found), COLUMNS, [cells(name, kept) for name, kept in found.precisions.items()])
        for path in paths:
            click.echo(path)
    return 2 if found.failed else 0


def _names(bundle: Path, manifest: Manifest, precisions: str | None, target: str) -> list[str]:
    """Precisions to compare.

    Args:
        target: what the graphs are made for.
    """
    there = [name for name in PRECISIONS[1:] if manifest.graph("image", name, target) is not None]
    if precisions is None and not there:
        raise InputError(f"{bundle}: nothing but fp32 for {target}; `dcformer calibrate {bundle} --data DIR` adds "
                         "precisions")
    if precisions is None:
        return there
    known = list(dict.fromkeys([*there, *["bf16"] * (target == "openvino")]))
    advice = f"; `dcformer calibrate {bundle} --data DIR --precision NAME` adds one"
    if target != GPU_TARGET and manifest.graph("image", "bf16", GPU_TARGET) is not None:
        advice += "; the bundle's bf16 is for GPUs: --emulate"
    names = parse_names("--precision", precisions, known, advice)
    if target == "openvino" and "bf16" in names and not has_bfloat16():
        names.remove("bf16")
        if not names:
            raise DeviceUnavailable(f"{NO_BFLOAT16}; choose another --precision")
        warnings.warn(f"left out: {NO_BFLOAT16}", DcformerWarning, stacklevel=2)
    return names
