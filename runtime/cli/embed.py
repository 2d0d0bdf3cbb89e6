"""``dcformer embed``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np

from ..errors import InputError
from ..files import atomic_file
from ..model import load
from .options import bundle_argument, keep_going_option, model_options, preprocess_option, scan_options, scans_argument
from .output import announce
from .scans import for_each_scan


@click.command("embed")
@bundle_argument
@scans_argument
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="FILE.npz")
@keep_going_option
@scan_options
@model_options
@preprocess_option
def command(
    bundle: Path, scans: tuple[Path, ...], out: Path, keep_going: bool, device: str, threads: int | None,
    backend: str, precision: str, preprocess: str, no_verify: bool, **read_options: Any,
) -> int:
    """Embed each SCAN and write FILE.npz: `embeddings` [n, 512] float32, `volumes` [n], `manifest_sha256`."""
    if out.suffix != ".npz":
        raise InputError(f"--out {out}: expected a name ending in .npz")
    model = load(bundle, device, threads, not no_verify, backend, precision, preprocess)
    announce(model)
    with atomic_file(out) as temporary:  # first of all, so that a place that cannot be written is found out at once
        results = for_each_scan(scans, keep_going, model.embed_image, lambda scan: model.prepare(scan, **read_options))
        embedded = [(str(scan), result) for scan, result in zip(scans, results, strict=True)
                    if not isinstance(result, InputError)]
        if not embedded:
            raise InputError(f"none of the {len(scans)} scans could be embedded; {out} was not written")
        names, embeddings = zip(*embedded, strict=True)
        with temporary.open("wb") as file:
            np.savez(file, embeddings=np.stack(embeddings), volumes=np.array(names),
                     manifest_sha256=np.array(model.manifest.digest))
    failed = len(scans) - len(embeddings)
    click.echo(f"{out}: {len(embeddings)} embeddings of {len(embeddings[0])}"
               + (f"; {failed} scans failed" if failed else ""), err=True)
    return 2 if failed else 0
