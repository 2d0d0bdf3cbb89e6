"""``dcformer embed``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from ..backends.base import AUTO, Options
from ..backends.tensorrt import SLOTS
from ..engines import LIBRARIES
from ..errors import InputError
from ..files import atomic_file
from ..inputs import Item, find_items, require_there
from ..model import Model, load
from .options import bundle_argument, given_options, keep_going_option, model_options, preprocess_option, scan_options
from .output import announce, print_json, progress, told
from .scans import for_each_scan

if TYPE_CHECKING:
    from ..embedding_job import Report
    from ..pipeline import Settings

_FEW = ".npz"
#: On a GPU.
_USUAL_BATCH = 8
#: Each gets a reader of its own.
_FEW_CORES = 4


@click.command("embed")
@bundle_argument
@click.argument("inputs", metavar="SCAN...", nargs=-1, required=True)
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="STORE",
              help="A folder of Parquet files, which is gone on with if it is there; or FILE.npz for few scans.")
@click.option("--split", metavar="NAME", help="'valid' or 'train', where a folder holds both.")
@click.option("--readers", type=click.IntRange(1, 256), metavar="N",
              help="Scans at once: on a CPU read and computed, on a GPU read.  [default: one for each core, from 5 "
                   "cores on and on a GPU half as many]")
@click.option("--batch", type=click.IntRange(1, 256), metavar="N",
              help="On a GPU: scans of an inference, at most.  [default: 8, or what its engine takes]")
@click.option("--ray", "address", metavar="ADDRESS",
              help="Compute on a Ray cluster: 'auto', HOST:PORT, or 'local' for processes on this machine.")
@click.option("--workers", type=click.IntRange(1, 100_000), metavar="N",
              help="With --ray: processes that hold the model, of --threads CPU slots each.  [default: one for each "
                   "GPU, or for each CPU slot]")
@click.option("--retry", is_flag=True, help="Try again scans that failed before and have not changed.")
@keep_going_option
@click.option("--json", "as_json", is_flag=True, help="With STORE: print the figures of the run as JSON.")
@scan_options
@model_options
@preprocess_option
def command(
    bundle: Path, inputs: tuple[str, ...], out: Path, split: str | None, readers: int | None, batch: int | None,
    address: str | None, workers: int | None, retry: bool, keep_going: bool, as_json: bool, device: str,
    threads: int | None, backend: str, precision: str, preprocess: str, no_verify: bool, **read_options: Any,
) -> int:
    """Embed scans: files, folders, patterns, or CSV and Parquet lists with a column `path`, `volume` or `file`.

    STORE gets a row for each: embedding, zero-shot scores, content hash, how it was read, or its error. An interrupted
    run goes on where it stopped; what is there and unchanged is skipped. A SCAN that is not there ends the command at
    once, unless --keep-going. FILE.npz gets `embeddings` [n, 512] float32,
    `volumes` [n], `manifest_sha256`. Exit code 2 if scans failed.
    """
    if out.suffix not in ("", _FEW) and not out.is_dir():
        raise InputError(f"--out {out}: expected FILE.npz, or the name of a folder, without an ending")
    given = given_options(read_options)
    if not keep_going:
        require_there(inputs)
    cores = Options(threads=threads).thread_count
    readers_here = readers or _usual_readers(device, cores)
    in_store_on_cpu = device == "cpu" and out.suffix != _FEW
    model = load(bundle, device, max(1, cores // readers_here) if in_store_on_cpu else threads, not no_verify, backend,
                 precision, preprocess)
    announce(model)
    if out.suffix == _FEW:
        _refuse(f"only for a store; --out {out} is one file", {
            "--readers": readers, "--batch": batch, "--retry": retry or None, "--json": as_json or None,
            "--ray": address, "--workers": workers})
        return _write_file(model, find_items(inputs, split, given), out, keep_going)
    from ..embedding_job import EmbeddingJob
    from ..store import Identity, Store

    if address is None:
        _refuse("only with --ray", {"--workers": workers})
    if address is not None and backend == AUTO:
        raise InputError("--backend auto: with --ray each machine would choose for itself; name one")
    device = model.device
    if device == "cpu":
        _refuse("only with --device cuda; on a CPU every reader computes its own scan", {"--batch": batch})
    items = list({item.path: item for item in find_items(inputs, split, given)}.values())
    if address is None:
        model.describe()  # opens the image tower: what it lacks is found out before a store is begun
    manifest = model.manifest
    identity = Identity(model.results_digest, manifest.encoder, precision, manifest.embedding_dim,
                        manifest.zero_shot.classes if manifest.zero_shot else (),
                        {name: list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path)
                         else value for name, value in given.items()})
    if address is None:
        settings = _settings(model, device, cores, readers_here, batch)
        with Store(out, identity, bundle) as store, progress(len(items)) as display:
            report = EmbeddingJob(store, retry, told(display)).run(model, settings, items)
    else:
        from ..cluster import ModelSpec, connect

        spec = ModelSpec(str(bundle.absolute()), manifest.digest, device, backend, precision, preprocess, not no_verify)
        with connect(address) as cluster:
            plan = cluster.plan(device, workers, readers, threads, batch or (_USUAL_BATCH if device == "cuda" else 1),
                                exact_batch=batch is not None)
            with Store(out, identity, bundle) as store, progress(len(items)) as display:
                report = EmbeddingJob(store, retry, told(display)).collect(
                    lambda todo: cluster.run(todo, spec, plan, store.index.contents()), items,
                    plan.settings.readers * plan.count,
                    plan.count * (plan.settings.readers if device == "cpu" else SLOTS if backend in LIBRARIES else 1))
    _print(report, out, as_json)
    return 2 if report.failed or report.failed_before else 0


def _print(report: Report, out: Path, as_json: bool) -> None:
    if as_json:
        print_json({"embedded": report.embedded, "copied": report.copied, "failed": report.failed,
                    "skipped": report.skipped, "failed_before": report.failed_before,
                    "seconds": report.seconds, "scans_per_s": report.scans_per_s,
                    "limit": report.limit, "step_s": report.step_s,
                    "stages": [{"name": stage.name, "workers": stage.workers, "busy": stage.busy}
                               for stage in report.stages]})
    else:
        busy = ", ".join(f"{stage.name} {stage.busy:.0%} of {stage.workers}" for stage in report.stages)
        before = f", {report.failed_before} failed before (--retry tries them again)" if report.failed_before else ""
        click.echo(f"{out}: {report.embedded} embedded, {report.copied} with the same content as another, "
                   f"{report.skipped} there already, {report.failed} failed{before}; "
                   f"{report.scans_per_s:.2f} scans/s; busy: {busy}; limit: {report.limit}")


def _refuse(why: str, options: Mapping[str, object]) -> None:
    for option, value in options.items():
        if value is not None:
            raise InputError(f"{option}: {why}")


def _settings(model: Model, device: str, cores: int, readers: int, batch: int | None) -> Settings:
    """On this machine: on a CPU each reader computes, too; a GPU is fed by all of them."""
    from ..pipeline import Settings

    threads = max(1, cores // readers)
    if device == "cpu":
        return Settings(readers, threads, together=True)
    limit = model.largest_batch
    if batch is not None and limit is not None and batch > limit:
        raise InputError(f"--batch {batch}: the engine was built for at most {limit}; build with a larger --max-batch")
    most = batch or min(_USUAL_BATCH, limit or _USUAL_BATCH)
    return Settings(readers, threads, most, 2 * most, model.inferences)


def _usual_readers(device: str, cores: int) -> int:
    """On a CPU each holds an inference in memory, so that many cores share fewer."""
    if device == "cuda":
        return max(1, cores // 2)
    return cores if cores <= _FEW_CORES else cores // 2


def _write_file(model: Model, items: list[Item], out: Path, keep_going: bool) -> int:
    options = {item.path: item.options for item in items}
    scans = [item.path for item in items]
    with atomic_file(out) as temporary:  # first of all, so that a place that cannot be written is found out at once
        results = for_each_scan(scans, keep_going, model.embed_image, lambda scan: model.prepare(scan, **options[scan]))
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
