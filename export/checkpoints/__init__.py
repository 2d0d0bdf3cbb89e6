"""Checkpoint readers: published files in, a model description and matching tensors out."""

from __future__ import annotations

from pathlib import Path

from ...runtime.errors import InputError
from ...runtime.manifest import Reduction
from .dcformer import read_dcformer
from .med3dvlm import CONFIG_NAME, read_med3dvlm
from .types import Checkpoint

__all__ = ["Checkpoint", "read_checkpoint"]


def read_checkpoint(path: Path, input_size: int | None = None, reduction: Reduction | None = None) -> Checkpoint:
    """Read a file of the original DCFormer or CT-CLIP code, or a Hugging Face folder of Med3DVLM.

    Args:
        input_size: S of volumes (S/2, S, S); needed only where the checkpoint does not tell.
        reduction: likewise.

    Raises:
        InputError: unreadable, another model, keys missing, unexpected or misshaped, weights not finite, or a given
            option that contradicts the checkpoint.
    """
    if path.is_dir() and not (path / CONFIG_NAME).exists():
        raise InputError(f"{path}: expected a checkpoint, found a folder without {CONFIG_NAME}; of folders, only those "
                         "of Med3DVLM are read")
    reader = read_med3dvlm if path.is_dir() else read_dcformer
    return reader(path, input_size, reduction)
