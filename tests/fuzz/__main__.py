"""``python -m fuzz``: cases of every kind in turn, as many as asked for; a table, and exit code 1 if one ends badly.

A case is told by its kind and number, which with the seed make it anew: ``--only dicom:17 --keep FOLDER``.
"""

from __future__ import annotations

import datetime
import importlib
import json
import multiprocessing
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import click
import torch

from dcformer_deploy.runtime.cli.app import COMMANDS, main
from dcformer_deploy.runtime.cli.output import markdown_table
from dcformer_deploy.runtime.machine import machine

from . import bundles, volumes, words
from .judge import LARGEST_BYTES, LARGEST_S, Case, Verdict, judge
from .seeds import Seeds, make_seeds

KINDS: dict[str, Callable[[Random, Seeds, Path], Case]] = {
    "header": volumes.header,
    "body": volumes.body,
    "gzip": volumes.gz,
    "dicom": volumes.dicom,
    "zip": volumes.zips,
    "table": volumes.tables,
    "manifest": bundles.manifest,
    "onnx": bundles.graphs,
    "store": bundles.stores,
    "checkpoint": bundles.checkpoints,
    "prompt": words.prompts,
    "option": words.options,
}
_Result = tuple[str, int, Verdict, list[str]]


@click.command()
@click.option("--cases", type=click.IntRange(1), default=10_000, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--kinds", default=",".join(KINDS), help="Some of the kinds, separated by commas.")
@click.option("--only", metavar="KIND:NUMBER,…", help="Single cases, with all that they print.")
@click.option(
    "--keep", type=click.Path(path_type=Path), help="With --only and one case: an empty folder for its files."
)
@click.option(
    "--bundle", type=click.Path(path_type=Path), help="Of the golden nano checkpoint; exported if not given."
)
@click.option("--processes", type=click.IntRange(1), default=2, show_default=True)
@click.option("--table", type=click.Path(path_type=Path), help="Write the counts there, as Markdown.")
@click.option("--json", "details", type=click.Path(path_type=Path), help="Write how every case ended.")
def command(
    cases: int,
    seed: int,
    kinds: str,
    only: str | None,
    keep: Path | None,
    bundle: Path | None,
    processes: int,
    table: Path | None,
    details: Path | None,
) -> None:
    """Run damaged and hostile input through the program."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        seeds = _seeds(Path(place), bundle)
        _import_all()
        if only is not None:
            for name in only.split(","):
                kind, _, number = name.partition(":")
                _show(_run(kind, int(number), seed, seeds, Path(place), keep))
            return
        names = kinds.split(",")
        jobs = [(names[i % len(names)], i // len(names)) for i in range(cases)]
        results = list(_all(jobs, seed, seeds, Path(place), processes))
    _summary(results, seed, details, table)
    sys.exit(any(verdict.problem for _, _, verdict, _ in results))


def _seeds(place: Path, bundle: Path | None) -> Seeds:
    """Made in a child of its own, so that this process keeps a single thread and can be forked."""
    (place / "seeds").mkdir()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(make_seeds, (place / "seeds", bundle))


def _import_all() -> None:
    """Everything that commands import when they run, once, before the forks."""
    for module in (
        "onnxruntime",
        "openvino",
        "pydicom",
        "gdcm",
        "pyarrow.parquet",
        "zarr",
        "usearch.index",
        "tritonclient.grpc",
        "pydicom.pixels",
        "torch",
        "onnx",
        "transformers",
        "dcformer_deploy.export.make_bundle",
        "dcformer_deploy.runtime.volume.dicom",
    ):
        importlib.import_module(module)
    torch.set_num_threads(1)  # making a case may compute; a process that has done so in threads can not be forked
    for name, _ in COMMANDS.values():
        importlib.import_module(f"dcformer_deploy.runtime.cli.{name}")


def _all(jobs: list[tuple[str, int]], seed: int, seeds: Seeds, place: Path, processes: int) -> Iterator[_Result]:
    context = multiprocessing.get_context("fork")
    with context.Pool(processes) as pool:
        waiting = [pool.apply_async(_run, (kind, number, seed, seeds, place, None)) for kind, number in jobs]
        for done, result in enumerate(waiting, 1):
            found = result.get()
            if found[2].problem:
                click.echo(f"{found[0]}:{found[1]} {found[2].problem} :: {_short(found[3])}", err=True)
            if done % 500 == 0:
                click.echo(f"{done} of {len(jobs)}", err=True)
            yield found


def _run(kind: str, number: int, seed: int, seeds: Seeds, place: Path, keep: Path | None) -> _Result:
    random = Random(f"{seed}:{kind}:{number}")
    with (
        tempfile.TemporaryDirectory(prefix=f"case-{kind}-{number}-", dir=place) as temporary,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        folder = keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        try:
            case = KINDS[kind](random, seeds, folder)
        except Exception as error:
            raise RuntimeError(f"{kind}:{number}: the case cannot be made") from error
        return kind, number, judge(case, folder, main), list(case.arguments)


def _show(result: _Result) -> None:
    kind, number, verdict, arguments = result
    click.echo(
        f"{kind}:{number}: dcformer {_short(arguments)}\nexit code {verdict.exit_code}, {verdict.seconds:.2f} s, "
        f"{verdict.peak_bytes >> 20} MiB, {verdict.problem or 'good'}\n{verdict.errors}"
    )


def _short(arguments: list[str]) -> str:
    return " ".join(repr(word if len(word) < 80 else word[:77] + "…") for word in arguments)


def _summary(results: list[_Result], seed: int, details: Path | None, table: Path | None) -> None:
    columns = ("kind", "cases", "ok", "refused (2)", "check failed (1)", "environment (3)", "bad ends", "longest",
               "memory")
    rows = []
    for kind in dict.fromkeys(result[0] for result in results):
        own = [verdict for name, _, verdict, _ in results if name == kind]
        codes = Counter(verdict.exit_code for verdict in own)
        rows.append((kind, str(len(own)), *(str(codes[code]) for code in (0, 2, 1, 3)),
                     str(sum(verdict.problem is not None for verdict in own)),
                     f"{max(verdict.seconds for verdict in own):.1f} s",
                     f"{max(verdict.peak_bytes for verdict in own) >> 20} MiB"))
    told = [f"{len(results)} cases, seed {seed}; {machine()}; {datetime.date.today()}.", "",
            *markdown_table(columns, rows), "",
            f"Limits: {LARGEST_S:g} s, and {LARGEST_BYTES >> 20} MiB beyond the libraries that all cases share.",
            *(f"{kind}:{number}: {v.problem}" for kind, number, v, _ in results if v.problem)]
    click.echo("\n".join(told))
    if table is not None:
        head = ["# Input that tries to break it", "", "`make fuzz`; what the kinds are: tests/fuzz.", ""]
        table.write_text("\n".join([*head, *told]) + "\n")
    if details is not None:
        ends = [{"case": f"{kind}:{number}", "exit_code": v.exit_code, "problem": v.problem, "arguments": arguments,
                 "errors": v.errors} for kind, number, v, arguments in results]
        details.write_text(json.dumps(ends, indent=1) + "\n")


if __name__ == "__main__":
    command()
