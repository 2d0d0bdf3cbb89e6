"""``dcformer export``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from ..backends.base import CPU_BACKENDS
from ..errors import InputError
from ..manifest import ANY_TARGET, REDUCTIONS, Reduction
from ..scan_files import ScanPath
from .inspect import print_agreement, print_rewrites
from .options import SCAN, json_option, read_classes
from .output import print_json, progress


@click.command("export")
@click.argument("checkpoint", required=False, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="BUNDLE", help="Folder to make.")
@click.option("--tokenizer", type=click.Path(path_type=Path), metavar="DIR",
              help="Folder with the text encoder's vocab.txt or tokenizer.json.")
@click.option("--encoder", metavar="NAME", help="With --random-weights: an encoder of `dcformer encoders`.")
@click.option("--random-weights", "seed", type=click.IntRange(min=0), metavar="SEED",
              help="Instead of CHECKPOINT: weights as PyTorch initialises them, for benchmarking. Scores mean nothing.")
@click.option("--no-tokenizer", is_flag=True, help="Make a bundle that takes token ids but no texts.")
@click.option("--classes", type=click.Path(path_type=Path), metavar="FILE",
              help="Class names, one per line, instead of CT-RATE's 18 pathologies.")
@click.option("--input-size", type=int, metavar="S",
              help="Volumes of (S/2, S, S); for random weights, and where the checkpoint does not tell.")
@click.option("--reduction", type=click.Choice(REDUCTIONS),
              help="For random weights, and where the checkpoint does not tell.")
@click.option("--check-scan", type=SCAN, metavar="SCAN",
              help="CT for the comparison with PyTorch, instead of the one that comes with this program.")
@click.option("--license", "weights_license", metavar="TEXT", help="Licence of the weights, for the manifest.")
@click.option("--input", "reads", type=click.Choice(["lines", "volume"]), default="lines", show_default=True,
              help="What the image tower takes: all voxels, or only the lines of them that it reads, where it does.")
@click.option("--target", "targets", type=click.Choice([*CPU_BACKENDS, ANY_TARGET]), multiple=True,
              default=CPU_BACKENDS[:1], show_default=True,
              help="Back end to be fast on, can be repeated: rewrites that pay only on some are measured here, and a "
                   "graph with those that do is added to the one for any back end.")
@click.option("--without-rewrite", "without", multiple=True, metavar="RULE",
              help="Leave out an exact rewrite of the image tower; can be repeated. --show-rewrites lists them.")
@click.option("--show-rewrites", is_flag=True, help="Print what each rewrite changed, and what it left alone and why.")
@click.option("--force", is_flag=True, help="Replace an existing bundle (nothing else is ever replaced).")
@json_option
def command(
    checkpoint: Path | None, out: Path, tokenizer: Path | None, encoder: str | None, seed: int | None,
    no_tokenizer: bool, classes: Path | None, input_size: int | None, reduction: Reduction | None,
    check_scan: ScanPath | None, weights_license: str | None, reads: str, targets: tuple[str, ...],
    without: tuple[str, ...], show_rewrites: bool, force: bool, as_json: bool,
) -> None:
    """Turn CHECKPOINT, or random weights, into a bundle.

    CHECKPOINT is a file of the original DCFormer or CT-CLIP code (.pth, bare state dict or .safetensors), or the folder
    of Med3DVLM's DCFormer-SigLIP with its config.json, model.safetensors and tokenizer.

    The ONNX graphs are compared with PyTorch on a real CT and on random input; the command fails, and writes nothing,
    if they differ by more than the stated tolerance.
    """
    if checkpoint is None and (encoder is None or seed is None):
        raise InputError("pass CHECKPOINT, or --encoder NAME and --random-weights SEED for a model without one")
    if checkpoint is not None and (encoder is not None or seed is not None):
        raise InputError("--encoder and --random-weights make a model without a checkpoint; drop them or CHECKPOINT")
    if tokenizer is not None and no_tokenizer:
        raise InputError("--tokenizer and --no-tokenizer exclude each other")
    brings_tokenizer = checkpoint is not None and checkpoint.is_dir()
    if checkpoint is not None and tokenizer is None and not no_tokenizer and not brings_tokenizer:
        raise InputError("--tokenizer DIR is needed to embed texts and score scans (or pass --no-tokenizer)")
    if checkpoint is None and (tokenizer is not None or no_tokenizer):
        raise InputError("random weights come with a text tower and its tokenizer; drop --tokenizer, --no-tokenizer")
    names = read_classes(classes)
    from ...export.make_bundle import ExportOptions, export_checkpoint, export_random_weights
    from ...export.rules.line_input import TITLE as LINE_INPUT

    without = (*without, *[LINE_INPUT] * (reads == "volume"))
    options = ExportOptions(tokenizer, names, input_size, reduction, check_scan, weights_license, overwrite=force,
                            own_tokenizer=not no_tokenizer, without_rewrites=without, targets=targets)
    with progress() as display:
        if checkpoint is not None:
            manifest = export_checkpoint(checkpoint, out, options, display.stage)
        else:
            assert encoder is not None
            assert seed is not None
            manifest = export_random_weights(encoder, seed, out, options, display.stage)
    if as_json:
        print_json({"bundle": str(out), "encoder": manifest.encoder, "input_size": manifest.input_size,
                    "reduction": manifest.reduction, "agreement": [vars(a) for a in manifest.agreement],
                    "rewrites": [dataclasses.asdict(rewrite) for rewrite in manifest.rewrites]})
        return
    if show_rewrites:
        print_rewrites(manifest)
    print_agreement(manifest)
    size = sum(record.bytes for record in manifest.files)
    click.echo(f"{out}: {manifest.encoder}, input size {manifest.input_size}, reduction {manifest.reduction}, "
               f"{size / 1e6:.1f} MB")
