"""The checkpoints of the original DCFormer and CT-CLIP training codes: CLIP pretraining and the fine-tuned detector.

Formats: ``{'model': state_dict, 'args': Namespace, …}`` as its ``save_model`` writes, a bare state dict, or
safetensors; the detector wraps everything in ``trained_model.`` and adds ``classifier.``.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...runtime.errors import InputError, suggestion
from ...runtime.files import sha256_file
from ...runtime.manifest import REDUCTIONS, Reduction
from ..clip import ClipSpec, reduced_width
from ..registry import CheckpointFormat, EncoderSpec, all_encoders
from ..text import TextSpec
from .checks import require_equal_twins, require_finite, require_fit, require_same_keys, with_both_norm_names
from .files import read_tensors
from .types import Checkpoint

_ENCODER = "visual_transformer.encoder."
_CODEBOOK = "visual_transformer.vq._codebook.embed"
_TEXT = "text_transformer."
_PROJECTION = "to_visual_latent.weight"
_DETECTOR = "trained_model."
_CLASSIFIER = "classifier.weight"
#: Buffers that older transformers releases saved and that are functions of the sizes alone.
_IGNORED = ("text_transformer.embeddings.position_ids", "text_transformer.embeddings.token_type_ids",
            # CT-CLIP makes these whether it uses them or not.
            "to_text_latent_extra.weight", "to_visual_latent_extra.weight")
#: CT-CLIP saves the logarithm of the similarity's scale; DCFormer's code creates it as 1 in each forward pass.
_TEMPERATURE = "temperature"
LARGEST_SIZE = 2048
_LARGEST_SIDE = 1 << 22


def read_dcformer(path: Path, input_size: int | None = None, reduction: Reduction | None = None) -> Checkpoint:
    """Read a checkpoint and find variant, input size and reduction from its ``args`` or its tensor shapes.

    Args:
        input_size: S of (S/2, S, S); needed only where neither ``args`` nor shapes tell.
        reduction: likewise.

    Raises:
        InputError: unreadable, another model, keys missing, unexpected or misshaped, weights not finite, or a given
            option that contradicts the file.
    """
    tensors, arguments = read_tensors(path)
    tensors = {key: value for key, value in tensors.items() if key.removeprefix(_DETECTOR) not in _IGNORED}
    scoring = _take_similarity_scale(path, tensors)
    tensors = with_both_norm_names(tensors)
    is_detector = any(key.startswith(_DETECTOR) for key in tensors)
    shapes = {key.removeprefix(_DETECTOR): tuple(value.shape) for key, value in tensors.items()}

    _require_known_parts(path, shapes, is_detector)
    encoder = _find_encoder(path, shapes, getattr(arguments, "model", None))
    tensors = _with_common_names(tensors, encoder)
    reduction, input_size = _find_reduction(path, encoder, shapes[_PROJECTION], arguments, input_size, reduction)
    spec = ClipSpec(
        encoder=encoder,
        reduction=reduction,
        input_size=input_size,
        codebook_size=shapes[_CODEBOOK][1],
        text=_find_text(path, shapes),
        class_count=shapes[_CLASSIFIER][0] if is_detector else None,
    )
    require_fit(path, spec, tensors)
    require_finite(path, tensors)
    require_equal_twins(path, tensors)
    assert encoder.checkpoint is not None
    return Checkpoint(
        path, sha256_file(path), spec, trained=not getattr(arguments, "untrained", False), state_dict=tensors,
        preprocessing={**encoder.checkpoint.preprocessing, **_find_spacing(path, arguments)}, scoring=scoring,
    )


def _take_similarity_scale(path: Path, tensors: dict[str, Tensor]) -> dict[str, float]:
    """What cosines are multiplied by, where the file tells: the exponential of the temperature, removed from it."""
    found = [tensors.pop(key) for key in (_TEMPERATURE, _DETECTOR + _TEMPERATURE) if key in tensors]
    if not found:
        return {}
    if found[0].numel() != 1 or not -10 < float(found[0]) < 10:
        raise InputError(f"{path}: {_TEMPERATURE} is {found[0].flatten()[:4].tolist()}; expected one number, the "
                         "logarithm of the similarity's scale")
    return {"similarity_scale": math.exp(float(found[0]))}


def _encoder_part(key: str, checkpoint: CheckpointFormat) -> str | None:
    """The name of an encoder's tensor in its module; None for other tensors."""
    if not key.startswith(checkpoint.prefix):
        return None
    name = key.removeprefix(checkpoint.prefix)
    return None if name.startswith(("vq.", *checkpoint.unused)) else name


def _with_common_names(tensors: Mapping[str, Tensor], encoder: EncoderSpec) -> dict[str, Tensor]:
    """The encoder's tensors where ``Clip`` has them, and none that it does not need."""
    assert encoder.checkpoint is not None
    unused = tuple(encoder.checkpoint.prefix + beginning for beginning in encoder.checkpoint.unused)
    renamed = {}
    for key, value in tensors.items():
        wrapper = _DETECTOR if key.startswith(_DETECTOR) else ""
        inner = key.removeprefix(wrapper)
        name = _encoder_part(inner, encoder.checkpoint)
        if name is not None:
            renamed[f"{wrapper}{_ENCODER}{name}"] = value
        elif not unused or not inner.startswith(unused):
            renamed[key] = value
    return renamed


def _require_known_parts(path: Path, shapes: Mapping[str, tuple[int, ...]], is_detector: bool) -> None:
    """The tensors that sizes are read from must be there and have the right number of dimensions."""
    needed = {_CODEBOOK: 3, _PROJECTION: 2, f"{_TEXT}embeddings.word_embeddings.weight": 2,
              f"{_TEXT}embeddings.position_embeddings.weight": 2, f"{_TEXT}embeddings.token_type_embeddings.weight": 2,
              f"{_TEXT}encoder.layer.0.intermediate.dense.weight": 2, **({_CLASSIFIER: 2} if is_detector else {})}
    for key, dimensions in needed.items():
        if key not in shapes:
            raise InputError(f"{path}: not a DCFormer checkpoint: no tensor {key!r} among its {len(shapes)} "
                             f"(the first is {next(iter(shapes))!r})")
        if len(shapes[key]) != dimensions or 0 in shapes[key]:
            raise InputError(f"{path}: {key} has shape {list(shapes[key])}; expected {dimensions} dimensions, "
                             "none of them empty")
        if max(shapes[key]) > _LARGEST_SIDE:
            raise InputError(f"{path}: {key} has shape {list(shapes[key])}; no axis of a model is longer than "
                             f"{_LARGEST_SIDE:,}")


def _find_encoder(path: Path, shapes: Mapping[str, tuple[int, ...]], name_in_args: str | None) -> EncoderSpec:
    """The registered encoder whose keys and shapes the file has; ``args.model``, if there, must say the same."""
    expected: dict[str, dict[str, tuple[int, ...]]] = {}
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    formats = {spec.name: spec.checkpoint for spec in all_encoders() if spec.checkpoint is not None}
    specs = {spec.name: spec for spec in all_encoders() if spec.name in formats}
    for name, spec in specs.items():
        found[name] = {part: shape for key, shape in shapes.items() if (part := _encoder_part(key, formats[name]))}
        with torch.device("meta"):
            tensors = spec.build(spec.input_size).state_dict()
        expected[name] = {key: tuple(value.shape) for key, value in tensors.items()}
    if not any(found.values()):
        raise InputError(f"{path}: not a checkpoint of an encoder known here: no tensors below {_ENCODER!r}")
    # Compare what overlaps most, so that a damaged file is described against the encoder it was meant to be.
    best = max(specs, key=lambda name: len(found[name].items() & expected[name].items())
               / len(expected[name] | found[name]))
    if name_in_args is not None:
        known = {form.name: name for name, form in formats.items() if form.name is not None}
        if not isinstance(name_in_args, str) or name_in_args not in known:
            raise InputError(f"{path}: args.model is {name_in_args!r}, not one of {', '.join(sorted(map(str, known)))}"
                             f"{suggestion(str(name_in_args), map(str, known))}")
        if known[name_in_args] != best and found[best] == expected[best]:
            raise InputError(f"{path}: args.model says {name_in_args!r} but the tensors are those of {best}")
        best = known[name_in_args]
    require_same_keys(path, expected[best], found[best], best, prefix=formats[best].prefix)
    return specs[best]


def _find_reduction(
    path: Path, encoder: EncoderSpec, projection: tuple[int, ...], arguments: argparse.Namespace | None,
    input_size: int | None, reduction: Reduction | None,
) -> tuple[Reduction, int]:
    """Reduction and input size that fit the projection's width, the file's ``args`` and the caller's options."""
    step = encoder.size_step
    size_in_args = getattr(arguments, "input_size", None)
    size = _agreed(path, "input size", size_in_args, input_size, "--input-size")
    chosen = reduction
    if arguments is not None and hasattr(arguments, "reduction"):
        name_in_args = str(arguments.reduction).lower()
        if name_in_args not in REDUCTIONS:
            raise InputError(f"{path}: args.reduction is {name_in_args!r}; expected one of {', '.join(REDUCTIONS)}")
        chosen = _agreed(path, "reduction", name_in_args, reduction, "--reduction")
    if size is not None and (not isinstance(size, int) or size <= 0 or size % step or size > LARGEST_SIZE):
        raise InputError(f"{path}: input size {size!r}: {encoder.name} takes positive multiples of {step} up to "
                         f"{LARGEST_SIZE} (the volume is (S/2, S, S))")
    sizes = [size] if size is not None else list(range(step, LARGEST_SIZE + 1, step))
    fits: list[tuple[Reduction, int]] = [
        (kind, candidate)
        for kind in REDUCTIONS
        for candidate in sizes
        if (chosen is None or kind == chosen)
        and reduced_width(kind, encoder.grid(candidate), encoder.channels) == projection[-1]
    ]
    kinds, possible_sizes = {kind for kind, _ in fits}, {candidate for _, candidate in fits}
    if not fits:
        raise InputError(f"{path}: {_PROJECTION} reads {projection[-1]} features, which no volume size gives with "
                         f"{encoder.name}, reduction {chosen or 'any'}, input size {size or 'any'}")
    if len(kinds) > 1:
        raise InputError(f"{path}: {_PROJECTION} fits the reductions {', '.join(sorted(kinds))}; pass --reduction")
    if len(possible_sizes) > 1:
        raise InputError(f"{path}: the input size is neither in the file's args nor in its shapes; pass --input-size "
                         "(published checkpoints: 512)")
    return fits[0]


def _find_spacing(path: Path, arguments: argparse.Namespace | None) -> dict[str, tuple[float, float, float]]:
    """Voxel spacing that the model was trained at, where the file tells; nothing means the published one.

    The original code has it as a constant, so only this project's training saves it.
    """
    spacing = getattr(arguments, "spacing_hwd_mm", None)
    if spacing is None:
        return {}
    if (not isinstance(spacing, list | tuple) or len(spacing) != 3
            or not all(isinstance(mm, int | float) and math.isfinite(mm) and 0.1 <= mm <= 20 for mm in spacing)):
        raise InputError(f"{path}: args.spacing_hwd_mm is {spacing!r}; expected three distances of 0.1 to 20 mm")
    return {"spacing_hwd_mm": (float(spacing[0]), float(spacing[1]), float(spacing[2]))}


def _agreed(path: Path, what: str, in_file: Any, given: Any, option: str) -> Any:
    """The one of the two that is not None; an error if they differ."""
    if in_file is not None and given is not None and in_file != given:
        raise InputError(f"{path}: {what} is {in_file} in the file's args but {option} says {given}; drop the option")
    return given if in_file is None else in_file


def _find_text(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> TextSpec:
    """BERT sizes from tensor shapes."""
    vocab_size, hidden_size = shapes[f"{_TEXT}embeddings.word_embeddings.weight"]
    if hidden_size % 64:
        raise InputError(f"{path}: text hidden size is {hidden_size}; expected a multiple of 64 (one head per 64)")
    layers = {match[1] for key in shapes if (match := re.match(rf"{re.escape(_TEXT)}encoder\.layer\.(\d+)\.", key))}
    return TextSpec(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=len(layers),
        intermediate_size=shapes[f"{_TEXT}encoder.layer.0.intermediate.dense.weight"][0],
        max_positions=shapes[f"{_TEXT}embeddings.position_embeddings.weight"][0],
        token_types=shapes[f"{_TEXT}embeddings.token_type_embeddings.weight"][0],
    )
