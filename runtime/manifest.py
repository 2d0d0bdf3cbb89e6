"""What a bundle is: one frozen dataclass, saved as ``manifest.json``. The format is described in docs/bundle.md."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal, get_args

import dacite

from .errors import BundleError
from .provenance import ANY_TARGET, Agreement, Conversion, Rewrite

SCHEMA_VERSION = 3
MANIFEST_NAME = "manifest.json"
DIGEST_FIELD = "manifest_sha256"

ROLES = ("image", "text")
#: Inputs of an image tower that reads only the lines its first layer looks at, and the axis along which each is whole.
LINE_INPUTS = {"lines_d": 0, "lines_h": 1, "lines_w": 2}
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
Reduction = Literal["channel", "depth", "none"]
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
#: Kinds of zero-shot score, and the number of prompts per class that each compares with.
SCORE_KINDS = {"softmax_over_pair": 2, "sigmoid": 1}
RESAMPLINGS = ("to_spacing", "to_shape")
INTENSITIES = ("window", "min_max")

#: The 18 findings of CT-RATE in label order (Hamamci et al., arXiv:2403.17834).
CT_RATE_CLASSES = (
    "Medical material", "Arterial wall calcification", "Cardiomegaly", "Pericardial effusion",
    "Coronary artery wall calcification", "Hiatal hernia", "Lymphadenopathy", "Emphysema", "Atelectasis",
    "Lung nodule", "Lung opacity", "Pulmonary fibrotic sequela", "Pleural effusion",
    "Mosaic attenuation pattern", "Peribronchial thickening", "Consolidation", "Bronchiectasis",
    "Interlobular septal thickening",
)


@dataclass(frozen=True)
class Preprocessing:
    """From a scan to what the image tower reads. The defaults are those of DCFormer's published checkpoints.

    Steps: clip to ``clip_hu`` and divide by ``resampling_scale_hu``; trilinear resampling (half-pixel centres, no
    antialiasing) to ``spacing_hwd_mm``; multiply back, clip to ``window_hu``; ``(v + offset_hu) / scale_hu``;
    centre-crop or pad with ``pad_value`` to ``shape_dhw``.

    ``orientation``: the directions in which the H, W and D indices grow (L left, P posterior, S superior).
    ``resampling``: "to_shape" stretches the scan to ``shape_dhw`` whatever its spacing; nothing is cropped or padded.
    ``intensity``: "min_max" maps the clipped scan's own minimum and maximum to 0 and 1 instead of a window, so that
    the voxels need not be Hounsfield units.
    ``crops_to_foreground``: first cut the scan to the box of all voxels above its minimum.
    """

    shape_dhw: tuple[int, int, int]
    orientation: str = "LPS"
    spacing_hwd_mm: tuple[float, float, float] = (0.75, 0.75, 1.5)
    clip_hu: tuple[float, float] = (-1000.0, 1000.0)
    resampling_scale_hu: float = 1000.0
    window_hu: tuple[float, float] = (-1000.0, 200.0)
    offset_hu: float = 400.0
    scale_hu: float = 600.0
    pad_value: float = -1.0
    resampling: str = "to_spacing"
    intensity: str = "window"
    crops_to_foreground: bool = False

    @property
    def value_range(self) -> tuple[float, float]:
        """The smallest and the largest value that a preprocessed volume can hold."""
        if self.intensity == "min_max":
            return 0.0, 1.0
        values = [(edge + self.offset_hu) / self.scale_hu for edge in self.window_hu] + [self.pad_value]
        return min(values), max(values)

    def __post_init__(self) -> None:
        for field, known in (("resampling", RESAMPLINGS), ("intensity", INTENSITIES)):
            _require(getattr(self, field) in known, f"preprocessing.{field}", getattr(self, field),
                     f"one of {', '.join(known)}")
        _require(all(side > 0 for side in self.shape_dhw), "preprocessing.shape_dhw", self.shape_dhw, "positive sides")
        _require(all(mm > 0 for mm in self.spacing_hwd_mm), "preprocessing.spacing_hwd_mm", self.spacing_hwd_mm,
                 "positive millimetres")
        axes = {"L": 0, "R": 0, "A": 1, "P": 1, "S": 2, "I": 2}
        _require(sorted(axes.get(letter, 9) for letter in self.orientation) == [0, 1, 2], "preprocessing.orientation",
                 self.orientation, "three letters such as LPS")
        for field in ("clip_hu", "window_hu"):
            low, high = getattr(self, field)
            _require(low < high, f"preprocessing.{field}", (low, high), "low < high")
        for field in ("resampling_scale_hu", "scale_hu"):
            _require(getattr(self, field) > 0, f"preprocessing.{field}", getattr(self, field), "a positive number")


@dataclass(frozen=True)
class TensorInfo:
    """Name, numpy dtype and axes of a graph input or output; a string axis is dynamic."""

    name: str
    dtype: str
    axes: tuple[int | str, ...]


@dataclass(frozen=True)
class Graph:
    """One ONNX file of the bundle and what it computes.

    ``target``: the back end that it is made for; graphs of one role and precision compute the same, and each runs
    anywhere. ``weights``: the file with its large arrays; None where they are in ``file``.
    """

    role: str
    precision: str
    file: str
    opset: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    target: str = ANY_TARGET
    weights: str | None = None

    def __post_init__(self) -> None:
        _require(self.role in ROLES, "graphs.role", self.role, f"one of {', '.join(ROLES)}")
        _require(self.precision in PRECISIONS, "graphs.precision", self.precision, f"one of {', '.join(PRECISIONS)}")


@dataclass(frozen=True)
class Text:
    """The text tower's tokenizer: ``file`` is a Hugging Face ``tokenizer.json``; longer texts are truncated."""

    file: str
    max_tokens: int
    pad_token_id: int

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 2, "text.max_tokens", self.max_tokens, "at least 2")


@dataclass(frozen=True)
class ZeroShotTask:
    """Zero-shot scoring: each class with one or two prompts, ``{}`` standing for its name.

    ``score``: "softmax_over_pair" = first entry of softmax(scale * cosine(image, prompt)) over the two prompts;
    "sigmoid" = sigmoid(scale * cosine(image, positive prompt) + bias), with no negative prompt.
    ``prompt_embeddings``: file of the text embeddings of these prompts, float32 ``[classes, prompts, 512]``, positive
    first.
    """

    classes: tuple[str, ...]
    positive_prompt: str
    negative_prompt: str | None
    score: str
    similarity_scale: float
    prompt_embeddings: str
    similarity_bias: float = 0.0

    def __post_init__(self) -> None:
        _require_classes("zero_shot.classes", self.classes)
        _require(self.score in SCORE_KINDS, "zero_shot.score", self.score, f"one of {', '.join(SCORE_KINDS)}")
        _require((self.negative_prompt is not None) == (self.prompt_count == 2), "zero_shot.negative_prompt",
                 self.negative_prompt, f"a prompt or null, as {self.score} needs")
        for field in ("positive_prompt", "negative_prompt"):
            prompt = getattr(self, field)
            _require(prompt is None or prompt.count("{}") == 1, f"zero_shot.{field}", prompt, "one {}")

    @property
    def prompt_count(self) -> int:
        """Prompts per class: 2, or 1 where the score reads only the positive one."""
        return SCORE_KINDS[self.score]

    def prompts(self, class_name: str) -> tuple[str, ...]:
        """The prompts of a class, the positive one first."""
        templates = (self.positive_prompt, self.negative_prompt)
        return tuple(template.replace("{}", class_name) for template in templates if template is not None)


@dataclass(frozen=True)
class DetectorTask:
    """The fine-tuned detector's classes, in the order of the image tower's output ``class_scores``."""

    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        _require_classes("detector.classes", self.classes)


@dataclass(frozen=True)
class Source:
    """Where the weights came from: a checkpoint, or a random number generator with a seed.

    ``trained`` is false for weights that are known to be random. ``file`` and ``sha256`` of the checkpoint are None
    where there was none. ``license``: of the weights, as the exporting user stated it; None if nothing was stated.
    """

    file: str | None
    sha256: str | None
    trained: bool
    license: str | None
    random_seed: int | None = None

    def __post_init__(self) -> None:
        _require((self.file is None) == (self.sha256 is None) == (self.random_seed is not None), "source.file",
                 self.file, "a checkpoint with its sha256, or a random_seed")

    def __str__(self) -> str:
        if self.file is None or self.sha256 is None:
            return f"random weights, seed {self.random_seed}"
        return f"{self.file}, sha256 {self.sha256[:16]}" + ("" if self.trained else ", UNTRAINED")


@dataclass(frozen=True)
class FileRecord:
    """Size and sha256 of a file of the bundle; ``path`` is relative, with forward slashes."""

    path: str
    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        parts = PurePosixPath(self.path).parts
        plain = bool(parts) and not self.path.startswith("/") and ".." not in parts
        plain = plain and not set(self.path) & set("\\:\0")
        _require(plain, "files.path", self.path, "a relative path inside the bundle")
        _require(re.fullmatch("[0-9a-f]{64}", self.sha256) is not None, "files.sha256", self.sha256, "64 hex digits")


@dataclass(frozen=True)
class Manifest:
    """Everything the runtime must know about a model. ``input_size`` S means volumes of (D, H, W) = (S/2, S, S)."""

    schema_version: int
    created: str
    encoder: str
    parameters: int
    input_size: int
    reduction: Reduction
    embedding_dim: int
    source: Source
    preprocessing: Preprocessing
    graphs: tuple[Graph, ...]
    rewrites: tuple[Rewrite, ...]
    text: Text | None
    zero_shot: ZeroShotTask | None
    detector: DetectorTask | None
    agreement: tuple[Agreement, ...]
    files: tuple[FileRecord, ...]
    tools: dict[str, str]
    conversions: tuple[Conversion, ...] = ()

    def __post_init__(self) -> None:
        listed = {record.path for record in self.files}
        for name in sorted(self._named(self.graphs)):
            _require(name in listed, "files", name, "every named file listed with its sha256")
        side = self.input_size
        _require(self.preprocessing.shape_dhw == (side // 2, side, side), "input_size", side,
                 f"the size of {self.preprocessing.shape_dhw} (D, H, W)")
        image = self.graph("image")
        if image is None:
            raise BundleError("graphs holds no image tower")
        for graph in self.graphs:
            if graph.role == "image":
                _require_image_inputs(graph, self.preprocessing.shape_dhw)
        if self.detector is not None:
            widths = [output.axes[-1] for output in image.outputs if output.name == "class_scores"]
            _require(widths == [len(self.detector.classes)], "detector.classes", len(self.detector.classes),
                     f"as many as the image tower's class_scores, {widths}")

    @property
    def digest(self) -> str:
        """What ``manifest.json`` calls ``manifest_sha256``: identifies the bundle as it is."""
        return _digest(dataclasses.asdict(self))

    def results_digest(self, precision: str) -> str:
        """Identifies what makes results by the graphs of a precision: other precisions may come and go."""
        kept = tuple(graph for graph in self.graphs if graph.precision in ("fp32", precision))
        names = self._named(kept)
        return dataclasses.replace(
            self, graphs=kept, files=tuple(sorted((record for record in self.files if record.path in names),
                                                  key=lambda record: record.path)),
            conversions=tuple(one for one in self.conversions if one.precision == precision)).digest

    def _named(self, graphs: Sequence[Graph]) -> set[str]:
        """Files that some graphs, the tokenizer and the prompts need."""
        names = {name for graph in graphs for name in (graph.file, graph.weights) if name is not None}
        names |= {self.text.file} if self.text else set()
        return names | ({self.zero_shot.prompt_embeddings} if self.zero_shot else set())

    def graph(self, role: str, precision: str = "fp32", target: str = ANY_TARGET) -> Graph | None:
        """The graph of that role and precision for a target, else the one for any; None if there is none."""
        fitting = [g for g in self.graphs if (g.role, g.precision) == (role, precision) and
                   g.target in (target, ANY_TARGET)]
        return min(fitting, key=lambda g: g.target == ANY_TARGET, default=None)

    def to_json(self) -> str:
        """The text of ``manifest.json``, its own digest included."""
        content = dataclasses.asdict(self)
        return json.dumps({**content, DIGEST_FIELD: _digest(content)}, indent=2, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Manifest:
        """Read ``manifest.json``.

        Raises:
            BundleError: not JSON, another schema version, edited, or a field missing, unknown or of the wrong type.
        """
        try:
            content = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"not valid JSON ({error}); the file is truncated or damaged") from error
        if not isinstance(content, dict) or type(content.get("schema_version")) is not int:
            raise BundleError("no schema_version; this is not the manifest of a bundle")
        if (version := content["schema_version"]) != SCHEMA_VERSION:
            advice = "upgrade dcformer-deploy" if version > SCHEMA_VERSION else "export the checkpoint again"
            raise BundleError(f"schema_version is {version}, this program reads {SCHEMA_VERSION}; {advice}")
        digest = content.pop(DIGEST_FIELD, None)
        try:
            expected = _digest(content)
        except ValueError as error:  # a number like 1e999, which JSON allows and no float holds
            raise BundleError(f"a number in it is out of range ({error})") from error
        if digest != expected:
            raise BundleError(f"{DIGEST_FIELD} does not match the content: the manifest was edited or damaged; "
                              "export the bundle again")
        try:
            return dacite.from_dict(Manifest, content, dacite.Config(strict=True, cast=[tuple]))
        except (dacite.DaciteError, TypeError, ValueError) as error:
            raise BundleError(str(error)) from error


def _digest(content: dict[str, Any]) -> str:
    """sha256 of the canonical JSON of a manifest without its digest: it tells an edit from the export's own work."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _require_image_inputs(image: Graph, shape: tuple[int, int, int]) -> None:
    """One volume, or three families of lines with one stride."""
    found = {info.name: info.axes[-3:] for info in image.inputs}
    sides = next((axes for name, axes in found.items() if name == "lines_d"), ())
    stride = shape[1] // sides[1] if len(sides) == 3 and isinstance(sides[1], int) and sides[1] > 0 else 1
    lines = {name: tuple(side if axis == whole else side // stride for axis, side in enumerate(shape))
             for name, whole in LINE_INPUTS.items()}
    _require(found in ({"volume": shape}, lines), "preprocessing.shape_dhw", shape,
             f"the sides that the image tower reads, {found}")


def _require_classes(field: str, classes: tuple[str, ...]) -> None:
    _require(len(classes) > 0, field, classes, "at least one name")
    _require(len(set(classes)) == len(classes), field, classes, "names without repetition")


def _require(condition: bool, field: str, value: object, expected: str) -> None:
    if not condition or (isinstance(value, float) and not math.isfinite(value)):
        raise BundleError(f"{field} is {value!r}; expected {expected}")
