"""What every reader makes of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..clip import Clip, ClipSpec, Detector


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint understood: what to build, the tensors that fit it exactly, and where they came from.

    ``path`` and ``sha256`` are None for random weights, which have a ``random_seed`` instead. ``trained`` is false for
    them, and where a file itself says that its weights are random (``args.untrained``).
    ``preprocessing``: what differs from the defaults of ``Preprocessing``, by field.
    ``scoring``: what differs from the defaults of ``ZeroShotTask``, by field.
    ``tokenizer``: folder of the tokenizer that came with the weights, if one did.
    """

    path: Path | None
    sha256: str | None
    spec: ClipSpec
    trained: bool
    state_dict: Mapping[str, Tensor]
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    scoring: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Path | None = None
    random_seed: int | None = None

    def build(self) -> Clip | Detector:
        """The PyTorch model with these weights, fp32, in evaluation mode."""
        model = self.spec.build()
        model.load_state_dict(dict(self.state_dict))
        return model
