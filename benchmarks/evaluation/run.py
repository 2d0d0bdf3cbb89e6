"""Evaluate a bundle, and beside it the PyTorch checkpoint it was made from, on a data set."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...runtime.cli.output import Stages
from ...runtime.errors import BundleError, InputError
from ...runtime.model import Model
from ...runtime.text import TruncationWarning
from .dataset import Case
from .metrics import RESAMPLES, Classification, Estimate, classification, retrieval
from .state import State, stamp

#: Texts embedded at once.
_TEXT_BATCH = 16
_T = TypeVar("_T")
_V = TypeVar("_V")


@dataclass(frozen=True)
class Outputs:
    """What one contender makes of a scan: ``embedding`` [512], and ``scores`` [classes]."""

    embedding: NDArray[np.float32]
    scores: NDArray[np.float32]


class Embedder(Protocol):
    """Something to evaluate."""

    def image(self, volume: NDArray[np.float32]) -> Outputs:
        """A preprocessed volume ``[D, H, W]``."""
        ...

    def texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit rows ``[n, 512]``."""
        ...


@dataclass(frozen=True)
class Failure:
    """A scan that could not be used, and why."""

    volume: str
    error: str


@dataclass(frozen=True)
class Result:
    """Metrics of one contender. ``retrieval``: by direction; empty without reports."""

    classification: Classification
    retrieval: dict[str, dict[str, Estimate]]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: values by name, and their intervals under ``intervals_95``."""
        scores = self.classification
        single = {"mean_auroc": scores.mean_auroc, "f1": scores.f1, "accuracy": scores.accuracy,
                  "precision": scores.precision, "recall": scores.recall}
        return {
            **{name: estimate.value for name, estimate in single.items()},
            "auroc": {name: estimate.value for name, estimate in scores.auroc.items()},
            "retrieval": {way: {k: e.value for k, e in row.items()} for way, row in self.retrieval.items()},
            "intervals_95": {
                **{name: _interval(estimate) for name, estimate in single.items()},
                "auroc": {name: _interval(estimate) for name, estimate in scores.auroc.items()},
                "retrieval": {way: {k: _interval(e) for k, e in row.items()} for way, row in self.retrieval.items()},
            },
        }


@dataclass(frozen=True)
class Evaluation:
    """Results by contender, over the same scans. ``positives``: scans that have each finding."""

    results: dict[str, Result]
    scans: int
    reports: int
    positives: dict[str, int]
    failed: tuple[Failure, ...]


def _interval(estimate: Estimate) -> list[float | None]:
    return [estimate.low, estimate.high]


class BundleEmbedder:
    """The bundle, by zero-shot prompts or by its classifier."""

    def __init__(self, model: Model, classifier: bool) -> None:
        self._model, self._classifier = model, classifier

    def image(self, volume: NDArray[np.float32]) -> Outputs:
        """See Embedder."""
        if self._classifier:
            found = self._model.image_outputs(volume[None], ["image_embedding", "class_scores"])
            return Outputs(found["image_embedding"][0], found["class_scores"][0])
        embedding = self._model.image_outputs(volume[None], ["image_embedding"])["image_embedding"]
        return Outputs(embedding[0], self._model.score_embeddings(embedding)[0])

    def texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """See Embedder."""
        return self._model.embed_text(texts)


def evaluate(
    cases: Sequence[Case], embedders: Mapping[str, Embedder], model: Model, state: State, classes: Sequence[str],
    display: Stages, read_options: Mapping[str, Any],
) -> Evaluation:
    """Stream the scans through every embedder and judge the answers.

    Args:
        model: reads and preprocesses the scans.
        classes: names of the columns of labels and scores.
        read_options: as for ``Model.preprocess``, on top of the data set's metadata.

    Raises:
        InputError: no scan could be used.
    """
    collected: dict[str, list[Outputs]] = {name: [] for name in embedders}
    done: list[Case] = []
    failed: list[Failure] = []
    for case, outputs in _outputs(cases, embedders, model, state, read_options, display):
        display.advance()
        if isinstance(outputs, InputError):
            failed.append(Failure(case.name, str(outputs)))
            continue
        done.append(case)
        for name, output in outputs.items():
            collected[name].append(output)
    if not done:
        raise InputError(f"none of the {len(cases)} scans could be used; the first: {failed[0].error}")
    labels = np.array([case.labels for case in done], bool)
    with_report = [index for index, case in enumerate(done) if case.report is not None]
    results = {}
    for name, embedder in embedders.items():
        display.stage(f"{name}: reports and {RESAMPLES} resamples")
        scores = np.stack([output.scores for output in collected[name]]).astype(np.float64)
        ways = {}
        if with_report and model.manifest.text is not None:
            images = np.stack([collected[name][index].embedding for index in with_report])
            reports = _report_embeddings(name, [done[index] for index in with_report], embedder, state)
            ways = {"image_to_report": retrieval(images, reports), "report_to_image": retrieval(reports, images)}
        results[name] = Result(classification(scores, labels, classes), ways)
    positives = dict(zip(classes, labels.sum(axis=0).tolist(), strict=True))
    return Evaluation(results, len(done), len(with_report), positives, tuple(failed))


def _outputs(
    cases: Sequence[Case], embedders: Mapping[str, Embedder], model: Model, state: State,
    read_options: Mapping[str, Any], display: Stages,
) -> Iterator[tuple[Case, dict[str, Outputs] | InputError]]:
    """Outputs per scan; while one is embedded the next is read."""

    def prepare(case: Case) -> ReadScan:
        options = {"metadata": case.metadata, **read_options} if case.metadata is not None else read_options
        return read_unless_known(case.path, options, state, [_key(name, case) for name in embedders], model)

    for case, prepared in read_ahead(cases, prepare):
        display.stage(case.name)
        try:
            scan = prepared()
            yield case, {name: _embed(state, name, case, embedder, scan) for name, embedder in embedders.items()}
        except BundleError:
            raise
        except InputError as error:
            yield case, error


def read_ahead(items: Sequence[_T], prepare: Callable[[_T], _V]) -> Iterator[tuple[_T, Callable[[], _V]]]:
    """Each item with a function that gives, or raises, what became of ``prepare``; the next is prepared meanwhile."""
    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(prepare, items[0])
        for index, item in enumerate(items):
            current = following
            if index + 1 < len(items):
                following = reader.submit(prepare, items[index + 1])
            yield item, current.result


@dataclass(frozen=True)
class ReadScan:
    """A scan for several contenders.

    ``stamp``: of what it was read from, as that was before; outputs are known by it, whatever happens to the file
    later. ``volume``: [D, H, W], preprocessed; None where all outputs are known.
    """

    stamp: str
    volume: NDArray[np.float32] | None


def read_unless_known(path: Path, options: Mapping[str, Any], state: State, keys: Iterable[str], model: Model
                      ) -> ReadScan:
    """Read a scan, unless the state has an array for every key.

    Raises:
        InputError: as ``Model.preprocess``; a scan or a table of metadata that is not there, or changes meanwhile.
    """
    before = stamp(path, options)
    if all(state.get(key, before) is not None for key in keys):
        return ReadScan(before, None)
    volume = model.preprocess(path, **options)
    if stamp(path, options) != before:
        raise InputError(f"{path}: changed while it was read, or its table of metadata did; start again")
    return ReadScan(before, volume)


def recall_or_compute(state: State, key: str, scan: ReadScan,
                      compute: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> NDArray[np.float32]:
    """An array of a scan, from the state, or computed of its volume and put there."""
    row = state.get(key, scan.stamp)
    if row is None:
        assert scan.volume is not None  # it is None only where every key was known by this stamp
        row = compute(scan.volume)
        state.put(key, scan.stamp, row)
    return row


def _key(contender: str, case: Case) -> str:
    return f"{contender}/image/{case.path}"


def _embed(state: State, contender: str, case: Case, embedder: Embedder, scan: ReadScan) -> Outputs:
    def compute(volume: NDArray[np.float32]) -> NDArray[np.float32]:
        outputs = embedder.image(volume)
        return np.concatenate([outputs.embedding, outputs.scores])

    row = recall_or_compute(state, _key(contender, case), scan, compute)
    return Outputs(row[:-len(case.labels)], row[-len(case.labels):])


def _report_embeddings(contender: str, cases: Sequence[Case], embedder: Embedder, state: State) -> NDArray[np.float32]:
    """``[n, 512]``; the report's text is its own stamp."""
    texts = {case.name: case.report or "" for case in cases}
    missing = [name for name, text in texts.items() if state.get(f"{contender}/text/{name}", text) is None]
    with warnings.catch_warnings():
        warnings.simplefilter("once", TruncationWarning)
        for start in range(0, len(missing), _TEXT_BATCH):
            names = missing[start : start + _TEXT_BATCH]
            for name, row in zip(names, embedder.texts([texts[name] for name in names]), strict=True):
                state.put(f"{contender}/text/{name}", texts[name], row)
    rows = [state.get(f"{contender}/text/{name}", text) for name, text in texts.items()]
    return np.stack([row for row in rows if row is not None])
