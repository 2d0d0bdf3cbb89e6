"""``dcformer triton``."""

from __future__ import annotations

import re
from pathlib import Path

import click

from ..backends import Options
from ..backends.base import BACKENDS, DEVICES
from ..bundle import open_bundle
from ..errors import InputError
from ..manifest import PRECISIONS
from .options import bundle_argument, json_option
from .output import print_json

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
#: Triton's names of its back ends.
_TOWERS = ("onnxruntime", "tensorrt", "python")


@click.command("triton")
@bundle_argument
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="DIR",
              help="DIR/models becomes the model repository, DIR/bundle what its Python models load.")
@click.option("--scans", required=True, metavar="DIR",
              help="The folder, as the server sees it, below which scans lie; clients name paths in it.")
@click.option("--name", metavar="NAME", help="Of the models.  [default: the encoder's]")
@click.option("--tower", type=click.Choice(_TOWERS), default=_TOWERS[0], show_default=True,
              help="Triton's back end for the towers; python: this program's own, with --backend.")
@click.option("--device", type=click.Choice(DEVICES), default="cpu", show_default=True)
@click.option("--backend", type=click.Choice(BACKENDS), metavar="NAME",
              help="With --tower python: the inference library, for example openvino or tensorrt_rtx.  "
                   "[default: onnxruntime]")
@click.option("--precision", type=click.Choice(PRECISIONS), default=PRECISIONS[0], show_default=True)
@click.option("--instances", type=click.IntRange(1, 64), default=1, show_default=True, help="Copies of each tower.")
@click.option("--readers", type=click.IntRange(1, 256), default=2, show_default=True,
              help="Processes that read and preprocess scans.")
@click.option("--max-batch", type=click.IntRange(1, 256), default=1, show_default=True)
@click.option("--delay", type=click.IntRange(0, 10_000_000), default=2000, show_default=True, metavar="MICROSECONDS",
              help="How long a request may wait for others to be computed with.")
@click.option("--force", is_flag=True, help="Replace what this command made before.")
@json_option
def command(bundle: Path, out: Path, scans: str, name: str | None, tower: str, device: str, backend: str | None,
            precision: str, instances: int, readers: int, max_batch: int, delay: int, force: bool,
            as_json: bool) -> None:
    """Write a model repository for NVIDIA's Triton Inference Server.

    Clients send the path of a scan, or a text; no request carries a volume. Model NAME answers with image_embedding and
    scores, NAME_embed_text with text_embedding. docs/serving.md has the server's and the client's commands.
    """
    from ..triton.config import Serving
    from ..triton.repository import write_repository

    if backend is not None and tower != "python":
        raise InputError(f"--backend {backend}: only with --tower python")
    if not Path(scans).is_absolute():
        raise InputError(f"--scans {scans}: expected an absolute path, as the server sees it")
    if tower == "tensorrt" and device != "cuda":
        raise InputError("--tower tensorrt: only with --device cuda")
    backend = backend or ("onnxruntime" if tower != "tensorrt" else "tensorrt")
    Options(device, None, backend, precision)  # says what does not go together
    opened = open_bundle(bundle, engines=True)
    name = name or opened.manifest.encoder
    if not _NAME.fullmatch(name):
        raise InputError(f"--name {name}: expected letters, digits, '_', '.' and '-'")
    serving = Serving(name, tower, device, backend, precision, instances, readers, max_batch, delay, scans)
    names, engine = write_repository(opened, serving, out, force)
    if as_json:
        print_json({"repository": str(out), "models": list(names),
                    "tensorrt": None if engine is None else engine.version,
                    "compute_capability": [] if engine is None else list(engine.compute_capability)})
        return
    click.echo(f"{out}: {', '.join(names)}")
    if engine is not None:
        click.echo(f"the server must have TensorRT {engine.version} and a GPU of compute capability "
                   f"{', '.join(engine.compute_capability)}")
