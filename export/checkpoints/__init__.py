"""Checkpoint readers: published files in, a model description and matching tensors out."""

from .dcformer import Checkpoint, read_checkpoint

__all__ = ["Checkpoint", "read_checkpoint"]
