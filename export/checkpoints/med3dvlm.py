"""Med3DVLM's DCFormer-SigLIP: a Hugging Face folder with ``config.json`` and ``model.safetensors``.

Xin et al., "Med3DVLM: An Efficient Vision-Language Model for 3D Medical Image Analysis", arXiv:2503.20047, and its
published code: DCFormer-small without a quantizer, the mean of its tokens, DistilBERT (ClinicalBERT), both projected
with a bias, and the sigmoid of SigLIP (Zhai et al., arXiv:2303.15343) as score.

Its data are stacks of pictures that were scaled from their darkest to their brightest voxel, cut to what is not black
and stretched to one shape; which window the pictures were made with is not recorded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...runtime.errors import InputError
from ...runtime.files import require_file, sha256_file
from ...runtime.manifest import Reduction
from ..clip import ClipSpec
from ..registry import get_encoder
from ..text import TextSpec
from .checks import require_equal_twins, require_finite, require_fit, with_both_norm_names
from .files import read_tensors
from .types import Checkpoint

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
ENCODER = "dcformer-small"
#: Beginnings of names there, and what they are in ``Clip``.
_NAMES = {
    "vision_encoder.encoder.": "visual_transformer.encoder.",
    "language_encoder.": "text_transformer.",
    "mm_vision_proj.": "to_visual_latent.",
    "mm_language_proj.": "to_text_latent.",
}
_SCALE, _BIAS = "t_prime", "bias"
_WORDS, _POSITIONS = "language_encoder.embeddings.word_embeddings.weight", (
    "language_encoder.embeddings.position_embeddings.weight")
_HIDDEN = "language_encoder.transformer.layer.0.ffn.lin1.weight"
#: Pictures are rows from front to back of columns to the patient's left: the axes of files that the published code
#: writes and reads with SimpleITK.
_PREPROCESSING = {"orientation": "PLS", "resampling": "to_shape", "intensity": "min_max", "crops_to_foreground": True}


def read_med3dvlm(folder: Path, input_size: int | None = None, reduction: Reduction | None = None) -> Checkpoint:
    """Read a folder as ``save_pretrained`` of the published code writes it. See ``read_checkpoint``."""
    config = _read_config(folder / CONFIG_NAME)
    size = _find_size(folder / CONFIG_NAME, config, input_size)
    if reduction not in (None, "channel"):
        raise InputError(f"{folder}: --reduction {reduction}: Med3DVLM takes the mean of all tokens (channel); drop it")
    path = folder / WEIGHTS_NAME
    if (folder / f"{WEIGHTS_NAME}.index.json").exists():
        raise InputError(f"{folder}: the weights are in several files; save the model again with a larger "
                         "max_shard_size")
    tensors, _ = read_tensors(path)
    scoring = {"score": "sigmoid", "negative_prompt": None, "similarity_bias": _number(path, tensors, _BIAS),
               "similarity_scale": math.exp(_number(path, tensors, _SCALE))}
    spec = ClipSpec(get_encoder(ENCODER), "channel", size, codebook_size=None, text=_find_text(path, tensors),
                    projection_bias=True)
    renamed = with_both_norm_names(_renamed(path, tensors))
    require_fit(path, spec, renamed)
    require_finite(path, renamed)
    require_equal_twins(path, renamed)
    has_tokenizer = any((folder / name).is_file() for name in ("vocab.txt", "tokenizer.json"))
    return Checkpoint(path, sha256_file(path), spec, trained=True, state_dict=renamed, preprocessing=_PREPROCESSING,
                      scoring=scoring, tokenizer=folder if has_tokenizer else None)


def _read_config(path: Path) -> dict[str, Any]:
    require_file(path, "model configuration")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected an object with Med3DVLM's settings")
    for key, expected in (("model_type", "dec_clip"), ("vision_encoder", "dcformer"), ("loss_type", "sigmoid")):
        if config.get(key) != expected:
            raise InputError(f"{path}: {key} is {config.get(key)!r}; expected {expected!r}, as in Med3DVLM's "
                             "DCFormer-SigLIP")
    return config


def _find_size(path: Path, config: Mapping[str, Any], given: int | None) -> int:
    """S of the configuration's (S, S, S/2)."""
    sides, step = config.get("input_size"), get_encoder(ENCODER).size_step
    side = sides[0] if isinstance(sides, list) and sides else None
    if not isinstance(side, int) or side <= 0 or side % step or sides != [side, side, side // 2]:
        raise InputError(f"{path}: input_size is {sides!r}; expected [S, S, S/2] with S a multiple of {step}")
    if given not in (None, side):
        raise InputError(f"{path}: input_size is {sides} but --input-size says {given}; drop the option")
    return side


def _number(path: Path, tensors: Mapping[str, Tensor], key: str) -> float:
    value = tensors.get(key)
    if value is None or value.numel() != 1 or not -100 < float(value) < 100:
        found = "missing" if value is None else f"{value.flatten()[:4].tolist()}"
        raise InputError(f"{path}: {key} is {found}; expected one number, of the sigmoid score")
    return float(value)


def _find_text(path: Path, tensors: Mapping[str, Tensor]) -> TextSpec:
    """DistilBERT sizes from tensor shapes."""
    for key in (_WORDS, _POSITIONS, _HIDDEN):
        if key not in tensors or tensors[key].ndim != 2:
            raise InputError(f"{path}: not Med3DVLM's DCFormer-SigLIP: no matrix {key!r} among its {len(tensors)} "
                             "tensors")
    vocab_size, width = tensors[_WORDS].shape
    if width % 64:
        raise InputError(f"{path}: text hidden size is {width}; expected a multiple of 64 (one head per 64)")
    layers = {match[1] for key in tensors if (match := re.match(r"language_encoder\.transformer\.layer\.(\d+)\.", key))}
    return TextSpec(vocab_size, width, len(layers), tensors[_HIDDEN].shape[0], tensors[_POSITIONS].shape[0],
                    architecture="distilbert")


def _renamed(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors where ``Clip`` has them; Med3DVLM calls the blocks' LayerScale ``scale``, DCFormer ``gamma``."""
    result = {}
    for key, value in tensors.items():
        beginning = next((name for name in _NAMES if key.startswith(name)), None)
        if beginning is None and key not in (_SCALE, _BIAS):
            raise InputError(f"{path}: unexpected tensor {key!r} {list(value.shape)}; expected those of Med3DVLM's "
                             "DCFormer-SigLIP")
        if beginning is not None and key != "language_encoder.embeddings.position_ids":
            result[re.sub(r"\.scale$", ".gamma", _NAMES[beginning] + key.removeprefix(beginning))] = value
    return result
