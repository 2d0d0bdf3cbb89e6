"""The model a user holds: embeddings and scores from a bundle. Knows neither inference libraries nor file formats."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from .ahead import ahead
from .arguments import ARRAY, class_names, require_finite, require_tokens, scan_name
from .backends import Backend, Options, open_tower
from .backends.base import AUTO, EngineBackend
from .backends.borrow import OnGpu, borrow, stack
from .backends.choose import choose_backend
from .bundle import Bundle, open_bundle
from .errors import BundleError, InputError
from .forks import ForkableLock
from .image_inputs import ImageInputs
from .manifest import Graph, Manifest, ZeroShotTask
from .prompts import Prompts
from .results import Classification, Prepared, ZeroShot
from .scan_files import SliceFiles, as_scan
from .scoring import probabilities
from .text import Tokenizer
from .volume import ReadOptions, Volume, is_prepared, open_prepared, prepare_scan, read_scan

#: Of an inference of the text tower, whose memory grows with them.
_TOKENS_AT_ONCE = 8192
#: What to read: a file, a folder, or a list of DICOM slices.
Readable = str | Path | SliceFiles | Sequence[str | Path]
#: That, a preprocessed volume ``[D, H, W]`` float32, or what ``Model.prepare`` made; with the back ends that run
#: engines also a volume on the GPU, float32 or float16.
Scan = Readable | NDArray[np.float32] | OnGpu | Prepared


def load(bundle: str | Path, device: str = "cpu", threads: int | None = None, verify: bool = True,
         backend: str = "onnxruntime", precision: str = "fp32", preprocess: str = "cpu") -> Model:
    """Open a bundle for inference.

    Args:
        device: "cpu" or "cuda"; never replaced silently by the other.
        threads: CPU threads of one inference; None = the cores this process may use.
        verify: compare the sha256 of every file with the manifest.
        backend: "onnxruntime", "openvino", or with device "cuda" "tensorrt" or "tensorrt_rtx"; "auto" for the best
            that works here.
        precision: "fp32", or one that `dcformer calibrate` added: "fp16", "bf16", "int8". openvino needs nothing added
            for "bf16", it computes fp32 graphs so.
        preprocess: "gpu" makes inputs from a file's voxels on the GPU, for the back ends that run engines; "auto" where
            fewer bytes must go to it.

    Raises:
        InputError, BundleError: no bundle there, or a damaged, edited or newer one.
    """
    return Model(open_bundle(bundle, verify), Options(device, threads, backend, precision, preprocess))


class Model:
    """A loaded bundle, whose methods may be called from several threads.

    Graphs are opened when first used, but for what the back end "auto" tries on a GPU; ``describe`` opens the image
    tower, so that a service learns at its start what its first request would tell it.

    Embeddings are float32 with unit length. ``choice``: with the back end "auto", which was chosen and why.
    """

    def __init__(self, bundle: Bundle, options: Options) -> None:
        self._bundle = bundle
        self.choice: str | None = None
        self._graphs: dict[str, Backend] = {}
        if options.backend == AUTO:
            options, self.choice, tried = choose_backend(bundle, options)
            if tried is not None:
                self._graphs["image"] = tried
        self._options = options
        self._inputs = ImageInputs(bundle.manifest.preprocessing, options, lambda: self._info("image"),
                                   lambda: self._graph("image"))
        self._prompts = Prompts(bundle)
        self._lock = ForkableLock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Loaded again where it is unpickled."""
        options = self._options
        return load, (str(self._bundle.root), options.device, options.threads, True, options.backend, options.precision,
                      options.preprocess)

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self._bundle.manifest

    @property
    def device(self) -> str:
        """Where inference runs: "cpu" or "cuda"; with the back end "auto", what it chose."""
        return self._options.device

    @property
    def precision(self) -> str:
        """Of the graphs that run."""
        return self._options.precision

    @property
    def results_digest(self) -> str:
        """Of the bundle, as ``Manifest.results_digest``, for the graphs that run."""
        return self.manifest.results_digest(self._options.graph_precision)

    def describe(self) -> str:
        """Inference library, version and device of the image tower; opens it if need be."""
        return self._graph("image").describe()

    # ------------------------------------------------------------------ images

    def preprocess(
        self, path: Readable, spacing: Sequence[float] | None = None, slope: float | None = None,
        intercept: float | None = None, orientation: str | None = None, metadata: str | Path | None = None,
        series: str | None = None, resample_irregular: bool | None = None,
    ) -> NDArray[np.float32]:
        """Read a NIfTI scan into the image tower's input: ``[D, H, W]`` float32, in [-1, 1] (the manifest tells).

        Args:
            path: ``.nii`` or ``.nii.gz``; a folder, a zip or a list of DICOM files; or what `dcformer prepare` made of
                any: then the volume is zero where the image tower does not look.
            spacing: mm along the stored axes, (x, y, z) or (xy, z); None = the header's.
            slope, intercept: HU = slope * value + intercept, on top of the file's own scaling; None = 1 and 0.
            orientation: "as-stored" ignores the header's directions; None reorients to the manifest's orientation.
            metadata: CSV with CT-RATE's columns, for files with blank headers.
            series, resample_irregular: for DICOM, as in ``ReadOptions``.

        Raises:
            InputError: anything about the file that would have to be guessed; the message says what to pass.
        """
        options = ReadOptions(spacing, slope, intercept, orientation, metadata, series, resample_irregular)
        return prepare_scan(as_scan(path), self.manifest.preprocessing, options, self._options.thread_count,
                            self._info("image").inputs)

    def prepare(self, scan: Scan, threads: int | None = None, **read_options: Any) -> Prepared:
        """All that is done with a scan before its inference. Raises ``InputError`` as ``embed_image``.

        Args:
            threads: that preprocess it; None = those of the model.
        """
        return self._prepare(scan, read_options, {}, threads)

    def prepare_volume(self, volume: Volume, name: str, timings_ms: dict[str, float] | None = None,
                       threads: int | None = None) -> Prepared:
        """As ``prepare``, of a scan that ``volume.read_scan`` has read for this model's preprocessing.

        Args:
            timings_ms: gets that of "preprocess".
        """
        timings = {} if timings_ms is None else timings_ms
        with _timed(timings, "preprocess"):
            feeds = self._inputs.of_scan(volume, threads or self._options.thread_count)
        return Prepared(name, feeds, volume.stored.shape, volume.spacing_hwd_mm, volume.orientation,
                        ", then ".join(map(str, volume.scaling)) or None, "; ".join(volume.notes) or None, timings)

    @property
    def largest_batch(self) -> int | None:
        """Of ``embed_batch``; None where there is no limit but memory."""
        backend = self._graph("image")
        return backend.largest_batch if isinstance(backend, EngineBackend) else None

    @property
    def inferences(self) -> int:
        """How many at the same time are worth it: on engines two, the inputs of one brought while another runs."""
        backend = self._graph("image")
        return backend.slots if isinstance(backend, EngineBackend) else 1

    def embed_batch(self, scans: Sequence[Prepared]) -> NDArray[np.float32]:
        """Image embeddings ``[n, 512]`` of prepared scans, in one inference unless some lie on the GPU and some do not.

        A row may hold NaN or infinity: one scan that overflows must not take its neighbours along.

        Raises:
            InferenceError: the inference library failed.
        """
        run = self._graph("image").run
        if len(scans) == 1:
            return run(scans[0].feeds, ["image_embedding"])[0]
        feeds = {name: stack([scan.feeds[name] for scan in scans]) for name in scans[0].feeds}
        if any(array is None for array in feeds.values()):
            return np.concatenate([run(scan.feeds, ["image_embedding"])[0] for scan in scans])
        return run(feeds, ["image_embedding"])[0]

    def embed_image(self, scan: Scan, **read_options: Any) -> NDArray[np.float32]:
        """Image embedding ``[512]`` of a file (``read_options`` as in ``preprocess``) or a preprocessed array.

        Raises:
            InputError: a file that cannot be used, or an array that is not a preprocessed volume of the right shape.
            InferenceError: the inference library failed.
        """
        return self._embed(self._prepare(scan, read_options, {}).feeds)

    def embed_images(self, scans: Iterable[Scan], **read_options: Any) -> NDArray[np.float32]:
        """Image embeddings ``[n, 512]``, the next scan read while one is computed. Raises like ``embed_image``."""
        if isinstance(scans, str | Path | SliceFiles) or not isinstance(scans, Iterable):
            raise InputError(f"scans: {type(scans).__name__}; expected a list of scans, or use embed_image for one")
        if len(shape := getattr(scans, "shape", ())) == 3:
            raise InputError(f"scans: an array {list(shape)}; expected a list of scans, or [n, D, H, W]; embed_image "
                             "takes one")
        embeddings = [self._embed(prepared().feeds)
                      for _, prepared in ahead(scans, lambda scan: self.prepare(scan, **read_options))]
        if not embeddings:
            raise InputError("scans: an empty list; expected at least one scan")
        return np.stack(embeddings)

    def image_outputs(
        self, volumes: NDArray[np.float32] | OnGpu, outputs: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Any output of the image tower for preprocessed volumes ``[B, D, H, W]``; None = all that the manifest lists.

        ``image_embedding`` [B, 512], ``feature_map`` [B, C, H', W', D'], with a quantizer ``codes`` [B, tokens] int64,
        and for a fine-tuned detector ``class_scores`` [B, classes]. Volumes may also lie on the GPU, as ``Scan``.

        Raises:
            InputError: another shape, values outside the window, NaN.
        """
        known = [info.name for info in self._info("image").outputs]
        names = list(outputs) if outputs is not None else known
        if isinstance(outputs, str) or not names or not set(names) <= set(known):
            raise InputError(f"outputs: {outputs!r}; expected a list of some of {', '.join(known)}")
        feeds = self._inputs.of_volumes(volumes)
        return dict(zip(names, self._run("image", feeds, names), strict=True))

    # ------------------------------------------------------------------ texts

    def embed_text(self, texts: Iterable[str] | str) -> NDArray[np.float32]:
        """Text embeddings ``[n, 512]``. A text over the token limit is truncated with a TruncationWarning.

        Raises:
            InputError: no text, or something that is no text.
            BundleError: the bundle has no tokenizer.
        """
        return self.embed_tokens(*self.tokenize(texts))

    def tokenize(self, texts: Iterable[str] | str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Token ids and attention mask ``[n, length]`` of texts. Warns and raises as ``embed_text``."""
        if not isinstance(texts, Iterable):
            raise InputError(f"texts: {type(texts).__name__}; expected a text or a list of them")
        return self._tokenizer.encode([texts] if isinstance(texts, str) else list(texts))

    def embed_tokens(self, ids: NDArray[np.integer], mask: NDArray[np.integer]) -> NDArray[np.float32]:
        """Text embeddings ``[n, 512]`` of token ids ``[n, length]`` with their attention mask (1 = token).

        Raises:
            InputError: shapes that differ, no integers, negative ids.
            InferenceError: ids or lengths that the text tower does not have.
        """
        ids, mask = require_tokens(ids, mask)
        feeds = {"input_ids": ids.astype(np.int64), "attention_mask": mask.astype(np.int64)}
        at_once = max(1, _TOKENS_AT_ONCE // ids.shape[1])
        if isinstance(backend := self._graph("text"), EngineBackend):
            at_once = min(at_once, backend.largest_batch)
        parts = ({name: rows[start : start + at_once] for name, rows in feeds.items()}
                 for start in range(0, len(ids), at_once))
        return np.concatenate([self._run("text", part, ["text_embedding"])[0] for part in parts])

    # ------------------------------------------------------------------ scores

    def zero_shot(self, scan: Scan, classes: Sequence[str] | None = None, **read_options: Any) -> ZeroShot:
        """Probability of each class for a scan, by its prompts.

        Args:
            scan: file or preprocessed array.
            classes: other names than the manifest's; the embeddings of their prompts are kept.
            read_options: as in ``preprocess``.
        """
        task = self._zero_shot_task()
        names = class_names(classes) if classes is not None else task.classes
        timings: dict[str, float] = {}
        with _timed(timings, "total"):
            feeds = self._prepare(scan, read_options, timings).feeds
            with _timed(timings, "load"):
                self._graph("image")
            with _timed(timings, "image"):
                image = self._embed(feeds)
            with _timed(timings, "prompts"):
                prompts = self._prompts.embeddings(task, names, self.embed_text)
            with _timed(timings, "score"):
                scores = probabilities(prompts @ image, task)
        return ZeroShot(scan_name(scan), dict(zip(names, scores.tolist(), strict=True)), timings)

    def score_embeddings(
        self, embeddings: NDArray[np.float32], classes: Sequence[str] | None = None
    ) -> NDArray[np.float32]:
        """Zero-shot probabilities ``[n, classes]`` of image embeddings ``[n, 512]`` that are already computed.

        Args:
            classes: as in ``zero_shot``.
        """
        task = self._zero_shot_task()
        names = class_names(classes) if classes is not None else task.classes
        embeddings = np.asarray(embeddings, np.float32)
        width = self.manifest.embedding_dim
        if embeddings.ndim != 2 or embeddings.shape[1] != width or not np.isfinite(embeddings).all():
            raise InputError(f"embeddings: shape {list(embeddings.shape)}; expected finite [n, {width}]")
        similarity = np.einsum("nd,cpd->ncp", embeddings, self._prompts.embeddings(task, names, self.embed_text))
        return probabilities(similarity, task)

    def classify(self, scan: Scan, **read_options: Any) -> Classification:
        """Class probabilities of a fine-tuned detector.

        Raises:
            BundleError: this bundle was made from a checkpoint without a classifier.
        """
        detector = self.manifest.detector
        if detector is None:
            raise BundleError(f"{self._bundle.folder}: no classifier in this bundle (its checkpoint is a plain CLIP "
                              "model); use zero_shot")
        timings: dict[str, float] = {}
        with _timed(timings, "total"):
            feeds = self._prepare(scan, read_options, timings).feeds
            with _timed(timings, "load"):
                self._graph("image")
            with _timed(timings, "image"):
                scores = self._run("image", feeds, ["class_scores"])[0][0]
        return Classification(scan_name(scan), dict(zip(detector.classes, scores.tolist(), strict=True)), timings)

    # ------------------------------------------------------------------ inside

    def _prepare(self, scan: Scan, read_options: dict[str, Any], timings: dict[str, float],
                 threads: int | None = None) -> Prepared:
        inputs, spec = self._info("image").inputs, self.manifest.preprocessing
        lying = borrow(scan)
        array = lying.with_axis(0) if lying is not None else scan[None] if isinstance(scan, np.ndarray) else None
        if (array is not None or isinstance(scan, Prepared)) and read_options:
            raise InputError(f"{', '.join(read_options)}: only for files; an array is already preprocessed")
        if isinstance(scan, Prepared):
            return scan
        if array is not None:
            return Prepared(ARRAY, self._inputs.of_volumes(array))
        path = as_scan(cast(Readable, scan))
        if isinstance(path, Path) and is_prepared(path):
            with _timed(timings, "read"):
                found = open_prepared(path, spec, inputs, ReadOptions(**read_options))
            return Prepared(str(path), dict(found.feeds), found.shape_hwd, found.spacing_hwd_mm, found.orientation,
                            found.hounsfield, found.notes, timings)
        with _timed(timings, "read"):
            volume = read_scan(path, spec, ReadOptions(**read_options))
        return self.prepare_volume(volume, str(path), timings, threads)

    def _embed(self, feeds: dict[str, Any]) -> NDArray[np.float32]:
        return self._run("image", feeds, ["image_embedding"])[0][0]

    def _run(self, role: str, feeds: dict[str, Any], outputs: Sequence[str]) -> list[NDArray[Any]]:
        arrays = self._graph(role).run(feeds, outputs)
        require_finite(f"{self._bundle.folder}: {role} tower in {self._options.precision}", outputs, arrays)
        return arrays

    def _info(self, role: str) -> Graph:
        precision = self._options.graph_precision
        graph = self.manifest.graph(role, precision, self._options.target)
        if graph is None and self.manifest.graph(role) is not None:
            advice = f"`dcformer calibrate {self._bundle.folder} --data DIR --precision {precision}` adds it"
            if precision == "bf16":
                advice = ("bf16 runs on GPUs, after `dcformer calibrate --precision bf16` and `dcformer build`, and in "
                          "openvino, which computes fp32 graphs in it")
            raise BundleError(f"{self._bundle.folder}: no {role} tower in {precision} for {self._options.backend}; "
                              f"{advice}")
        if graph is None:
            raise BundleError(f"{self._bundle.folder}: this bundle has no {role} tower; it was exported without one")
        return graph

    def _graph(self, role: str) -> Backend:
        with self._lock:
            if role not in self._graphs:
                self._graphs[role] = open_tower(self._bundle, self._info(role), self._options)
            return self._graphs[role]

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        spec = self.manifest.text
        if spec is None:
            raise BundleError(f"{self._bundle.folder}: this bundle has no tokenizer; export it with --tokenizer DIR")
        return Tokenizer(self._bundle.path(spec.file), spec)

    def _zero_shot_task(self) -> ZeroShotTask:
        task = self.manifest.zero_shot
        if task is None:
            raise BundleError(f"{self._bundle.folder}: no zero-shot prompts in this bundle; export it with --tokenizer "
                              "DIR")
        return task


@contextmanager
def _timed(timings: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings[phase] = (time.perf_counter() - start) * 1e3
