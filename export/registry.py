"""The encoders this project knows; one joins by adding one file to ``export/encoders/`` that registers itself."""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..runtime.errors import InputError, suggestion
from ..runtime.manifest import Reduction

if TYPE_CHECKING:
    from torch import nn

#: Width of the joint image-text space of every published model.
EMBEDDING_DIM = 512


@dataclass(frozen=True)
class Published:
    """Figures of the published tables (README of the original repository), at 512x512x256.

    ``gflops`` counts multiply-accumulates. ``params_include_projection`` says whether the published parameter count
    holds the Linear to the 512-wide joint space besides the encoder: it differs from row to row of the table.
    """

    params_m: float
    gflops: float
    params_include_projection: bool = False
    zero_shot_f1: float | None = None


@dataclass(frozen=True)
class CheckpointFormat:
    """How the published checkpoints of an encoder hold it.

    ``prefix``: of its tensors. ``name``: its name in ``args.model``, where there are args. ``unused``: beginnings,
    below the prefix, of tensors that have no part in embedding. ``preprocessing``: what differs from the defaults of
    ``Preprocessing``, by field.
    """

    prefix: str
    name: str | None = None
    unused: tuple[str, ...] = ()
    preprocessing: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EncoderSpec:
    """How one image encoder is built and what it accepts.

    ``build(S)`` returns a module for volumes of (S/2, S, S), mapping ``[B, 1, D, H, W]`` to
    ``[B, channels, H', W', D']``, each side divided by its entry of ``stride_dhw``.
    ``input_size``, ``reduction``: those it was published with. ``checkpoint``: None where nobody published weights.
    """

    name: str
    build: Callable[[int], nn.Module]
    channels: int
    stride_dhw: tuple[int, int, int]
    input_size: int = 512
    reduction: Reduction = "channel"
    checkpoint: CheckpointFormat | None = None
    published: Published | None = None

    @property
    def size_step(self) -> int:
        """Every S that the encoder takes is a multiple of this."""
        depth, height, width = self.stride_dhw
        return math.lcm(2 * depth, height, width)

    def grid(self, input_size: int) -> tuple[int, int, int]:
        """Output grid (D', H', W') for a volume of (input_size/2, input_size, input_size)."""
        depth, height, width = self.stride_dhw
        return input_size // 2 // depth, input_size // height, input_size // width


_REGISTRY: dict[str, EncoderSpec] = {}


def register(spec: EncoderSpec) -> None:
    """Add an encoder; a name can be taken once."""
    if spec.name in _REGISTRY:
        raise ValueError(f"encoder {spec.name!r} is registered twice")
    _REGISTRY[spec.name] = spec


def all_encoders() -> list[EncoderSpec]:
    """Every registered encoder, in registration order, after importing all files of ``export/encoders``."""
    from . import encoders

    for module in pkgutil.iter_modules(encoders.__path__):
        importlib.import_module(f"{encoders.__name__}.{module.name}")
    return list(_REGISTRY.values())


def get_encoder(name: str) -> EncoderSpec:
    """The encoder of that name.

    Raises:
        InputError: no such encoder; the message names the nearest one.
    """
    specs = {spec.name: spec for spec in all_encoders()}
    if name not in specs:
        raise InputError(f"encoder {name!r}: unknown; `dcformer encoders` lists all{suggestion(name, specs)}")
    return specs[name]
