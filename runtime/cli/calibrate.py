"""``dcformer calibrate``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ..backends import Options
from ..backends.base import MOST_THREADS
from ..bundle import open_bundle, require_writable_bundle
from ..errors import InputError
from ..files import cache_folder, require_writable_file
from .inspect import print_conversions
from .options import bundle_argument, json_option, parse_names, scan_options
from .output import print_json, progress

DEFAULT_SAMPLES = 64


@click.command("calibrate")
@bundle_argument
@click.option("--data", type=click.Path(path_type=Path), metavar="DIR",
              help="Folder of scans like those that the bundle will see; without it, what was observed before is used.")
@click.option("--samples", type=click.IntRange(min=1), metavar="N",
              help=f"Scans to observe, spread evenly over the folder.  [default: {DEFAULT_SAMPLES}]")
@click.option("--split", metavar="NAME", help="'valid' or 'train', where the folder holds both.")
@click.option("--precision", "precisions", default="fp16,int8", show_default=True, metavar="NAME,NAME",
              help="Precisions to add to the bundle.")
@click.option("--method", default="mse", show_default=True, metavar="NAME",
              help="From what was observed to INT8's range: minmax, percentile, entropy or mse.")
@click.option("--depthwise", default="measure", show_default=True, metavar="WHEN",
              help="Depthwise convolutions in INT8: measure (those that are faster so here), always, never.")
@click.option("--cache", type=click.Path(path_type=Path), metavar="FILE",
              help="With --data: also write what was observed there; without: read it from there.")
@click.option("--threads", type=click.IntRange(1, MOST_THREADS), help="CPU threads; by default every usable core.")
@json_option
@scan_options
def command(bundle: Path, data: Path | None, samples: int | None, split: str | None, precisions: str, method: str,
            depthwise: str, cache: Path | None, threads: int | None, as_json: bool, **read_options: Any) -> None:
    """Add FP16 and INT8 graphs to BUNDLE, from what its activations look like on scans.

    Nothing is kept of the scans but digests of their contents, and extremes and histograms of activations
    (calibration.json in the bundle), in memory that does not grow with their number. An interrupted calibration goes on
    where it stopped. `dcformer retention` shows how well the new graphs keep the answers.
    """
    from ...calibration.add_precisions import ADDED, DEPTHWISE, Choice, add_precisions, bundle_record
    from ...calibration.calibrate import forget, image_graph, observe
    from ...calibration.record import model_digest, read_record, write_record
    from ...calibration.scales import require_method
    from ...calibration.scans import choose_samples

    names = parse_names("--precision", precisions, ADDED)
    require_method(method)
    if depthwise not in DEPTHWISE:
        raise InputError(f"--depthwise {depthwise!r}: expected one of {', '.join(DEPTHWISE)}")
    given = {name: value for name, value in read_options.items() if value is not None}
    if data is None:
        _refuse_reading({"--samples": samples, "--split": split, **{f"--{name}": given[name] for name in given}})
    opened = open_bundle(bundle)
    require_writable_bundle(opened)
    if cache is not None and data is not None:
        require_writable_file(cache)
    options = Options(threads=threads)
    samples = DEFAULT_SAMPLES if samples is None else samples
    with progress(samples if data is not None else None) as display:
        if data is not None:
            chosen = choose_samples(data, samples, split, given)
            identity = json.dumps([opened.manifest.digest, [str(s.path.resolve()) for s in chosen], str(given)])
            state = cache_folder() / "calibrate" / f"{hashlib.sha256(identity.encode()).hexdigest()[:20]}.json"
            record, correlations = observe(opened, chosen, samples, state, options, display)
            if cache is not None:
                write_record(cache, record)
        else:
            state = None
            proto, correlations = image_graph(opened)[1], None
            record = bundle_record(opened, proto) if cache is None else read_record(cache, model_digest(proto))
        manifest = add_precisions(opened, record, Choice(names, method, depthwise), display, correlations)
        if state is not None:
            forget(state)
    if as_json:
        print_json(json.loads(manifest.to_json())["conversions"])
        return
    print_conversions(manifest)
    click.echo(f"{bundle}: now also {' and '.join(names)}; `dcformer retention {bundle} --data DIR` shows what is kept")


def _refuse_reading(options: Mapping[str, object]) -> None:
    """Without scans, what says how to read them would be ignored."""
    for name, value in options.items():
        if value is not None:
            raise InputError(f"{name}: only with --data, which reads scans; drop it, or pass --data DIR")
