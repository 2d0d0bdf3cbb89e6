"""Models with random weights, for benchmarking what nobody has published weights of.

Every step works as with a real checkpoint, and latency, memory and export error are real; scores mean nothing, and the
bundle says so.
"""

from __future__ import annotations

import string
from pathlib import Path

import torch

from ..runtime.errors import InputError
from ..runtime.manifest import CT_RATE_CLASSES, Reduction
from .checkpoints.dcformer import LARGEST_SIZE
from .checkpoints.types import Checkpoint
from .clip import ClipSpec
from .registry import get_encoder
from .text import TextSpec

#: Of the published checkpoints.
CODEBOOK_SIZE = 8192
_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def vocabulary() -> list[str]:
    """A WordPiece vocabulary that spells every word and holds those of the prompts whole."""
    words = sorted({word for name in CT_RATE_CLASSES for word in name.lower().split()} | {"is", "not", "present"})
    letters = string.ascii_lowercase + string.digits
    return [*_SPECIAL_TOKENS, *string.punctuation, *letters, *(f"##{letter}" for letter in letters), *words]


def write_tokenizer(folder: Path) -> None:
    """Write ``vocab.txt`` for the text tower of a random model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary()) + "\n", encoding="utf-8")


def random_checkpoint(encoder: str, seed: int, input_size: int | None = None,
                      reduction: Reduction | None = None) -> Checkpoint:
    """A model as PyTorch initialises it; the same seed gives the same weights with the same release of PyTorch.

    Args:
        input_size: S of volumes (S/2, S, S); None = the one that the encoder was published with.
        reduction: None = the published one.

    Raises:
        InputError: unknown encoder, or a size that it does not take.
    """
    spec = get_encoder(encoder)
    size = spec.input_size if input_size is None else input_size
    if size <= 0 or size % spec.size_step or size > LARGEST_SIZE:
        raise InputError(f"--input-size {size}: {encoder} takes multiples of {spec.size_step} up to {LARGEST_SIZE}")
    text = TextSpec(vocab_size=len(vocabulary()), hidden_size=128, layers=2, intermediate_size=512, max_positions=512,
                    token_types=2)
    clip_spec = ClipSpec(spec, reduction or spec.reduction, size, CODEBOOK_SIZE, text)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = clip_spec.build()
    return Checkpoint(path=None, sha256=None, spec=clip_spec, trained=False, state_dict=model.state_dict(),
                      preprocessing=spec.checkpoint.preprocessing if spec.checkpoint else {}, random_seed=seed)
