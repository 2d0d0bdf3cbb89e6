"""``dcformer report``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import InputError
from ..files import require_writable_file
from ..inputs import one_scan
from ..model import load
from .options import bundle_argument, given_options, json_option, model_options, read_classes, scan_options
from .output import announce, print_json, progress

_BLOCKS = 256


@click.command("report")
@bundle_argument
@click.argument("scan", nargs=-1, required=True, type=click.Path())
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="FILE.html", help="The page to write.")
@click.option("--title", metavar="TEXT",
              help="Heading of the page.  [default: the scan's sha256, as a file's name may name the patient]")
@click.option("--classes", type=click.Path(path_type=Path), metavar="FILE",
              help="Class names, one per line, instead of the bundle's 18 pathologies.")
@click.option("--explain", multiple=True, metavar="NAME",
              help="Show where the encoder looked for this class; can be repeated.  [default: the three of the "
                   "highest scores]")
@click.option("--blocks", type=click.IntRange(min=8, max=100_000), metavar="N",
              help="Blocks to hide one after the other, at most; each takes an inference.  [default: 256]")
@click.option("--no-occlusion", is_flag=True, help="Leave out where the encoder looked.")
@json_option
@scan_options
@model_options
def command(
    bundle: Path, scan: tuple[str, ...], out: Path, title: str | None, classes: Path | None, explain: tuple[str, ...],
    blocks: int | None,
    no_occlusion: bool, as_json: bool, device: str, threads: int | None, backend: str, precision: str,
    no_verify: bool, **read_options: Any,
) -> None:
    """Write a page on SCAN: slices, scores, where the encoder looked, how the scan was read, and by which model.

    SCAN is one: a file, a folder, or the DICOM files of a folder. The page is one HTML file that loads nothing. It
    names neither the patient nor the file.
    """
    from ..report.page import require_page_name
    from ..report.scan import PageOptions, write_scan_page

    if no_occlusion and (explain or blocks is not None):
        raise InputError("--explain and --blocks are for where the encoder looked, which --no-occlusion leaves "
                         "out; drop one or the other")
    require_page_name(out)
    require_writable_file(out)
    path, given = one_scan(scan), given_options(read_options)
    options = PageOptions(title, read_classes(classes), explain, None if no_occlusion else blocks or _BLOCKS, given)
    model = load(bundle, device, threads, not no_verify, backend, precision)
    announce(model)
    with progress() as display:
        display.stage(path.name)
        result, found = write_scan_page(
            model, path, out, options, lambda done, of: display.stage(f"{path.name}: block {done + 1} of {of}"))
    effects = {name: found.strongest(name)[0][1] for name in found.classes} if found else None
    if as_json:
        print_json({"report": str(out), "scores": result.scores, "timings_ms": result.timings_ms,
                    "blocks_dhw": list(found.effect.shape[:3]) if found else None,
                    "largest_effects": effects})
        return
    click.echo(out)
