"""``dcformer embed-text``."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..files import atomic_file
from ..model import load
from .options import bundle_argument, json_option, model_options
from .output import announce, print_json, print_table

_LARGEST_MATRIX = 8


@click.command("embed-text")
@bundle_argument
@click.argument("texts", metavar="TEXT...", nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE.npz",
              help="Write `embeddings` [n, 512] float32 and `texts` [n].")
@json_option
@model_options
def command(
    bundle: Path, texts: tuple[str, ...], out: Path | None, as_json: bool, device: str, threads: int | None,
    backend: str, precision: str, no_verify: bool,
) -> None:
    """Embed each TEXT. Without --out or --json it prints how similar the texts are to each other."""
    if out is not None and out.suffix != ".npz":
        raise InputError(f"--out {out}: expected a name ending in .npz")
    model = load(bundle, device, threads, not no_verify, backend, precision)
    announce(model)
    embeddings = model.embed_text(texts)
    if out is not None:
        with atomic_file(out) as temporary, temporary.open("wb") as file:
            np.savez(file, embeddings=embeddings, texts=np.array(texts))
        click.echo(f"{out}: {len(embeddings)} embeddings of {embeddings.shape[1]}", err=True)
    if as_json:
        print_json([{"text": t, "embedding": e.tolist()} for t, e in zip(texts, embeddings, strict=True)])
    elif out is None:
        _print_similarity(texts, embeddings @ embeddings.T)


def _print_similarity(texts: tuple[str, ...], cosine: NDArray[np.float32]) -> None:
    """All pairs while they fit a screen; of more texts, each one's nearest other."""
    if len(texts) <= _LARGEST_MATRIX:
        rows = ((f"{i + 1}. {text}", *(f"{c:.3f}" for c in cosine[i])) for i, text in enumerate(texts))
        print_table("cosine similarity", ("text", *(str(i + 1) for i in range(len(texts)))), rows)
        return
    others = cosine - 2 * np.eye(len(texts))
    print_table("cosine similarity with the nearest other text", ("text", "nearest", "cosine"), (
        (text, texts[int(row.argmax())], f"{row.max():.3f}") for text, row in zip(texts, others, strict=True)
    ))
