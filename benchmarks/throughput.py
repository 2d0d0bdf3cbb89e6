"""Scans per second of ``dcformer embed`` beside a plain loop, where the limit is, and what that means for an archive.

``python -m dcformer_deploy.benchmarks.throughput BUNDLE SCANS --out DIR`` (``make throughput``).
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from ..runtime import Model, load
from ..runtime.backends import Options
from ..runtime.cli.options import bundle_argument
from ..runtime.cli.output import Stages, markdown_table, print_table, progress
from ..runtime.cluster import LOCAL, Cluster, ModelSpec, connect
from ..runtime.embedding_job import EmbeddingJob, Report
from ..runtime.files import atomic_file
from ..runtime.inputs import Item, find_items
from ..runtime.machine import machine
from ..runtime.pipeline import Settings
from ..runtime.preparing import find_tasks, prepare_all
from ..runtime.scan_files import file_facts
from ..runtime.store import Identity, Store
from ..runtime.store.store import parts
from .capacity import ARCHIVES, Steps, plan_rows

LOOP = "plain loop"
PREPARED = "embed of prepared scans"
#: As on a GPU: one thread reads, another computes.
APART = "reading beside inference"


@dataclass(frozen=True)
class Rate:
    """``scans_per_s``: of each round; ``busy``: share of the time that readers and inference were at work, last round.

    ``step_s``: seconds per scan and step, last round; none of the loop and of processes.
    """

    contender: str
    scans_per_s: tuple[float, ...]
    busy: dict[str, float]
    step_s: dict[str, float]

    @property
    def median(self) -> float:
        """Over rounds."""
        return statistics.median(self.scans_per_s)


@dataclass(frozen=True)
class Throughput:
    """``bytes``: of a scan's file, ``row_bytes``: of its row in a store, means. Rates in the order of a first round."""

    machine: str
    date: str
    encoder: str
    scans: int
    bytes: int
    row_bytes: int
    rates: tuple[Rate, ...]


def measure(bundle: Path, scans: Sequence[Item], rounds: int, workers: int, display: Stages,
            scratch: Path) -> Throughput:
    """Every contender on all scans, in turn, after a warm-up; the order turns round with each round.

    Args:
        workers: readers, and processes under Ray, beside one reader.
        scratch: a folder for stores and prepared scans.
    """
    model = load(bundle)
    cores = Options().thread_count
    prepared = scratch / "prepared"
    display.stage("preparing")
    prepare_all(model, find_tasks([item.path for item in scans], None, {}, prepared), "int16", 1, cores)
    contenders: dict[str, Callable[[], Report]] = {LOOP: lambda: _loop(model, scans)}
    alone = load(bundle, threads=1)
    for count in (1, workers):
        contenders[_embedding(count)] = (
            lambda count=count: _embed(alone, scans, Settings(count, together=True), scratch))
    contenders[f"{PREPARED}, {_readers(workers)}"] = lambda: _embed(
        alone, find_items([prepared], None, {}), Settings(workers, together=True), scratch)
    contenders[APART] = lambda: _embed(model, scans, Settings(1, cores, 1, 2), scratch)
    model.zero_shot(scans[0].path)
    alone.zero_shot(scans[0].path)
    found = _rounds(contenders, rounds, display)
    with connect(LOCAL) as cluster:  # last, as its own processes are there from now on
        found |= _rounds({f"embed --ray, {workers} processes": lambda: _on_ray(
            cluster, model, bundle, scans, workers, scratch)}, rounds, display)
    return Throughput(machine(), time.strftime("%Y-%m-%d"), model.manifest.encoder, len(scans),
                      round(statistics.mean((file_facts(item.path) or (0,))[0] for item in scans)),
                      _row_bytes(model, scans, scratch),
                      tuple(_rate(name, reports) for name, reports in found.items()))


def _rounds(contenders: dict[str, Callable[[], Report]], rounds: int, display: Stages) -> dict[str, list[Report]]:
    found: dict[str, list[Report]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in list(contenders)[:: 1 if number % 2 == 0 else -1]:
            display.stage(f"round {number + 1}: {name}")
            found[name].append(contenders[name]())
    return found


def _readers(count: int) -> str:
    return f"{count} reader{'s' * (count > 1)}"


def _embedding(count: int) -> str:
    return f"embed, {_readers(count)} of one core"


def _rate(name: str, reports: Sequence[Report]) -> Rate:
    last = reports[-1]
    return Rate(name, tuple(report.scans_per_s for report in reports),
                {stage.name: stage.busy for stage in last.stages}, last.step_s)


def _loop(model: Model, scans: Sequence[Item]) -> Report:
    """What everyone writes first, with every core for each step."""
    start = time.perf_counter()
    for item in scans:
        model.score_embeddings(model.embed_image(item.path)[None])
    return Report(len(scans), 0, 0, 0, 0, time.perf_counter() - start, (), {})


def _embed(model: Model, scans: Sequence[Item], settings: Settings, scratch: Path) -> Report:
    with tempfile.TemporaryDirectory(dir=scratch) as folder, Store(Path(folder) / "s", _identity(model)) as store:
        return EmbeddingJob(store).run(model, settings, scans)


def _row_bytes(model: Model, scans: Sequence[Item], scratch: Path) -> int:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        with Store(Path(folder) / "s", _identity(model)) as store:
            EmbeddingJob(store).run(model, Settings(), scans)
        return round(sum(part.stat().st_size for part in parts(Path(folder) / "s")) / len(scans))


def _on_ray(cluster: Cluster, model: Model, bundle: Path, scans: Sequence[Item], count: int, scratch: Path) -> Report:
    spec = ModelSpec(str(bundle.absolute()), model.manifest.digest, "cpu", "onnxruntime", "fp32", "cpu", verify=True)
    plan = cluster.plan("cpu", count, None, 1, 1)
    with tempfile.TemporaryDirectory(dir=scratch) as folder, Store(Path(folder) / "s", _identity(model)) as store:
        return EmbeddingJob(store).collect(lambda todo: cluster.run(todo, spec, plan, store.index.contents()), scans,
                                           count, count)


def _identity(model: Model) -> Identity:
    manifest = model.manifest
    return Identity(manifest.results_digest("fp32"), manifest.encoder, "fp32", manifest.embedding_dim,
                    manifest.zero_shot.classes if manifest.zero_shot else (), {})


def steps_of(found: Throughput) -> Steps:
    """Seconds of one core per scan."""
    alone = next(rate for rate in found.rates if rate.contender == _embedding(1))
    return Steps(**{f"{name}_s": alone.step_s[name] for name in ("hash", "read", "preprocess", "inference")},
                 write_s=alone.step_s["write"], bytes=found.bytes, row_bytes=found.row_bytes)


def to_markdown(found: Throughput) -> str:
    """The report: rates, and the plan on paper."""
    loop = next(rate for rate in found.rates if rate.contender == LOOP)
    rows = [(rate.contender, f"{rate.median:.2f}", f"{rate.median / loop.median:.2f}",
             ", ".join(f"{name} {busy:.0%}" for name, busy in rate.busy.items()) or "-") for rate in found.rates]
    steps = steps_of(found)
    lines = [f"# Throughput of {found.encoder}", "",
             f"{found.machine}, {found.date}; {found.scans} scans of {found.bytes / 1e6:.1f} MB, medians of "
             f"{len(loop.scans_per_s)} rounds, in turn. The loop uses every core for each step. Ray's processes start "
             "and load the model within their time.", "",
             *markdown_table(("contender", "scans/s", "to the loop", "busy"), rows), "",
             "Seconds per scan, on one core: "
             + ", ".join(f"{name.removesuffix('_s')} {value:.3f}" for name, value in
                         dataclasses.asdict(steps).items() if name.endswith("_s")) + ".", "",
             "## What that means for archives", "",
             *markdown_table(*plan_rows(steps, ARCHIVES)), ""]
    return "\n".join(lines)


def write(found: Throughput, out: Path, name: str) -> list[Path]:
    """Markdown and JSON."""
    texts = {"md": to_markdown(found), "json": json.dumps(dataclasses.asdict(found), indent=2) + "\n"}
    paths = [out / f"{name}.{ending}" for ending in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return paths


@click.command()
@bundle_argument
@click.argument("inputs", metavar="SCAN...", nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", required=True)
@click.option("--name", default="throughput", show_default=True, help="Of the files in DIR.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--workers", type=click.IntRange(min=2), default=2, show_default=True, help="Readers beside one.")
def command(bundle: Path, inputs: tuple[str, ...], out: Path, name: str, rounds: int, workers: int) -> None:
    """Measure scans per second of `dcformer embed` beside a plain loop."""
    items = find_items(inputs, None, {})
    with tempfile.TemporaryDirectory(prefix="dcformer-") as scratch, progress() as display:
        found = measure(bundle, items, rounds, workers, display, Path(scratch))
    loop = next(rate for rate in found.rates if rate.contender == LOOP)
    print_table(f"{found.scans} scans of {found.bytes / 1e6:.1f} MB", ("contender", "scans/s", "to the loop"), (
        (rate.contender, f"{rate.median:.2f}", f"{rate.median / loop.median:.2f}") for rate in found.rates))
    for path in write(found, out, name):
        click.echo(path)


if __name__ == "__main__":
    command()
