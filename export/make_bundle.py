"""From a checkpoint to a bundle: read, trace, compare with PyTorch, and only then give the folder its name."""

from __future__ import annotations

import datetime
import math
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.backends import Options, open_graph
from ..runtime.backends.base import CPU_BACKENDS
from ..runtime.backends.onnxruntime import import_onnxruntime, installed_distributions
from ..runtime.bundle import record_file, write_manifest
from ..runtime.errors import InputError
from ..runtime.files import atomic_folder, require_replaceable
from ..runtime.manifest import (
    ANY_TARGET,
    CT_RATE_CLASSES,
    MANIFEST_NAME,
    SCHEMA_VERSION,
    Agreement,
    DetectorTask,
    Manifest,
    Preprocessing,
    Reduction,
    Source,
    Text,
    ZeroShotTask,
)
from ..runtime.scan_files import ScanPath
from ..runtime.text import Tokenizer
from ..runtime.volume import prepare_scan
from .checkpoints import Checkpoint, read_checkpoint
from .clip import Clip, Detector
from .random_weights import random_checkpoint, write_tokenizer
from .registry import EMBEDDING_DIM
from .rules.pipeline import require_rules
from .tokenizer import convert_tokenizer
from .trace import trace_image_tower, trace_text_tower
from .verify import check_image_tower, check_text_tower, require_agreement
from .write_graphs import TEXT_FILE, write_image_graphs, write_text_graphs

TOKENIZER_FILE = "tokenizer.json"
PROMPTS_FILE = "prompt_embeddings.fp32.npy"
POSITIVE_PROMPT = "{} is present."
NEGATIVE_PROMPT = "{} is not present."
#: exp of the temperature parameter, which the published code creates as 1.0 in every forward pass and never trains.
SIMILARITY_SCALE = math.e
_TOOLS = ("dcformer-deploy", "torch", "onnx", "onnxscript", "transformers", "tokenizers", "numpy")
_RANDOM_SEED = 0
TARGETS = (*CPU_BACKENDS, ANY_TARGET)


@dataclass(frozen=True)
class ExportOptions:
    """What the caller adds to the checkpoint.

    ``tokenizer``: folder with vocab.txt or tokenizer.json; None takes the one that came with the weights if
    ``own_tokenizer``, else leaves the text tower without texts and prompts.
    ``classes``: names for zero-shot prompts and detector outputs; None = CT-RATE's 18.
    ``input_size``, ``reduction``: only where the checkpoint does not tell.
    ``check_scan``: a scan for the comparison with PyTorch; None = the CT that this package carries.
    ``license``: of the weights, for the manifest.
    ``without_rewrites``: names of rewrite rules (``rules.pipeline.RULE_NAMES``) not to apply to the image tower.
    ``targets``: back ends on which the image tower is to be fast on this machine's CPU; rules that only pay on some are
    measured on each, and where they do, a graph is added. "any" adds none.
    """

    tokenizer: Path | None
    classes: Sequence[str] | None = None
    input_size: int | None = None
    reduction: Reduction | None = None
    check_scan: ScanPath | None = None
    license: str | None = None
    overwrite: bool = False
    own_tokenizer: bool = True
    without_rewrites: Collection[str] = ()
    targets: Sequence[str] = ("onnxruntime",)


def example_ct() -> Path:
    """A real CT for comparisons (export/data/README.md says where it is from)."""
    return Path(__file__).parent / "data" / "example_ct.nii.gz"


def export_checkpoint(
    checkpoint_path: Path, out: Path, options: ExportOptions, on_stage: Callable[[str], None] = lambda _: None
) -> Manifest:
    """Make the bundle ``out``.

    Args:
        on_stage: told in words what begins; for progress display.

    Raises:
        InputError: the checkpoint, the tokenizer or an option cannot be used.
        CheckFailed: the ONNX graphs do not compute what PyTorch computes; nothing is written.
    """
    _require_possible(out, options)
    on_stage("reading the checkpoint")
    return _export(read_checkpoint(checkpoint_path, options.input_size, options.reduction), out, options, on_stage)


def export_random_weights(
    encoder: str, seed: int, out: Path, options: ExportOptions, on_stage: Callable[[str], None] = lambda _: None
) -> Manifest:
    """Make the bundle ``out`` of an encoder with random weights and a small text tower; see ``random_weights``.

    Raises:
        InputError: no such encoder, or an option cannot be used.
        CheckFailed: as ``export_checkpoint``.
    """
    _require_possible(out, options)
    on_stage("drawing the weights")
    checkpoint = random_checkpoint(encoder, seed, options.input_size, options.reduction)
    with tempfile.TemporaryDirectory() as tokenizer:
        write_tokenizer(Path(tokenizer))
        return _export(checkpoint, out, replace(options, tokenizer=Path(tokenizer)), on_stage)


def _require_possible(out: Path, options: ExportOptions) -> None:
    """What can be known before minutes of work."""
    require_replaceable(out, MANIFEST_NAME if options.overwrite else None)
    require_rules(options.without_rewrites)
    for target in options.targets:
        if target not in TARGETS:
            raise InputError(f"target: {target!r}; expected one of {', '.join(TARGETS)}")
    import_onnxruntime()


def _export(checkpoint: Checkpoint, out: Path, options: ExportOptions, on_stage: Callable[[str], None]) -> Manifest:
    classes = _class_names(checkpoint, options.classes)
    spec = checkpoint.spec
    side = spec.input_size
    preprocessing = Preprocessing(shape_dhw=(side // 2, side, side), **checkpoint.preprocessing)
    real = prepare_scan(options.check_scan or example_ct(), preprocessing)
    with atomic_folder(out, MANIFEST_NAME if options.overwrite else None) as folder:
        tokenizer = None
        if (source := options.tokenizer or (checkpoint.tokenizer if options.own_tokenizer else None)) is not None:
            tokenizer = convert_tokenizer(source, spec.text, folder / TOKENIZER_FILE)
        model = checkpoint.build()
        clip = model.trained_model if isinstance(model, Detector) else model
        on_stage("tracing the image tower")
        traced = trace_image_tower(model, spec)
        on_stage("rewriting the image tower")
        targets = dict.fromkeys(target for target in options.targets if target != ANY_TARGET)
        graphs, rewrites = write_image_graphs(traced, folder, options.without_rewrites, list(targets))
        on_stage("tracing the text tower")
        graphs += write_text_graphs(trace_text_tower(clip, spec), folder, list(targets))
        on_stage("comparing with PyTorch")
        zero_shot = _zero_shot_task(classes, checkpoint.scoring) if tokenizer else None
        prompts = _prompt_ids(folder, tokenizer, zero_shot) if tokenizer and zero_shot else None
        towers = {role: [folder / graph.file for graph in graphs if graph.role == role] for role in ("image", "text")}
        agreement = _compare(model, clip, towers, real, preprocessing.value_range, prompts)
        require_agreement(agreement)
        if prompts is not None:
            on_stage("embedding the prompts")
            _write_prompt_embeddings(folder, prompts, len(classes))
        on_stage("writing the manifest")
        files = sorted(path.name for path in folder.iterdir())
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            encoder=spec.encoder.name,
            parameters=sum(p.numel() for p in clip.visual_transformer.encoder.parameters()),
            input_size=side,
            reduction=spec.reduction,
            embedding_dim=EMBEDDING_DIM,
            source=_source(checkpoint, options.license),
            preprocessing=preprocessing,
            graphs=tuple(graphs),
            rewrites=tuple(rewrites),
            text=tokenizer,
            zero_shot=zero_shot,
            detector=DetectorTask(classes) if spec.class_count is not None else None,
            agreement=tuple(agreement),
            files=tuple(record_file(folder, name) for name in files),
            tools={name: metadata.version(name) for name in (*_TOOLS, *installed_distributions())},
        )
        write_manifest(folder, manifest)
    return manifest


def _source(checkpoint: Checkpoint, weights_license: str | None) -> Source:
    name = checkpoint.path.name if checkpoint.path else None
    return Source(name, checkpoint.sha256, checkpoint.trained, weights_license, checkpoint.random_seed)


def _class_names(checkpoint: Checkpoint, given: Sequence[str] | None) -> tuple[str, ...]:
    classes = tuple(given) if given is not None else CT_RATE_CLASSES
    count = checkpoint.spec.class_count
    if count is not None and count != len(classes):
        raise InputError(f"{checkpoint.path}: the classifier has {count} outputs but {len(classes)} class names are "
                         "given; pass --classes FILE with one name per line, in output order")
    return classes


def _zero_shot_task(classes: tuple[str, ...], differences: Mapping[str, Any]) -> ZeroShotTask:
    usual: dict[str, Any] = {
        "positive_prompt": POSITIVE_PROMPT, "negative_prompt": NEGATIVE_PROMPT, "score": "softmax_over_pair",
        "similarity_scale": SIMILARITY_SCALE,
    }
    return ZeroShotTask(classes=classes, prompt_embeddings=PROMPTS_FILE, **{**usual, **differences})


def _prompt_ids(
    folder: Path, tokenizer: Text, task: ZeroShotTask
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    texts = [text for name in task.classes for text in task.prompts(name)]
    return Tokenizer(folder / tokenizer.file, tokenizer).encode(texts)


def _compare(
    model: Clip | Detector, clip: Clip, towers: Mapping[str, Sequence[Path]], real: NDArray[np.float32],
    value_range: tuple[float, float], prompts: tuple[NDArray[np.int64], NDArray[np.int64]] | None,
) -> list[Agreement]:
    """Image tower on the real and on a random volume; text tower on the prompts and on random ids with padding."""
    rng = np.random.default_rng(_RANDOM_SEED)
    volumes = {"real": real[None], "random": rng.uniform(*value_range, (1, *real.shape)).astype(np.float32)}
    config = clip.text_transformer.config
    length = min(64, config.max_position_embeddings)
    mask = (np.arange(length) < np.array([[length], [length // 2], [1]])).astype(np.int64)
    texts = {"random": (rng.integers(0, config.vocab_size, mask.shape) * mask, mask)}
    if prompts is not None:
        texts["prompts"] = prompts
    return [*check_image_tower(model, towers["image"], volumes),
            *(row for path in towers["text"] for row in check_text_tower(clip, path, texts))]


def _write_prompt_embeddings(
    folder: Path, prompts: tuple[NDArray[np.int64], NDArray[np.int64]], class_count: int
) -> None:
    """Embed the prompts once, with the graph that users would run, so that scoring needs no text tower."""
    ids, mask = prompts
    backend = open_graph(folder / TEXT_FILE, Options())
    (embeddings,) = backend.run({"input_ids": ids, "attention_mask": mask}, ["text_embedding"])
    np.save(folder / PROMPTS_FILE, embeddings.reshape(class_count, -1, embeddings.shape[1]).astype(np.float32))
