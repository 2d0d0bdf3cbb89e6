"""``dcformer embed``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np

from ..errors import InputError
from ..files import atomic_file, sha256_file
from ..manifest import MANIFEST_NAME
from ..model import load
from .options import bundle_argument, keep_going_option, model_options, scan_options, scans_argument
from .output import progress


@click.command("embed")
@bundle_argument
@scans_argument
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="FILE.npz")
@keep_going_option
@scan_options
@model_options
def command(
    bundle: Path, scans: tuple[Path, ...], out: Path, keep_going: bool, device: str, threads: int | None,
    no_verify: bool, **read_options: Any,
) -> int:
    """Embed each SCAN and write FILE.npz: `embeddings` [n, 512] float32, `volumes` [n], `manifest_sha256`."""
    if out.suffix != ".npz":
        raise InputError(f"--out {out}: expected a name ending in .npz")
    model = load(bundle, device, threads, verify=not no_verify)
    embeddings, names, failed = [], [], 0
    with progress(len(scans)) as display:
        for scan in scans:
            display.stage(scan.name)
            try:
                embeddings.append(model.embed_image(scan, **read_options))
                names.append(str(scan))
            except InputError as error:
                if not keep_going:
                    raise
                failed += 1
                click.echo(f"error: {error}", err=True)
            display.advance()
    if not embeddings:
        raise InputError(f"none of the {len(scans)} scans could be embedded; {out} was not written")
    with atomic_file(out) as temporary, temporary.open("wb") as file:
        np.savez(file, embeddings=np.stack(embeddings), volumes=np.array(names),
                 manifest_sha256=np.array(sha256_file(bundle / MANIFEST_NAME)))
    click.echo(f"{out}: {len(embeddings)} embeddings of {len(embeddings[0])}"
               + (f"; {failed} scans failed" if failed else ""), err=True)
    return 2 if failed else 0
