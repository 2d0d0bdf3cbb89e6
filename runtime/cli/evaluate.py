"""``dcformer evaluate``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..backends import Options
from ..bundle import open_bundle
from ..errors import BundleError, one_line
from ..model import Model
from .options import bundle_argument, json_option, model_options, scan_options
from .output import announce, print_json, print_table, progress

if TYPE_CHECKING:
    from ...benchmarks.evaluation.metrics import Estimate
    from ...benchmarks.evaluation.run import Embedder, Evaluation

#: Scans of a kind that a bootstrap's interval needs to mean anything.
_FEW = 10


@click.command("evaluate")
@bundle_argument
@click.argument("dataset", type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), metavar="FILE",
              help="Also judge the PyTorch checkpoint that the bundle was made from, on the same scans.")
@click.option("--split", metavar="NAME", help="'valid' or 'train', where the folder holds both.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N scans.")
@click.option("--classifier", is_flag=True, help="Judge the fine-tuned classifier instead of zero-shot prompts.")
@click.option("--labels", type=click.Path(path_type=Path), metavar="CSV", help="Instead of those in the folder.")
@click.option("--reports", type=click.Path(path_type=Path), metavar="CSV", help="Instead of those in the folder.")
@click.option("--state", type=click.Path(path_type=Path), metavar="FILE",
              help="Where finished scans are kept until the end; default: in the user's cache folder.")
@click.option("--fresh", is_flag=True, help="Do not go on with an interrupted evaluation.")
@json_option
@scan_options
@model_options
def command(
    bundle: Path, dataset: Path, checkpoint: Path | None, split: str | None, limit: int | None, classifier: bool,
    labels: Path | None, reports: Path | None, state: Path | None, fresh: bool, as_json: bool, device: str,
    threads: int | None, backend: str, precision: str, no_verify: bool, metadata: Path | None, **read_options: Any,
) -> int:
    """Score the scans of DATASET, a folder in CT-RATE's layout, and compare with its labels and reports.

    Prints AUROC per finding, and as in the published table F1 (weighted), accuracy, precision and recall (micro), all
    with scores rounded at 0.5; where there are reports also retrieval, both ways. Intervals are 95 %, by bootstrap over
    scans. An interrupted evaluation goes on where it stopped. Scans that cannot be read are listed, and make the exit
    code 2.
    """
    from ...benchmarks.evaluation.dataset import Tables, read_dataset
    from ...benchmarks.evaluation.run import BundleEmbedder, evaluate
    from ...benchmarks.evaluation.state import library_of, open_state, state_path

    options = Options(device, threads, backend, precision)
    opened = open_bundle(bundle, verify=not no_verify)
    model = Model(opened, options)
    announce(model)
    classes = _classes(model, bundle, classifier)
    cases = read_dataset(dataset, classes, Tables(labels, reports, metadata), split)[:limit]
    embedders: dict[str, Embedder] = {"bundle": BundleEmbedder(model, classifier)}
    if checkpoint is not None:
        from ...benchmarks.evaluation.pytorch import CheckpointEmbedder

        embedders["pytorch"] = CheckpointEmbedder(opened, checkpoint, classifier, options.thread_count)
    given = {name: value for name, value in read_options.items() if value is not None}
    # Tables are not in it: what is read by them is known by their stamps, or by the text itself.
    identity = {"command": "evaluate", "bundle": model.manifest.digest, "dataset": str(dataset.resolve()),
                "backend": library_of(model.describe()), "precision": precision, "classifier": classifier,
                "options": {name: str(value) for name, value in given.items()}}
    started = time.monotonic()
    with progress(len(cases)) as display, open_state(state or state_path(identity), identity, fresh) as kept:
        found = evaluate(cases, embedders, model, kept, classes, display, given)
    for failure in found.failed:
        click.echo(f"error: {one_line(failure.error)}", err=True)
    if as_json:
        print_json(_to_json(found, model, bundle, dataset, time.monotonic() - started))
    else:
        _print(found, dataset)
    return 2 if found.failed else 0


def _classes(model: Model, bundle: Path, classifier: bool) -> Sequence[str]:
    task = model.manifest.detector if classifier else model.manifest.zero_shot
    if task is None and classifier:
        raise BundleError(f"{bundle}: no classifier in this bundle; drop --classifier")
    if task is None:
        raise BundleError(f"{bundle}: no zero-shot prompts in this bundle; export it with --tokenizer DIR"
                          + (", or pass --classifier" if model.manifest.detector else ""))
    return task.classes


def _to_json(found: Evaluation, model: Model, bundle: Path, dataset: Path, seconds: float) -> dict[str, Any]:
    document: dict[str, Any] = {
        **found.results["bundle"].to_dict(),
        "scans": found.scans, "reports": found.reports, "positives": found.positives,
        "failed": [{"volume": failure.volume, "error": failure.error} for failure in found.failed],
        "bundle": str(bundle), "manifest_sha256": model.manifest.digest, "backend": model.describe(),
        "dataset": str(dataset), "seconds": round(seconds, 1),
    }
    if "pytorch" in found.results:
        document["pytorch"] = found.results["pytorch"].to_dict()
    return document


def _print(found: Evaluation, dataset: Path) -> None:
    names = list(found.results)
    judged = [found.results[name].classification for name in names]
    rows = [(finding, str(count), *(_text(one.auroc[finding]) for one in judged))
            for finding, count in found.positives.items()]
    rows.append(("mean", "", *(_text(one.mean_auroc) for one in judged)))
    print_table(f"{dataset}: AUROC on {found.scans} scans [95 % interval]", ("finding", "scans with it", *names), rows)
    few = [finding for finding, count in found.positives.items() if 0 < min(count, found.scans - count) < _FEW]
    if few:
        click.echo(f"Fewer than {_FEW} scans with it or without: {', '.join(few)}; resampled, so few give intervals "
                   "that are too narrow.")
    averages = [("F1, weighted", [one.f1 for one in judged]), ("accuracy", [one.accuracy for one in judged]),
                ("precision, micro", [one.precision for one in judged]),
                ("recall, micro", [one.recall for one in judged])]
    print_table("Scores rounded at 0.5", ("metric", *names), ((name, *map(_text, row)) for name, row in averages))
    ways = found.results[names[0]].retrieval
    if ways:
        print_table(f"Retrieval among {found.reports}", ("direction", *names), (
            (f"{way.replace('_', ' ')} {k}", *(_text(found.results[name].retrieval[way][k]) for name in names))
            for way, row in ways.items() for k in row))
    if found.failed:
        click.echo(f"{len(found.failed)} of {found.scans + len(found.failed)} scans could not be used:")
        for failure in found.failed:
            click.echo(f"  {one_line(failure.error)}")


def _text(estimate: Estimate) -> str:
    if estimate.value is None:
        return "not defined"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
