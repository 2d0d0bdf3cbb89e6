"""``dcformer embed``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from ..errors import BundleError, InputError
from ..files import atomic_file
from ..model import Model, load
from .options import bundle_argument, keep_going_option, model_options, scan_options, scans_argument
from .output import progress, warn_if_untrained


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
    warn_if_untrained(model)
    with atomic_file(out) as temporary:  # first of all, so that a place that cannot be written is found out at once
        embeddings, names = _embed_scans(model, scans, keep_going, read_options)
        if not embeddings:
            raise InputError(f"none of the {len(scans)} scans could be embedded; {out} was not written")
        with temporary.open("wb") as file:
            np.savez(file, embeddings=np.stack(embeddings), volumes=np.array(names),
                     manifest_sha256=np.array(model.manifest.digest))
    failed = len(scans) - len(embeddings)
    click.echo(f"{out}: {len(embeddings)} embeddings of {len(embeddings[0])}"
               + (f"; {failed} scans failed" if failed else ""), err=True)
    return 2 if failed else 0


def _embed_scans(
    model: Model, scans: tuple[Path, ...], keep_going: bool, read_options: dict[str, Any]
) -> tuple[list[NDArray[np.float32]], list[str]]:
    embeddings, names = [], []
    with progress(len(scans)) as display:
        for scan in scans:
            display.stage(scan.name)
            try:
                embeddings.append(model.embed_image(scan, **read_options))
                names.append(str(scan))
            except InputError as error:
                if not keep_going or isinstance(error, BundleError):  # a bundle that fails one scan fails them all
                    raise
                click.echo(f"error: {error}", err=True)
            display.advance()
    return embeddings, names
